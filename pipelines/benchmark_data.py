"""How fast windows are read: codes alone, with a track at every base, with hundreds of tracks; beside memcpy and peers."""

from __future__ import annotations

import gc
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyBigWig
import torch

from genossm.dataset import PreparedDataset
from genossm.device_data import PlaceName, place_data
from genossm.errors import ConfigError, DataError
from genossm.loaders import WindowDataset
from genossm.pipelines.benchmark_data_peers import NAMES, Task, Timed, absent_peers, time_passes, time_peer
from genossm.pipelines.device import describe, pick_device
from genossm.pipelines.prepare import prepare
from genossm.pipelines.simulate_genome import SMALLEST_BP, simulate_sparse
from genossm.progress import say
from genossm.stream_loader import LoaderName, WindowLoader
from genossm.version import versions

CODES, ONE = "codes", "codes and one track at 1 bp"
MEMCPY, INLINE = "memcpy of the codes", "genossm"
WANTED = {"memcpy": 0.5, "naive": 20.0, "GenVarLoader": 1.0}
"""What our rate in one process is to be, over that of the other: of codes for memcpy, else with one track."""

_CHECKED = 8
_SLICE_BP = 1_000_000
Save = Callable[["DataBenchmark"], None]


@dataclass(frozen=True)
class Rate:
    """Whole passes over the windows of a case by one way of reading; `problem` says why there is none."""

    case: str
    by: str
    workers: int
    windows_per_s: float | None
    mb_per_s: float | None
    seconds: tuple[float, ...]
    first_batch_s: float | None = None
    problem: str | None = None


@dataclass
class DataBenchmark:
    """What was measured, on what; `ratios` are our rate in one process over another's, and what it is to be."""

    device: str
    machine: str
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[Rate] = field(default_factory=list)
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    peak_memory_mb: float | None = None
    seconds: float = 0.0


def measure_data(
    *,
    genome_bp: int = 20_000_000,
    window_bp: int = 100_000,
    tracks: int = 161,
    batch_size: int = 8,
    workers: int = 2,
    repeats: int = 5,
    peers: bool = True,
    device: str = "cpu",
    dataset: str | os.PathLike[str] | None = None,
    limit_s: float = 120.0,
    save: Save | None = None,
) -> DataBenchmark:
    """Simulate small datasets in a temporary folder, read them in all ways, and compare.

    Rates are medians of whole passes in the windows' own order, with files in the page cache. What others yield is
    compared with ours before it is timed.

    Args:
        genome_bp: size of the simulated genomes, at least 10,000,000.
        window_bp: of the windows with no or one track; those with many are of 131,072 bp.
        tracks: how many the third case has.
        batch_size: windows of a batch.
        workers: of the ways that have threads or processes.
        repeats: passes timed.
        peers: also time the other loaders that are installed.
        device: where our batches end up: `cpu`, `cuda` or `cuda:N`.
        dataset: read the training windows of this prepared dataset instead of simulated ones; no peers.
        limit_s: seconds after which a peer is given up.
        save: called with what there is after each row.

    Raises:
        ConfigError: a number is out of range.
        DataError: our own loader yields something else than the files hold.
    """
    if genome_bp < SMALLEST_BP or not 1 <= window_bp <= genome_bp // _CHECKED:
        raise ConfigError(
            f"a genome of {genome_bp} bp and windows of {window_bp} bp: the genome must have {SMALLEST_BP} bp or more, "
            f"and at least {_CHECKED} windows"
        )
    if min(tracks, batch_size, workers, repeats) < 1:
        raise ConfigError("tracks, batch_size, workers and repeats must each be at least 1")
    chosen = pick_device(device)
    settings = {
        "genome_bp": genome_bp,
        "window_bp": window_bp,
        "tracks": tracks,
        "batch_size": batch_size,
        "workers": workers,
        "repeats": repeats,
        "dataset": None if dataset is None else str(dataset),
    }
    result = DataBenchmark(describe(chosen), _machine(), versions(), settings)
    work = _Work(result, chosen, batch_size, workers, repeats, save)
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if dataset is not None:
            work.own(PreparedDataset(dataset), f"training windows of {Path(dataset).name}")
        else:
            with tempfile.TemporaryDirectory(prefix="genossm-bench-") as folder, _caches_in(Path(folder)):
                work.simulated(Path(folder), genome_bp, window_bp, tracks, limit_s if peers else None)
    finally:
        torch.set_num_threads(threads)
    result.seconds = time.perf_counter() - started
    work.keep()
    return result


class _Work:
    """The measuring of one benchmark."""

    def __init__(
        self,
        result: DataBenchmark,
        device: torch.device,
        batch_size: int,
        workers: int,
        repeats: int,
        save: Save | None,
    ) -> None:
        self.result, self.device = result, device
        self.batch_size, self.workers, self.repeats, self.save = batch_size, workers, repeats, save

    def simulated(
        self, folder: Path, genome_bp: int, window_bp: int, tracks: int, peers_limit_s: float | None
    ) -> None:
        """All three cases; no peers where there is no limit for them."""
        say(f"simulating {genome_bp / 1e6:.0f} Mb with one track, and with {tracks}")
        task = _simulate_one(folder, genome_bp, window_bp, self.batch_size, self.repeats)
        data = PreparedDataset(folder / "one")
        windows = WindowDataset(data, "train")
        _check_own(windows, task)
        self._codes(windows)
        self._all_ways(lambda: PreparedDataset(folder / "one"), ONE)
        many = simulate_sparse(folder / "many", genome_bp=genome_bp, tracks=tracks)
        case = f"{tracks} tracks at 32 bp"
        for compress, words in (("none", case), ("gzip", f"{case}, compressed")):
            made = folder / f"many-{compress}"
            prepare(many / "dataset.yaml", made, overrides=[f"compress={compress}"])
            self._all_ways(lambda made=made: PreparedDataset(made), words)  # type: ignore[misc]
        self._note_memory()
        if peers_limit_s is None:
            self.result.absent["peers"] = "not asked for"
        else:
            self._peers(task, peers_limit_s)
        self._compare()

    def own(self, data: PreparedDataset, case: str) -> None:
        """All ways of reading a dataset that is there."""
        self._all_ways(lambda: PreparedDataset(data.folder), case)
        self._note_memory()

    def keep(self) -> None:
        """Give what there is to `save`."""
        if self.save is not None:
            self.save(self.result)

    def _codes(self, windows: WindowDataset) -> None:
        count, chrom = len(windows), windows.place(0).chrom
        genome = np.array(windows.dataset.genome.chromosome(chrom))
        size = windows.window_bp

        def batches() -> Iterator[list[int]]:
            for first in range(0, count, self.batch_size):
                yield list(range(first, min(first + self.batch_size, count)))

        def copied() -> Iterator[Any]:
            for batch in batches():
                out = np.empty((len(batch), size), dtype=np.int8)
                for row, index in enumerate(batch):
                    out[row] = genome[index * size : (index + 1) * size]
                yield out

        def read() -> Iterator[Any]:
            return (windows.read(batch, targets=False) for batch in batches())

        # In turn, so that other work on the machine hits both alike.
        for by, seconds in zip((MEMCPY, INLINE), time_passes([copied, read], self.repeats), strict=True):
            self._add(Timed(by, CODES, 0, seconds), count, size)

    def _all_ways(self, open_dataset: Callable[[], PreparedDataset], case: str) -> None:
        """One process, threads, processes; and from the device's memory."""
        ways: list[tuple[str, LoaderName, int, PlaceName]] = [
            (INLINE, "threads", 0, "host"),
            (f"{INLINE}, threads", "threads", self.workers, "host"),
            (f"{INLINE}, processes", "processes", self.workers, "host"),
        ]
        if self.device.type == "cuda":
            ways += [
                (f"{INLINE}, genome on the device", "threads", self.workers, "genome"),
                (f"{INLINE}, genome and targets on the device", "threads", self.workers, "device"),
            ]
        for by, loader, workers, where in ways:
            started = time.perf_counter()
            data = open_dataset()
            windows = WindowDataset(data, "train")
            held = place_data(data, windows.chroms, self.device, where)
            batches = WindowLoader(
                windows,
                batch_size=self.batch_size,
                shuffle=False,
                workers=workers,
                loader=loader,
                device=self.device,
                data=held,
            )
            next(iter(batches))
            first_batch_s = time.perf_counter() - started
            [seconds] = time_passes([lambda batches=batches: _until_there(batches)], self.repeats)  # type: ignore[misc]
            payload = windows.window_bp + 4 * windows.bins * len(data.tracks)
            self._add(Timed(by, case, workers, seconds), len(windows), payload, first_batch_s)
            del batches, held
            gc.collect()  # ends the processes

    def _peers(self, task: Task, limit_s: float) -> None:
        self.result.absent |= absent_peers()
        payload = {CODES: task.window_bp, ONE: 5 * task.window_bp}
        for peer in NAMES:
            for case, workers in ((CODES, 0), (ONE, 0), (ONE, self.workers)):
                if peer not in self.result.absent:
                    say(f"measuring {NAMES[peer]}: {case}, {workers} workers")
                    timed = time_peer(peer, task, case, workers, limit_s=limit_s)
                    self._add(timed, len(task.starts), payload[case])

    def _add(self, timed: Timed, windows: int, payload: int, first_batch_s: float | None = None) -> None:
        rate = None if timed.problem else windows / timed.median_s
        self.result.rows.append(
            Rate(
                timed.case,
                timed.name,
                timed.workers,
                rate,
                None if rate is None else rate * payload / 1e6,
                timed.seconds,
                first_batch_s,
                timed.problem,
            )
        )
        self.keep()

    def _compare(self) -> None:
        rates = {(row.case, row.by, row.workers): row.windows_per_s for row in self.result.rows}
        others = {
            "memcpy": (CODES, MEMCPY),
            "naive": (ONE, NAMES["naive"]),
            "GenVarLoader": (ONE, NAMES["GenVarLoader"]),
        }
        for name, (case, by) in others.items():
            own, other = rates[case, INLINE, 0], rates.get((case, by, 0))
            if own is not None and other is not None:
                self.result.ratios[name] = (own / other, WANTED[name])

    def _note_memory(self) -> None:
        scale = 1e6 if sys.platform == "darwin" else 1e3
        self.result.peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


@contextmanager
def _caches_in(folder: Path) -> Iterator[None]:
    """Caches of genomes go there, and with it."""
    before = os.environ.get("GENOSSM_CACHE")
    os.environ["GENOSSM_CACHE"] = str(folder / "caches")
    try:
        yield
    finally:
        if before is None:
            del os.environ["GENOSSM_CACHE"]
        else:
            os.environ["GENOSSM_CACHE"] = before


def _until_there(batches: WindowLoader) -> Iterator[Any]:
    """A pass that ends when the device has everything."""
    yield from batches
    if batches.device.type == "cuda":
        torch.cuda.synchronize(batches.device)


def _simulate_one(folder: Path, genome_bp: int, window_bp: int, batch_size: int, repeats: int) -> Task:
    """A chromosome of whole windows, with a value at each base, prepared; and what loaders are to yield at first."""
    random = np.random.default_rng(0)
    starts = range(0, genome_bp // window_bp * window_bp, window_bp)
    length = len(starts) * window_bp
    bases = np.frombuffer(b"ACGTacgt", dtype=np.uint8)[random.choice(8, length, p=[*[0.2] * 4, *[0.05] * 4])]
    gap_bp = max(1, window_bp // 10)
    for start in range(gap_bp, length, 50 * gap_bp):
        bases[start : start + gap_bp] = ord("N")
    (folder / "genome.fa").write_bytes(b">chr1\n" + b"\n".join(_lines(bases)) + b"\n")
    bigwig = pyBigWig.open(str(folder / "signal.bw"), "w")
    bigwig.addHeader([("chr1", length)], maxZooms=0)
    track = np.empty(length, dtype=np.float32)
    for start in range(0, length, _SLICE_BP):
        part = track[start : start + _SLICE_BP]
        part[:] = np.rint(random.gamma(0.5, 16.0, part.size)) / 8  # exact in 16 bits, so that all must agree
        bigwig.addEntries("chr1", start, values=part, span=1, step=1)
    bigwig.close()
    (folder / "dataset.yaml").write_text(
        "assembly: simulated\ngenome: genome.fa\ntracks: [{name: signal, file: signal.bw, kind: signal}]\n"
        f"window: {{length: {window_bp}, margin: 0, bin: 1}}\nsplit: {{train: [chr1], valid: [], test: []}}\n"
    )
    prepare(folder / "dataset.yaml", folder / "one")
    task = Task(folder, "chr1", tuple(starts), window_bp, batch_size, repeats)
    table = np.full(256, 4, dtype=np.int8)
    for code, pair in enumerate((b"Aa", b"Cc", b"Gg", b"Tt")):
        table[list(pair)] = code
    first = slice(0, _CHECKED * window_bp)
    np.savez(
        folder / task.expected,
        codes=table[bases[first]].reshape(_CHECKED, window_bp),
        track=track[first].reshape(_CHECKED, window_bp),
    )
    return task


def _lines(bases: np.ndarray[Any, Any]) -> Iterator[bytes]:
    for start in range(0, len(bases), 100):
        yield bases[start : start + 100].tobytes()


def _check_own(windows: WindowDataset, task: Task) -> None:
    """Our own first windows against what was written; N is masked."""
    expected = np.load(task.folder / task.expected)
    for index in range(_CHECKED):
        codes, targets, mask = (part.numpy() for part in windows[index])
        there = expected["codes"][index] != 4
        if not (
            np.array_equal(codes, expected["codes"][index])
            and np.array_equal(mask[:, 0], there)
            and np.array_equal(targets[:, 0], np.where(there, expected["track"][index], 0))
        ):
            raise DataError(f"window {index} of the simulated genome is read wrongly: please report this")


def _machine() -> str:
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"
