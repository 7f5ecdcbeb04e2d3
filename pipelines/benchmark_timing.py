"""How the benchmarks measure: medians with a cold cache, CUDA graphs, the host's share, peak memory, and ceilings."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20
"""Written before each repetition: several times the L2 cache of any GPU of today."""

Step = Callable[[], object]
Run = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Pass:
    """One pass: median ms, peak MiB beyond its inputs, ms as a CUDA graph, and host ms to launch it (None: not measured)."""

    ms: float
    repeats: int
    peak_mib: float | None
    graph_ms: float | None = None
    host_ms: float | None = None
    graph_problem: str | None = None


@dataclass(frozen=True)
class Measured:
    """One case at one length by one implementation; `problem` says why a pass is missing or what stands beside it."""

    case: str
    length: int
    by: str
    forward: Pass | None = None
    forward_backward: Pass | None = None
    problem: str | None = None
    quoted: bool = False


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best: copying (bytes read and written), bf16 matrix products, exponentials."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float
    exponentials_g_per_s: float | None


class Stopwatch:
    """Times steps on one device, each for about `budget_s` seconds, with 5 to 40 repetitions."""

    def __init__(self, device: torch.device, budget_s: float = 0.4, fewest: int = 5, most: int = 40) -> None:
        self.device = device
        self.budget_s = budget_s
        self.fewest, self.most = fewest, most
        self._flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
        )

    def measure(self, step: Step, *, host_bound: bool = False) -> Pass:
        """Warm up, then measure; `host_bound` adds the CUDA graph and the host's time (on CUDA alone)."""
        step()
        peak = peak_mib(step, self.device)
        self._wait()
        started = time.perf_counter()
        step()
        self._wait()
        seconds = max(time.perf_counter() - started, 1e-6)
        repeats = int(max(self.fewest, min(self.most, self.budget_s / seconds)))
        ms = median_ms(step, self.device, repeats, self._flush)
        if not host_bound or self.device.type != "cuda":
            return Pass(ms, repeats, peak)
        host_ms = self._host_ms(step, repeats)
        try:
            return Pass(ms, repeats, peak, self._graph_ms(step, repeats), host_ms)
        except RuntimeError as error:
            return Pass(ms, repeats, peak, None, host_ms, sentence(error))

    def _graph_ms(self, step: Step, repeats: int) -> float:
        """The same work without launches by the host: a replayed CUDA graph."""
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return median_ms(graph.replay, self.device, repeats, self._flush)

    def _host_ms(self, step: Step, repeats: int) -> float:
        """How long the host is busy until everything is launched, the device idle before."""
        times: list[float] = []
        for _ in range(repeats):
            self._wait()
            started = time.perf_counter()
            step()
            times.append((time.perf_counter() - started) * 1000)
        self._wait()
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_passes(
    watch: Stopwatch,
    run: Run,
    inputs: Sequence[Tensor],
    *,
    case: str,
    length: int,
    by: str,
    host_bound: bool = False,
    catch: bool = False,
) -> Measured:
    """The forward pass without, then with the gradient of every input.

    A pass for which the memory does not suffice is left out and told in `problem`; with `catch` so is one that fails
    in any other way.
    """
    caught: type[Exception] = Exception if catch else torch.OutOfMemoryError
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    problems: list[str] = []

    def forward() -> object:
        with torch.no_grad():
            return run(inputs)

    def attempt(step: Step) -> Pass | None:
        try:
            return watch.measure(step, host_bound=host_bound)
        except caught as error:
            problems.append(sentence(error))
            return None

    alone = attempt(forward)
    together: Pass | None = None
    if alone is not None:
        with torch.no_grad():
            gradients = [torch.randn_like(y) for y in run(inputs)]

        def forward_backward() -> object:
            return torch.autograd.grad(run(leaves), leaves, gradients)

        together = attempt(forward_backward)
    release(watch.device)
    return Measured(case, length, by, alone, together, "; ".join(problems) or None)


def describe_row(row: Measured) -> str:
    """A row in one line."""
    parts = [
        f"{name} {part.ms:.3f} ms"
        for name, part in (("forward", row.forward), ("with gradient", row.forward_backward))
        if part is not None
    ]
    return (
        f"{row.case}, {row.length:,} positions, {row.by}: {', '.join([*parts, *filter(None, [row.problem])])}"
    )


def sentence(error: BaseException) -> str:
    """An error in one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")


def release(device: torch.device) -> None:
    """Give memory that nothing holds back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_ceilings(device: torch.device, *, copy_bytes: int = 2**32, matmul_size: int = 8192) -> Ceilings:
    """Copy a large buffer, multiply two square bf16 matrices of random numbers, and take exponentials in registers."""
    watch = Stopwatch(device)
    copy_ms = _copy_ms(watch, copy_bytes)
    release(device)
    a, b = (
        torch.randn(matmul_size, matmul_size, device=device).to(torch.bfloat16) for _ in range(2)
    )  # zeros would run faster: the clock falls with the bits that change
    matmul_ms = watch.measure(lambda: a @ b).ms
    exponentials: float | None = None
    if device.type == "cuda":
        from genossm.pipelines.benchmark_exponentials import exponentials_step

        step, count = exponentials_step(device)
        exponentials = count / watch.measure(step).ms / 1e6
    return Ceilings(2 * copy_bytes / copy_ms / 1e6, 2 * matmul_size**3 / matmul_ms / 1e9, exponentials)


def median_ms(step: Step, device: torch.device, repeats: int, flush: Tensor | None = None) -> float:
    """The median of `repeats` runs: CUDA events around each, `flush` overwritten before it, or the wall clock."""
    if device.type != "cuda":
        times: list[float] = []
        for _ in range(repeats):
            started = time.perf_counter()
            step()
            times.append((time.perf_counter() - started) * 1000)
        return statistics.median(times)
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        if flush is not None:
            flush.zero_()
        begin.record()
        step()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return float(statistics.median(begin.elapsed_time(end) for begin, end in pairs))


def peak_mib(step: Step, device: torch.device) -> float | None:
    """The most memory that `step` took beyond what was held before; None where the system cannot tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # What was freed goes back to the system first (glibc), lest it be used again without being seen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak back to the present
        before_kib = _status_kib("VmRSS")
    except (OSError, AttributeError, KeyError, ValueError):
        step()
        return None
    step()
    return max(0, _status_kib("VmHWM") - before_kib) / 1024


def _copy_ms(watch: Stopwatch, size: int) -> float:
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=watch.device)
    target = torch.empty_like(source)
    return watch.measure(lambda: target.copy_(source)).ms


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0])
