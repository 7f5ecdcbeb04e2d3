"""Other people's loaders on the windows of the data benchmark, each in a process of its own and checked before it is timed."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pass = Callable[[], Iterator[Any]]
"""A whole pass over the windows, batch by batch."""
Codes = npt.NDArray[np.int8]

PACKAGES = {"naive": "pyfaidx", "tangermeme": "tangermeme", "GenVarLoader": "genvarloader"}
"""Each peer and the package that it needs."""
NAMES = {
    "naive": "pyfaidx + F.one_hot + pyBigWig",
    "tangermeme": "tangermeme extract_loci",
    "GenVarLoader": "GenVarLoader, written before",
}


_LEAST_S = 0.2


@dataclass(frozen=True)
class Task:
    """What a peer is given: files, and the windows, all of one length, of one chromosome."""

    folder: Path
    chrom: str
    starts: tuple[int, ...]
    window_bp: int
    batch_size: int
    repeats: int
    genome: str = "genome.fa"
    signal: str = "signal.bw"
    expected: str = "expected.npz"


@dataclass(frozen=True)
class Timed:
    """Seconds of whole passes by one way of reading."""

    name: str
    case: str
    workers: int
    seconds: tuple[float, ...]
    problem: str | None = None

    @property
    def median_s(self) -> float:
        """The median of the passes, NaN where there is none."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


def time_passes(makes: Sequence[Pass], repeats: int) -> list[tuple[float, ...]]:
    """Seconds of `repeats` passes of each, in turn, after one to warm up; short ones are timed many at once."""
    counts = []
    for make in makes:
        seconds = 0.0
        for _ in range(2):
            seconds = _seconds(make, 1)
        counts.append(max(1, math.ceil(_LEAST_S / max(seconds, 1e-6))))
    rounds = [
        [_seconds(make, count) for make, count in zip(makes, counts, strict=True)] for _ in range(repeats)
    ]
    return [tuple(column) for column in zip(*rounds, strict=True)]


def _seconds(make: Pass, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        for _ in make():
            pass
    return (time.perf_counter() - started) / count


def absent_peers() -> dict[str, str]:
    """The peers that cannot be imported here, and why."""
    found = {}
    for peer, package in PACKAGES.items():
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            found[peer] = f"the package {package} is not installed"
    return found


def time_peer(peer: str, task: Task, case: str, workers: int, *, limit_s: float) -> Timed:
    """Run one peer in a new process, ended after `limit_s` seconds: some loaders hang after a fork."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sending, peer, task, case, workers), daemon=False)
    process.start()
    group = process.pid
    assert group is not None
    sending.close()
    try:
        answer: tuple[float, ...] | str = (
            receiving.recv() if receiving.poll(limit_s) else f"not done after {limit_s:.0f} s"
        )
    except EOFError:
        process.join()
        answer = f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
        with suppress(ProcessLookupError):  # its workers, where it was given up
            os.killpg(group, signal.SIGKILL)
    name = NAMES[peer]
    if isinstance(answer, str):
        return Timed(name, case, workers, (), answer)
    return Timed(name, case, workers, answer)


def _work(sending: Any, peer: str, task: Task, case: str, workers: int) -> None:
    """In the peer's process, the first of a group of its own: set up, compare the first windows with ours, time."""
    os.setsid()
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        make, codes_of, track_of = _PEERS[peer](task, case, workers)
        _compare(next(iter(make())), task, codes_of, track_of if case != "codes" else None)
        sending.send(time_passes([make], task.repeats)[0])
    except Exception as error:
        sending.send(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def _compare(batch: Any, task: Task, codes_of: Callable[[Any], Codes], track_of: Any) -> None:
    """Refuse a peer that yields other bases or values than we do for its first windows."""
    expected = np.load(task.folder / task.expected)
    codes = codes_of(batch)
    rows = min(len(codes), len(expected["codes"]))
    if rows == 0 or not np.array_equal(codes[:rows], expected["codes"][:rows]):
        raise ValueError("it yields other bases than genossm")
    if track_of is not None and not np.array_equal(track_of(batch)[:rows], expected["track"][:rows]):
        raise ValueError("it yields other values of the track than genossm")


def _of_one_hot(one_hot: Any, axis: int) -> Codes:
    """Codes of (batch, 4, window) or (batch, window, 4); nothing set is 4."""
    values = np.asarray(one_hot)
    codes: Codes = np.where(values.sum(axis) > 0, values.argmax(axis), 4).astype(np.int8)
    return codes


def _context(workers: int) -> str | None:
    """Workers are forked, as is usual on Linux, though this process was not."""
    return "fork" if workers else None


def _naive(task: Task, case: str, workers: int) -> tuple[Pass, Any, Any]:
    """What users write themselves: letters to float one-hot, window by window, files opened in each worker."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Naive(Dataset[Any]):
        def __init__(self) -> None:
            self.fasta: Any = None
            self.bigwig: Any = None
            self.table = np.full(256, 4, dtype=np.int64)
            for code, base in enumerate(b"ACGT"):
                self.table[[base, base + 32]] = code

        def __len__(self) -> int:
            return len(task.starts)

        def __getitem__(self, index: int) -> Any:
            if self.fasta is None:
                import pyBigWig
                import pyfaidx

                self.fasta = pyfaidx.Fasta(str(task.folder / task.genome))
                self.bigwig = pyBigWig.open(str(task.folder / task.signal))
            start, end = task.starts[index], task.starts[index] + task.window_bp
            letters = np.frombuffer(str(self.fasta[task.chrom][start:end]).encode(), dtype=np.uint8)
            codes = torch.from_numpy(self.table[letters])
            bases = torch.nn.functional.one_hot(codes, 5)[:, :4].float()
            if case == "codes":
                return bases, ()
            values = self.bigwig.values(task.chrom, start, end, numpy=True)
            return bases, torch.from_numpy(np.nan_to_num(values))

    loader = DataLoader(
        Naive(),
        task.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=_context(workers),
    )
    return lambda: iter(loader), lambda batch: _of_one_hot(batch[0], 2), lambda batch: batch[1].numpy()


def _tangermeme(task: Task, case: str, workers: int) -> tuple[Pass, Any, Any]:
    """All windows at once: it gives no batches."""
    import pandas as pd

    extract = importlib.import_module("tangermeme.io").extract_loci
    loci = pd.DataFrame(
        {"chrom": task.chrom, "start": task.starts, "end": [start + task.window_bp for start in task.starts]}
    )
    options: dict[str, Any] = {"in_window": task.window_bp, "n_jobs": max(1, workers)}
    if case != "codes":
        options |= {"signals": [str(task.folder / task.signal)], "out_window": task.window_bp}

    def make() -> Iterator[Any]:
        yield extract(loci, str(task.folder / task.genome), **options)

    def codes_of(batch: Any) -> Codes:
        return _of_one_hot(batch if case == "codes" else batch[0], 1)

    return make, codes_of, lambda batch: batch[1][:, 0].numpy()


def _genvarloader(task: Task, case: str, workers: int) -> tuple[Pass, Any, Any]:
    """Its dataset of bytes and float32 tracks, written before the time is taken."""
    gvl = importlib.import_module("genvarloader")
    bed = importlib.import_module("polars").DataFrame(
        {
            "chrom": [task.chrom] * len(task.starts),
            "chromStart": list(task.starts),
            "chromEnd": [start + task.window_bp for start in task.starts],
        }
    )
    reference = gvl.Reference.from_path(str(task.folder / task.genome), in_memory=True)
    if case == "codes":
        dataset = gvl.RefDataset(reference, bed, output_length=task.window_bp)
    else:
        path = task.folder / "genvarloader"
        if not path.exists():  # a process that has written may hang when it forks workers
            tracks = gvl.BigWigs("signal", {"sample": str(task.folder / task.signal)})
            gvl.write(path=path, bed=bed, tracks=tracks)
        dataset = gvl.Dataset.open(path, reference).with_seqs("reference").with_tracks("signal")
        dataset = dataset.with_len(task.window_bp)

    table = np.full(256, 4, dtype=np.int8)
    table[np.frombuffer(b"ACGT", dtype=np.uint8)] = range(4)

    def make() -> Iterator[Any]:
        # A new one for each pass: one that was iterated before its workers are forked may hang.
        options = {"num_workers": workers, "multiprocessing_context": _context(workers)}
        return iter(dataset.to_dataloader(batch_size=task.batch_size, **options))

    def codes_of(batch: Any) -> Codes:
        letters = np.asarray(batch if case == "codes" else batch[0])
        return np.asarray(table[letters.view(np.uint8).reshape(len(letters), -1)])

    return make, codes_of, lambda batch: np.asarray(batch[1])[:, 0]


_PEERS: dict[str, Callable[[Task, str, int], tuple[Pass, Any, Any]]] = {
    "naive": _naive,
    "tangermeme": _tangermeme,
    "GenVarLoader": _genvarloader,
}
