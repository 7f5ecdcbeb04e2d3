"""Predictions in parts: files that appear complete, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genossm.atomic import atomic_path
from genossm.errors import GenossmError
from genossm.pipelines.plan import PARTS_FOLDER, PLAN_FILE, Plan
from genossm.progress import say
from genossm.windows import Window

SUFFIX = ".safetensors"
Compute = Callable[[Sequence[Sequence[Window]]], Iterator[npt.NDArray[np.float32]]]
Spans = list[list[Any]]


class PredictionStopped(GenossmError, InterruptedError):
    """A prediction was asked to stop, and did after the part in hand: run it again to go on."""


class PartsGone(GenossmError, OSError):
    """The parts were merged or discarded by another process while this one made one."""


class Parts:
    """The part files of one prediction in `folder`/.parts; part i holds a run of consecutive windows.

    A part is a safetensors file with `values`, float32 (tracks, bins): the target bins of its windows, one after the
    other. It says itself which bins these are, of which prediction, and its checksum. Parts depend on the plan alone,
    not on who makes them: jobs may make the same part at the same time, and the last one's stays.

    Args:
        folder: the output folder.
        plan: what is predicted.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder / PARTS_FOLDER
        self.plan = plan
        self.selection = selection = plan.selection
        self.groups = _grouped(selection.windows, plan.part_bp)
        # Per chromosome where its windows lie: (part, column in it, first bin, past-the-last bin).
        self._places: dict[str, list[tuple[int, int, int, int]]] = {}
        for index, group in enumerate(self.groups):
            column = 0
            for window in group:
                first, stop = selection.target_bins(window)
                self._places.setdefault(window.chrom, []).append((index, column, first, stop))
                column += stop - first
        self._opened = lru_cache(maxsize=1)(self._open)  # neighbouring chromosomes share a part

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def bases_read(self) -> list[int]:
        """Bases that the windows of each part read: what it costs, unlike the bases it covers."""
        return [sum(window.length_bp for window in group) for group in self.groups]

    def bases(self, indices: Sequence[int]) -> int:
        """Bases that the targets of some parts cover."""
        return sum(self.selection.target_bp_of(window) for index in indices for window in self.groups[index])

    def complete(
        self,
        compute: Compute,
        advance: Callable[[int], object],
        *,
        indices: Sequence[int] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> int:
        """Compute the parts that are not there yet and return how many were there already.

        `compute` is given the windows of all missing parts, a group for each, and yields one array (target bins,
        tracks) per window. Parts are written while the next one is computed.

        Args:
            compute: makes values; reports its own progress.
            advance: told the base pairs of parts that are there.
            indices: which parts; all by default.
            stopped: asked before each part whether to go on.

        Raises:
            PredictionStopped: `stopped` said so; all that was computed is written.
            PartsGone: another process merged or discarded the parts.
        """
        missing = []
        for index in range(len(self)) if indices is None else indices:
            if self._found(index):
                advance(self.bases([index]))
            else:
                missing.append(index)
        there = len(self if indices is None else indices) - len(missing)
        blocks = compute([self.groups[index] for index in missing])
        with ThreadPoolExecutor(1, thread_name_prefix="parts") as writer:
            written: Future[None] | None = None
            for done, index in enumerate(missing):
                if stopped():
                    if written is not None:
                        written.result()
                    raise PredictionStopped(
                        f"stopped after the part in hand, as asked: {there + done} of {there + len(missing)} parts are "
                        f"in {self.folder}; run the same command again to go on"
                    )
                values = np.concatenate([next(blocks) for _ in self.groups[index]])
                if written is not None:
                    written.result()
                written = writer.submit(self._write, index, values)
            if written is not None:
                written.result()
        return there

    def fault(self, index: int) -> str:
        """What is wrong with a part in a few words ("" where it is complete)."""
        path = self.path(index)
        spans = self._spans(index)
        shape = (len(self.plan.tracks), sum(stop - first for _, first, stop in spans))
        try:
            with safe_open(path, framework="numpy") as stored:
                said = stored.metadata() or {}
                if said.get("identity") != self.plan.key:
                    return "is of another prediction"
                if json.loads(said["spans"]) != spans:
                    return f"is one doubled: it holds what is at {_where(json.loads(said['spans']))}"
                values = stored.get_tensor("values")
        except FileNotFoundError:
            return "is missing"
        except (SafetensorError, OSError, KeyError, ValueError):
            return "is truncated or damaged"
        if values.shape != shape or values.dtype != np.float32:
            return f"has values {values.dtype} {values.shape} and not float32 {shape}"
        return "" if said.get("crc32") == _checksum(values) else "has a wrong checksum"

    def where(self, index: int) -> str:
        """The stretch of a part: "chrI:0-98304" up to its last window."""
        return _where(self._spans(index), self.plan)

    def strangers(self) -> list[Path]:
        """Files of values that are not among the parts: copies under another name, or leftovers."""
        known = {self.path(index) for index in range(len(self))}
        return sorted(path for path in self.folder.glob(f"*{SUFFIX}") if path not in known)

    def coverage(self) -> dict[str, Counter[tuple[int, int]]]:
        """Per chromosome, how often each range of bins is in the parts, as the files themselves say."""
        found: dict[str, Counter[tuple[int, int]]] = {}
        for index in range(len(self)):
            with safe_open(self.path(index), framework="numpy") as stored:
                for chrom, first, stop in json.loads(stored.metadata()["spans"]):
                    found.setdefault(chrom, Counter())[first, stop] += 1
        return found

    def track(self, chrom: str, track: int) -> npt.NDArray[np.float32]:
        """float32 (bins,) of one track on a whole chromosome; bins that were not asked for are NaN."""
        selection = self.selection
        values = np.full(-(-selection.lengths[chrom] // selection.bin_bp), np.nan, dtype=np.float32)
        for index, places in groupby(self._places[chrom], key=itemgetter(0)):
            stored = self._opened(index)
            for _, column, first, stop in places:
                values[first:stop] = stored[track, column : column + stop - first]
        values[~selection.wanted(chrom)] = np.nan
        return values

    def slices(self, chrom: str) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(first bin, float32 (bins, tracks)) of each window on a chromosome; bins not asked for are NaN."""
        wanted = self.selection.wanted(chrom)
        for index, places in groupby(self._places[chrom], key=itemgetter(0)):
            stored = self._opened(index)
            for _, column, first, stop in places:
                block = stored[:, column : column + stop - first].T.copy()
                block[~wanted[first:stop]] = np.nan
                yield first, block

    def path(self, index: int) -> Path:
        """The file of a part."""
        return self.folder / f"{index:06d}{SUFFIX}"

    def _open(self, index: int) -> Any:
        return safe_open(self.path(index), framework="numpy").get_slice("values")  # type: ignore[no-untyped-call]

    def _spans(self, index: int) -> Spans:
        return [[window.chrom, *self.selection.target_bins(window)] for window in self.groups[index]]

    def _found(self, index: int) -> bool:
        fault = self.fault(index)
        if fault and fault != "is missing":
            say(f"{self.path(index)} {fault}; computing it again")
        return not fault

    def _write(self, index: int, values: npt.NDArray[np.float32]) -> None:
        stored = np.ascontiguousarray(values.T)
        said = {
            "identity": self.plan.key,
            "spans": json.dumps(self._spans(index)),
            "crc32": _checksum(stored),
        }
        content = save({"values": stored}, said)
        gone = PartsGone(
            f"{self.folder} was merged or discarded by another process while this one made a part of it"
        )
        if not (self.folder / PLAN_FILE).is_file():
            raise gone
        try:
            with atomic_path(self.path(index)) as temporary:
                temporary.write_bytes(content)  # written here: a full disk is then an OSError
        except FileNotFoundError as error:
            raise gone from error


def _grouped(windows: Sequence[Window], part_bp: int) -> list[Sequence[Window]]:
    """Runs of windows, each ended by the one that brings the bases it reads to `part_bp`."""
    groups: list[Sequence[Window]] = []
    first = size = 0
    for number, window in enumerate(windows, start=1):
        size += window.length_bp
        if size >= part_bp or number == len(windows):
            groups.append(windows[first:number])
            first, size = number, 0
    return groups


def _checksum(values: npt.NDArray[np.float32]) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(values).data):08x}"


def _where(spans: Spans, plan: Plan | None = None) -> str:
    """Where the bins begin and end: in bases where the plan is known, else in bins."""
    (chrom, first, _), (last, _, end) = spans[0], spans[-1]
    if plan is None:
        return f"{chrom} from bin {first:,}"
    end_bp = min(end * plan.bin_bp, plan.lengths[last])
    return f"{chrom}:{first * plan.bin_bp}-" + (f"{end_bp}" if last == chrom else f"{last}:{end_bp}")
