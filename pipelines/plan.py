"""The plan of a prediction: all that its parts and their merger need, without the model and the genome."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genossm.atomic import atomic_write_text
from genossm.errors import ConfigError, DataError
from genossm.pipelines.selection import Selection, selection_of, whole_chromosomes

PARTS_FOLDER = ".parts"
PLAN_FILE = "plan.json"
FORMAT = "genossm-plan/1"
SMALLEST_PART_WINDOWS = {"cpu": 8, "cuda": 32}
SMALLEST_PART_BP = 1 << 20
MOST_PARTS = 2048


@dataclass(frozen=True, slots=True)
class PlannedTrack:
    """A column of the values: what it is, and the range [low, high] of what it can mean, None without an end."""

    name: str
    kind: Literal["peaks", "signal"]
    aggregate: str
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What is made of the values: `hdf5` the type of its numbers or None; `thresholds` of the tracks that are called."""

    hdf5: Literal["float16", "float32"] | None
    sequences: bool
    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """What is predicted, in which parts, and what is made of them. It is `.parts/plan.json` in the output folder.

    Attributes:
        identity: what decides every value: model, genome, geometry, selection, precision.
        tracks: the columns.
        lengths: chromosome lengths in bp, in genome order.
        bins: wanted bins, see `Selection.bins`, as lists.
        window_bp, margin_bp, bin_bp: geometry.
        whole: whole chromosomes are windows.
        part_bp: a part ends with the window that brings what its windows read to this many bases.
        options: what is made of the values.
        assembly: of the model.
        record: what run.json says of all of it, whichever job makes which part.
        command: the words of the command that makes it in one piece.
        overlap_bp: base pairs of target that neighbouring windows share.
    """

    identity: Mapping[str, Any]
    tracks: tuple[PlannedTrack, ...]
    lengths: Mapping[str, int]
    bins: Mapping[str, Sequence[Sequence[int]]]
    window_bp: int
    margin_bp: int
    bin_bp: int
    whole: bool
    part_bp: int
    options: OutputOptions
    assembly: str
    record: Mapping[str, Any]
    command: tuple[str, ...]
    overlap_bp: int = 0

    @cached_property
    def selection(self) -> Selection:
        """Bins and windows; the same wherever it is asked for."""
        ranges = {chrom: np.array(rows, dtype=np.int64).reshape(-1, 2) for chrom, rows in self.bins.items()}
        selection = selection_of(
            self.lengths,
            ranges,
            window_bp=self.window_bp,
            margin_bp=self.margin_bp,
            bin_bp=self.bin_bp,
            overlap_bp=self.overlap_bp,
        )
        return whole_chromosomes(selection) if self.whole else selection

    @cached_property
    def key(self) -> str:
        """A short name of the identity, which every part carries."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def bin_total(self) -> int:
        """Wanted bins."""
        return sum(stop - first for rows in self.bins.values() for first, stop in rows)

    def file_names(self) -> list[str]:
        """The names of the files that come of it, beside run.json."""
        if self.options.sequences:
            return ["sequences.h5"]
        names = [f"{track.name}.bw" for track in self.tracks]
        names += [f"{name}.narrowPeak" for name in self.options.thresholds]
        return [*names, *(["predictions.h5"] if self.options.hdf5 else []), "qc.bed"]


def part_size(
    windows: int,
    window_bp: int,
    total_bp: int,
    *,
    whole: bool,
    device: str,
    batch_size: int,
    overlap: bool = False,
) -> int:
    """`Plan.part_bp` of a new prediction: small enough to lose little by a kill, and 2,048 parts at most.

    Windows: 8 on a CPU and 32 on CUDA, or more, in full batches. Of windows that overlap one less: the one before them
    is computed with them. Whole chromosomes: a million bases, or more.
    """
    if whole:
        return max(SMALLEST_PART_BP, -(-total_bp // MOST_PARTS))
    count = max(SMALLEST_PART_WINDOWS[device], -(-windows // MOST_PARTS) + overlap)
    return max(1, -(-count // batch_size) * batch_size - overlap) * window_bp


def command_words(runs: Sequence[str], **options: Any) -> Iterator[str]:
    """The words of a `genossm predict` with these options, None and False left out."""
    yield from ("genossm", "predict", *runs)
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            yield flag
        elif value is not None and value is not False:
            for item in value if isinstance(value, list | tuple) else [value]:
                yield from (flag, str(item))


def settle(folder: Path, plan: Plan, *, shard: bool, force: bool) -> Plan:
    """Make `plan` that of the parts in `folder`, or join the one that is there for the same values; keeps its parts.

    Jobs that come at the same moment agree: the first to write is joined by the others.

    Raises:
        DataError: the folder holds parts of another prediction and `force` was not given.
        ConfigError: another shard was told to make other files of the same values.
    """
    while True:
        try:
            stored = read_plan(folder)
        except DataError:
            if not force:
                raise
            discard(folder)
            continue
        if stored is None:
            if _write_first(folder / PARTS_FOLDER / PLAN_FILE, plan):
                return plan
        elif stored.key == plan.key:
            return _join(folder / PARTS_FOLDER / PLAN_FILE, stored, plan, shard)
        elif force:
            discard(folder)
        else:
            raise DataError(
                f"{folder} holds an unfinished prediction of another model, genome or selection: "
                "choose another folder, or give force (--force) to discard it"
            )


def read_plan(folder: Path) -> Plan | None:
    """The plan in an output folder, None where there is none (any more).

    Raises:
        DataError: it is damaged, or of another version of genossm.
    """
    path = folder / PARTS_FOLDER / PLAN_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged: delete {path.parent} and run again") from error
    if stored.pop("format", None) != FORMAT:
        raise DataError(
            f"{path} is of another version of genossm: finish it with that one, or delete {path.parent} and run again"
        )
    stored["tracks"] = tuple(PlannedTrack(**track) for track in stored["tracks"])
    stored["options"] = OutputOptions(**stored["options"])
    stored["command"] = tuple(stored["command"])
    return Plan(**stored)


def discard(folder: Path) -> None:
    """Delete all parts in `folder` at once: a job that still writes one finds no plan, and stops."""
    doomed = folder / f"{PARTS_FOLDER}.{uuid.uuid4().hex[:8]}"
    try:
        (folder / PARTS_FOLDER).rename(doomed)
    except FileNotFoundError:  # another job was first
        return
    for left in folder.glob(f"{PARTS_FOLDER}.{'?' * 8}"):  # of a process that was killed in here, too
        shutil.rmtree(left, ignore_errors=left != doomed)


def _join(path: Path, stored: Plan, plan: Plan, shard: bool) -> Plan:
    joined = replace(plan, part_bp=stored.part_bp)
    if stored.options == plan.options:
        return joined
    if shard:
        raise ConfigError(
            f"the plan {path} makes other files ({_words(stored.options)}) than this shard was told to "
            f"({_words(plan.options)}): give all shards the same options, or delete {path.parent} first"
        )
    atomic_write_text(path, _text(joined))
    return joined


def _write_first(path: Path, plan: Plan) -> bool:
    """Write the plan unless another job's is there by now; a link is made once, on a shared file system, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{PLAN_FILE}.{uuid.uuid4().hex}.tmp")
    atomic_write_text(temporary, _text(plan))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.replace(
            temporary, path
        )  # a file system without links: of plans made at one moment the last one stays
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _text(plan: Plan) -> str:
    return json.dumps({"format": FORMAT, **asdict(plan)})


def _words(options: OutputOptions) -> str:
    called = ", ".join(f"{name} called at {value:g}" for name, value in options.thresholds.items())
    return f"HDF5: {options.hdf5 or 'none'}; regions: {called or 'none'}"
