"""Tests of genossm.sequence against Python's own string operations and biopython."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from Bio.Seq import reverse_complement as biopython_reverse_complement
from hypothesis import given
from hypothesis import strategies as st

from genossm.errors import DataError
from genossm.sequence import ALPHABET, NO_BASE, decode, encode, reverse_complement

bases = st.text("ACGTN")


@given(bases)
def test_decode_reads_what_encode_wrote(sequence: str) -> None:
    codes = encode(sequence)
    assert codes.dtype == np.int8 and codes.shape == (len(sequence),)
    assert decode(codes) == sequence
    assert codes.tolist() == [(ALPHABET + "N").index(base) for base in sequence]


@given(bases)
def test_case_and_type_do_not_matter(sequence: str) -> None:
    assert np.array_equal(encode(sequence.lower()), encode(sequence))
    assert np.array_equal(encode(sequence.encode()), encode(sequence))


@pytest.mark.parametrize("code", "RYSWKMBDHVNXryswkmbdhvnx")
def test_ambiguity_codes_are_no_base(code: str) -> None:
    assert encode(f"A{code}T").tolist() == [0, NO_BASE, 3]


def test_uracil_is_read_as_thymine() -> None:
    assert encode("Uu").tolist() == [3, 3]


@pytest.mark.parametrize("character", ["-", "*", " ", "\n", "1", "E", "f", "Z", "@", ">", "\0", "é", "\x80"])
def test_an_illegal_character_is_named_with_its_place(character: str) -> None:
    with pytest.raises(DataError, match=r"at position 3 is no nucleotide") as caught:
        encode("ACG" + character + "T")
    assert repr(character) in str(caught.value)


@given(st.binary())
def test_any_bytes_are_encoded_or_refused(content: bytes) -> None:
    legal = set(b"ACGTURYSWKMBDHVNXacgturyswkmbdhvnx")
    if set(content) <= legal:
        assert encode(content).max(initial=0) <= NO_BASE
    else:
        with pytest.raises(DataError):
            encode(content)


@given(bases)
def test_reverse_complement_agrees_with_biopython(sequence: str) -> None:
    assert decode(reverse_complement(encode(sequence))) == biopython_reverse_complement(sequence)


@given(st.integers(1, 4), st.integers(0, 50), st.integers(0, 2**32))
def test_reverse_complement_works_on_the_last_axis_and_undoes_itself(
    rows: int, length: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 5, size=(2, rows, length), dtype=np.int8)
    other = reverse_complement(codes)
    assert other.shape == codes.shape and other.dtype == np.int8
    assert np.array_equal(reverse_complement(other), codes)
    assert np.array_equal(other[1, rows - 1], reverse_complement(codes[1, rows - 1]))


def test_reverse_complement_copies_also_from_a_memory_map(tmp_path: Path) -> None:
    path = tmp_path / "codes"
    encode("AACGTN").tofile(path)
    mapped = np.memmap(path, dtype=np.int8, mode="r")
    other = reverse_complement(mapped)
    assert type(other) is np.ndarray and other.flags.writeable and other.flags.c_contiguous
    assert decode(other) == "NACGTT"
    assert decode(mapped) == "AACGTN"


@pytest.mark.parametrize("codes", [[0, 5], [-1, 2], [0.0, 1.0]])
def test_codes_outside_the_alphabet_are_refused(codes: list[float]) -> None:
    for function in (decode, reverse_complement):
        with pytest.raises(DataError, match=r"codes must be integers from 0 to 4"):
            function(np.array(codes))


def test_decode_takes_one_sequence() -> None:
    with pytest.raises(DataError, match=r"shape \(2, 3\)"):
        decode(np.zeros((2, 3), dtype=np.int8))
