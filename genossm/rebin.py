"""Per-bin values at another resolution, so that figures compare with those of other people's tools.

Bin i of `bin_bp` covers bases [i * bin_bp, min((i + 1) * bin_bp, length_bp)): the last one may be shorter.
The new resolution need not be a multiple of the bin: a base counts for the new bin it lies in.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from genossm.errors import DataError
from genossm.interval import bin_count


def rebin_mean(
    values: npt.NDArray[Any], bin_bp: int, length_bp: int, resolution_bp: int
) -> npt.NDArray[np.float64]:
    """Mean over the bases of each new bin, every base having the value of its old bin.

    Args:
        values: (bins, tracks) or (bins,); NaN bins are absent: their bases count neither way.
        bin_bp: base pairs of an old bin.
        length_bp: length of the chromosome; there are ceil(length_bp / bin_bp) old bins.
        resolution_bp: base pairs of a new bin.

    Returns:
        float64 (new bins, tracks) or (new bins,); NaN where a new bin has no base with a value.

    Raises:
        DataError: the number of bins is not that of the length, or a size is not positive.
    """
    total, bases = _sums(values, bin_bp, length_bp, resolution_bp)
    return np.divide(total, bases, out=np.full_like(total, np.nan), where=bases > 0)


def rebin_sum(
    values: npt.NDArray[Any], bin_bp: int, length_bp: int, resolution_bp: int
) -> npt.NDArray[np.float64]:
    """Sum in each new bin of counts: sums over old bins, spread evenly over an old bin's bases.

    Arguments, result and errors as for `rebin_mean`; totals over the chromosome are kept.
    """
    _check(values, bin_bp, length_bp, resolution_bp)
    sizes = np.diff(np.append(np.arange(0, length_bp, bin_bp), length_bp))
    per_base = np.asarray(values, np.float64) / sizes.reshape((-1,) + (1,) * (np.ndim(values) - 1))
    total, bases = _sums(per_base, bin_bp, length_bp, resolution_bp)
    total[bases == 0] = np.nan
    return total


def rebin(
    values: npt.NDArray[Any],
    bin_bp: int,
    length_bp: int,
    resolution_bp: int,
    aggregate: Literal["mean", "sum", "max"] = "mean",
) -> npt.NDArray[np.float64]:
    """`rebin_mean`, `rebin_sum`, or for "max" the highest of the old bins that reach into a new bin."""
    if aggregate == "mean":
        return rebin_mean(values, bin_bp, length_bp, resolution_bp)
    if aggregate == "sum":
        return rebin_sum(values, bin_bp, length_bp, resolution_bp)
    if aggregate != "max":
        raise DataError(
            f"a track is re-binned by mean, sum or max, not by {aggregate!r}; correct its `aggregate`"
        )
    _check(values, bin_bp, length_bp, resolution_bp)
    source, _, first = _pieces(bin_bp, length_bp, resolution_bp)
    highest: npt.NDArray[np.float64] = np.fmax.reduceat(np.asarray(values, np.float64)[source], first, axis=0)
    return highest


def _sums(
    values: npt.NDArray[Any], bin_bp: int, length_bp: int, resolution_bp: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sum over bases, and number of bases with a value, of each new bin."""
    _check(values, bin_bp, length_bp, resolution_bp)
    source, bases, first = _pieces(bin_bp, length_bp, resolution_bp)
    array = np.asarray(values, np.float64)[source]
    weight = bases.astype(np.float64).reshape((-1,) + (1,) * (array.ndim - 1))
    present = np.where(np.isnan(array), 0.0, weight)
    total = np.add.reduceat(np.where(np.isnan(array), 0.0, array) * weight, first, axis=0)
    return total, np.add.reduceat(present, first, axis=0)


def _pieces(
    bin_bp: int, length_bp: int, resolution_bp: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut at the edges of both grids: old bin and bases of each piece, first piece of each new bin."""
    new_starts = np.arange(0, length_bp, resolution_bp, dtype=np.int64)
    starts = np.union1d(np.arange(0, length_bp, bin_bp, dtype=np.int64), new_starts)
    bases = np.diff(np.append(starts, length_bp))
    return starts // bin_bp, bases, np.searchsorted(starts, new_starts)


def _check(values: npt.NDArray[Any], bin_bp: int, length_bp: int, resolution_bp: int) -> None:
    if bin_bp < 1 or resolution_bp < 1 or length_bp < 1:
        raise DataError(
            f"bin ({bin_bp} bp), resolution ({resolution_bp} bp) and chromosome length ({length_bp} bp) must "
            "be at least 1 bp; give a positive resolution"
        )
    bins = bin_count(length_bp, bin_bp)
    if len(values) != bins:
        raise DataError(
            f"{len(values)} values cannot be the {bin_bp}-bp bins of a chromosome of {length_bp} bp, which "
            f"has {bins}; give the whole chromosome"
        )
