"""Intervals on a chromosome: a value type, region strings, unions and bases per bin; 0-based half-open."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genossm.errors import DataError

_BLOCK_BINS = 1 << 20  # so that memory does not grow with bins of 1 bp on a long chromosome
_REGION = re.compile(r"(?P<chrom>\S+):(?P<start>[0-9][0-9,]*)-(?P<end>[0-9][0-9,]*)")


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """Bases `start` to `end` (0-based, half-open, in base pairs) of `chrom`.

    `start` may be negative and `end` past the chromosome: an input window may hang over an end.

    Raises:
        DataError: `end` lies before `start`.
    """

    chrom: str
    start: int
    end: int

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise DataError(
                f"the interval {self.chrom}:{self.start}-{self.end} ends before it starts: "
                "give start <= end (0-based, half-open)"
            )

    @property
    def length(self) -> int:
        """Number of bases."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.chrom}:{self.start}-{self.end}"

    @classmethod
    def parse(cls, text: str, lengths: Mapping[str, int] | None = None) -> Interval:
        """Read a region, 0-based half-open: `chr1:100-200`, `chr1:1,000-2,000`, or `chr1` (all of it).

        Args:
            text: the region.
            lengths: chromosome lengths in bp; with them names and ends are checked, and a bare name is
                allowed.

        Raises:
            DataError: the text is no region, the chromosome is unknown, or the region runs past its end.
        """
        text = text.strip()
        if lengths is not None and text in lengths:
            return cls(text, 0, lengths[text])
        found = _REGION.fullmatch(text)
        if found is None:
            known = "" if lengths is None else ", or name a whole chromosome of the genome"
            raise DataError(
                f"{text!r} is no region: write chromosome:start-end such as chr1:1,000-2,000 (0-based){known}"
            )
        chrom = found["chrom"]
        start, end = (int(found[group].replace(",", "")) for group in ("start", "end"))
        if lengths is not None:
            if chrom not in lengths:
                names = ", ".join(list(lengths)[:5]) + (" ..." if len(lengths) > 5 else "")
                raise DataError(
                    f"the region {text!r} names the chromosome {chrom!r}, which the genome lacks: it has "
                    f"{names}"
                )
            if end > lengths[chrom]:
                raise DataError(
                    f"the region {text!r} runs past the end of {chrom}, which has {lengths[chrom]:,} bp: end "
                    "there"
                )
        return cls(chrom, start, end)


def merge(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The union of intervals of one chromosome: sorted, disjoint, touching ones joined, empty ones dropped.

    Args:
        starts, ends: int (n,), base pairs, 0-based half-open, in any order.

    Returns:
        starts, ends: int64 (m,) with starts[i] < ends[i] < starts[i + 1].

    Raises:
        DataError: the arrays differ in length, or an interval ends before it starts.
    """
    starts = np.asarray(starts, dtype=np.int64)
    ends = np.asarray(ends, dtype=np.int64)
    if starts.ndim != 1 or starts.shape != ends.shape:
        raise DataError(
            f"starts and ends must be one-dimensional and equally long, but have shapes {starts.shape} and "
            f"{ends.shape}"
        )
    if np.any(ends < starts):
        row = int(np.argmax(ends < starts))
        raise DataError(
            f"the interval {starts[row]}-{ends[row]} ends before it starts: give start <= end (0-based, "
            "half-open)"
        )
    kept = ends > starts
    starts, ends = starts[kept], ends[kept]
    if starts.size == 0:
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    reach = np.maximum.accumulate(ends)
    first = np.concatenate(([True], starts[1:] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return starts[first], reach[last]


def covered_bases(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], length_bp: int, bin_bp: int
) -> npt.NDArray[np.int64]:
    """How many bases of each bin lie inside the union of the intervals.

    Bin i covers [i * bin_bp, min((i + 1) * bin_bp, length_bp)). Intervals are clipped to [0, length_bp) and
    may overlap.

    Args:
        starts, ends: int (n,), base pairs, 0-based half-open, in any order.
        length_bp: chromosome length.
        bin_bp: bin width.

    Returns:
        int64 (ceil(length_bp / bin_bp),), each at most the bases its bin has.

    Raises:
        DataError: an interval ends before it starts, or a length or width is not positive.
    """
    bins = bin_count(length_bp, bin_bp)
    starts, ends = merge(starts, ends)
    covered = np.empty(bins, dtype=np.int64)
    for first in range(0, bins, _BLOCK_BINS):
        block = covered[first : first + _BLOCK_BINS]
        edges = np.minimum(np.arange(first, first + block.size + 1, dtype=np.int64) * bin_bp, length_bp)
        block[:] = np.diff(bases_below(edges, starts, ends))
    return covered


def bases_below(
    positions: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """How many bases of sorted, disjoint intervals (as `merge` gives them) lie below each position, int64."""
    # Those of the intervals that end at or before the position, and a part of the one across it.
    before = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(ends - starts)))
    finished = np.searchsorted(ends, positions, side="right")
    open_start = np.concatenate((starts, [np.iinfo(np.int64).max]))[finished]
    inside = np.where(open_start < positions, positions - open_start, 0)
    return np.asarray(before[finished] + inside, dtype=np.int64)


def bin_count(length_bp: int, bin_bp: int) -> int:
    """Number of bins of `bin_bp` that cover `length_bp` bases; the last may be partial.

    Raises:
        DataError: the length is negative or the width is not positive.
    """
    if length_bp < 0 or bin_bp < 1:
        raise DataError(
            f"cannot cut {length_bp} bp into bins of {bin_bp} bp: the length must be >= 0 and the bin >= 1"
        )
    return -(-length_bp // bin_bp)
