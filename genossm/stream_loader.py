"""Batches of windows, ready on the device: one sequence for any number of threads, processes and ranks, resumable."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from genossm.device_data import DeviceData
from genossm.device_lock import DEVICE_LOCK
from genossm.errors import CheckpointError
from genossm.loaders import WindowDataset
from genossm.packed import Batch, Packed, Unpacker
from genossm.sampling import PADDING, count_steps, epoch_order, share

LoaderName = Literal["threads", "processes"]
T = TypeVar("T")
_ON_DEVICE = 2
"""Batches that wait on a CUDA device beside the one in use."""


class Portion(NamedTuple):
    """The items of one batch; `real` is False for those that only fill it up."""

    indices: tuple[int, ...]
    real: tuple[bool, ...]


class WindowLoader:
    """Batches of a `WindowDataset`, pass by pass; each pass is an epoch, and the next one follows by itself.

        loader = WindowLoader(gs.WindowDataset("yeast/", "train", augment=True), batch_size=4, workers=2)
        for epoch in range(10):
            for codes, targets, mask in loader:
                ...

    The sequence depends on (seed, epoch) alone, not on `workers`, `loader`, `prefetch`, `device` or `data`. Ranks deal
    out each step among them (see `sampling.share`). All batches are of one size: the last of an epoch is filled up
    with windows that are masked everywhere, so each window counts once in an epoch over all ranks.

    Args:
        windows: what is read.
        batch_size: windows of a batch, of this rank.
        shuffle: another order in each epoch; False gives the windows in their own order, the same each time.
        workers: threads or processes that read; 0 reads when a batch is asked for.
        loader: `threads`, from which nothing has to be copied, or `processes`: of use where targets are compressed,
            for HDF5 unpacks in one thread at a time, and there are cores to spare (`genossm bench data` measures both).
        prefetch: batches that are read ahead.
        device: where batches are; for CUDA they are copied beside the work there.
        data: what lies on the device already (see `DeviceData`) and is not read.
        rank, ranks: of how many processes this is which.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        windows: WindowDataset,
        *,
        batch_size: int,
        shuffle: bool = True,
        workers: int = 0,
        loader: LoaderName = "threads",
        prefetch: int = 4,
        device: torch.device | str = "cpu",
        data: DeviceData | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size < 1 or workers < 0 or prefetch < 1 or not 0 <= rank < ranks:
            raise ValueError(
                f"batch_size {batch_size}, workers {workers}, prefetch {prefetch}, rank {rank} of {ranks}: batch_size "
                "and prefetch must be at least 1, workers at least 0, and rank below ranks"
            )
        if loader not in ("threads", "processes"):
            raise ValueError(f"loader is {loader!r}; it must be `threads` or `processes`")
        self.windows, self.batch_size, self.shuffle = windows, batch_size, shuffle
        self.workers, self.loader, self.prefetch = workers, loader, prefetch
        self.rank, self.ranks = rank, ranks
        self.device = torch.device(device)
        self._data = data
        codes, targets = data is None or data.genome is None, data is None or data.targets is None
        self._reader = _Reader(windows, codes=codes, targets=targets)
        self._unpack = Unpacker(windows.dataset, self.device)
        self._processes: DataLoader[Packed] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._portions: list[Portion] = []
        self._epoch = 0
        self._given = 0
        self._resume_at = 0

    def __len__(self) -> int:
        return count_steps(len(self.windows), self.batch_size, self.ranks)

    def __iter__(self) -> Iterator[Batch]:
        first, self._resume_at = self._resume_at, 0
        self._given = first
        portions = self.portions()
        with closing(self._batches(portions[first:])) as batches:
            for step, batch in enumerate(batches, start=first + 1):
                self._given = step
                if step == len(portions):  # not after it: who counts the batches does not ask for another
                    self._epoch, self._given = self._epoch + 1, 0
                yield batch

    @property
    def epoch(self) -> int:
        """The epoch that is being given, or comes next."""
        return self._epoch

    @property
    def batch_sampler(self) -> _Holder:
        """Where Lightning finds whose `set_epoch` to call."""
        return _Holder(self)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. The one that a restored state is in goes on where it was."""
        if epoch != self._epoch:
            self._epoch, self._given, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where in the sequence this is, after the batch given last, and what the sequence depends on."""
        return {"epoch": self._epoch, "next_batch": self._given, **self.sequence()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that was given last when `state` was taken.

        Raises:
            CheckpointError: it is the state of another sequence, or of other ranks.
        """
        own = self.sequence()
        other = [f"{key} {state.get(key)} instead of {own[key]}" for key in own if state.get(key) != own[key]]
        if other:
            raise CheckpointError(
                f"the saved position in the data is of another sequence of batches ({', '.join(other)}): resume with "
                "the same settings and as many processes"
            )
        self._epoch, self._given = int(state["epoch"]), int(state["next_batch"])
        self._resume_at = self._given

    def sequence(self) -> dict[str, Any]:
        """What the sequence of batches depends on: the data, which of them, how they are moved and turned, and the order."""
        windows = self.windows
        own = set(windows.chroms)
        return {
            "dataset": windows.dataset.content_hash,
            "split": "/".join(name for name, chroms in windows.dataset.splits.items() if own <= set(chroms)),
            "window_bp": windows.window_bp,
            "margin_bp": windows.margin_bp,
            "augment": windows.augment,
            "reverse_complement": windows.augment and windows.reverse_complement,
            "jitter_bp": windows.jitter_bp if windows.augment else 0,
            "seed": windows.seed,
            "windows": len(windows),
            "batch_size": self.batch_size,
            "ranks": self.ranks,
            "shuffle": self.shuffle,
            "sampling": windows.sampling,
            "signal_fraction": windows.signal_fraction,
        }

    def portions(self) -> list[Portion]:
        """The items of each batch of this rank in the epoch that is being given."""
        length, seed, epoch = len(self.windows), self.windows.seed, self._epoch
        order = epoch_order(length, seed=seed, epoch=epoch) if self.shuffle else np.arange(length)
        base = epoch * length if self.shuffle else 0
        rows = share(order, batch_size=self.batch_size, rank=self.rank, ranks=self.ranks)
        real = rows != PADDING
        # What only fills up repeats a window that is there, so that its bases are like any other's.
        rows = base + np.where(real, rows, np.where(real[:, :1], rows[:, :1], order[0]))
        return [
            Portion(tuple(items), tuple(flags))
            for items, flags in zip(rows.tolist(), real.tolist(), strict=True)
        ]

    def _batches(self, portions: Sequence[Portion]) -> Generator[Batch, None, None]:
        """Finished where that takes the least time from who computes on them."""
        cuda = self.device.type == "cuda"
        in_threads = self.loader == "threads" and self.workers and not self._reader.reads_nothing
        if in_threads and not cuda:
            return _in_threads(self._read_and_finish, portions, workers=self.workers, ahead=self.prefetch)
        packed: Iterator[Packed]
        if in_threads:
            packed = _in_threads(
                self._reader.__getitem__, portions, workers=self.workers, ahead=self.prefetch
            )
        elif self.workers and not self._reader.reads_nothing:
            packed = self._in_processes(portions)
        else:
            packed = map(self._reader.__getitem__, portions)
        if cuda and self.workers:
            if self._stream is None:  # one for all passes: torch has 32, which it hands out again
                self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            return _on_stream(packed, self._finish, self._stream)
        return (self._finish(item) for item in packed)

    def _read_and_finish(self, portion: Portion) -> Batch:
        return self._finish(self._reader[portion])

    def _in_processes(self, portions: Sequence[Portion]) -> Iterator[Packed]:
        """By processes that live as long as this loader."""
        self._portions[:] = portions
        if self._processes is None:
            self._processes = DataLoader(
                self._reader,
                batch_size=None,
                sampler=_Listed(self._portions),
                num_workers=self.workers,
                prefetch_factor=-(-self.prefetch // self.workers),
                persistent_workers=True,
            )
        return iter(self._processes)

    def _finish(self, packed: Packed) -> Batch:
        """The batch on the device."""
        exceptions = [indices.to(self.device) for indices in packed.exceptions()]
        there = packed.to(self.device)
        if self._data is not None:
            there = self._data.complete(there, self.windows.window_bp, self.windows.bins)
        return self._unpack(there, *exceptions)


class _Holder(NamedTuple):
    sampler: WindowLoader


class _Reader(Dataset[Packed]):
    """What a worker does; as a torch Dataset its index is a `Portion`."""

    def __init__(self, windows: WindowDataset, *, codes: bool, targets: bool) -> None:
        self._windows, self._codes, self._targets = windows, codes, targets

    @property
    def reads_nothing(self) -> bool:
        """Whether all lies on the device already."""
        return not (self._codes or self._targets)

    def __getitem__(self, portion: Portion) -> Packed:
        return self._windows.read(
            portion.indices, real=portion.real, codes=self._codes, targets=self._targets
        )


class _Listed(Sampler[Portion]):
    """A list that changes between passes, as the sampler of a DataLoader, which keeps its own for life."""

    def __init__(self, portions: list[Portion]) -> None:
        self._portions = portions

    def __len__(self) -> int:
        return len(self._portions)

    def __iter__(self) -> Iterator[Portion]:
        return iter(self._portions)


def _in_threads(
    work: Callable[[Portion], T], portions: Sequence[Portion], *, workers: int, ahead: int
) -> Generator[T, None, None]:
    """What `work` makes of each portion, in order, up to `ahead` of them before they are asked for."""
    left = iter(portions)
    with ThreadPoolExecutor(workers, thread_name_prefix="genossm-loader") as pool:
        try:
            waiting = deque(pool.submit(work, portion) for portion in islice(left, ahead))
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(work, portion) for portion in islice(left, 1))
                yield done
        finally:
            pool.shutdown(cancel_futures=True)


def _on_stream(
    packed: Iterator[Packed], finish: Callable[[Packed], Batch], stream: torch.cuda.Stream
) -> Generator[Batch, None, None]:
    """Finish batches in a thread and on a CUDA stream of their own, a few ahead of who computes on them."""
    device = stream.device
    ready: queue.Queue[tuple[Batch, torch.cuda.Event] | BaseException | None] = queue.Queue(_ON_DEVICE)
    stopped = threading.Event()

    def give(item: tuple[Batch, torch.cuda.Event] | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                for item in packed:
                    with DEVICE_LOCK:
                        batch = finish(item.pinned())
                        written = stream.record_event()
                    if not give((batch, written)):
                        break
            give(None)
        except BaseException as error:  # raised again where the batch is waited for
            give(error)
        finally:
            if hasattr(packed, "close"):
                packed.close()

    thread = threading.Thread(target=work, name="genossm-device", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, written = item
            current = torch.cuda.current_stream(device)
            current.wait_event(written)
            for tensor in batch:
                tensor.record_stream(current)
            yield batch
    finally:
        stopped.set()
        thread.join()
