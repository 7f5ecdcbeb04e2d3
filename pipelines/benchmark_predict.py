"""Measure prediction of whole chromosomes, end to end: FASTA to bigWig, beside a loop as people write it and a Transformer.

Every measurement has a process of its own, so that the most memory it took is its own too. In it the model is warmed up on a
short record first: compiling kernels is told apart, as they are kept on disk.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from genossm import checkpoint
from genossm.atomic import atomic_path
from genossm.errors import ConfigError, GenossmError
from genossm.genome import Genome
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.benchmark_encoder_cases import TRACKS
from genossm.pipelines.benchmark_gpu import exponent, hardware
from genossm.pipelines.benchmark_predict_loop import loop
from genossm.pipelines.benchmark_rivals import sized_like
from genossm.pipelines.chromosome import chosen_chunk_bp
from genossm.pipelines.cuda_graphs import GraphedPrediction
from genossm.pipelines.device import describe, pick_device
from genossm.pipelines.predict import predict
from genossm.progress import say
from genossm.run_config import RunConfig, load_run_config
from genossm.version import versions

HUMAN_CHR1 = 248_956_422
LENGTHS = (1_000_000, 12_000_000, 62_000_000, HUMAN_CHR1)
QUICK_LENGTHS = (200_000, 1_000_000)
N_SHARE = 0.07
"""Of a chromosome, in one run, as in human chromosome 1."""
WARM_UP_BP = {"cpu": 400_000, "cuda": 4_000_000}
"""On a GPU more than a whole batch and a whole chunk, whose kernels are compiled for their own sizes."""
LINE = 60
COMPARED_BP = 10_000_000
"""Read at once of the two bigWigs that are compared."""

By = Literal["genossm windows", "genossm chromosome", "a loop", "Transformer, windows"]
OURS: tuple[By, ...] = ("genossm windows", "genossm chromosome")
Save = Callable[["PredictBenchmark"], None]


@dataclass(frozen=True)
class PredictRow:
    """One chromosome by one way.

    Attributes:
        seconds: from the call until the bigWig is there; Mbp/s are all of the chromosome's bases over them.
        model_share: the time that the model alone takes, for the same windows or on random codes of the same length, over
            `seconds`; None where not measured.
        device_mib: the most that PyTorch had reserved on the device.
        host_mib: the most resident memory of the process.
        start_s: imports, loading and compiling before that.
        problem: why there are no figures.
    """

    by: By
    length_bp: int
    seconds: float | None = None
    mbp_per_s: float | None = None
    model_share: float | None = None
    device_mib: float | None = None
    host_mib: float | None = None
    start_s: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Growth:
    """How the seconds of one way grow with the length.

    Attributes:
        start_s, s_per_mb: the straight line through the times by least squares.
        r2: the share of the times' variance that the line explains.
        power: of the length with which the seconds grow, by least squares of the logarithms.
    """

    start_s: float
    s_per_mb: float
    r2: float
    power: float


@dataclass
class PredictBenchmark:
    """All that a run found; `difference` is between the loop's values and genossm's, the largest of a probability."""

    device: str
    hardware: dict[str, str]
    versions: dict[str, str]
    config: str
    precision: str
    batch_size: int
    quick: bool
    rows: list[PredictRow] = field(default_factory=list)
    growth: dict[str, Growth] = field(default_factory=dict)
    difference: float | None = None


@dataclass(frozen=True)
class _Job:
    by: By
    run: str
    genome: str
    warm_up: str
    out: str
    device: str
    precision: Literal["bf16", "float32"]
    batch_size: int


def benchmark_predict(
    *,
    device: str = "auto",
    config: str = "accessibility-100kb",
    lengths: Sequence[int] | None = None,
    batch_size: int = 16,
    rivals: bool = True,
    quick: bool = False,
    folder: Path | None = None,
    save: Save | None = None,
) -> PredictBenchmark:
    """Predict random chromosomes of several lengths with a model of random weights and one track of peaks.

    Args:
        device: auto, cuda, cuda:N or, with `quick`, cpu.
        config: the model, a shipped configuration or a YAML file.
        lengths: base pairs of the chromosomes; None for 1 Mb to that of human chromosome 1.
        batch_size: windows at once.
        rivals: also measure a loop as people write it (pyfaidx, DataLoader, model, pyBigWig), and a Transformer.
        quick: short chromosomes.
        folder: where chromosomes and predictions are written for the time being; None for the system's.
        save: called with what there is after each row.

    Raises:
        DeviceError: the device is not there.
        ConfigError: the configuration is not there, or a CPU is to do more than `quick`.
        GenossmError: the loop gives other values.
    """
    place = pick_device(device)
    if place.type == "cpu" and not quick:
        raise ConfigError(
            "whole chromosomes are measured on a GPU; on a CPU only a quick run is possible: give --quick"
        )
    chosen = tuple(lengths or (QUICK_LENGTHS if quick else LENGTHS))
    precision: Literal["bf16", "float32"] = "bf16" if place.type == "cuda" else "float32"
    result = PredictBenchmark(
        describe(place), hardware(place), versions(), config, precision, batch_size, quick
    )
    keep = save or (lambda _: None)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        bench = _Bench(Path(scratch), load_run_config(config), str(place), precision, batch_size)
        for length_bp in chosen:
            for by in OURS:
                _measure(bench, result, by, length_bp, keep)
        for by in OURS:
            points = [(row.length_bp, row.seconds) for row in result.rows if row.by == by and row.seconds]
            if len(points) > 1:
                result.growth[by] = fit_growth(*zip(*points, strict=True))
        if rivals:
            longest = max(chosen)
            _measure(bench, result, "a loop", longest, keep)
            result.difference = bench.difference(longest)
            if result.difference is not None and not result.difference < 0.02:
                raise GenossmError(
                    f"the loop's values differ from genossm's by up to {result.difference:.2g} of a probability; this is a "
                    "fault of this build or device: please report it"
                )
            _measure(bench, result, "Transformer, windows", longest, keep)
    keep(result)
    return result


def fit_growth(lengths_bp: Sequence[int], seconds: Sequence[float]) -> Growth:
    """Fit a line and a power to times of at least two lengths."""
    megabases, times = np.array(lengths_bp) / 1e6, np.array(seconds)
    s_per_mb, start_s = np.polyfit(megabases, times, 1)
    unexplained = np.sum((times - start_s - s_per_mb * megabases) ** 2) / np.sum((times - times.mean()) ** 2)
    power = exponent(lengths_bp, seconds)
    assert power is not None
    return Growth(float(start_s), float(s_per_mb), float(1 - unexplained), power)


def _measure(bench: _Bench, result: PredictBenchmark, by: By, length_bp: int, keep: Save) -> None:
    row = bench.measure(by, length_bp)
    result.rows.append(row)
    told = row.problem or f"{row.seconds:.1f} s, {row.mbp_per_s:.3g} Mbp/s"
    say(f"{by}, {length_bp:,} bp: {told}")
    keep(result)


class _Bench:
    """Models, chromosomes and predictions in one folder."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        device: str,
        precision: Literal["bf16", "float32"],
        batch_size: int,
    ) -> None:
        self.folder, self.device, self.precision, self.batch_size = folder, device, precision, batch_size
        self.config = config

    def measure(self, by: By, length_bp: int) -> PredictRow:
        """One row, by a fresh process."""
        job = _Job(
            by,
            str(self._run("Transformer" if by.startswith("Transformer") else "own")),
            str(self._genome(length_bp)),
            str(self._genome(_warm_up_bp(self.device))),
            str(self._out(by, length_bp)),
            self.device,
            self.precision,
            self.batch_size,
        )
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, sender))
        process.start()
        sender.close()
        try:
            found: dict[str, Any] = receiver.recv()
        except EOFError:
            found = {"problem": "the process was killed, perhaps for want of memory"}
        process.join()
        row = PredictRow(by, length_bp, **found)
        return row if row.seconds is None else replace(row, mbp_per_s=length_bp / row.seconds / 1e6)

    def difference(self, length_bp: int) -> float | None:
        """Between the bigWigs of the loop and of windows mode: the largest."""
        import pyBigWig

        ways: tuple[By, By] = ("a loop", "genossm windows")
        paths = [self._out(by, length_bp) / f"{TRACKS[0].name}.bw" for by in ways]
        if not all(path.is_file() for path in paths):
            return None
        largest = 0.0
        with pyBigWig.open(str(paths[0])) as theirs, pyBigWig.open(str(paths[1])) as ours:
            for start in range(0, length_bp, COMPARED_BP):
                stretch = "chr", start, min(start + COMPARED_BP, length_bp)
                a, b = (bigwig.values(*stretch, numpy=True) for bigwig in (theirs, ours))
                covered = ~np.isnan(a)
                if (covered == np.isnan(b)).any():
                    return float("inf")
                largest = max(largest, float(np.max(np.abs(a - b)[covered], initial=0)))
        return largest

    def _run(self, kind: str) -> Path:
        """The folder of a model with random weights."""
        run = self.folder / kind
        if not run.exists():
            config = self.config
            if kind == "Transformer":
                config = sized_like(config, "attention", window=None)
            torch.manual_seed(1)
            train = config.train
            model = AccessibilityModel(
                config.model,
                TRACKS,
                window_bp=train.window_bp or 131_072,
                margin_bp=16_384 if train.margin_bp is None else train.margin_bp,
            )
            run.mkdir()
            checkpoint.save(model, run / checkpoint.MODEL_FILE)
        return run

    def _genome(self, length_bp: int) -> Path:
        """A FASTA of one chromosome, and its cache beside it."""
        path = self.folder / f"{length_bp}.fa"
        if not path.exists():
            write_random_fasta(path, length_bp)
            Genome(path, cache_dir=self.folder)
        return path

    def _out(self, by: By, length_bp: int) -> Path:
        return self.folder / f"{by.replace(' ', '-').replace(',', '')}-{length_bp}"


def write_random_fasta(path: Path, length_bp: int) -> None:
    """One record, `chr`, of random bases with a run of N in the middle."""
    random = np.random.default_rng(length_bp)
    from_bp = int(length_bp * (1 - N_SHARE) / 2)
    to_bp = from_bp + int(length_bp * N_SHARE)
    block = LINE * 100_000
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(b">chr\n")
        for start in range(0, length_bp, block):
            bases = np.frombuffer(b"ACGT", np.uint8)[random.integers(0, 4, min(block, length_bp - start))]
            bases[max(0, from_bp - start) : max(0, to_bp - start)] = ord("N")
            whole = bases.size // LINE * LINE
            lines = np.full((whole // LINE, LINE + 1), ord("\n"), np.uint8)
            lines[:, :LINE] = bases[:whole].reshape(-1, LINE)
            file.write(lines.tobytes())
            if whole < bases.size:
                file.write(bases[whole:].tobytes() + b"\n")


def _work(job: _Job, sender: Any) -> None:
    """What a fresh process does; sends the fields of a row."""
    import resource

    began = time.monotonic()
    try:
        _once(job, job.warm_up, f"{job.out}-warm-up")
        start_s, began = time.monotonic() - began, time.monotonic()
        _once(job, job.genome, job.out)
        seconds = time.monotonic() - began
        cuda = job.device.startswith("cuda")
        found: dict[str, float | str | None] = {
            "seconds": seconds,
            "start_s": start_s,
            "device_mib": torch.cuda.max_memory_reserved() / 2**20 if cuda else None,
            "host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        }
        if job.by.endswith("windows"):
            found["model_share"] = _model_seconds(job) / seconds
        elif job.by.endswith("chromosome"):
            found["model_share"] = _stream_seconds(job) / seconds
    except Exception as error:  # told in the row
        traceback.print_exc()
        found = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    sender.send(found)
    sender.close()


def _once(job: _Job, genome: str, out: str) -> None:
    if job.by == "a loop":
        loop(job.run, genome, out, device=job.device, precision=job.precision, batch_size=job.batch_size)
        return
    mode = "chromosome" if job.by.endswith("chromosome") else "windows"
    batch = {"batch_size": job.batch_size} if mode == "windows" else {}
    predict(
        job.run,
        Genome(genome, cache_dir=Path(genome).parent),
        out,
        device=job.device,
        mode=mode,
        precision=job.precision,
        **batch,  # type: ignore[arg-type]
    )


def _warm_up_bp(device: str) -> int:
    return WARM_UP_BP[torch.device(device).type]


def _stream_seconds(job: _Job) -> float:
    """What `stream` alone takes for random codes of the chromosome's length: codes and features stay on the device."""
    device = torch.device(job.device)
    model = checkpoint.load(job.run).to(device).eval()
    trunk_bp, chunk_bp = model.encoder.trunk_bp, chosen_chunk_bp(model, None, device)
    length_bp = (
        -(-Genome(job.genome, cache_dir=Path(job.genome).parent).lengths["chr"] // trunk_bp) * trunk_bp
    )
    tokens = torch.randint(0, 4, (1, length_bp), dtype=torch.int8, device=device)
    seconds = 0.0
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16"):
        for end in (
            min(length_bp, _warm_up_bp(job.device) // trunk_bp * trunk_bp),
            length_bp,
        ):  # the first one warms up
            began = time.perf_counter()
            for _ in model.stream(tokens[:, :end], chunk_bp=chunk_bp, keep="device"):
                pass
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
    return seconds


def _model_seconds(job: _Job) -> float:
    """What the model alone takes for all windows of the chromosome that hold bases."""
    device = torch.device(job.device)
    model = checkpoint.load(job.run).to(device)
    run = GraphedPrediction(model) if device.type == "cuda" else model.predict
    genome = Genome(job.genome, cache_dir=Path(job.genome).parent)
    windows = genome.lengths["chr"] * (1 - N_SHARE) / (model.window_bp - 2 * model.margin_bp)
    tokens = torch.randint(0, 4, (job.batch_size, model.window_bp), dtype=torch.int8, device=device)
    times = []
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16"),
    ):
        for _ in range(8 if device.type == "cuda" else 2):
            began = time.perf_counter()
            run(tokens)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return min(times) * windows / job.batch_size
