"""The files of one track, and the arrays of all, made of finished parts piece by piece; each with a record of what it is.

A record binds the files to the values they were made of, so that a merger that was killed leaves finished files as they
are and never takes up another's. Imports no torch: processes that write files are small.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.atomic import atomic_write_text
from genossm.outputs.bed import call_regions, write_narrowpeak
from genossm.outputs.bigwig import write_bigwig
from genossm.outputs.hdf5 import write_hdf5
from genossm.pipelines.part_file import Runs
from genossm.pipelines.parts import Parts, PartsGone
from genossm.pipelines.plan import PARTS_FOLDER, read_plan

FILES_FOLDER = "files"
ARRAYS = -1
"""Stands for the file of arrays among the numbers of tracks."""
Record = dict[str, Any]


def names_of(parts: Parts, index: int) -> list[str]:
    """The files of track number `index`, or of `ARRAYS`."""
    options = parts.plan.options
    if index == ARRAYS:
        return ["sequences.h5" if options.sequences else "predictions.h5"]
    name = parts.plan.tracks[index].name
    called = [f"{name}.narrowPeak"] if name in options.thresholds else []
    return [] if options.sequences else [f"{name}.bw", *called]


def write_files(task: tuple[Path, str, int], _: object = None) -> Record:
    """Write the files of a track, or the arrays; the work of a process.

    Args:
        task: the output folder, the `Parts.digest` that they are to be of, and the track's number or `ARRAYS`.
    """
    folder, digest, index = task
    return made(_parts(folder, digest), digest, index)


@lru_cache(maxsize=1)
def _parts(folder: Path, digest: str) -> Parts:
    plan = read_plan(folder)
    parts = None if plan is None else Parts(folder, plan)
    if parts is None or parts.digest() != digest:
        raise PartsGone(f"{folder / PARTS_FOLDER} was merged or discarded by another process")
    return parts


def made(parts: Parts, digest: str, index: int) -> Record:
    """Write the files of a track, or the arrays, into the folder `files` of the parts, and then their record.

    Returns:
        the record: `of` the digest, `files` with size and time of each, and of a track `row` of the summary, `count` of
        bins with a value, and `runs` of bins for the QC BED.
    """
    folder = parts.folder / FILES_FOLDER
    said: Record = {}
    if index == ARRAYS:
        _write_arrays(parts, folder)
    else:
        said = _write_track(parts, index, folder)
    said |= {"of": digest, "files": {name: stamp(folder / name) for name in names_of(parts, index)}}
    atomic_write_text(_record_path(parts, index), json.dumps(said))
    return said


def recorded(parts: Parts, digest: str, index: int) -> Record | None:
    """The record of files that are complete and of these very values, None where they are to be written (again)."""
    try:
        said: Record = json.loads(_record_path(parts, index).read_text(encoding="utf-8"))
        complete = said["of"] == digest and list(said["files"]) == names_of(parts, index)
        if complete and all(_lies(parts, name, there) for name, there in said["files"].items()):
            return said
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def stamp(path: Path) -> list[int] | None:
    """Size and time of change of a file, which a move leaves as they are; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _lies(parts: Parts, name: str, there: object) -> bool:
    """Whether a file is where it was written, or where it belongs in the end."""
    return there is not None and there in (
        stamp(parts.folder / FILES_FOLDER / name),
        stamp(parts.folder.parent / name),
    )


def _record_path(parts: Parts, index: int) -> Path:
    return parts.folder / FILES_FOLDER / ("arrays.json" if index == ARRAYS else f"{index:06d}.json")


def _write_arrays(parts: Parts, folder: Path) -> None:
    plan, lengths = parts.plan, parts.selection.lengths
    write_hdf5(
        folder / names_of(parts, ARRAYS)[0],
        ((chrom, lengths[chrom], parts.slices(chrom)) for chrom in parts.selection.bins),
        tracks=[track.name for track in plan.tracks],
        bin_bp=plan.bin_bp,
        assembly="" if plan.options.sequences else plan.assembly,
        dtype=plan.options.hdf5 or "float16",
    )


def _write_track(parts: Parts, index: int, folder: Path) -> Record:
    plan, selection = parts.plan, parts.selection
    track = plan.tracks[index]
    tally, notes = _Tally(), _Notes(parts, index)
    slices = (
        (chrom, tally.add(notes.add(chrom, first, values)), first * plan.bin_bp)
        for chrom in selection.bins
        for first, values in parts.pieces(chrom, index)
    )
    row: dict[str, Any] = {"kind": track.kind}
    if plan.options.sequences:
        for _ in slices:  # only counted: sequences have no coordinates for a bigWig
            pass
    else:
        row["file"] = f"{track.name}.bw"
        write_bigwig(folder / row["file"], selection.lengths, slices, plan.bin_bp)
    row |= tally.summary() | {"out_of_range": notes.out_of_range}
    if track.name in plan.options.thresholds:
        threshold = plan.options.thresholds[track.name]
        row["threshold"] = threshold
        row["regions"] = write_narrowpeak(
            folder / f"{track.name}.narrowPeak",
            (
                (
                    chrom,
                    call_regions(parts.track(chrom, index), plan.bin_bp, selection.lengths[chrom], threshold),
                )
                for chrom in selection.bins
            ),
            name=track.name,
        )
    return {"row": row, "count": tally.count, "runs": notes.runs}


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
    """Runs of wanted bins without a value (of the first track: a gap is one in all), and of values beyond what they can mean."""

    def __init__(self, parts: Parts, index: int) -> None:
        self._parts, self._track, self._gaps = parts, parts.plan.tracks[index], index == 0
        self.runs: Runs = {}
        self.out_of_range = 0

    def add(self, chrom: str, first: int, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Take in the values from bin `first` on, and hand them on."""
        if self._gaps:
            wanted = self._parts.selection.wanted(chrom, first, first + len(values))
            self._note(chrom, "gap", first, np.isnan(values) & wanted)
        beyond = np.zeros(values.shape, dtype=np.bool_)
        if self._track.low is not None:
            beyond |= values < self._track.low
        if self._track.high is not None:
            beyond |= values > self._track.high
        self.out_of_range += int(beyond.sum())
        self._note(chrom, f"out_of_range:{self._track.name}", first, beyond)
        return values

    def _note(self, chrom: str, what: str, first: int, there: npt.NDArray[np.bool_]) -> None:
        if there.any():
            runs = np.flatnonzero(np.diff(np.concatenate(([False], there, [False])).astype(np.int8)))
            self.runs.setdefault(chrom, []).append((what, (runs.reshape(-1, 2) + first).tolist()))


def qc_rows(parts: Parts, runs_of_tracks: list[Mapping[str, Any]]) -> Iterator[tuple[str, int, int, str]]:
    """(chrom, start, end, what) in base pairs, sorted: rows of the QC BED from the `runs` of each track, and others."""
    lengths, bin_bp = parts.selection.lengths, parts.plan.bin_bp
    for chrom in parts.selection.bins:
        joined: dict[str, list[list[int]]] = {}
        for what, runs in (noted for of_track in runs_of_tracks for noted in of_track.get(chrom, ())):
            whole = joined.setdefault(what, [])
            for first, stop in runs:
                if whole and whole[-1][1] == first:  # a run goes on in the next piece
                    whole[-1][1] = stop
                else:
                    whole.append([first, stop])
        yield from sorted(
            (chrom, first * bin_bp, min(stop * bin_bp, lengths[chrom]), what)
            for what, runs in joined.items()
            for first, stop in runs
        )
