"""Call regions from per-bin values and write them as narrowPeak; write notes on regions as BED."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genossm.atomic import atomic_path
from genossm.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """Called regions of one chromosome, sorted and disjoint, one entry per region in each array.

    `starts`, `ends` int64 base pairs, 0-based half-open; `maxima`, `means` float64 of the bins inside;
    `summits` int64 base pairs: the middle of the (first) highest bin.
    """

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    maxima: npt.NDArray[np.float64]
    means: npt.NDArray[np.float64]
    summits: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)


def call_regions(values: npt.NDArray[np.float32], bin_bp: int, length_bp: int, threshold: float) -> Regions:
    """Runs of neighbouring bins at or above `threshold`; a NaN bin ends a run.

    Args:
        values: float32 (bins,) of a whole chromosome; bin i covers [i*bin_bp, min((i+1)*bin_bp, length_bp)).
        bin_bp: bases per bin.
        length_bp: length of the chromosome.
        threshold: lowest value inside a region.

    Raises:
        DataError: the number of bins does not fit the length, or the threshold is NaN.
    """
    if values.shape != (-(-length_bp // bin_bp),):
        raise DataError(
            f"{values.shape} values do not fit {length_bp} bp: one for each {bin_bp}-bp bin is needed"
        )
    if np.isnan(threshold):
        raise DataError("the threshold is NaN; give a number")
    above = np.concatenate(([False], values >= threshold, [False]))
    edges = np.flatnonzero(np.diff(above.astype(np.int8)))
    firsts, stops = edges[0::2], edges[1::2]
    maxima, means, summits = [], [], []
    for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
        inside = values[first:stop].astype(np.float64)
        top = first + int(np.argmax(inside))
        maxima.append(float(inside.max()))
        means.append(float(inside.mean()))
        summits.append((top * bin_bp + min((top + 1) * bin_bp, length_bp)) // 2)
    return Regions(
        starts=firsts.astype(np.int64) * bin_bp,
        ends=np.minimum(stops.astype(np.int64) * bin_bp, length_bp),
        maxima=np.array(maxima, dtype=np.float64),
        means=np.array(means, dtype=np.float64),
        summits=np.array(summits, dtype=np.int64),
    )


def write_narrowpeak(
    path: str | os.PathLike[str], regions: Iterable[tuple[str, Regions]], *, name: str = "region"
) -> int:
    """Write called regions as narrowPeak (BED6+4), complete or not at all, and return how many there were.

    Columns: chrom, start, end, `name`_<number>, score = 1000 * maximum (0 to 1000), strand ".", signalValue =
    mean value, pValue and qValue -1 (none), summit as an offset from start. Order is that of `regions`.

    Raises:
        FileError: the disk is full or the folder cannot be written.
    """
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for chrom, found in regions:
            columns = (found.starts, found.ends, found.maxima, found.means, found.summits)
            for start, end, top, mean, summit in zip(*(column.tolist() for column in columns), strict=True):
                count += 1
                score = min(1000, max(0, int(1000 * top)))
                label = f"{name}_{count}\t{score}\t."
                handle.write(f"{chrom}\t{start}\t{end}\t{label}\t{mean:.6g}\t-1\t-1\t{summit - start}\n")
    return count


def write_notes(path: str | os.PathLike[str], rows: Iterable[tuple[str, int, int, str]]) -> None:
    """Write (chrom, start, end, note) as BED4, complete or not at all; a file without a row is empty.

    Raises:
        FileError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for chrom, start, end, note in rows:
            handle.write(f"{chrom}\t{start}\t{end}\t{note}\n")
