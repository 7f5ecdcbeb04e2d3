"""What a bin's target is, and where there is none: peaks to 0 or 1, excluded bases and N runs to a mask.

Bin i of a chromosome covers the bases [i * bin_bp, min((i + 1) * bin_bp, length_bp)); shares are of those
bases.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from genossm.interval import bin_count, covered_bases, merge
from genossm.sequence import NO_BASE

MASKED_SHARE = 0.25
"""A bin with this share of its bases excluded, or more, is masked: no loss and no metric there."""

_SLICE_BP = 1 << 22

Intervals = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def bases_per_bin(length_bp: int, bin_bp: int) -> npt.NDArray[np.int64]:
    """int64 (bins,): `bin_bp` everywhere but in a last bin that the chromosome's end cuts short."""
    sizes = np.full(bin_count(length_bp, bin_bp), bin_bp, dtype=np.int64)
    if length_bp % bin_bp:
        sizes[-1] = length_bp % bin_bp
    return sizes


def peak_bins(
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    length_bp: int,
    bin_bp: int,
    overlap: float = 0.5,
) -> npt.NDArray[np.float32]:
    """float32 (bins,): 1 where at least `overlap` of a bin's bases lie in the union of the intervals."""
    covered = covered_bases(starts, ends, length_bp, bin_bp)
    # The tiny tolerance keeps 0.1 * 30 bases from asking for 3.0000000000000004.
    return (covered >= overlap * bases_per_bin(length_bp, bin_bp) - 1e-9).astype(np.float32)


def masked_bins(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], length_bp: int, bin_bp: int
) -> npt.NDArray[np.bool_]:
    """bool (bins,): True where a quarter of a bin's bases, or more, lies in the union of the intervals."""
    covered = covered_bases(starts, ends, length_bp, bin_bp)
    return np.asarray(covered >= MASKED_SHARE * bases_per_bin(length_bp, bin_bp))


def no_base_runs(codes: npt.NDArray[np.int8]) -> Intervals:
    """(starts, ends) of the maximal runs of "no base" in a chromosome's codes, read slice by slice."""
    starts: list[npt.NDArray[np.int64]] = []
    ends: list[npt.NDArray[np.int64]] = []
    for begin in range(0, codes.shape[0], _SLICE_BP):
        absent = np.asarray(codes[begin : begin + _SLICE_BP]) == NO_BASE
        padded = np.concatenate(([False], absent, [False]))
        edges = np.flatnonzero(padded[1:] != padded[:-1]) + begin
        starts.append(edges[0::2])
        ends.append(edges[1::2])
    if not starts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return merge(np.concatenate(starts), np.concatenate(ends))
