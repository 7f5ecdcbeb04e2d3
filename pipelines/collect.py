"""From finished parts to files: a bigWig per track, called regions, HDF5 arrays, a QC BED, and a summary."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genossm.errors import ConfigError
from genossm.interval import merge
from genossm.outputs.bed import write_notes
from genossm.outputs.bigwig import FIXED_BYTES
from genossm.pipelines.part_file import NotedRuns, Runs
from genossm.pipelines.parts import Parts
from genossm.pipelines.track_files import (
    ARRAYS,
    FILES_FOLDER,
    Record,
    made,
    names_of,
    qc_rows,
    recorded,
    write_files,
)
from genossm.pipelines.worker_pool import in_processes, usual_jobs
from genossm.progress import progress, say

POOL_FROM_VALUES = 1 << 23
"""Fewer values than these are written sooner than processes start."""


@dataclass(frozen=True, slots=True)
class PredictionResult:
    """What a prediction wrote: the folder, its files (in the order written), and a summary.

    `summary` has `bases`, `bins`, `gap_bins` and, in `tracks`, for each track `file`, `mean`, `max`, `out_of_range`
    (bins beyond what its values can mean) and, where regions were called, `threshold` and `regions`. In the mode chromosome
    it also has `state_out_of_range`: bins where a recurrent mixer's state was larger than in windows. Of a shard, which
    writes parts and no files, it has `shard`, `parts`, `found` (of these, there before) and `bases`.
    """

    folder: Path
    files: tuple[Path, ...]
    summary: Mapping[str, Any]


def collect(folder: Path, parts: Parts, jobs: int | None = None) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """Write the files of a prediction whose parts are complete; those that a killed run of it completed are kept.

    They are written beside the parts, and moved to `folder` when all are there.

    Args:
        folder: the output folder.
        parts: what is written.
        jobs: processes that write tracks, each a piece of a chromosome at a time; None takes all cores, at most 8, and
            none but this one for little.

    Returns:
        the files in the order written, and the summary that `PredictionResult` describes.

    Raises:
        ConfigError: `jobs` is below 1.
        DataError: every bin is a gap, or a value is too large for float16.
        FileError: the disk is full.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be at least 1")
    plan = parts.plan
    arrays = [ARRAYS] if plan.options.hdf5 or plan.options.sequences else []
    records = _records(parts, [*arrays, *range(len(plan.tracks))], jobs)
    ordered = [records[index] for index in range(len(plan.tracks))]
    names = [name for index in [*range(len(plan.tracks)), *arrays] for name in names_of(parts, index)]
    noted = parts.noted()
    summary = _summary(parts, ordered, noted)
    for name in names:
        written = parts.folder / FILES_FOLDER / name
        if written.exists():  # else it was moved before this was killed
            os.replace(written, folder / name)
    if not plan.options.sequences:
        names.append("qc.bed")
        write_notes(folder / "qc.bed", qc_rows(parts, [*(record["runs"] for record in ordered), noted]))
    return tuple(folder / name for name in names), summary


def _records(parts: Parts, indices: Sequence[int], jobs: int | None) -> dict[int, Record]:
    """The record of each track and of the arrays, after all of them have been written."""
    digest = parts.digest()
    found = {index: record for index in indices if (record := recorded(parts, digest, index)) is not None}
    missing = [index for index in indices if index not in found]
    if found:
        say(f"kept the files of {len(found):,} of {len(indices):,} tracks and arrays that were complete")
    if not missing:
        return found
    (parts.folder / FILES_FOLDER).mkdir(exist_ok=True)
    free_bytes = shutil.disk_usage(parts.folder).free
    processes = writers(parts.plan.bin_total, len(missing), jobs, free_bytes)
    with progress(total=len(missing), unit="file", description="write") as bar:
        for index, record in _written(parts, digest, missing, processes):
            found[index] = record
            bar.update(1)
    return found


def _written(
    parts: Parts, digest: str, indices: Sequence[int], processes: int
) -> Iterator[tuple[int, Record]]:
    if processes == 1:
        for index in indices:
            yield index, made(parts, digest, index)
        return
    tasks = [(parts.folder.parent.absolute(), digest, index) for index in indices]
    records = in_processes(write_files, tasks, jobs=processes, advance=lambda _: None)
    for number, record in records:
        yield indices[number], record


def writers(bins: int, files: int, jobs: int | None, free_bytes: int) -> int:
    """How many processes write so many tracks of so many bins, where `jobs` were asked for (None: what suits).

    No more than there is room for on the disk: a bigWig is told its room beforehand.
    """
    if jobs is None:
        if bins * files < POOL_FROM_VALUES:
            return 1
        jobs = usual_jobs()
    return max(1, min(jobs, files, free_bytes // max(1, FIXED_BYTES * bins)))


def _summary(parts: Parts, records: Sequence[Record], noted: Runs) -> dict[str, Any]:
    plan, lengths = parts.plan, parts.selection.lengths
    bases = sum(
        min(stop * plan.bin_bp, lengths[chrom]) - first * plan.bin_bp
        for chrom, rows in plan.bins.items()
        for first, stop in rows
    )
    states = {"state_out_of_range": sum(map(_bins, noted.values()))} if plan.whole else {}
    return {
        "bases": bases,
        "bins": plan.bin_total,
        "gap_bins": plan.bin_total - records[-1]["count"],
        **states,
        "tracks": {track.name: record["row"] for track, record in zip(plan.tracks, records, strict=True)},
    }


def _bins(noted: NotedRuns) -> int:
    """Bins of a chromosome with a note, whatever it is."""
    runs = np.array([run for _, found in noted for run in found], dtype=np.int64).reshape(-1, 2)
    firsts, stops = merge(*runs.T)
    return int((stops - firsts).sum())
