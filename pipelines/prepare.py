"""`prepare`: genome, peaks and signal in, a prepared dataset folder out; complete or not at all.

Each track is converted on its own, several at once, and what is finished outlives a kill; then all are put into one
array. The folder is written beside its place and renamed when it is complete. It is made again only when the
configuration or an input file has changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from genossm.config import apply_overrides, build, load_yaml
from genossm.dataset import FORMAT, JSON_NAME, TARGETS_NAME, WINDOWS_NAME, PreparedDataset, read_dataset_json
from genossm.dataset_config import DatasetConfig, load_dataset_config
from genossm.dataset_inputs import DatasetInputs, open_inputs
from genossm.errors import ConfigError, DataError
from genossm.pipelines.prepare_columns import fingerprint, stamps_of
from genossm.pipelines.prepare_estimate import Estimate, estimate_work
from genossm.pipelines.prepare_work import Work, column_paths, input_files, processes_for
from genossm.pipelines.staging import Stage, leftover, staged
from genossm.progress import say
from genossm.verified import mark_verified
from genossm.windows import Window, find_leaks, tile


def prepare(
    config_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    force: bool = False,
    jobs: int | None = None,
) -> PreparedDataset:
    """Make the prepared dataset `out` from a dataset YAML, or return it at once when nothing has changed.

    Killed, it goes on with the next call where it was: finished tracks wait beside `out`, under names that depend
    on the configuration and the input files. Of several processes that make the same dataset one works.

    Args:
        config_path: the dataset YAML.
        out: the folder to make. One that exists must be a prepared dataset (it is replaced) or empty.
        overrides: `a.b=value` replacements of YAML keys.
        force: make it again even if nothing has changed.
        jobs: processes that convert tracks; None takes all cores, at most 8, and none but this one for
            little work.

    Raises:
        ConfigError: the YAML is refused, or `jobs` is below 1.
        DataError: the files do not fit together (all problems listed), or `out` holds something else.
        FileError: an input is missing or unreadable, the disk is full, or `out` cannot be written.
        GenossmError: a process was killed.
    """
    overrides = list(overrides)
    config = load_dataset_config(config_path, overrides)
    folder = Path(out).resolve()
    _check_jobs(jobs)
    if _is_wanted(folder, config, force=force) or leftover(folder).exists():
        with staged(folder) as stage:
            if _is_wanted(folder, config, force=force):  # else another process has made it meanwhile
                _make(config_path, overrides, config, stage, folder, jobs)
                made = PreparedDataset(folder)
                mark_verified(made)  # their hashes have just been taken
                return made
    say(f"{out} is up to date: configuration and input files are those it was made from")
    return PreparedDataset(folder)


def estimate(
    config_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    jobs: int | None = None,
) -> Estimate:
    """How large the dataset `out` will be and how long `prepare` takes.

    Nothing is written but caches that `prepare` uses afterwards: the genome's, and the cut sites of each BAM or fragments
    file, for which the file is read whole, before the estimate and beside its `seconds`.

    Arguments and errors as of `prepare`.
    """
    config = load_dataset_config(config_path, list(overrides))
    folder = Path(out).resolve()
    _check_jobs(jobs)
    stamps = stamps_of(input_files(config))
    inputs = open_inputs(config)
    paths = column_paths(inputs, stamps, Stage(leftover(folder)).pieces)
    return estimate_work(
        inputs,
        folder,
        windows=len(plan_windows(inputs)),
        jobs=max(1, processes_for(inputs, jobs)),
        finished={track for track, path in paths.items() if path.exists()},
    )


def plan_windows(inputs: DatasetInputs) -> list[Window]:
    """The windows that tile each chromosome of each split.

    Raises:
        DataError: a window of one split, margins included, holds target bases of another.
    """
    sizes = inputs.config.window
    windows = [
        window
        for split, chroms in inputs.splits.items()
        for chrom in chroms
        for window in tile(
            chrom,
            inputs.lengths[chrom],
            window_bp=sizes.length,
            margin_bp=sizes.margin,
            bin_bp=sizes.bin,
            split=split,
        )
    ]
    leaks = find_leaks(windows, margin_bp=sizes.margin, lengths=inputs.lengths)
    if leaks:
        shown = "; ".join(str(leak) for leak in leaks[:3])
        raise DataError(f"{len(leaks)} windows leak into another split: {shown}; make the splits disjoint")
    return windows


def _make(
    config_path: str | os.PathLike[str],
    overrides: list[str],
    config: DatasetConfig,
    stage: Stage,
    folder: Path,
    jobs: int | None,
) -> None:
    stamps = stamps_of(input_files(config))
    inputs = open_inputs(config)
    windows = plan_windows(inputs)
    say(
        f"preparing {config.assembly}: {len(inputs.lengths)} chromosomes, "
        f"{sum(inputs.lengths.values()) / 1e6:.1f} Mb, {len(config.tracks)} tracks, {len(windows)} windows"
    )
    for note in inputs.notes:
        say(f"note: {note}")
    as_written = str(apply_overrides(load_yaml(config_path), overrides)["genome"])
    Work(inputs, windows, stamps, stage, jobs).run(folder, as_written)
    stage.finish(folder)


def _check_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs is {jobs}: give the number of processes, at least 1")


def _is_wanted(folder: Path, config: DatasetConfig, *, force: bool) -> bool:
    """Whether there is something to do.

    Raises:
        DataError: `folder` holds something else than a prepared dataset.
    """
    previous = _previous(folder)
    return force or previous is None or not _unchanged(previous, config)


def _previous(folder: Path) -> dict[str, Any] | None:
    """dataset.json of what is at `folder`, {} if that is incomplete or of another version, None if nothing.

    Raises:
        DataError: something else is there; it is left alone.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise DataError(f"{folder} is a file: choose a folder for the prepared dataset")
    names = {entry.name for entry in folder.iterdir()}
    if not names:
        return None
    foreign = sorted(names - {JSON_NAME, TARGETS_NAME, WINDOWS_NAME})
    if JSON_NAME not in names or foreign:
        kind = f"holds other files ({', '.join(foreign[:3])})" if foreign else "is no prepared dataset"
        raise DataError(
            f"{folder} {kind}, which prepare would have to delete: choose another folder, or move them away"
        )
    try:
        return read_dataset_json(folder)
    except DataError:
        if _format_of(folder / JSON_NAME) != FORMAT:
            raise
        return {}


def _format_of(path: Path) -> object:
    """The "format" that a JSON file names, None where it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content.get("format") if isinstance(content, dict) else None


def _unchanged(previous: dict[str, Any], config: DatasetConfig) -> bool:
    """Whether configuration and input files are those of `previous`; by hash where a file's time differs."""
    try:  # built, so that a key that has come since counts as its default
        if build(DatasetConfig, previous["config"], where=JSON_NAME) != config:
            return False
    except (KeyError, ConfigError):
        return False
    if set(previous["scaling"]) != set(previous.get("scaled_statistics", {})):
        return False  # of a genossm that did not train on scaled targets
    recorded = {entry["path"]: entry for entry in previous["provenance"]["inputs"]}
    stamps = stamps_of(input_files(config))
    if set(recorded) != set(input_files(config)) or set(recorded) != set(stamps):
        return False
    return all(
        stamps[path] == (entry["bytes"], entry["mtime_ns"])
        or (stamps[path][0] == entry["bytes"] and fingerprint(path)["sha256"] == entry["sha256"])
        for path, entry in recorded.items()
    )
