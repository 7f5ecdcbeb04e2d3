"""What a bin's target is, and where there is none: peaks to 0 or 1, excluded bases and N runs to a mask.

Bin i of a chromosome covers the bases [i * bin_bp, min((i + 1) * bin_bp, length_bp)); shares are of those
bases.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from genossm.interval import bases_below, bin_count, merge
from genossm.sequence import NO_BASE

MASKED_SHARE = 0.25
"""A bin with this share of its bases excluded, or more, is masked: no loss and no metric there."""

_SLICE_BP = 1 << 22
_BLOCK_BINS = 1 << 20

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
    values = np.zeros(bin_count(length_bp, bin_bp), dtype=np.float32)
    for bins, covered, size in _touched(starts, ends, length_bp, bin_bp):
        # The tiny tolerance keeps 0.1 * 30 bases from asking for 3.0000000000000004.
        values[bins] = covered >= overlap * size - 1e-9
    return values


def masked_bins(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], length_bp: int, bin_bp: int
) -> npt.NDArray[np.bool_]:
    """bool (bins,): True where a quarter of a bin's bases, or more, lies in the union of the intervals."""
    masked = np.zeros(bin_count(length_bp, bin_bp), dtype=np.bool_)
    for bins, covered, size in _touched(starts, ends, length_bp, bin_bp):
        masked[bins] = covered >= MASKED_SHARE * size
    return masked


def _touched(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], length_bp: int, bin_bp: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """(bin, its covered bases, its bases) of the bins that intervals reach, in blocks of bounded memory.

    Peaks reach one bin in fifty of a genome: all others cost nothing.
    """
    starts, ends = merge(starts, ends)
    starts, ends = merge(np.clip(starts, 0, length_bp), np.clip(ends, 0, length_bp))
    firsts, stops = merge(starts // bin_bp, -(-ends // bin_bp))
    done: npt.NDArray[np.int64] = np.cumsum(stops - firsts)
    for low in range(0, int(done[-1]) if done.size else 0, _BLOCK_BINS):
        count: npt.NDArray[np.int64] = np.arange(low, min(low + _BLOCK_BINS, int(done[-1])), dtype=np.int64)
        run = np.searchsorted(done, count, side="right")
        bins = stops[run] - (done[run] - count)
        edges = np.minimum(np.stack((bins, bins + 1)) * bin_bp, length_bp)
        below = bases_below(edges, starts, ends)
        yield bins, below[1] - below[0], edges[1] - edges[0]


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
