"""`prepare`: genome, peaks and signal in, a prepared dataset folder out; complete or not at all.

The folder is written under a temporary name beside its own, and renamed when it is complete. It is made again
only when the configuration or an input file has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import genossm
from genossm.atomic import write_error
from genossm.config import apply_overrides, build, load_yaml, to_mapping
from genossm.dataset import (
    FORMAT,
    FORMAT_VERSION,
    JSON_NAME,
    TARGETS_NAME,
    WINDOWS_NAME,
    PreparedDataset,
    read_dataset_json,
)
from genossm.dataset_config import DatasetConfig, load_dataset_config
from genossm.dataset_inputs import DatasetInputs, open_inputs
from genossm.errors import ConfigError, DataError, FileError
from genossm.hdf5_file import create_hdf5
from genossm.pipelines.check import Statistics
from genossm.progress import progress, say
from genossm.windows import Window, find_leaks, tile, write_windows

if TYPE_CHECKING:
    import h5py

_BLOCK_BYTES = 1 << 24
_CHUNK_BYTES = 1 << 18


def prepare(
    config_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    force: bool = False,
) -> PreparedDataset:
    """Make the prepared dataset `out` from a dataset YAML, or return it at once when nothing has changed.

    Args:
        config_path: the dataset YAML.
        out: the folder to make. One that exists must be a prepared dataset (it is replaced) or empty.
        overrides: `a.b=value` replacements of YAML keys.
        force: make it again even if nothing has changed.

    Raises:
        ConfigError: the YAML is refused.
        DataError: the files do not fit together (all problems listed), or `out` holds something else.
        FileError: an input is missing or unreadable, the disk is full, or `out` cannot be written.
    """
    overrides = list(overrides)
    config = load_dataset_config(config_path, overrides)
    folder = Path(out).resolve()
    previous = _previous(folder)
    if previous is not None and not force and _unchanged(previous, config):
        say(f"{out} is up to date: configuration and input files are those it was made from")
        return PreparedDataset(folder)
    stamps = _stamps(config)
    inputs = open_inputs(config)
    windows = plan_windows(inputs)
    say(
        f"preparing {config.assembly}: {len(inputs.lengths)} chromosomes, "
        f"{sum(inputs.lengths.values()) / 1e6:.1f} Mb, {len(config.tracks)} tracks, {len(windows)} windows"
    )
    for note in inputs.notes:
        say(f"note: {note}")
    as_written = str(apply_overrides(load_yaml(config_path), overrides)["genome"])
    with _staging(folder) as stage:
        write_windows(stage / WINDOWS_NAME, windows)
        statistics = _write_targets(stage / TARGETS_NAME, inputs)
        for note in (late := statistics.notes(config.tracks)):
            say(f"note: {note}")
        content = _describe(inputs, statistics, as_written, folder, [*inputs.notes, *late])
        content["provenance"]["inputs"] = _fingerprints(config, stamps)
        content["files"] = {name: (stage / name).stat().st_size for name in (TARGETS_NAME, WINDOWS_NAME)}
        (stage / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return PreparedDataset(folder)


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


def _write_targets(path: Path, inputs: DatasetInputs) -> Statistics:
    """Write targets.h5, one chromosome at a time; tracks pass through scratch files to bound the memory."""
    statistics = Statistics()
    tracks = inputs.config.tracks
    total_bp = sum(inputs.lengths.values()) * len(tracks)
    values_path, mask_path = path.with_suffix(".values"), path.with_suffix(".mask")
    with (
        create_hdf5(path) as (file, flush),
        progress(total=total_bp, unit="bp", description="prepare", scale=True) as bar,
    ):
        file.attrs["bin_bp"] = inputs.config.window.bin
        file.attrs["tracks"] = [track.name for track in tracks]
        for chrom, length_bp in inputs.lengths.items():
            with values_path.open("wb") as values_file, mask_path.open("wb") as mask_file:
                for track, values, mask in inputs.columns(chrom):
                    statistics.add(track, inputs.split_of(chrom), values, mask)
                    values_file.write(np.ascontiguousarray(values, dtype=np.float32).data)
                    mask_file.write(mask.astype(np.uint8).data)
                    bar.update(length_bp)
            group = file.create_group(chrom)
            _transpose(values_path, group, "targets", np.dtype(np.float32), len(tracks))
            _transpose(mask_path, group, "mask", np.dtype(np.uint8), len(tracks))
            group["excluded"] = np.stack(inputs.excluded(chrom), axis=1)
            peaks = group.create_group("peaks")
            for track in tracks:
                if track.kind == "peaks":
                    peaks[track.name] = np.stack(inputs.peaks(chrom, track.name), axis=1)
            flush()
    values_path.unlink()
    mask_path.unlink()
    return statistics


def _transpose(scratch: Path, group: h5py.Group, name: str, dtype: np.dtype[Any], tracks: int) -> None:
    """Write a scratch file of (tracks, bins) as the dataset (bins, tracks), block by block."""
    columns: np.ndarray[Any, Any] = np.memmap(scratch, dtype=dtype, mode="r").reshape(tracks, -1)
    bins = columns.shape[1]
    row_bytes = dtype.itemsize * tracks
    chunk = min(bins, max(1, _CHUNK_BYTES // row_bytes))
    rows = max(chunk, _BLOCK_BYTES // row_bytes // chunk * chunk)
    dataset = group.create_dataset(
        name, shape=(bins, tracks), dtype=dtype, chunks=(chunk, tracks), compression="lzf", shuffle=True
    )
    for start in range(0, bins, rows):
        dataset[start : start + rows] = columns[:, start : start + rows].T


def _describe(
    inputs: DatasetInputs, statistics: Statistics, as_written: str, folder: Path, notes: list[str]
) -> dict[str, Any]:
    """The content of dataset.json, but for the inputs' fingerprints and the sizes of the files beside it."""
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


def _input_files(config: DatasetConfig) -> list[str]:
    """The genome, then every other input file once."""
    return list(dict.fromkeys([config.genome, *config.exclude, *(track.file for track in config.tracks)]))


def _stamps(config: DatasetConfig) -> dict[str, tuple[int, int]]:
    """Size and time of change of each input file that is there."""
    files = {path: os.stat(path) for path in _input_files(config) if os.path.isfile(path)}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in files.items()}


def _fingerprints(config: DatasetConfig, stamps: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Size, time and hash of each input file.

    Raises:
        DataError: one is not what it was when `stamps` were taken, so that other content may have been read.
    """
    entries = [_fingerprint(path) for path in _input_files(config)]
    for entry in entries:
        if (entry["bytes"], entry["mtime_ns"]) != stamps.get(entry["path"]):
            raise DataError(f"{entry['path']} was changed while it was being read: run prepare again")
    return entries


def _fingerprint(path: str) -> dict[str, Any]:
    status = os.stat(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


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
    recorded = {entry["path"]: entry for entry in previous["provenance"]["inputs"]}
    stamps = _stamps(config)
    if set(recorded) != set(_input_files(config)) or set(recorded) != set(stamps):
        return False
    return all(
        stamps[path] == (entry["bytes"], entry["mtime_ns"])
        or (stamps[path][0] == entry["bytes"] and _fingerprint(path)["sha256"] == entry["sha256"])
        for path, entry in recorded.items()
    )


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it takes that place on success, and is removed on failure.

    Raises:
        FileError: the disk is full, or the parent folder cannot be written.
    """
    prefix = f".{folder.name}.preparing-{socket.gethostname()}-"
    stage = folder.parent / f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent, prefix)
        stage.mkdir()
        yield stage
        _put_in_place(stage, folder)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        cause = error.__cause__ if isinstance(error, FileError) and error.__cause__ else error
        told = write_error(cause, folder)  # names the folder asked for, not a file of the stage
        if told is not None:
            raise told from cause
        raise


def _put_in_place(stage: Path, folder: Path) -> None:
    """Rename the finished folder; an old dataset steps aside first, and is removed last."""
    if folder.is_dir() and any(folder.iterdir()):
        aside = stage.with_name(f"{stage.name}-old")
        os.rename(folder, aside)
        try:
            os.rename(stage, folder)
        except OSError:
            os.rename(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(stage, folder)


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove what a killed prepare of the same folder left on this machine; a living one's is left alone."""
    # Exactly our names: a host called "node" must leave alone what one called "node-1" is at.
    own = re.compile(rf"{re.escape(prefix)}(\d+)-[0-9a-f]{{8}}(-old)?")
    for entry in parent.iterdir():
        found = own.fullmatch(entry.name)
        if found is not None and not _alive(int(found[1])):
            say(f"removing {entry.name}, which a prepare that was killed left behind")
            shutil.rmtree(entry, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
