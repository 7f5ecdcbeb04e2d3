"""From finished parts to files: a bigWig per track, called regions, HDF5 arrays, a QC BED, and a summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.outputs.bed import call_regions, write_narrowpeak, write_notes
from genossm.outputs.bigwig import write_bigwig
from genossm.outputs.hdf5 import write_hdf5
from genossm.pipelines.parts import Parts
from genossm.pipelines.plan import PlannedTrack


@dataclass(frozen=True, slots=True)
class PredictionResult:
    """What a prediction wrote: the folder, its files (in the order written), and a summary.

    `summary` has `bases`, `bins`, `gap_bins` and, in `tracks`, for each track `file`, `mean`, `max`, `out_of_range`
    (bins beyond what its values can mean) and, where regions were called, `threshold` and `regions`. Of a shard, which
    writes parts and no files, it has `shard`, `parts`, `found` (of these, there before) and `bases`.
    """

    folder: Path
    files: tuple[Path, ...]
    summary: Mapping[str, Any]


def collect(folder: Path, parts: Parts) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """Write the files of a prediction whose parts are complete; holds one track of one chromosome at a time.

    Returns:
        the files in the order written, and the summary that `PredictionResult` describes.

    Raises:
        DataError: every bin is a gap, or a value is too large for float16.
        FileError: the disk is full.
    """
    plan, selection = parts.plan, parts.selection
    lengths, bin_bp = selection.lengths, plan.bin_bp
    files: list[Path] = []
    ranges = [
        (lengths[chrom], first, stop)
        for chrom, rows in selection.bins.items()
        for first, stop in rows.tolist()
    ]
    bases = sum(min(stop * bin_bp, length) - first * bin_bp for length, first, stop in ranges)
    summary: dict[str, Any] = {"bases": bases, "bins": plan.bin_total, "gap_bins": 0, "tracks": {}}
    notes = _Notes(parts)
    for index, track in enumerate(plan.tracks):
        row: dict[str, Any] = {"kind": track.kind}
        tally = _Tally()
        slices = (
            (chrom, notes.add(chrom, index, track, tally.add(parts.track(chrom, index))), 0)
            for chrom in selection.bins
        )
        if plan.options.sequences:
            for _ in slices:  # only counted: sequences have no coordinates for a bigWig
                pass
        else:
            files.append(folder / f"{track.name}.bw")
            write_bigwig(files[-1], lengths, slices, bin_bp)
            row["file"] = files[-1].name
        row |= tally.summary() | {"out_of_range": notes.out_of_range[track.name]}
        summary["gap_bins"] = plan.bin_total - tally.count
        if track.name in plan.options.thresholds:
            threshold = plan.options.thresholds[track.name]
            files.append(folder / f"{track.name}.narrowPeak")
            row["threshold"] = threshold
            row["regions"] = write_narrowpeak(
                files[-1],
                (
                    (chrom, call_regions(parts.track(chrom, index), bin_bp, lengths[chrom], threshold))
                    for chrom in selection.bins
                ),
                name=track.name,
            )
        summary["tracks"][track.name] = row
    if plan.options.hdf5 or plan.options.sequences:
        files.append(folder / ("sequences.h5" if plan.options.sequences else "predictions.h5"))
        write_hdf5(
            files[-1],
            ((chrom, lengths[chrom], parts.slices(chrom)) for chrom in selection.bins),
            tracks=[track.name for track in plan.tracks],
            bin_bp=bin_bp,
            assembly="" if plan.options.sequences else plan.assembly,
            dtype=plan.options.hdf5 or "float16",
        )
    if not plan.options.sequences:
        files.append(folder / "qc.bed")
        write_notes(files[-1], notes.rows())
    return tuple(files), summary


class _Tally:
    """Count, mean and maximum of the values that pass by, gaps left out."""

    def __init__(self) -> None:
        self.count, self._sum, self._top = 0, 0.0, -np.inf

    def add(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Take the values in and hand them on."""
        present = values[~np.isnan(values)]
        self.count += present.size
        self._sum += float(present.sum(dtype=np.float64))
        self._top = max(self._top, float(present.max(initial=-np.inf)))
        return values

    def summary(self) -> dict[str, float | None]:
        """`mean` and `max`, None where there were no values."""
        if not self.count:
            return {"mean": None, "max": None}
        return {"mean": self._sum / self.count, "max": self._top}


class _Notes:
    """Runs of wanted bins without a value, and of values that are beyond what a track's can mean."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._runs: dict[str, list[tuple[str, npt.NDArray[np.int64]]]] = {}
        self.out_of_range = {track.name: 0 for track in parts.plan.tracks}

    def add(
        self, chrom: str, index: int, track: PlannedTrack, values: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Take the values of one track in and hand them on."""
        if index == 0:  # a bin is a gap in all tracks
            self._note(chrom, "gap", np.isnan(values) & self._parts.selection.wanted(chrom))
        beyond = np.zeros(values.shape, dtype=np.bool_)
        if track.low is not None:
            beyond |= values < track.low
        if track.high is not None:
            beyond |= values > track.high
        self.out_of_range[track.name] += int(beyond.sum())
        self._note(chrom, f"out_of_range:{track.name}", beyond)
        return values

    def rows(self) -> Iterator[tuple[str, int, int, str]]:
        """(chrom, start, end, what) in base pairs, sorted."""
        for chrom, found in self._runs.items():
            length_bp, bin_bp = self._parts.selection.lengths[chrom], self._parts.plan.bin_bp
            yield from sorted(
                (chrom, first * bin_bp, min(stop * bin_bp, length_bp), what)
                for what, runs in found
                for first, stop in runs.tolist()
            )

    def _note(self, chrom: str, what: str, there: npt.NDArray[np.bool_]) -> None:
        if there.any():
            runs = np.flatnonzero(np.diff(np.concatenate(([False], there, [False])).astype(np.int8)))
            self._runs.setdefault(chrom, []).append((what, runs.reshape(-1, 2)))
