"""How a finished prediction correlates with measured bigWigs, chromosome by chromosome."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from genossm.chrom_names import name_hint
from genossm.errors import DataError
from genossm.metrics import pearson, spearman
from genossm.progress import progress, say
from genossm.signal import Signal

SLICE_BINS = 1 << 16
MOST_LINES = 60


@dataclass(frozen=True, slots=True)
class CorrelationRow:
    """Correlations over the bins of a chromosome that have a prediction; NaN where one of the two is constant."""

    track: str
    reference: str
    chrom: str
    bins: int
    pearson: float
    spearman: float


@dataclass(frozen=True, slots=True)
class Correlations:
    """A row per track and chromosome."""

    rows: tuple[CorrelationRow, ...]

    def text(self) -> str:
        """A table for people, of the first rows where there are many."""
        lines = [f"{'track':20} {'chromosome':20} {'bins':>12} {'Pearson':>9} {'Spearman':>9}"]
        lines += [
            f"{row.track:20} {row.chrom:20} {row.bins:>12,} {row.pearson:>9.4f} {row.spearman:>9.4f}"
            for row in self.rows[:MOST_LINES]
        ]
        if len(self.rows) > MOST_LINES:
            lines.append(f"and {len(self.rows) - MOST_LINES:,} more: see --json")
        return "\n".join(lines)


def correlate(folder: str | os.PathLike[str], references: Sequence[str]) -> Correlations:
    """Pearson and Spearman correlation of predicted tracks with bigWigs, over bins that have a prediction.

    A bigWig is brought to the prediction's bins in the track's own aggregate (mean for peaks); bases without a value
    count as 0. Chromosomes that it lacks are left out, and said.

    Args:
        folder: a finished prediction.
        references: bigWigs, each for all tracks or as "track=file" for one.

    Raises:
        DataError: there is no finished prediction, no such track, or no chromosome in common.
        FileError: a bigWig is missing or damaged.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        tracks, bin_bp, chroms = record["tracks"], record["bin_bp"], record["chroms"]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise DataError(f"{folder} holds no finished prediction: predict first") from error
    if record["options"]["sequences"]:
        raise DataError(f"{folder} holds predictions of sequences without coordinates: a bigWig needs them")
    pairs = [pair for reference in references for pair in _pairs(reference, tracks)]
    rows: list[CorrelationRow] = []
    with progress(total=len(pairs) * len(chroms), unit="chromosome", description="correlate") as bar:
        for track, path in pairs:
            predicted, measured = Signal(folder / f"{track['name']}.bw"), Signal(path)
            for chrom in chroms:
                if chrom in measured.lengths:
                    rows.append(_row(track, predicted, measured, chrom, bin_bp))
                bar.update()
            absent = [chrom for chrom in chroms if chrom not in measured.lengths]
            if len(absent) == len(chroms):
                raise DataError(
                    f"{path} has none of the predicted chromosomes: {name_hint(chroms[0], measured.lengths)}"
                )
            if absent:
                named = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
                say(f"{path} lacks {len(absent):,} of {len(chroms):,} chromosomes: {named}")
    return Correlations(tuple(rows))


def _pairs(reference: str, tracks: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Which tracks go with which file."""
    name, equals, path = reference.partition("=")
    named = [track for track in tracks if equals and track["name"] == name]
    if named:
        yield named[0], path
    elif equals and not Path(reference).is_file():
        known = ", ".join(track["name"] for track in tracks)
        raise DataError(
            f"the reference {reference!r} names no track: write track=file.bw with one of {known}, or a file"
        )
    else:
        yield from ((track, reference) for track in tracks)


def _row(
    track: dict[str, Any], predicted: Signal, measured: Signal, chrom: str, bin_bp: int
) -> CorrelationRow:
    length_bp = predicted.lengths[chrom]
    aggregate: Literal["mean", "sum", "max"] = "mean" if track["kind"] == "peaks" else track["aggregate"]
    values = _bins(predicted, chrom, bin_bp)
    truth, _ = measured.binned(chrom, length_bp, bin_bp, aggregate)
    there = ~np.isnan(values)
    x, y = truth[there], values[there]
    found = (pearson(x, y), spearman(x, y)) if there.any() else (float("nan"), float("nan"))
    return CorrelationRow(track["name"], str(measured.path), chrom, int(there.sum()), *found)


def _bins(signal: Signal, chrom: str, bin_bp: int) -> npt.NDArray[np.float32]:
    """float32 (bins,): the value of each bin's first base, NaN in gaps; a prediction is constant within a bin."""
    length_bp, slice_bp = signal.lengths[chrom], SLICE_BINS * bin_bp
    return np.concatenate(
        [
            signal.values(chrom, start, min(start + slice_bp, length_bp), missing=np.nan)[::bin_bp]
            for start in range(0, length_bp, slice_bp)
        ]
    )
