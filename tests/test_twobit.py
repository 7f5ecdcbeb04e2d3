"""Tests of genossm.twobit: 2bit gives the genome that the FASTA of the same sequence gives."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genossm.genome as genome_module
from genossm.errors import DataError, FileError
from genossm.genome import Genome
from genossm.sequence import decode
from genossm.twobit import is_twobit, open_twobit

RECORDS = {"chrB": "ACGTNNacgtnnRYA" * 7, "chrA": "T", "chr_N": "NNNN", "chr1": "gattaca" * 30}


def runs(flags: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Starts and sizes of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return edges[::2].tolist(), (edges[1::2] - edges[::2]).tolist()


def write_twobit(
    path: Path, records: dict[str, str] | list[tuple[str, str]], order: Literal["<", ">"] = "<"
) -> Path:
    """A 2bit file: soft masks are lower case, all but ACGT are N."""
    items = list(records.items()) if isinstance(records, dict) else records

    def numbers(*values: int) -> bytes:
        return struct.pack(f"{order}{len(values)}I", *values)

    offset = 16 + sum(5 + len(name) for name, _ in items)
    index, body = b"", b""
    for name, bases in items:
        index += bytes([len(name)]) + name.encode() + numbers(offset + len(body))
        letters = np.frombuffer(bases.encode(), np.uint8)
        upper = np.frombuffer(bases.upper().encode(), np.uint8)
        codes = np.zeros(-(-len(upper) // 4) * 4, np.uint8)
        for code, letter in enumerate(b"TCAG"):
            codes[: len(upper)][upper == letter] = code
        packed = np.packbits(np.unpackbits(codes[:, None], axis=1)[:, 6:].reshape(-1))
        body += numbers(len(upper))
        for starts, sizes in (runs(~np.isin(upper, list(b"ACGT"))), runs(letters != upper)):
            body += numbers(len(starts), *starts, *sizes)
        body += numbers(0) + packed.tobytes()
    path.write_bytes(numbers(0x1A412743, 0, len(items), 0) + index + body)
    return path


def write_fasta(path: Path, records: dict[str, str]) -> Path:
    path.write_text("".join(f">{name}\n{bases}\n" for name, bases in records.items()))
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_2bit_genome_is_that_of_the_fasta(tmp_path: Path, order: Literal["<", ">"]) -> None:
    fasta = Genome(write_fasta(tmp_path / "a.fa", RECORDS), cache_dir=tmp_path / "cache")
    for name in ("a.2bit", "a.dat"):  # told by content
        twobit = Genome(write_twobit(tmp_path / name, RECORDS, order), cache_dir=tmp_path / "cache")
        assert list(twobit.lengths.items()) == list(fasta.lengths.items())
        assert twobit.sha256 == fasta.sha256
        assert decode(twobit.chromosome("chrB")) == "ACGTNNACGTNNNNA" * 7
    assert len(list((tmp_path / "cache").iterdir())) == 3


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text("chrXYZ0123456789_.-", min_size=1, max_size=8),
        st.text("ACGTNacgtnRY", min_size=1, max_size=90),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["<", ">"]),
    st.integers(1, 40),
)
def test_any_sequence_in_any_slices(records: dict[str, str], order: Literal["<", ">"], slice_bp: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(genome_module, "_SLICE_BP", slice_bp)
        path = write_twobit(Path(folder) / "a.2bit", records, order)
        fasta = Genome(write_fasta(Path(folder) / "a.fa", records), cache_dir=folder)
        twobit = Genome(path, cache_dir=folder)
        assert (list(twobit.lengths), twobit.sha256) == (list(fasta.lengths), fasta.sha256)
        for name in records:
            assert np.array_equal(twobit.chromosome(name), fasta.chromosome(name))


def test_letters_of_a_range(tmp_path: Path) -> None:
    path = write_twobit(tmp_path / "a.2bit", RECORDS)
    assert is_twobit(path) and not is_twobit(write_fasta(tmp_path / "a.fa", RECORDS))
    with open_twobit(path) as (lengths, fetch):
        assert lengths == {name: len(bases) for name, bases in RECORDS.items()}
        assert fetch("chrB", 3, 14) == b"TNNacgtnnNN"


@pytest.mark.parametrize("kept", [10, 20, 40, 100, 150, -1])
def test_a_cut_off_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_twobit(tmp_path / "a.2bit", RECORDS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises((FileError, DataError), match=r"a\.2bit (is|has no).*get the whole file"):
        Genome(path, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = write_twobit(tmp_path / "a.2bit", RECORDS)
    content = bytearray(path.read_bytes())
    content[4] = 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"version 1 \(64-bit offsets\).*give 2bit of version 0"):
        Genome(path, cache_dir=tmp_path)
    write_twobit(path, [("chr1", "ACGT"), ("chr1", "GG")])
    with pytest.raises(DataError, match="2 records of 1 names"):
        Genome(path, cache_dir=tmp_path)
    write_twobit(path, [])
    with pytest.raises(DataError, match="has no records"):
        Genome(path, cache_dir=tmp_path)


@pytest.mark.realdata
def test_yeast_as_2bit(realdata: Path, tmp_path: Path) -> None:
    fasta = Genome(realdata / "sacCer3" / "sacCer3.fa.gz", cache_dir=tmp_path)
    records = {name: decode(fasta.chromosome(name)) for name in fasta.names}
    assert Genome(write_twobit(tmp_path / "a.2bit", records), cache_dir=tmp_path).sha256 == fasta.sha256
