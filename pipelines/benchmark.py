"""Measure the PyTorch backend of the scans against the step-by-step loop: right first, then time, memory and growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genossm.errors import GenossmError
from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.ssd import ssd
from genossm.pipelines.benchmark_cases import Shapes
from genossm.pipelines.benchmark_gpu import QUICK, GpuBenchmark, Plan, benchmark_on_gpu
from genossm.pipelines.benchmark_tables import markdown, text
from genossm.pipelines.benchmark_timing import median_ms, peak_mib
from genossm.pipelines.device import describe, pick_device
from genossm.progress import say
from genossm.version import versions

CHECK_LENGTH = 257
LARGEST_ERROR = 1e-4
"""Relative to the largest element of the float64 reference; float32 rounding gives about 1e-6."""

Scan = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """Shapes to measure: ssd with one group, selective_scan with its own state."""

    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    ssd_state: int = 64
    channels: int = 256
    state: int = 16


@dataclass(frozen=True)
class Check:
    """Largest error of the torch backend in float32 against the float64 reference, relative to the largest element."""

    case: str
    length: int
    output_error: float
    gradient_error: float


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds and peak memory in MiB beyond the inputs (None: not measured)."""

    case: str
    backend: str
    length: int
    forward_ms: float
    forward_backward_ms: float
    forward_mib: float | None
    forward_backward_mib: float | None
    repeats: int


@dataclass(frozen=True)
class KernelBenchmark:
    """All that a run found; `text` is for people."""

    device: str
    versions: dict[str, str]
    threads: int
    sizes: Sizes
    length: int
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    growth: list[Timing] = field(default_factory=list)

    def speedup(self, case: str) -> tuple[float, float]:
        """How many times faster than the step-by-step loop: forward, and forward with backward."""
        by_backend = {timing.backend: timing for timing in self.timings if timing.case == case}
        fast, naive = by_backend["torch"], by_backend["reference"]
        return (
            naive.forward_ms / fast.forward_ms,
            naive.forward_backward_ms / fast.forward_backward_ms,
        )


def benchmark_kernels(
    *,
    device: str = "auto",
    length: int = 8192,
    sizes: Sizes | None = None,
    growth: tuple[int, int] = (2048, 16384),
    repeats: int = 7,
) -> KernelBenchmark:
    """Check and time `ssd` and `selective_scan`, torch backend, float32, forward and both directions.

    The step-by-step loop (`reference`) is timed beside the forward direction at the same length, its forward
    `repeats` // 2 times at most 3 and its backward once: it is slow, and keeps every state.

    Args:
        device: auto, cpu, cuda or cuda:N.
        length: positions of the main table.
        sizes: shapes; None takes the defaults.
        growth: a short and a long length, compared in time and memory.
        repeats: runs whose median is given, after one that is not counted.

    Raises:
        DeviceError: the device is not there.
        GenossmError: a kernel is wrong; nothing is timed then.
    """
    place = pick_device(device)
    sizes = sizes or Sizes()
    result = KernelBenchmark(
        describe(place),
        versions(),
        torch.get_num_threads(),
        sizes,
        length,
    )
    cases: dict[str, tuple[Scan, Callable[..., list[Tensor]], str]] = {
        f"{name} {direction}": (scan, make, direction)
        for name, scan, make in (("ssd", ssd, _ssd_inputs), ("selective_scan", selective_scan, _s6_inputs))
        for direction in ("forward", "both")
    }
    for case, (scan, make, direction) in cases.items():
        check = _check(case, partial(scan, direction=direction), make(sizes, CHECK_LENGTH, place))
        say(f"{case}: error {check.output_error:.1e}, of gradients {check.gradient_error:.1e}")
        result.checks.append(check)
    for case, (scan, make, direction) in cases.items():
        run = partial(scan, direction=direction)
        result.timings.append(_measure(case, "torch", run, make(sizes, length, place), repeats, repeats))
        if direction == "forward":
            loops = max(1, min(3, repeats // 2))
            result.timings.append(_measure(case, "reference", run, make(sizes, length, place), loops, 1))
        say(f"{case}: timed at {length:,} positions")
    for case, (scan, make, direction) in cases.items():
        if direction == "both":
            for positions in growth:
                inputs = make(sizes, positions, place)
                run = partial(scan, direction=direction)
                result.growth.append(_measure(case, "torch", run, inputs, repeats, repeats))
            say(f"{case}: timed at {growth[0]:,} and {growth[1]:,} positions")
    return result


def measure_kernels(
    *,
    device: str = "auto",
    cases: Sequence[str] = (),
    quick: bool = False,
    peers: bool = True,
    length: int | None = None,
    heads: int | None = None,
    save: Callable[[KernelBenchmark | GpuBenchmark, str], None] | None = None,
) -> tuple[KernelBenchmark | GpuBenchmark, str, list[str]]:
    """What `genossm bench kernels` does: `benchmark_on_gpu` on a CUDA device, else `benchmark_kernels`.

    Args:
        device: auto, cpu, cuda or cuda:N.
        cases, quick, peers: see `benchmark_on_gpu` and its `QUICK` plan; for a CUDA device.
        length: positions of the main table; None takes the default of either benchmark. With one, a CUDA device's
            growth with the length is left out.
        heads: heads of ssd; None likewise.
        save: called with the figures and their tables in Markdown (empty for a CPU), on a GPU after each part.

    Returns:
        The figures, a text of tables, and what failed to be measured.
    """
    if pick_device(device).type == "cpu":
        result = benchmark_kernels(
            device=device, length=length or 8192, sizes=None if heads is None else Sizes(heads=heads)
        )
        if save is not None:
            save(result, "")
        return result, report(result), []
    plan = QUICK if quick else Plan()
    if length is not None:
        plan = replace(plan, lengths=(length,), growth=())
    shapes = Shapes() if heads is None else Shapes(heads=heads)
    found = benchmark_on_gpu(
        device=device,
        cases=cases,
        plan=plan,
        shapes=shapes,
        peers=peers,
        save=None if save is None else lambda partial: save(partial, markdown(partial)),
    )
    return found, text(found), found.failures()


def report(result: KernelBenchmark) -> str:
    """The result as a text of aligned tables."""
    sizes = result.sizes
    lines = [
        f"device    {result.device}",
        f"versions  {', '.join(f'{name} {version}' for name, version in result.versions.items())}",
        f"threads   {result.threads}",
        f"shapes    ssd: batch {sizes.batch}, heads {sizes.heads}, head_dim {sizes.head_dim}, groups 1, "
        f"state {sizes.ssd_state}; selective_scan: batch {sizes.batch}, channels {sizes.channels}, "
        f"state {sizes.state}; float32",
        "",
        f"{'error, float32 against the float64 reference':<44}{'output':>10}{'gradients':>12}",
    ]
    for check in result.checks:
        label = f"{check.case}, {check.length} positions"
        lines.append(f"{label:<44}{check.output_error:>10.1e}{check.gradient_error:>12.1e}")
    head = f"{'forward ms':>12}{'+ backward':>12}{'peak MiB':>10}{'+ backward':>12}"
    lines += ["", f"{f'{result.length:,} positions, medians':<44}{head}"]
    lines += [_row(f"{timing.case}, {timing.backend}", timing) for timing in result.timings]
    for case in dict.fromkeys(check.case for check in result.checks if check.case.endswith("forward")):
        forward, both = result.speedup(case)
        lines.append(f"{f'{case}: reference / torch':<44}{f'{forward:.1f}x':>12}{f'{both:.1f}x':>12}")
    lines += ["", f"{'growth, torch backend':<44}{head}"]
    for short, long in zip(result.growth[::2], result.growth[1::2], strict=True):
        lines += [_row(f"{timing.case}, {timing.length:,} positions", timing) for timing in (short, long)]
        ratios = [
            _ratio(long.forward_ms, short.forward_ms),
            _ratio(long.forward_backward_ms, short.forward_backward_ms),
            _ratio(long.forward_mib, short.forward_mib),
            _ratio(long.forward_backward_mib, short.forward_backward_mib),
        ]
        label = f"ratio (length {long.length / short.length:.1f}x)"
        lines.append(f"{label:<44}{ratios[0]:>12}{ratios[1]:>12}{ratios[2]:>10}{ratios[3]:>12}")
    return "\n".join(lines)


def _row(label: str, timing: Timing) -> str:
    memory = [
        "-" if mib is None else f"{mib:,.0f}" for mib in (timing.forward_mib, timing.forward_backward_mib)
    ]
    times = f"{timing.forward_ms:>12,.1f}{timing.forward_backward_ms:>12,.1f}"
    return f"{label:<44}{times}{memory[0]:>10}{memory[1]:>12}"


def _ratio(long: float | None, short: float | None) -> str:
    return "-" if long is None or not short else f"{long / short:.1f}x"


def _ssd_inputs(sizes: Sizes, length: int, device: torch.device) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = (sizes.batch, length, sizes.heads), (sizes.batch, length, 1, sizes.ssd_state)
    inputs = [
        torch.randn(*shapes[0], sizes.head_dim, generator=random),
        torch.rand(*shapes[0], generator=random) * 0.1 + 0.001,
        -1 - 15 * torch.rand(sizes.heads, generator=random),
        torch.randn(*shapes[1], generator=random),
        torch.randn(*shapes[1], generator=random),
        torch.randn(sizes.heads, generator=random),
    ]
    return [tensor.to(device) for tensor in inputs]


def _s6_inputs(sizes: Sizes, length: int, device: torch.device) -> list[Tensor]:
    random = torch.Generator().manual_seed(2)
    inputs = [
        torch.randn(sizes.batch, length, sizes.channels, generator=random),
        torch.rand(sizes.batch, length, sizes.channels, generator=random) * 0.1 + 0.001,
        -1 - 15 * torch.rand(sizes.channels, sizes.state, generator=random),
        torch.randn(sizes.batch, length, sizes.state, generator=random),
        torch.randn(sizes.batch, length, sizes.state, generator=random),
        torch.randn(sizes.channels, generator=random),
    ]
    return [tensor.to(device) for tensor in inputs]


def _check(case: str, scan: Scan, inputs: list[Tensor]) -> Check:
    truth = _outcome(partial(scan, backend="reference"), [tensor.double() for tensor in inputs])
    got = _outcome(partial(scan, backend="torch"), inputs)
    errors = [
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(got, truth, strict=True)
    ]
    check = Check(case, inputs[0].shape[1], errors[0], max(errors[1:]))
    if not max(errors) <= LARGEST_ERROR:
        raise GenossmError(
            f"{case} in float32 differs from the float64 reference by {max(errors):.1e} of the largest element, more "
            f"than {LARGEST_ERROR:.0e}, so it is not timed; this is a fault of this build or device: please report it"
        )
    return check


def _outcome(scan: Scan, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y: Tensor = scan(*leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


def _measure(
    case: str, backend: str, scan: Scan, inputs: list[Tensor], repeats: int, backward_repeats: int
) -> Timing:
    run = partial(scan, backend=backend)
    device = inputs[0].device
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    gradient = torch.ones_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            run(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(run(*leaves), leaves, gradient)

    # The memory runs are the warm-up of the timed ones.
    forward_mib, backward_mib = peak_mib(forward, device), peak_mib(forward_backward, device)
    return Timing(
        case,
        backend,
        inputs[0].shape[1],
        median_ms(forward, device, repeats),
        median_ms(forward_backward, device, backward_repeats),
        forward_mib,
        backward_mib,
        repeats,
    )
