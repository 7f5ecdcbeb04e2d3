"""How large a prepared dataset will be and how long it takes, measured on a piece of it before the work starts."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from genossm.amounts import duration_text, size_text
from genossm.dataset_config import TrackConfig
from genossm.dataset_inputs import DatasetInputs
from genossm.interval import bin_count
from genossm.pipelines.prepare_columns import (
    ChromosomeTask,
    Column,
    ColumnTask,
    convert_column,
    measure_chromosome,
    of_tracks,
)
from genossm.pipelines.prepare_targets import is_compressed, write_targets
from genossm.storage import DtypeName, common_dtype

_SAMPLED_TRACKS = 3
_SMALLEST_SHARE = 0.01
_HASHED_BYTES = 1 << 24


@dataclass(frozen=True)
class Estimate:
    """What `prepare` expects to do, if all tracks are like those sampled; sizes in bytes.

    `dataset_bytes` is what the dataset takes, `working_bytes` what lies beside it while it is made, `free_bytes`
    the room there is. `seconds` is the time from the opened inputs on.
    """

    tracks: int
    bins: int
    windows: int
    dtype: DtypeName
    compressed: bool
    dataset_bytes: int
    working_bytes: int
    free_bytes: int
    seconds: float
    jobs: int
    finished: int
    sample: str

    @property
    def fits(self) -> bool:
        """Whether the disk has the room."""
        return self.dataset_bytes + self.working_bytes <= self.free_bytes

    def text(self) -> str:
        """The estimate in two lines for people."""
        form = f"{self.dtype}, {'compressed' if self.compressed else 'uncompressed'}"
        there = f" ({self.finished} of the tracks are there already)" if self.finished else ""
        return (
            f"{self.tracks} tracks x {self.bins:,} bins in {self.windows:,} windows: about "
            f"{size_text(self.dataset_bytes)} on the disk ({form}), {size_text(self.working_bytes)} more while it is made; "
            f"{size_text(self.free_bytes)} are free\n"
            f"about {duration_text(self.seconds)} with {self.jobs} process{'es' if self.jobs > 1 else ''}{there}, "
            f"measured on {self.sample}"
        )


def estimate_work(
    inputs: DatasetInputs, folder: Path, *, windows: int, jobs: int, finished: Collection[str] = ()
) -> Estimate:
    """Prepare a few tracks of each kind on one chromosome, and take the rest to be like them.

    Args:
        inputs: of all tracks.
        folder: where the dataset will be.
        windows: how many there are.
        jobs: processes at work.
        finished: names of the tracks whose column is there already.
    """
    config = inputs.config
    bins = sum(bin_count(length_bp, config.window.bin) for length_bp in inputs.lengths.values())
    chrom = _sample_chromosome(inputs)
    alike: dict[str, list[TrackConfig]] = {}
    for track in config.tracks:
        alike.setdefault(track.kind, []).append(track)
    sampled = {kind: _spread(tracks) for kind, tracks in alike.items()}
    with tempfile.TemporaryDirectory(prefix="genossm-estimate-") as scratch:
        sample = _Sample(inputs, chrom, Path(scratch))
        for tracks in sampled.values():
            for track in tracks:
                sample.convert(track)
        sample.write(bins)
    seconds, working, peaks = 0.0, 0.0, 0.0
    for kind, tracks in sampled.items():
        waiting = sum(track.name not in finished for track in alike[kind])
        seconds += waiting * float(np.median([sample.seconds[track.name] for track in tracks]))
        working += len(alike[kind]) * float(np.mean([sample.column_bytes[track.name] for track in tracks]))
        peaks += len(alike[kind]) * float(np.mean([sample.peak_bytes.get(track.name, 0) for track in tracks]))
    scale = bins / bin_count(inputs.lengths[chrom], config.window.bin)
    values = bins * len(config.tracks)
    hash_seconds = _hash_seconds([path for track in config.tracks for path in track.input_files])
    return Estimate(
        tracks=len(config.tracks),
        bins=bins,
        windows=windows,
        dtype=sample.dtype,
        compressed=sample.compressed,
        dataset_bytes=round(sample.value_bytes * values + peaks * scale),
        working_bytes=round(working * scale),
        free_bytes=shutil.disk_usage(_existing(folder)).free,
        seconds=(seconds * scale + hash_seconds) / jobs + sample.value_seconds * values,
        jobs=jobs,
        finished=len(finished),
        sample=f"{', '.join(sample.seconds)} on {chrom}",
    )


class _Sample:
    """The same work on one chromosome and a few tracks, in a folder that is then thrown away.

    Attributes:
        seconds, column_bytes, peak_bytes: of each track that was converted; the last of peaks only.
        dtype, compressed: of all targets, if all tracks are like these.
        value_bytes, value_seconds: of a stored target.
    """

    def __init__(self, inputs: DatasetInputs, chrom: str, scratch: Path) -> None:
        splits = {split: tuple({chrom} & set(names)) for split, names in inputs.splits.items()}
        self._inputs = replace(inputs, lengths={chrom: inputs.lengths[chrom]}, splits=splits)
        self._chrom, self._scratch = chrom, scratch
        self._usable = scratch / "usable"
        self._excluded = measure_chromosome(ChromosomeTask(self._inputs, chrom, self._usable), lambda _: None)
        self._tracks: list[TrackConfig] = []
        self.seconds: dict[str, float] = {}
        self.column_bytes: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}

    def convert(self, track: TrackConfig) -> None:
        """Make the column of a track."""
        path = self._path(track)
        task = ColumnTask(of_tracks(self._inputs, [track.name]), track, (self._usable,), path, None)
        started = time.perf_counter()
        convert_column(task, lambda _: None)
        self._tracks.append(track)
        self.seconds[track.name] = time.perf_counter() - started
        self.column_bytes[track.name] = path.stat().st_size

    def write(self, bins: int) -> None:
        """Put the columns together as in a dataset of `bins`."""
        path, columns = self._scratch / "targets.h5", [Column(self._path(track)) for track in self._tracks]
        self.dtype = common_dtype(self._inputs.config.storage, [column.coding for column in columns])
        self.compressed = is_compressed(self._inputs, bins, self.dtype)
        started = time.perf_counter()
        write_targets(
            path,
            self._inputs,
            self._tracks,
            columns,
            [self._usable],
            {self._chrom: self._excluded},
            dtype=self.dtype,
            compressed=self.compressed,
            advance=lambda _: None,
        )
        seconds = time.perf_counter() - started
        for column in columns:
            column.close()
        with h5py.File(path, "r") as file:
            targets, peaks = file[f"{self._chrom}/targets"], file[f"{self._chrom}/peaks"]
            self.value_bytes = targets.id.get_storage_size() / targets.size
            self.value_seconds = seconds / targets.size
            self.peak_bytes = {name: item.id.get_storage_size() for name, item in peaks.items()}

    def _path(self, track: TrackConfig) -> Path:
        return self._scratch / f"{track.name}.h5"


def _sample_chromosome(inputs: DatasetInputs) -> str:
    """The shortest that is no scrap: at least 1 % of the genome."""
    least = _SMALLEST_SHARE * sum(inputs.lengths.values())
    return min(
        (chrom for chrom, length in inputs.lengths.items() if length >= least), key=inputs.lengths.__getitem__
    )


def _spread(tracks: Sequence[TrackConfig]) -> list[TrackConfig]:
    """A few of the tracks, from the first to the last."""
    chosen = np.linspace(0, len(tracks) - 1, min(len(tracks), _SAMPLED_TRACKS)).round().astype(int)
    return [tracks[index] for index in chosen]


def _hash_seconds(paths: Sequence[str]) -> float:
    """How long hashing the files takes, once they are in memory."""
    block = bytes(_HASHED_BYTES)
    started = time.perf_counter()
    hashlib.sha256(block).digest()
    return sum(os.path.getsize(path) for path in paths) * (time.perf_counter() - started) / len(block)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
