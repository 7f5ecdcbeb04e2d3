"""One track of a dataset, converted on its own: a file of its stored bins, its statistics, and what it was made from.

`prepare` converts tracks in several processes, keeps what is finished when it is killed, and puts the columns
together at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from genossm import __version__
from genossm.config import to_mapping
from genossm.dataset_config import TrackConfig
from genossm.dataset_inputs import DatasetInputs
from genossm.errors import DataError, FileError
from genossm.hdf5_file import create_hdf5
from genossm.pipelines.check import Tally
from genossm.pipelines.worker_pool import Advance
from genossm.scaling import ValueCounts
from genossm.storage import Coding, RelativeError, ValueRange, choose_coding
from genossm.targets import Intervals

if TYPE_CHECKING:
    import h5py

COLUMN_VERSION = 1
CHUNK_BINS = 1 << 16
BLOCK_BINS = 1 << 22
COMPRESSION: dict[str, Any] = {
    "compression": "gzip",
    "compression_opts": 1,
    "shuffle": True,
    "fletcher32": True,
}

Stamps = Mapping[str, tuple[int, int]]
"""Size and time of change of files."""
Validity = Literal["all", "none", "some"]


@dataclass(frozen=True)
class ChromosomeTask:
    """What `measure_chromosome` needs; the result goes to `usable_path`."""

    inputs: DatasetInputs
    chrom: str
    usable_path: Path


@dataclass(frozen=True)
class ColumnTask:
    """What `convert_column` needs: the inputs of this track, where the usable bins lie, the file to write.

    `stamps` are those of the track's files, or None to leave out the files' hashes.
    """

    inputs: DatasetInputs
    track: TrackConfig
    usable: tuple[Path, ...]
    path: Path
    stamps: Stamps | None


class Column:
    """A finished column file, read.

    Attributes:
        tallies: split to the sums over its unmasked bins.
        coding: how its values are stored.
        files: path, bytes, mtime_ns and sha256 of each file it was made from.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self._path = path
        # No chunk is read twice, and there may be hundreds of files.
        self._file: h5py.File = h5py.File(path, "r", rdcc_nbytes=0)
        content = json.loads(self._file.attrs["column"])
        self.tallies = {split: Tally(**sums) for split, sums in content["tallies"].items()}
        self.coding = Coding(**content["coding"])
        self.files: list[dict[str, Any]] = content["files"]

    def values(self, chrom: str, start_bin: int, stop_bin: int) -> npt.NDArray[Any]:
        """The stored numbers of bins of a chromosome."""
        return self._read(f"{chrom}/values", start_bin, stop_bin)

    def validity(self, chrom: str) -> Validity:
        """Which bins of a chromosome have a value, whatever is excluded."""
        validity: Validity = self._file[chrom].attrs["valid"]
        return validity

    def valid(self, chrom: str, start_bin: int, stop_bin: int) -> npt.NDArray[np.bool_]:
        """bool (bins,) where `validity` is "some"."""
        return self._read(f"{chrom}/valid", start_bin, stop_bin).astype(np.bool_)

    @cached_property
    def counts(self) -> ValueCounts:
        """The unmasked values of the training bins (of all bins where none is for training), of a track with a scale."""
        return ValueCounts(self._file["counts"][:], self._file["sums"][:])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        try:
            values: npt.NDArray[Any] = self._file[name][start:stop]
        except OSError as error:
            self._path.unlink(missing_ok=True)
            raise FileError(
                f"the finished column {self._path} is damaged at {name} ({error}); it was removed: run the command "
                "again, and look after the disk"
            ) from error
        return values


def is_finished(path: Path) -> bool:
    """Whether a column file is there; one that cannot be opened is removed."""
    try:
        Column(path).close()
    except FileNotFoundError:
        return False
    except (OSError, KeyError, ValueError, TypeError):
        path.unlink()
        return False
    return True


def column_key(inputs: DatasetInputs, track: TrackConfig, stamps: Stamps) -> str:
    """A name for the column of a track that changes with everything that its content depends on."""
    config = inputs.config
    content = {
        "version": (COLUMN_VERSION, __version__),
        "genome": inputs.genome.sha256,
        "chromosomes": inputs.lengths,
        "splits": inputs.splits,
        "bin": config.window.bin,
        "exclude": [(path, stamps.get(path)) for path in config.exclude],
        "names": (config.chrom_names, config.unknown),
        "storage": config.storage,
        "track": {key: value for key, value in to_mapping(track).items() if key != "metadata"},
        "files": [(path, stamps.get(path)) for path in track.input_files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def of_tracks(inputs: DatasetInputs, names: Iterable[str]) -> DatasetInputs:
    """The inputs with the files of these tracks alone, small enough to be sent to another process."""
    wanted = set(names)
    return replace(
        inputs,
        peak_files={name: item for name, item in inputs.peak_files.items() if name in wanted},
        signals={name: item for name, item in inputs.signals.items() if name in wanted},
        signal_names={name: item for name, item in inputs.signal_names.items() if name in wanted},
        files=(),
        notes=(),
    )


def measure_chromosome(task: ChromosomeTask, advance: Advance) -> Intervals:
    """Write which bins of a chromosome are usable, and return what is excluded, (starts, ends) in bp."""
    usable = task.inputs.usable(task.chrom)
    with task.usable_path.open("wb") as file:
        file.write(usable.astype(np.uint8).data)
    advance(task.inputs.lengths[task.chrom])
    return task.inputs.excluded(task.chrom)


def read_usable(path: Path) -> npt.NDArray[np.bool_]:
    """bool (bins,): what `measure_chromosome` wrote."""
    return np.fromfile(path, dtype=np.bool_)


def convert_column(task: ColumnTask, advance: Advance) -> None:
    """Write the column file of a track, complete or not at all.

    The values are read once, to a scratch file, and stored when their range is known; memory is that of one
    chromosome.

    Raises:
        DataError: the values cannot be stored as asked, or a file was changed meanwhile.
        OSError: the disk is full.
    """
    scratch, temporary = task.path.with_suffix(".values"), task.path.with_suffix(".tmp")
    try:
        with scratch.open("w+b", buffering=0) as raw, create_hdf5(temporary) as (file, flush):
            content = _Converter(task).run(raw, file, flush, advance)
            hashed = () if task.stamps is None else task.track.input_files
            content["files"] = [unchanged_fingerprint(path, task.stamps or {}) for path in hashed]
            file.attrs["column"] = json.dumps(content)
        os.replace(temporary, task.path)
    finally:
        scratch.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)


class _Converter:
    """The two passes over a track."""

    def __init__(self, task: ColumnTask) -> None:
        self._task = task
        self._inputs, self._track = task.inputs, task.track
        self._tallies: dict[str, Tally] = {}
        self._range, self._counts = ValueRange(), ValueCounts()
        self._valid: dict[str, tuple[Validity, npt.NDArray[np.uint8]]] = {}
        # Peaks are 0 and 1 whatever comes: a quarter of the scratch file.
        self._scratch = np.dtype(np.uint8 if task.track.kind == "peaks" else np.float32)

    def run(self, raw: Any, file: h5py.File, flush: Any, advance: Advance) -> dict[str, Any]:
        """Read all values to `raw`, then store them in `file`; what is known of them."""
        for number, (chrom, length_bp) in enumerate(self._inputs.lengths.items()):
            self._read(number, chrom, raw)
            advance(length_bp)
        coding = choose_coding(self._inputs.config.storage, self._range, track=self._track.name)
        error = RelativeError()
        raw.seek(0)
        for chrom in self._inputs.lengths:
            self._store(chrom, raw, file.create_group(chrom), coding, error)
            flush()
        if self._track.scale is not None:
            for name, array in (("counts", self._counts.counts), ("sums", self._counts.sums)):
                file.create_dataset(name, data=array, chunks=True, **COMPRESSION)
        return {
            "track": self._track.name,
            "tallies": {split: asdict(tally) for split, tally in self._tallies.items()},
            "coding": asdict(error.of(coding)),
        }

    def _read(self, number: int, chrom: str, raw: Any) -> None:
        values, valid = self._inputs.column(chrom, self._track)
        mask = read_usable(self._task.usable[number]) & valid
        split = self._inputs.split_of(chrom)
        fitted_on = self._inputs.splits["train"] or self._inputs.lengths
        for start in range(0, values.size, BLOCK_BINS):
            block, kept = values[start : start + BLOCK_BINS], mask[start : start + BLOCK_BINS]
            sums = Tally()
            sums.add(block, kept)
            for name in ("all", split):
                self._tallies[name] = _together(self._tallies.get(name, Tally()), sums)
            self._range.add(block)
            if self._track.scale is not None and chrom in fitted_on:
                self._counts.add(block[kept])
            _write_all(raw, block.astype(self._scratch))
        validity: Validity = "all" if valid.all() else "some" if valid.any() else "none"
        self._valid[chrom] = validity, np.packbits(valid if validity == "some" else valid[:0])

    def _store(self, chrom: str, raw: Any, group: h5py.Group, coding: Coding, error: RelativeError) -> None:
        bins = -(-self._inputs.lengths[chrom] // self._inputs.config.window.bin)
        group.attrs["valid"], packed = self._valid.pop(chrom)
        chunks = (min(CHUNK_BINS, bins),)
        if packed.size:
            valid = np.unpackbits(packed, count=bins)
            group.create_dataset("valid", data=valid, chunks=chunks, **COMPRESSION)
        stored = group.create_dataset("values", (bins,), coding.dtype, chunks=chunks, **COMPRESSION)
        for start in range(0, bins, BLOCK_BINS):
            values = np.fromfile(raw, dtype=self._scratch, count=min(BLOCK_BINS, bins - start))
            if self._scratch == np.uint8:
                stored[start : start + BLOCK_BINS] = values
            else:
                numbers = coding.encode(values)
                error.add(values, coding.decode(numbers))
                stored[start : start + BLOCK_BINS] = numbers


def _together(first: Tally, second: Tally) -> Tally:
    return Tally(
        bins=first.bins + second.bins,
        unmasked=first.unmasked + second.unmasked,
        total=first.total + second.total,
        squares=first.squares + second.squares,
        highest=max(first.highest, second.highest),
    )


def stamps_of(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file that is there."""
    files = {path: os.stat(path) for path in paths if os.path.isfile(path)}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in files.items()}


def fingerprint(path: str) -> dict[str, Any]:
    """Path, size, time and hash of a file."""
    status = os.stat(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


def unchanged_fingerprint(path: str, stamps: Stamps) -> dict[str, Any]:
    """The fingerprint of a file that is still as it was when `stamps` were taken.

    Raises:
        DataError: it is not, so that other content may have been read.
    """
    entry = fingerprint(path)
    if (entry["bytes"], entry["mtime_ns"]) != stamps.get(path):
        raise DataError(f"{path} was changed while it was being read: run prepare again")
    return entry


def _write_all(raw: Any, array: npt.NDArray[Any]) -> None:
    """An unbuffered file may take a part of what it is given."""
    left = array.data.cast("B")
    while left.nbytes:
        left = left[raw.write(left) :]
