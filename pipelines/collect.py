"""From finished parts to files: a bigWig per track, called regions, HDF5 arrays, and a summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.models.accessibility import AccessibilityModel
from genossm.outputs.bed import call_regions, write_narrowpeak
from genossm.outputs.bigwig import write_bigwig
from genossm.outputs.hdf5 import write_hdf5
from genossm.pipelines.parts import Parts

SEQUENCES_FILE = "sequences.h5"
ARRAYS_FILE = "predictions.h5"


def collect(
    folder: Path,
    model: AccessibilityModel,
    parts: Parts,
    *,
    hdf5: bool,
    sequences: bool,
    thresholds: Mapping[str, float],
) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """Write the files of a prediction whose parts are complete; holds one track of one chromosome at a time.

    Args:
        folder: where to.
        model: for tracks, bin and assembly.
        parts: the values.
        hdf5: write `predictions.h5`.
        sequences: the chromosomes are sequences without coordinates: `sequences.h5` and no bigWig.
        thresholds: per peaks track whose regions are called, the lowest probability.

    Returns:
        the files in the order written, and the summary that `PredictionResult` describes.

    Raises:
        DataError: every bin is a gap.
        FileError: the disk is full.
    """
    selection = parts.selection
    lengths = selection.lengths
    files: list[Path] = []
    ranges = [
        (lengths[chrom], first, stop)
        for chrom, rows in selection.bins.items()
        for first, stop in rows.tolist()
    ]
    bins = sum(stop - first for _, first, stop in ranges)
    bases = sum(min(stop * model.bin_bp, length) - first * model.bin_bp for length, first, stop in ranges)
    summary: dict[str, Any] = {"bases": bases, "bins": bins, "gap_bins": 0, "tracks": {}}
    for index, track in enumerate(model.tracks):
        row: dict[str, Any] = {"kind": track.kind}
        tally = _Tally()
        slices = ((chrom, tally.add(parts.track(chrom, index)), 0) for chrom in selection.bins)
        if sequences:
            for _ in slices:  # only counted: sequences have no coordinates for a bigWig
                pass
        else:
            files.append(folder / f"{track.name}.bw")
            write_bigwig(files[-1], lengths, slices, model.bin_bp)
            row["file"] = files[-1].name
        row |= tally.summary()
        summary["gap_bins"] = bins - tally.count
        if track.name in thresholds:
            files.append(folder / f"{track.name}.narrowPeak")
            row["threshold"] = thresholds[track.name]
            row["regions"] = write_narrowpeak(
                files[-1],
                (
                    (chrom, call_regions(values, model.bin_bp, lengths[chrom], thresholds[track.name]))
                    for chrom, values in _chromosomes(parts, index)
                ),
                name=track.name,
            )
        summary["tracks"][track.name] = row
    if hdf5 or sequences:
        files.append(folder / (SEQUENCES_FILE if sequences else ARRAYS_FILE))
        write_hdf5(
            files[-1],
            ((chrom, lengths[chrom], parts.slices(chrom)) for chrom in selection.bins),
            tracks=[track.name for track in model.tracks],
            bin_bp=model.bin_bp,
            assembly="" if sequences else model.assembly,
        )
    return tuple(files), summary


def file_names(tracks: list[str], *, hdf5: bool, sequences: bool, called: Mapping[str, float]) -> list[str]:
    """The names of all files that `collect` will write."""
    names = [] if sequences else [f"{name}.bw" for name in tracks]
    names += [f"{name}.narrowPeak" for name in tracks if name in called]
    if sequences:
        return [*names, SEQUENCES_FILE]
    return [*names, ARRAYS_FILE] if hdf5 else names


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


def _chromosomes(parts: Parts, index: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for chrom in parts.selection.bins:
        yield chrom, parts.track(chrom, index)
