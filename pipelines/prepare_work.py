"""The making of one prepared dataset on its stage: chromosomes, then columns in several processes, then the folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import genossm
from genossm.config import to_mapping
from genossm.dataset import FORMAT, FORMAT_VERSION, JSON_NAME, TARGETS_NAME, WINDOWS_NAME
from genossm.dataset_config import DatasetConfig, TrackConfig
from genossm.dataset_inputs import DatasetInputs
from genossm.errors import DataError
from genossm.interval import bin_count
from genossm.pipelines.check import Statistics
from genossm.pipelines.prepare_columns import (
    ChromosomeTask,
    Column,
    ColumnTask,
    Stamps,
    column_key,
    convert_column,
    fingerprint,
    is_finished,
    measure_chromosome,
    of_tracks,
    stamps_of,
    unchanged_fingerprint,
)
from genossm.pipelines.prepare_estimate import estimate_work
from genossm.pipelines.prepare_targets import is_compressed, write_targets
from genossm.pipelines.staging import PIECE_SUFFIX, Stage
from genossm.pipelines.worker_pool import Advance, in_processes, usual_jobs
from genossm.progress import progress, say
from genossm.scaling import fit_scaling
from genossm.storage import common_dtype
from genossm.strands import partner_columns
from genossm.targets import Intervals
from genossm.windows import Window, find_leaks, split_distance, write_windows

LARGE_WORK = 2_000_000_000
"""Bases times tracks from which on the work is estimated before it starts, and done in other processes."""
_OTHER_OPEN_FILES = 64

Task = TypeVar("Task")
Result = TypeVar("Result")


class Work:
    """What is to be done for one dataset.

    Args:
        inputs: opened, of all tracks.
        windows: of all splits, without leaks.
        stamps: size and time of change of every input file, taken before anything was read.
        stage: where it is done.
        jobs: processes that convert tracks; None takes all cores, at most 8. For little work None and 1 take
            none but this one.
    """

    def __init__(
        self, inputs: DatasetInputs, windows: list[Window], stamps: Stamps, stage: Stage, jobs: int | None
    ) -> None:
        self._inputs, self._windows, self._stamps, self._stage = inputs, windows, stamps, stage
        self._processes = processes_for(inputs, jobs)
        self._usable = [stage.scratch / str(number) for number in range(len(inputs.lengths))]
        self._paths = column_paths(inputs, stamps, stage.pieces)

    def run(self, folder: Path, as_written: str) -> None:
        """Fill the stage's result, which will be `folder`; `as_written` is the genome's path in the YAML."""
        inputs, tracks = self._inputs, self._inputs.config.tracks
        self._stage.keep_only({path.name for path in self._paths.values()})
        missing = [track for track in tracks if not is_finished(self._paths[track.name])]
        if len(missing) < len(tracks):
            say(f"{len(tracks) - len(missing)} of {len(tracks)} tracks are there from an earlier attempt")
        if is_large(inputs):
            expected = estimate_work(
                inputs,
                folder,
                windows=len(self._windows),
                jobs=self._processes,
                finished={track.name for track in tracks} - {track.name for track in missing},
            )
            say(
                expected.text()
                if expected.fits
                else f"{expected.text()}\nnote: that is more than there is room for"
            )
        excluded = self._measure_chromosomes()
        self._convert(missing)
        with ExitStack() as stack:
            _allow_open_files(len(tracks))
            columns = []
            for track in tracks:
                columns.append(Column(self._paths[track.name]))
                stack.callback(columns[-1].close)
            self._write(columns, excluded, folder, as_written)

    def _measure_chromosomes(self) -> dict[str, Intervals]:
        """Write the usable bins of each chromosome to scratch files; what is excluded there."""
        inputs = of_tracks(self._inputs, ())
        names = list(inputs.lengths)
        tasks = (ChromosomeTask(inputs, chrom, path) for chrom, path in zip(names, self._usable, strict=True))
        found = dict(self._each(measure_chromosome, tasks, len(names), 1, "genome"))
        return {chrom: found[number] for number, chrom in enumerate(names)}

    def _convert(self, tracks: Sequence[TrackConfig]) -> None:
        tasks = (
            ColumnTask(
                inputs=of_tracks(self._inputs, [track.name]),
                track=track,
                usable=tuple(self._usable),
                path=self._paths[track.name],
                stamps={path: self._stamps[path] for path in track.input_files},
            )
            for track in tracks
        )
        for _ in self._each(convert_column, tasks, len(tracks), len(tracks), "convert"):
            pass

    def _each(
        self,
        work: Callable[[Task, Advance], Result],
        tasks: Iterable[Task],
        count: int,
        genomes: int,
        description: str,
    ) -> Iterator[tuple[int, Result]]:
        """The numbered results of `count` tasks, as they end, under a bar of the bases of so many genomes."""
        total_bp = genomes * sum(self._inputs.lengths.values())
        with progress(total=total_bp, unit="bp", description=description, scale=True) as bar:

            def advance(amount: int) -> None:
                bar.update(amount)

            if self._processes:
                yield from in_processes(work, tasks, jobs=min(self._processes, count), advance=advance)
            else:
                for number, task in enumerate(tasks):
                    yield number, work(task, advance)

    def _write(
        self, columns: Sequence[Column], excluded: dict[str, Intervals], folder: Path, as_written: str
    ) -> None:
        inputs, config, result = self._inputs, self._inputs.config, self._stage.result
        statistics = Statistics(
            {track.name: column.tallies for track, column in zip(config.tracks, columns, strict=True)}
        )
        for note in (late := statistics.notes(config.tracks)):
            say(f"note: {note}")
        content = _describe(inputs, statistics, as_written, folder, [*inputs.notes, *late])
        content["split_check"] = _split_check(inputs, self._windows)
        content["scaling"], content["scaled_statistics"] = _scalings(config.tracks, columns)
        dtype = common_dtype(config.storage, [column.coding for column in columns])
        bins = sum(bin_count(length_bp, config.window.bin) for length_bp in inputs.lengths.values())
        compressed = is_compressed(inputs, bins, dtype)
        codings = {
            track.name: to_mapping(column.coding)
            for track, column in zip(config.tracks, columns, strict=True)
        }
        content["storage"] = {"dtype": dtype, "compressed": compressed, "tracks": codings}

        write_windows(result / WINDOWS_NAME, self._windows)
        total = bins * len(columns)
        with progress(total=total, unit="value", description="write", scale=True) as bar:

            def advance(written: int) -> None:
                bar.update(written)

            write_targets(
                result / TARGETS_NAME,
                inputs,
                config.tracks,
                columns,
                self._usable,
                excluded,
                dtype=dtype,
                compressed=compressed,
                advance=advance,
            )
        known = {entry["path"]: entry for column in columns for entry in column.files}
        content["provenance"]["inputs"] = [
            known.get(path) or unchanged_fingerprint(path, self._stamps) for path in input_files(config)
        ]
        self._check_unchanged()
        content["files"] = {name: _size_and_hash(result / name) for name in (TARGETS_NAME, WINDOWS_NAME)}
        (result / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _check_unchanged(self) -> None:
        now = stamps_of(self._stamps)
        changed = [path for path, stamp in self._stamps.items() if now.get(path) != stamp]
        if changed:
            raise DataError(f"{changed[0]} was changed while it was being read: run prepare again")


def input_files(config: DatasetConfig) -> list[str]:
    """The genome, then every other input file once."""
    tracks = [path for track in config.tracks for path in track.input_files]
    return list(dict.fromkeys([config.genome, *config.exclude, *tracks]))


def column_paths(inputs: DatasetInputs, stamps: Stamps, pieces: Path) -> dict[str, Path]:
    """Where the column of each track is, once it is finished."""
    return {
        track.name: pieces / f"{column_key(inputs, track, stamps)}{PIECE_SUFFIX}"
        for track in inputs.config.tracks
    }


def is_large(inputs: DatasetInputs) -> bool:
    """Whether it takes longer than the start of a process."""
    return sum(inputs.lengths.values()) * len(inputs.config.tracks) >= LARGE_WORK


def processes_for(inputs: DatasetInputs, jobs: int | None) -> int:
    """How many processes convert the tracks, 0 for none but this one.

    Large work is never done in this process: what it maps of the genome would stay in its memory.
    """
    if jobs is None:
        return min(usual_jobs(), len(inputs.config.tracks)) if is_large(inputs) else 0
    return jobs if jobs > 1 or is_large(inputs) else 0


def _allow_open_files(count: int) -> None:
    """Make room for as many open files and some more; many systems give a process 1,024 until it asks.

    Raises:
        DataError: this one gives no more.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise DataError(
            f"{count} tracks need {wanted} open files at once and this system allows {hard}: raise the limit "
            "(`ulimit -Hn`), or make two datasets"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _split_check(inputs: DatasetInputs, windows: Sequence[Window]) -> dict[str, Any]:
    """The proof that no window, margins included, reaches target bases of another split."""
    margin_bp = inputs.config.window.margin
    leaks = find_leaks(windows, margin_bp=margin_bp, lengths=inputs.lengths)
    splits_on = Counter(chrom for chrom, _ in {(window.chrom, window.split) for window in windows})
    return {
        "windows": len(windows),
        "leaks": len(leaks),
        "shared_chromosomes": sum(count > 1 for count in splits_on.values()),
        "nearest_bp": split_distance(windows, margin_bp=margin_bp, lengths=inputs.lengths),
    }


def _scalings(
    tracks: Sequence[TrackConfig], columns: Sequence[Column]
) -> tuple[dict[str, Any], dict[str, dict[str, float | None]]]:
    """The fitted scaling of each track that has one, and mean and std of its scaled training bins (None: no bins).

    Partners share both, as they swap places.
    """
    fitted, statistics = {}, {}
    for index, (track, partner) in enumerate(zip(tracks, partner_columns(tracks), strict=True)):
        if track.scale is not None:
            both = sorted({index, partner})
            counts = columns[both[0]].counts
            if len(both) > 1:
                counts = counts + columns[both[1]].counts
            scaling = fit_scaling(track.scale, counts, track=track.name)
            fitted[track.name] = to_mapping(scaling)
            numbers = zip(("mean", "std"), counts.mean_and_spread(scaling.forward), strict=True)
            statistics[track.name] = {name: number if isfinite(number) else None for name, number in numbers}
    return fitted, statistics


def _size_and_hash(path: Path) -> dict[str, Any]:
    entry = fingerprint(str(path))
    return {"bytes": entry["bytes"], "sha256": entry["sha256"]}


def _describe(
    inputs: DatasetInputs, statistics: Statistics, as_written: str, folder: Path, notes: list[str]
) -> dict[str, Any]:
    """What dataset.json says of the inputs and of what is in them."""
    config = inputs.config
    summary = statistics.to_mapping()
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "genossm_version": genossm.__version__,
        "assembly": config.assembly,
        "genome": {
            "path": config.genome,
            "as_written": as_written,
            "relative_path": os.path.relpath(config.genome, folder),
            "sequence_sha256": inputs.genome.sha256,
        },
        "window_bp": config.window.length,
        "margin_bp": config.window.margin,
        "bin_bp": config.window.bin,
        "chromosomes": inputs.lengths,
        "splits": {split: list(names) for split, names in inputs.splits.items()},
        "tracks": to_mapping(config.tracks),
        "positive_rate": {
            track.name: summary[track.name]["all"]["mean"] for track in config.tracks if track.kind == "peaks"
        },
        "statistics": summary,
        "config": to_mapping(config),
        "provenance": {
            "genossm": genossm.__version__,
            "numpy": np.__version__,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "genome_sequence_sha256": inputs.genome.sha256,
            "files": [to_mapping(item) for item in inputs.files],
            "notes": notes,
        },
    }
