"""Measure the Triton kernels on a GPU: right first, then their times, memory and growth beside floors and peers."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from genossm.errors import GenossmError
from genossm.kernels.backend import Backend
from genossm.pipelines.benchmark_beside import PeerProcesses, Peers
from genossm.pipelines.benchmark_cases import Case, Shapes, Work, select_cases
from genossm.pipelines.benchmark_timing import (
    Ceilings,
    Measured,
    Pass,
    Run,
    Stopwatch,
    describe_row,
    measure_ceilings,
    measure_passes,
    release,
    sentence,
)
from genossm.pipelines.device import describe, pick_device
from genossm.progress import say
from genossm.version import versions

LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Norm of the difference to the float64 reference, over the norm of the reference, for each output and gradient."""
LONG = 131072
US = "genossm"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    lengths: tuple[int, ...] = (8192, 131072, 1048576)
    one_direction: tuple[int, ...] = (32768,)
    growth: tuple[int, ...] = (8192, 32768, 131072, 524288, 1048576, 4194304)
    host_bound_below: int = 8192
    check_length: int = 769
    check_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    check_shapes: Shapes = field(default_factory=lambda: Shapes(heads=4, channels=96))
    dtype: torch.dtype = torch.bfloat16
    budget_s: float = 0.25
    warm_limit_s: float = 80.0
    peers_limit_s: float = 220.0
    copy_bytes: int = 2**32
    matmul_size: int = 8192

    def lengths_of(self, case: Case) -> list[int]:
        """The lengths for a case: one direction alone is also measured where it begins to matter."""
        more = self.one_direction if case.direction == "forward" and len(self.lengths) > 1 else ()
        return sorted({*self.lengths, *more})


QUICK = Plan(lengths=(8192, 131072), one_direction=(), growth=(8192, 131072, 1048576), budget_s=0.1)


@dataclass(frozen=True)
class GpuCheck:
    """Largest error of a kernel against the float64 reference over its outputs, and over all gradients."""

    case: str
    dtype: str
    length: int
    output_error: float
    gradient_error: float


@dataclass(frozen=True)
class Floor:
    """The least time on this device for a case, forward and with the gradient, and which ceiling sets it."""

    case: str
    length: int
    forward_ms: float
    forward_backward_ms: float
    forward_limit: str
    forward_backward_limit: str
    forward_work: Work
    forward_backward_work: Work


@dataclass(frozen=True)
class Growth:
    """ms ~ length ** exponent, fitted over all lengths and over those from 131,072 (None: fewer than two)."""

    case: str
    rows: list[Measured]
    forward: float | None
    forward_backward: float | None
    long_forward: float | None
    long_forward_backward: float | None


@dataclass
class GpuBenchmark:
    """All that a run found; the tables are in genossm.pipelines.benchmark_tables."""

    device: str
    hardware: dict[str, str]
    versions: dict[str, str]
    backend: str
    dtype: str
    shapes: Shapes
    states: dict[str, int]
    checks: list[GpuCheck] = field(default_factory=list)
    ceilings: Ceilings | None = None
    floors: list[Floor] = field(default_factory=list)
    rows: list[Measured] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def failures(self) -> list[str]:
        """Our own rows that failed otherwise than for want of memory."""
        rows = [*self.rows, *(row for growth in self.growth for row in growth.rows)]
        return [
            describe_row(row)
            for row in rows
            if row.by == US and row.problem is not None and set(row.problem.split("; ")) != {"out of memory"}
        ]


def benchmark_on_gpu(
    *,
    device: str = "auto",
    cases: Sequence[str] = (),
    plan: Plan | None = None,
    shapes: Shapes | None = None,
    peers: bool = True,
    backend: Backend = "triton",
    save: Callable[[GpuBenchmark], None] | None = None,
) -> GpuBenchmark:
    """Check every case against float64, then time it, its growth and the peers that are there.

    Args:
        device: auto, cuda or cuda:N (cpu with backend="torch" runs the same, for tests).
        cases: names of cases, or their beginnings; all when empty.
        plan: lengths and how long to measure; None takes the full one.
        shapes: None takes the shapes of the published comparison.
        peers: whether to time the peers found in $PEER_PATH or installed, and to quote those that are absent.
        backend: the implementation to measure.
        save: called with what there is after each part (cases, growth, peers), so that a cut-off run leaves it.

    Raises:
        DeviceError: the device is not there.
        ConfigError: no case has that name.
        GenossmError: a kernel is wrong; nothing is timed then.
    """
    began = time.monotonic()
    chosen = select_cases(cases)
    place = pick_device(device)
    plan, shapes = plan or Plan(), shapes or Shapes()
    result = GpuBenchmark(
        describe(place),
        hardware(place),
        versions(),
        backend,
        str(plan.dtype).removeprefix("torch."),
        shapes,
        {case.name: case.state or shapes.state for case in chosen},
    )
    with ExitStack() as stack:
        if place.type == "cuda":
            stack.enter_context(torch.cuda.device(place))  # streams and events are of the current device
        beside: PeerProcesses | None = None
        if peers:
            beside = stack.enter_context(
                PeerProcesses(
                    chosen,
                    shapes,
                    {case.name: plan.lengths_of(case) for case in chosen},
                    place,
                    plan.dtype,
                    budget_s=plan.budget_s,
                    host_bound_below=plan.host_bound_below,
                    warm_limit_s=plan.warm_limit_s,
                    limit_s=plan.peers_limit_s,
                )
            )
            if place.type == "cuda":
                beside.warm()
        # What is compiled and compared here is not timed, so the peers may compile beside it.
        result.checks = check_cases(chosen, plan, place, backend)
        if beside is not None:
            beside.wait()
        result.ceilings = measure_ceilings(place, copy_bytes=plan.copy_bytes, matmul_size=plan.matmul_size)
        for case in chosen:
            _measure_case(result, case, plan, place, backend)
        if save is not None:
            save(result)
        for case in chosen:
            if plan.growth and case.operator == "ssd" and case.direction == "both":
                result.growth.append(_growth(case, plan, shapes, place, backend))
        if save is not None:
            save(result)
        found = beside.run() if beside is not None else Peers()
    result.rows += found.rows
    result.versions |= {f"peer {name}": version for name, version in found.versions.items()}
    result.absent = found.absent
    result.seconds = time.monotonic() - began
    if save is not None:
        save(result)
    return result


def check_cases(cases: Sequence[Case], plan: Plan, device: torch.device, backend: Backend) -> list[GpuCheck]:
    """Compare every output and gradient of every case with the float64 reference on the same, rounded inputs.

    Raises:
        GenossmError: one is off by more than LARGEST_ERROR, or could not be computed; all such are named.
    """
    checks: list[GpuCheck] = []
    wrong: list[str] = []
    cause: Exception | None = None
    for case in cases:
        for dtype in plan.check_dtypes:
            name = str(dtype).removeprefix("torch.")
            try:
                errors = check_case(case, plan.check_shapes, plan.check_length, dtype, device, backend)
            except Exception as error:
                wrong.append(f"{case.name} in {name} failed ({sentence(error)})")
                cause = error
                continue
            off = {label: error for label, error in errors.items() if not error <= LARGEST_ERROR[dtype]}
            if off:
                told = ", ".join(f"{label} by {error:.1e}" for label, error in off.items())
                wrong.append(f"{case.name} in {name} is off in {told} (at most {LARGEST_ERROR[dtype]:.0e})")
            outputs, gradients = (
                [error for label, error in errors.items() if label.startswith("output") == wanted]
                for wanted in (True, False)
            )
            checks.append(GpuCheck(case.name, name, plan.check_length, max(outputs), max(gradients)))
            say(f"{case.name}, {name}: outputs off by {max(outputs):.1e}, gradients by {max(gradients):.1e}")
    if wrong:
        raise GenossmError(
            f"kernels differ from the float64 reference at {plan.check_length} positions, relative to its norm: "
            f"{'; '.join(wrong)}; nothing is timed; this is a fault of this build or device: please report it"
        ) from cause
    return checks


def check_case(
    case: Case, shapes: Shapes, length: int, dtype: torch.dtype, device: torch.device, backend: Backend
) -> dict[str, float]:
    """The error of each output and of the gradient of each input: norm of the difference over norm of the truth."""
    inputs = case.inputs(shapes, length, dtype, device, seed=length)
    names = (
        ("x", "weight", "bias") if case.operator == "short_conv" else ("x", "dt", "A", "B", "C", "D", "bias")
    )
    got = _outcome(lambda leaves: case.run(leaves, backend), inputs)
    truth = _outcome(case.reference, [tensor.double() for tensor in inputs])
    labels = [f"output {index}" for index in range(len(got) - len(inputs))]
    labels += [f"the gradient of {name}" for name in names]
    errors = {
        label: float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
        for label, a, b in zip(labels, got, truth, strict=True)
    }
    release(device)
    return errors


def floor(case: str, length: int, work: tuple[Work, Work], ceilings: Ceilings) -> Floor:
    """The longest of: moving the bytes, the matrix products and the exponentials, each at its ceiling."""

    def least(work: Work) -> tuple[float, str]:
        rates = {
            "bytes": work.bytes / ceilings.copy_gb_per_s / 1e6,
            "matrix products": work.flops / ceilings.matmul_tflop_per_s / 1e9,
        }
        if ceilings.exponentials_g_per_s is not None:
            rates["exponentials"] = work.exponentials / ceilings.exponentials_g_per_s / 1e6
        limit = max(rates, key=lambda name: rates[name])
        return rates[limit], limit

    (forward, limit), (both, both_limit) = (least(part) for part in work)
    return Floor(case, length, forward, both, limit, both_limit, *work)


def exponent(lengths: Sequence[int], times: Sequence[float]) -> float | None:
    """The slope of log time over log length by least squares; None for fewer than two points."""
    if len(lengths) < 2:
        return None
    x, y = ([math.log(value) for value in values] for values in (lengths, times))
    middle, height = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / across


def hardware(device: torch.device) -> dict[str, str]:
    """What the driver tells about the device."""
    if device.type != "cuda":
        return {}
    card = torch.cuda.get_device_properties(device)
    found = {
        "processors": str(card.multi_processor_count),
        "memory": f"{card.total_memory / 2**30:.0f} GiB",
        "compute capability": f"{card.major}.{card.minor}",
        "CUDA of torch": str(torch.version.cuda),
    }
    program = shutil.which("nvidia-smi")
    if program is not None:
        asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            found["driver"] = answer.stdout.split()[0]
    return found


def _measure_case(
    result: GpuBenchmark, case: Case, plan: Plan, place: torch.device, backend: Backend
) -> None:
    watch = Stopwatch(place, plan.budget_s)
    assert result.ceilings is not None
    for length in plan.lengths_of(case):
        # On the meta device inputs have sizes and no contents.
        sizes = case.inputs(result.shapes, length, plan.dtype, torch.device("meta"))
        work = case.work(result.shapes, length, sizes)
        result.floors.append(floor(case.name, length, work, result.ceilings))
        host_bound = length <= plan.host_bound_below
        result.rows.append(_measure_ours(case, length, watch, result.shapes, plan.dtype, backend, host_bound))


def _measure_ours(
    case: Case,
    length: int,
    watch: Stopwatch,
    shapes: Shapes,
    dtype: torch.dtype,
    backend: Backend,
    host_bound: bool,
) -> Measured:
    """One row; a failure stands in it, so that what was measured before is not lost."""
    try:
        row = measure_passes(
            watch,
            partial(case.run, backend=backend),
            case.inputs(shapes, length, dtype, watch.device),
            case=case.name,
            length=length,
            by=US,
            host_bound=host_bound,
            catch=True,
        )
        release(watch.device)
    except Exception as error:
        row = Measured(case.name, length, US, problem=sentence(error))
    say(describe_row(row))
    return row


def _growth(case: Case, plan: Plan, shapes: Shapes, place: torch.device, backend: Backend) -> Growth:
    watch = Stopwatch(place, plan.budget_s / 2)
    rows = [
        _measure_ours(case, length, watch, shapes, plan.dtype, backend, host_bound=False)
        for length in plan.growth
    ]

    def fit(pick: Callable[[Measured], Pass | None], shortest: int) -> float | None:
        points = [(row.length, part.ms) for row in rows if (part := pick(row)) and row.length >= shortest]
        return exponent([length for length, _ in points], [ms for _, ms in points])

    return Growth(
        case.name,
        rows,
        fit(lambda row: row.forward, 0),
        fit(lambda row: row.forward_backward, 0),
        fit(lambda row: row.forward, LONG),
        fit(lambda row: row.forward_backward, LONG),
    )


def _outcome(run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of a fixed random sum of them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = run(leaves)
    random = torch.Generator(inputs[0].device).manual_seed(3)
    # Weights that both precisions hold exactly: small whole numbers.
    weights = [torch.randint(-3, 4, y.shape, generator=random, device=y.device).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, weights)]
