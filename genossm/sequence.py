"""Bases as small integers: 0..3 are A, C, G, T and 4 is "no base"."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.errors import DataError

ALPHABET = "ACGT"
NO_BASE = 4

_ILLEGAL = -1
_UNKNOWN_BASES = "RYSWKMBDHVNX"  # IUPAC ambiguity codes, and X of old repeat maskers


def _encoding_table() -> npt.NDArray[np.int8]:
    table = np.full(256, _ILLEGAL, dtype=np.int8)
    for letters, codes in (
        (ALPHABET, range(4)),
        ("U", [3]),
        (_UNKNOWN_BASES, [NO_BASE] * len(_UNKNOWN_BASES)),
    ):
        for letter, code in zip(letters, codes, strict=True):
            table[ord(letter)] = table[ord(letter.lower())] = code
    return table


_ENCODING = _encoding_table()
_LETTERS = np.frombuffer((ALPHABET + "N").encode(), dtype=np.uint8)
_COMPLEMENT = np.array([3, 2, 1, 0, NO_BASE], dtype=np.int8)


def encode(sequence: str | bytes) -> npt.NDArray[np.int8]:
    """Codes of a sequence, int8 (length,): A, C, G, T = 0, 1, 2, 3, everything unknown = 4.

    Lower case (soft-masked) counts as upper case, U as T; N, X and the IUPAC ambiguity codes are "no base".

    Raises:
        DataError: a character is no nucleotide code.
    """
    try:
        letters = sequence.encode("ascii") if isinstance(sequence, str) else sequence
    except UnicodeEncodeError as error:
        raise _illegal_character(error.object[error.start], error.start) from error
    codes = _ENCODING[np.frombuffer(letters, dtype=np.uint8)]
    if codes.size and codes.min() == _ILLEGAL:
        position = int(np.argmax(codes == _ILLEGAL))
        raise _illegal_character(chr(letters[position]), position)
    return codes


def decode(codes: npt.NDArray[np.integer[Any]]) -> str:
    """The letters of one-dimensional codes; "no base" is N.

    Raises:
        DataError: the array is not one-dimensional, or a code is not in 0..4.
    """
    codes = np.asarray(codes)
    if codes.ndim != 1:
        raise DataError(f"decode takes one sequence, shape (length,), but got shape {codes.shape}")
    return _look_up(_LETTERS, codes).tobytes().decode("ascii")


def reverse_complement(codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int8]:
    """The other strand, read 5' to 3': the last axis is reversed and every code complemented.

    Args:
        codes: integers in 0..4, shape (..., length); a memory map is fine.

    Returns:
        A new int8 array of the same shape.

    Raises:
        DataError: a code is not in 0..4.
    """
    return _look_up(_COMPLEMENT, np.asarray(codes)[..., ::-1])


def _look_up(table: npt.NDArray[Any], codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
    if codes.size and not (codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() <= NO_BASE):
        raise DataError(
            f"codes must be integers from 0 to {NO_BASE} (0..3 = {ALPHABET}, {NO_BASE} = no base), but got "
            f"{codes.dtype} from {codes.min()} to {codes.max()}: use encode() to make them from letters"
        )
    result: npt.NDArray[Any] = table[codes.astype(np.int8, copy=False)]
    return result


def _illegal_character(character: str, position: int) -> DataError:
    return DataError(
        f"the character {character!r} at position {position} is no nucleotide: "
        f"only {ALPHABET}, U and the IUPAC codes {_UNKNOWN_BASES} are allowed, in either case"
    )
