"""The windows that tile a split of a prepared dataset: which of them have anything to learn, and how much signal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from genossm.dataset import PreparedDataset
from genossm.errors import DataError
from genossm.interval import merge
from genossm.progress import progress
from genossm.targets import Intervals
from genossm.windows import Window, tile

_BLOCK_BINS = 1 << 18
_MANY_WINDOWS = 2_000


def tile_split(dataset: PreparedDataset, split: str, *, window_bp: int, margin_bp: int) -> list[Window]:
    """The windows of a split, of the dataset's own lengths or of others; each base is a target once."""
    if (window_bp, margin_bp) == (dataset.window_bp, dataset.margin_bp):
        return dataset.windows(split)
    return [
        window
        for chrom in dataset.splits.get(split, ())
        for window in tile(
            chrom,
            dataset.lengths[chrom],
            window_bp=window_bp,
            margin_bp=margin_bp,
            bin_bp=dataset.bin_bp,
            split=split,
        )
    ]


class Unmasked:
    """Where a dataset has bins that count for a track at least."""

    def __init__(self, dataset: PreparedDataset) -> None:
        self._dataset = dataset
        self._masked: dict[str, Intervals] = {}

    def any(self, chrom: str, first_bin: int, stop_bin: int) -> bool:
        """Whether one of the bins [first_bin, stop_bin) counts; bins outside the chromosome do not."""
        first, stop = max(first_bin, 0), min(stop_bin, self._dataset.bins(chrom))
        if first >= stop:
            return False
        starts, ends = self._runs(chrom)
        run = int(np.searchsorted(ends, first, side="right"))
        return run == len(ends) or bool(starts[run] > first or ends[run] < stop)

    def _runs(self, chrom: str) -> Intervals:
        """(starts, ends) in bins: the maximal runs of bins that count for no track."""
        if chrom not in self._masked:
            self._masked[chrom] = self._find_runs(chrom)
        return self._masked[chrom]

    def _find_runs(self, chrom: str) -> Intervals:
        parts = self._dataset.mask_parts(chrom)
        absent = set(parts.absent.tolist())
        there = [track for column, track in enumerate(self._dataset.tracks) if column not in absent]
        if not there:
            return np.zeros(1, dtype=np.int64), np.array([self._dataset.bins(chrom)], dtype=np.int64)
        if not parts.own or any(track.missing == "zero" for track in there):
            return parts.starts, parts.ends  # a track that has a value everywhere decides
        runs = []
        for start in range(0, self._dataset.bins(chrom), _BLOCK_BINS):
            stop = min(start + _BLOCK_BINS, self._dataset.bins(chrom))
            masked = ~self._dataset.mask(chrom, start, stop).any(axis=1)
            edges = np.flatnonzero(np.diff(np.concatenate(([False], masked, [False])).astype(np.int8)))
            runs.append(edges.reshape(-1, 2) + start)
        joined = np.concatenate(runs)
        return merge(joined[:, 0], joined[:, 1])


def signal_weights(
    dataset: PreparedDataset, windows: list[Window], *, margin_bp: int
) -> npt.NDArray[np.float64]:
    """The share of the signal that lies in the target of each window, float64 (windows,), mean over the tracks.

    A track's signal is the sum of its targets above 0 in bins that count, in these windows; a track without any
    does not vote. Reads the targets of all windows once.

    Raises:
        DataError: no track has any signal in these windows.
    """
    sums = np.zeros((len(windows), len(dataset.tracks)))
    shown = (
        progress(windows, unit="window", description="signal") if len(windows) > _MANY_WINDOWS else windows
    )
    for row, window in zip(sums, shown, strict=True):
        first = max(0, (window.start + margin_bp) // dataset.bin_bp)
        stop = min((window.end - margin_bp) // dataset.bin_bp, dataset.bins(window.chrom))
        targets = dataset.targets(window.chrom, first, stop)
        row[:] = targets.sum(
            axis=0, where=dataset.mask(window.chrom, first, stop) & (targets > 0), dtype=np.float64
        )
    totals = sums.sum(axis=0)
    if not totals.any():
        raise DataError(
            "sampling `signal` finds no signal: all targets of these windows are 0 or masked; use sampling `all`"
        )
    voting = totals > 0
    shares: npt.NDArray[np.float64] = (sums[:, voting] / totals[voting]).mean(axis=1)
    return shares
