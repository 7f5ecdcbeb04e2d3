"""Sorting more numbers than fit into memory: sorted runs in a scratch file, merged by ranges of values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

_BUFFERED = 1 << 23
_MERGED = 1 << 23

Numbers = npt.NDArray[np.uint64]


class ExternalSort:
    """Takes numbers in any order, and gives all of them back in ascending order, block by block.

    Memory: some times 64 MB, whatever the number of numbers, unless one number stands there very often; disk:
    8 bytes a number. A context manager, which closes its file.

    Attributes:
        total: how many numbers there are.
        upper: how many numbers there are of each value of the upper 32 bits.
    """

    def __init__(self, scratch: Path) -> None:
        self.total = 0
        self.upper: Counter[int] = Counter()
        self._path = scratch / "runs"
        self._file = self._path.open("wb")
        self._buffer: list[Numbers] = []
        self._buffered = 0
        self._runs: list[int] = []

    def __enter__(self) -> ExternalSort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, numbers: Numbers) -> None:
        """Take in numbers, uint64 (n,)."""
        self._buffer.append(numbers)
        self._buffered += numbers.size
        self.total += numbers.size
        if self._buffered >= _BUFFERED:
            self._write_run()

    def finish(self) -> None:
        """Write what is still in memory; `upper` is complete then."""
        if self._buffered:
            self._write_run()
        self._file.flush()

    def merged(self) -> Iterator[Numbers]:
        """All numbers in ascending order, in blocks, after `finish`."""
        if not self.total:
            return
        whole = np.memmap(self._path, dtype=np.uint64, mode="r")
        runs = np.split(np.asarray(whole), np.cumsum(self._runs)[:-1])
        # Of every run each `step`-th number is a pivot. Between two pivots of one run lie `step` numbers of it, so
        # between every `len(runs)`-th of all pivots lie at most 2 * step * len(runs) numbers of all runs.
        step = max(1, _MERGED // len(runs))
        pivots = np.sort(np.concatenate([run[::step] for run in runs]))[:: len(runs)][1:]
        starts = np.zeros(len(runs), dtype=np.int64)
        for pivot in [*np.unique(pivots), None]:
            if pivot is None:
                ends = np.array([run.size for run in runs])
            else:
                ends = np.array([np.searchsorted(run, pivot) for run in runs])
            parts = [run[start:end] for run, start, end in zip(runs, starts, ends, strict=True)]
            starts = ends
            block = np.concatenate(parts)
            if block.size:
                block.sort()
                yield block

    def _write_run(self) -> None:
        run = np.concatenate(self._buffer)
        run.sort()
        upper, counts = np.unique(run >> np.uint64(32), return_counts=True)
        self.upper.update(dict(zip(upper.tolist(), counts.tolist(), strict=True)))
        self._file.write(run.data)
        self._runs.append(run.size)
        self._buffer, self._buffered = [], 0
