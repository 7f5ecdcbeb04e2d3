"""Predictions in parts: files that appear complete, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.errors import DataError, FileError, GenossmError
from genossm.interval import merge
from genossm.outputs.hdf5 import CHUNK_BINS
from genossm.pipelines.part_file import NotedRuns, PartFile, Runs, write_part
from genossm.pipelines.plan import PARTS_FOLDER, PLAN_FILE, Plan
from genossm.progress import say
from genossm.windows import Window

SUFFIX = ".safetensors"
PIECE_BINS = 1 << 18
"""Bins of a track that are read at once. Pieces lie on a fixed grid: what is made of them depends on no part's size."""
PIECE_VALUES = 1 << 20
"""Values of all tracks together that are read at once."""
Compute = Callable[[Sequence[Sequence[Window]]], Iterator[npt.NDArray[np.float32]]]
Spans = list[list[Any]]
_Place = tuple[int, int, int, int]
"""(part, column in it, first bin, past-the-last bin)."""


class PredictionStopped(GenossmError, InterruptedError):
    """A prediction was asked to stop, and did after the part in hand: run it again to go on."""


class PartsGone(GenossmError, OSError):
    """The parts were merged or discarded by another process while this one made one."""


class Parts:
    """The part files of one prediction in `folder`/.parts; part i holds a run of consecutive windows.

    A part is a safetensors file with `values`, float32 (tracks, bins): the target bins of its windows, one after the
    other. It says itself which bins these are, of which prediction, its checksum, and of whole chromosomes what was noted
    of their bins. Parts depend on the plan alone, not on who makes them: jobs may make the same part at the same time, and
    the last one's stays.

    Args:
        folder: the output folder.
        plan: what is predicted.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder / PARTS_FOLDER
        self.plan = plan
        self.selection = selection = plan.selection
        self.groups = _grouped(selection.windows, plan.part_bp)
        self._places: dict[str, list[_Place]] = {}  # per chromosome, where its windows lie
        for index, group in enumerate(self.groups):
            column = 0
            for window in group:
                first, stop = selection.target_bins(window)
                places = self._places.setdefault(window.chrom, [])
                if places and places[-1][0] == index and places[-1][3] == first:  # read both at once
                    _, begin, first, _ = places.pop()
                    places.append((index, begin, first, stop))
                    column = begin + stop - first
                else:
                    places.append((index, column, first, stop))
                    column += stop - first
        # Pieces of some parts, and neighbouring chromosomes, share one.
        self._opened = lru_cache(maxsize=4)(lambda index: PartFile(self.path(index)))

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def bases_read(self) -> list[int]:
        """Bases that the windows of each part read, and those they overlap: what it costs, unlike the bases it covers."""
        return [sum(window.length_bp for window in self.selection.needed(group)) for group in self.groups]

    def bases(self, indices: Sequence[int]) -> int:
        """Bases that the targets of some parts cover."""
        return sum(self.selection.target_bp_of(window) for index in indices for window in self.groups[index])

    def complete(
        self,
        compute: Compute,
        advance: Callable[[int], object],
        *,
        indices: Sequence[int] | None = None,
        already: Callable[[int], object] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        noted: Mapping[str, NotedRuns] | None = None,
    ) -> int:
        """Compute the parts that are not there yet and return how many were there already.

        `compute` is given the windows of all missing parts, a group for each, and yields one array (target bins,
        tracks) per window. Parts are written while the next one is computed.

        Args:
            compute: makes values; reports its own progress.
            advance: told the base pairs of parts that are there.
            already: told instead those of parts that were there before.
            indices: which parts; all by default.
            stopped: asked before each part whether to go on.
            noted: where `compute` puts what it notes of a whole chromosome before it yields its values.

        Raises:
            PredictionStopped: `stopped` said so; all that was computed is written.
            PartsGone: another process merged or discarded the parts.
        """
        missing = []
        for index in range(len(self)) if indices is None else indices:
            if self._found(index):
                (already or advance)(self.bases([index]))
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
                values = self._gathered(index, blocks)
                if written is not None:
                    written.result()
                written = writer.submit(self._write, index, values, self._notes(index, noted or {}))
            if written is not None:
                written.result()
        return there

    def fault(self, index: int) -> str:
        """What is wrong with a part in a few words ("" where it is complete)."""
        path = self.path(index)
        spans = self._spans(index)
        shape = (len(self.plan.tracks), sum(stop - first for _, first, stop in spans))
        if not path.is_file():
            return "is missing"
        try:
            stored = PartFile(path)
            said = stored.said
            if said.get("identity") != self.plan.key:
                return "is of another prediction"
            if json.loads(said["spans"]) != spans:
                return f"is one doubled: it holds what is at {_where(json.loads(said['spans']))}"
            if stored.shape != shape or stored.dtype != np.float32:
                return f"has values {stored.dtype} {stored.shape} and not float32 {shape}"
            if self.plan.whole and "notes" not in said:
                return "is of an earlier version of genossm, without notes on states"
            return "" if said.get("crc32") == stored.checksum() else "has a wrong checksum"
        except (DataError, FileError, KeyError, ValueError):
            return "is truncated or damaged"

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
            for chrom, first, stop in json.loads(PartFile(self.path(index)).said["spans"]):
                found.setdefault(chrom, Counter())[first, stop] += 1
        return found

    def noted(self) -> Runs:
        """What the parts note of the wanted bins of each whole chromosome; runs of one note are sorted and disjoint."""
        notes: Runs = {}
        for index in range(len(self)) if self.plan.whole else ():
            for chrom, found in json.loads(PartFile(self.path(index)).said["notes"]).items():
                runs: dict[str, list[list[int]]] = {}
                for what, of_model in found:  # of several models, each one's
                    runs.setdefault(what, []).extend(of_model)
                notes[chrom] = [(what, self._inside(chrom, runs[what])) for what in sorted(runs)]
        return notes

    def digest(self) -> str:
        """A short name of all values: what is made of these parts is not made of others, nor with other options."""
        named = hashlib.sha256(json.dumps([self.plan.key, asdict(self.plan.options)]).encode())
        for index in range(len(self)):
            named.update(PartFile(self.path(index)).said["crc32"].encode())
        return named.hexdigest()[:32]

    def track(self, chrom: str, track: int) -> npt.NDArray[np.float32]:
        """float32 (bins,) of one track on a whole chromosome; bins that were not asked for are NaN."""
        selection = self.selection
        values = np.full(-(-selection.lengths[chrom] // selection.bin_bp), np.nan, dtype=np.float32)
        for first, piece in self.pieces(chrom, track):
            values[first : first + len(piece)] = piece
        return values

    def pieces(self, chrom: str, track: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(first bin, float32 (bins,)) of one track along a chromosome; bins that were not asked for are NaN, or left out."""
        for low, high, places in self._cells(chrom, PIECE_BINS):
            values = np.full(high - low, np.nan, dtype=np.float32)
            for index, column, first, stop in places:
                values[first - low : stop - low] = self._opened(index).read(
                    track, column, column + stop - first
                )
            values[~self.selection.wanted(chrom, low, high)] = np.nan
            yield low, values

    def slices(self, chrom: str) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(first bin, float32 (bins, tracks)) of stretches with windows of a chromosome; bins not asked for are NaN."""
        tracks = len(self.plan.tracks)
        cell_bins = max(1, PIECE_VALUES // tracks // CHUNK_BINS) * CHUNK_BINS
        for _, _, places in self._cells(chrom, cell_bins):
            for run in _joined(places):
                low, high = run[0][2], run[-1][3]
                block = np.empty((high - low, tracks), dtype=np.float32)
                for index, column, first, stop in run:
                    stored = self._opened(index)
                    for track in range(tracks):
                        block[first - low : stop - low, track] = stored.read(
                            track, column, column + stop - first
                        )
                block[~self.selection.wanted(chrom, low, high)] = np.nan
                yield low, block

    def _cells(self, chrom: str, most_bins: int) -> Iterator[tuple[int, int, list[_Place]]]:
        """Stretches [low, high) of bins on a grid, with what is stored of each; those without anything are left out.

        The last one takes in a rest that is shorter than half of one.
        """
        stored = self._places[chrom]
        total = -(-self.selection.lengths[chrom] // self.selection.bin_bp)
        for number in range(max(1, (total + most_bins // 2) // most_bins)):
            low = number * most_bins
            high = total if total - low < most_bins + most_bins // 2 else low + most_bins
            begin = bisect_right(stored, low, key=itemgetter(3))
            end = bisect_left(stored, high, key=itemgetter(2))
            places = [
                (index, column + max(0, low - first), max(low, first), min(high, stop))
                for index, column, first, stop in stored[begin:end]
            ]
            if places:
                yield low, high, places

    def path(self, index: int) -> Path:
        """The file of a part."""
        return self.folder / f"{index:06d}{SUFFIX}"

    def _spans(self, index: int) -> Spans:
        return [[window.chrom, *self.selection.target_bins(window)] for window in self.groups[index]]

    def _found(self, index: int) -> bool:
        fault = self.fault(index)
        if fault and fault != "is missing":
            say(f"{self.path(index)} {fault}; computing it again")
        return not fault

    def _gathered(self, index: int, blocks: Iterator[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """The values of a part as they are stored, (tracks, bins), from those of its windows."""
        spans = self._spans(index)
        values = np.empty(
            (len(self.plan.tracks), sum(stop - first for _, first, stop in spans)), dtype=np.float32
        )
        column = 0
        for _, first, stop in spans:
            values[:, column : column + stop - first] = next(blocks).T
            column += stop - first
        return values

    def _notes(self, index: int, noted: Mapping[str, NotedRuns]) -> dict[str, str]:
        """What a part says of itself beside its place: in the mode chromosome what was noted of its chromosomes."""
        if not self.plan.whole:
            return {}
        chroms = [window.chrom for window in self.groups[index]]
        return {"notes": json.dumps({chrom: noted[chrom] for chrom in chroms if noted.get(chrom)})}

    def _inside(self, chrom: str, runs: Sequence[Sequence[int]]) -> list[list[int]]:
        """The union of runs of bins, as far as the bins are wanted."""
        wanted, inside = self.selection.bins[chrom], list[list[int]]()
        for first, stop in zip(*merge(*np.array(runs, dtype=np.int64).reshape(-1, 2).T), strict=True):
            low, high = np.searchsorted(wanted[:, 1], first, "right"), np.searchsorted(wanted[:, 0], stop)
            inside += np.clip(wanted[low:high], first, stop).tolist()
        return inside

    def _write(self, index: int, values: npt.NDArray[np.float32], notes: Mapping[str, str]) -> None:
        said = {"identity": self.plan.key, "spans": json.dumps(self._spans(index)), **notes}
        gone = PartsGone(
            f"{self.folder} was merged or discarded by another process while this one made a part of it"
        )
        if not (self.folder / PLAN_FILE).is_file():
            raise gone
        try:
            write_part(self.path(index), values, said)
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


def _joined(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Runs of places that follow each other without a gap."""
    run: list[_Place] = []
    for place in places:
        if run and run[-1][3] != place[2]:
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _where(spans: Spans, plan: Plan | None = None) -> str:
    """Where the bins begin and end: in bases where the plan is known, else in bins."""
    (chrom, first, _), (last, _, end) = spans[0], spans[-1]
    if plan is None:
        return f"{chrom} from bin {first:,}"
    end_bp = min(end * plan.bin_bp, plan.lengths[last])
    return f"{chrom}:{first * plan.bin_bp}-" + (f"{end_bp}" if last == chrom else f"{last}:{end_bp}")
