"""Predictions in parts: files that appear complete, so that a killed run goes on where it stopped."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.atomic import atomic_path, atomic_write_text
from genossm.errors import DataError
from genossm.pipelines.selection import Selection
from genossm.progress import say
from genossm.windows import Window

WINDOWS_PER_PART = 8
Compute = Callable[[Sequence[Window]], Iterator[npt.NDArray[np.float32]]]


class Parts:
    """The part files of one prediction in `folder`/.parts; part i holds a run of consecutive windows.

    A part is a `.npy` array float32 (tracks, bins): the target bins of its windows, one after the other.

    Args:
        folder: the output folder.
        identity: what decides every value (model, genome, geometry, selection); a folder with other parts is
            refused.
        selection: windows in genome order.
        tracks: number of tracks.
        windows_per_part: windows of a part, where a part is not there yet.

    Raises:
        DataError: the folder holds parts of another prediction and `force` was not given.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        selection: Selection,
        tracks: int,
        *,
        force: bool = False,
        windows_per_part: int = WINDOWS_PER_PART,
    ) -> None:
        self.folder = folder / ".parts"
        self.selection = selection
        self.tracks = tracks
        plan = self.folder / "plan.json"
        if plan.is_file():
            stored = _read_plan(plan)
            if stored.get("identity") == identity:
                windows_per_part = int(stored["windows_per_part"])  # a resumed run keeps the parts it has
            elif force:
                shutil.rmtree(self.folder)
            else:
                raise DataError(
                    f"{folder} holds an unfinished prediction of another model, genome or selection: "
                    "choose another folder, or give force (--force) to discard it"
                )
        if not plan.is_file():
            atomic_write_text(plan, json.dumps({"identity": identity, "windows_per_part": windows_per_part}))
        self._groups = [
            selection.windows[first : first + windows_per_part]
            for first in range(0, len(selection.windows), windows_per_part)
        ]
        # Per chromosome where its windows lie: (part, column in it, first bin, past-the-last bin).
        self._places: dict[str, list[tuple[int, int, int, int]]] = {}
        for index, group in enumerate(self._groups):
            column = 0
            for window in group:
                first, stop = selection.target_bins(window)
                self._places.setdefault(window.chrom, []).append((index, column, first, stop))
                column += stop - first

    def complete(self, compute: Compute, advance: Callable[[int], object]) -> int:
        """Compute the parts that are not there yet and return how many were there already.

        `compute` yields one array (target bins, tracks) per window, of all missing parts in one stream, so
        that its batches cross the borders of parts; a part is written as soon as its last window is there.
        `advance` is told the base pairs of finished parts found at the start (`compute` reports its own).
        """
        missing = []
        for index, group in enumerate(self._groups):
            if self._valid(index):
                advance(sum(map(self.selection.target_bp_of, group)))
            else:
                missing.append(index)
        blocks = compute([window for index in missing for window in self._groups[index]])
        for index in missing:
            values = np.concatenate([next(blocks) for _ in self._groups[index]])
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(values.T))
            with atomic_path(self._path(index)) as temporary:
                temporary.write_bytes(content.getbuffer())  # numpy's own write hides that a disk is full
        return len(self._groups) - len(missing)

    def track(self, chrom: str, track: int) -> npt.NDArray[np.float32]:
        """float32 (bins,) of one track on a whole chromosome; bins that were not asked for are NaN."""
        selection = self.selection
        values = np.full(-(-selection.lengths[chrom] // selection.bin_bp), np.nan, dtype=np.float32)
        for index, places in groupby(self._places[chrom], key=itemgetter(0)):
            stored = np.load(self._path(index), mmap_mode="r")
            for _, column, first, stop in places:
                values[first:stop] = stored[track, column : column + stop - first]
        values[~selection.wanted(chrom)] = np.nan
        return values

    def slices(self, chrom: str) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(first bin, float32 (bins, tracks)) of each window on a chromosome; bins not asked for are NaN."""
        wanted = self.selection.wanted(chrom)
        for index, places in groupby(self._places[chrom], key=itemgetter(0)):
            stored = np.load(self._path(index), mmap_mode="r")
            for _, column, first, stop in places:
                block = np.array(stored[:, column : column + stop - first]).T
                block[~wanted[first:stop]] = np.nan
                yield first, block

    def remove(self) -> None:
        """Delete the part files, once what is made of them is safely written."""
        shutil.rmtree(self.folder)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def _valid(self, index: int) -> bool:
        path = self._path(index)
        bins = sum(stop - first for first, stop in map(self.selection.target_bins, self._groups[index]))
        if not path.is_file():
            return False
        try:
            stored = np.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            say(f"{path} is damaged; computing it again")
            return False
        return bool(stored.shape == (self.tracks, bins) and stored.dtype == np.float32)


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: delete {path.parent} and run again") from error
    return plan
