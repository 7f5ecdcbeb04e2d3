"""The files of one track: each opened as what it is, and several of them read as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from genossm.cut_sites import CutOptions, CutSites
from genossm.errors import DataError
from genossm.fragments import is_fragment_file
from genossm.interval import bin_count, merge
from genossm.signal import Signal, aggregate_bases, is_bigwig

_SLICE_BP = 2_000_000

Intervals = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
Aggregate = Literal["mean", "sum", "max"]
Missing = Literal["zero", "mask"]


class SignalReader(Protocol):
    """What `Signal` and `CutSites` have in common; see `Signal`."""

    path: Path

    @property
    def lengths(self) -> dict[str, int]: ...

    def values(self, chrom: str, start: int, end: int, missing: float = 0.0) -> npt.NDArray[np.float32]: ...

    def binned(
        self,
        chrom: str,
        length_bp: int,
        bin_bp: int,
        aggregate: Aggregate = "mean",
        missing: Missing = "zero",
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]: ...


def open_signal(
    path: str | os.PathLike[str], options: CutOptions, group: str | None = None
) -> Signal | CutSites:
    """A bigWig as its values, fragments, bedpe or BAM as their cut sites.

    What a file is, is told by its content; tables of fragments by their name, too (.tsv, .bedpe, .bed,
    .tagAlign, .fragments, and .gz of each).

    Raises:
        FileError: the file is missing, cut off, damaged, or nothing of these.
        DataError: a row is malformed, or options of cut sites are given for a bigWig.
    """
    path = Path(path)
    if not is_bigwig(path) and is_fragment_file(path):
        return CutSites(path, options, group=group)
    signal = Signal(path)
    for name, value, default in (
        ("shift", list(options.shift), list(CutOptions().shift)),
        ("min_mapq", options.min_mapq, CutOptions().min_mapq),
        ("deduplicate", options.deduplicate, CutOptions().deduplicate),
        ("barcodes", options.barcodes, None),
    ):
        if value != default:
            raise DataError(
                f"{path} is a bigWig, for which {name!r} has no meaning: remove `{name}: {value}`"
            )
    return signal


def binned_together(
    readers: Sequence[SignalReader],
    names: Sequence[str],
    length_bp: int,
    bin_bp: int,
    aggregate: Aggregate,
    missing: Missing,
    combine: Literal["mean", "sum"],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """One value per bin of a chromosome from several samples: as if their sum, or mean, of each base were binned.

    A bin is valid where it is in every sample. With `missing` "mask" a mean over a bin's bases is each sample's own,
    over the bases that it has.

    Args:
        readers: the samples.
        names: what each of them calls the chromosome.
        length_bp, bin_bp, aggregate, missing: as for `Signal.binned`.
        combine: the sum of the samples, or their mean.

    Returns:
        values: float32 (ceil(length_bp / bin_bp),).
        valid: bool, same shape.
    """
    if len(readers) == 1:
        return readers[0].binned(names[0], length_bp, bin_bp, aggregate, missing)
    share = 1.0 if combine == "sum" else 1.0 / len(readers)
    total = np.zeros(bin_count(length_bp, bin_bp))
    valid = np.ones(total.size, dtype=np.bool_)
    if aggregate != "max":
        for reader, name in zip(readers, names, strict=True):
            values, present = reader.binned(name, length_bp, bin_bp, aggregate, missing)
            total += values
            valid &= present
    else:  # the highest of sums is not the sum of the highest
        slice_bp = max(1, _SLICE_BP // bin_bp) * bin_bp
        absent = 0.0 if missing == "zero" else np.nan
        for start in range(0, length_bp, slice_bp):
            end = min(start + slice_bp, length_bp)
            bases = np.zeros(end - start)
            for reader, name in zip(readers, names, strict=True):
                bases += reader.values(name, start, end, missing=absent)
            here = slice(start // bin_bp, bin_count(end, bin_bp))
            total[here], valid[here] = aggregate_bases(bases, bin_bp, "max", missing)
    return np.where(valid, total * share, 0.0).astype(np.float32), valid


def shared_intervals(samples: Sequence[Intervals], least: int) -> Intervals:
    """The bases that lie in the intervals of at least `least` samples: starts and ends, sorted and disjoint.

    Args:
        samples: (starts, ends) of each sample, int (n,), base pairs, half-open, in any order.
        least: 1 is the union, `len(samples)` what all of them have.
    """
    merged = [merge(*sample) for sample in samples]
    starts = np.concatenate([np.zeros(0, np.int64), *(sample[0] for sample in merged)])
    ends = np.concatenate([np.zeros(0, np.int64), *(sample[1] for sample in merged)])
    if least == 1:
        return merge(starts, ends)
    # A sample's own intervals never touch, so that the depth at an edge is the number of samples.
    edges, index = np.unique(np.concatenate([starts, ends]), return_inverse=True)
    steps = np.zeros(edges.size, dtype=np.int64)
    np.add.at(steps, index, np.repeat([1, -1], [starts.size, ends.size]))
    deep = np.concatenate(([False], np.cumsum(steps) >= least))
    changes = np.flatnonzero(deep[1:] != deep[:-1])
    return edges[changes[0::2]], edges[changes[1::2]]
