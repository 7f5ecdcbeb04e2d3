"""The SSD scan in Triton on a CUDA device: every dtype, sizes, long inputs, repeats, offsets past 2^31, graphs and compilation.

Tolerances are relative to a tensor's norm. The truth is float64: the recurrence step by step, or the chunked torch backend,
which tests/test_ssd.py holds equal to it, for what is longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genossm.kernels.ssd import ssd

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1e-2}
SUMMED = {"dA", "dD", "ddt_bias"}
"""Gradients that are sums over all positions, most of which cancels here: 3 times the tolerance."""
LENGTHS = (1, 15, 63, 64, 65, 255, 256, 257, 1000, 1009, 4099)
BY_POSITION = ("x", "dt", "B", "C", "z")


@dataclass(frozen=True)
class Case:
    """What a test scans."""

    length: int
    dtype: torch.dtype = torch.bfloat16
    heads: int = 4
    head_dim: int = 64
    state: int = 64
    groups: int = 1
    batch: int = 1
    direction: str = "both"
    separate: bool = False

    def __str__(self) -> str:
        sizes = f"H{self.heads} P{self.head_dim} N{self.state} G{self.groups}"
        own = ", separate" if self.separate else ""
        return f"{self.direction} L{self.length} {sizes} {str(self.dtype).removeprefix('torch.')}{own}"


SIZES = (
    {"heads": 16, "state": 128},
    {"heads": 6, "groups": 2},
    {"head_dim": 128, "state": 128},
    {"state": 16},
    {"state": 256},
    {"heads": 3, "head_dim": 40, "state": 24},
    {"heads": 8, "head_dim": 32},
    {"heads": 2, "head_dim": 32, "state": 128},
    {"head_dim": 16, "state": 16},
    {"head_dim": 128, "state": 32},
)
OF_LENGTHS = [Case(length, dtype) for dtype in (torch.bfloat16, torch.float32) for length in LENGTHS]
OF_SIZES = [
    Case(1009, dtype, separate=True, **size) for dtype in (torch.bfloat16, torch.float32) for size in SIZES
]
OF_DIRECTIONS = [
    Case(length, direction=direction, batch=2)
    for direction in ("forward", "reverse")
    for length in (200, 1009, 1024)
]
HALF = Case(1009, torch.float16)


def make(case: Case) -> dict[str, Tensor]:
    random = torch.Generator("cuda").manual_seed(case.length + case.state)
    batch, length, heads, dtype = case.batch, case.length, case.heads, case.dtype
    own = (2,) if case.separate else ()
    states = (batch, heads, case.head_dim, case.state)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=random, device="cuda", dtype=dtype)

    return {
        "x": normal(batch, length, heads, case.head_dim, dtype=dtype),
        "dt": normal(batch, length, heads, *own, dtype=dtype),
        "A": -normal(heads, *own).abs() - 0.05,
        "B": normal(batch, length, case.groups, case.state, dtype=dtype),
        "C": normal(batch, length, case.groups, case.state, dtype=dtype),
        "D": normal(heads),
        "z": normal(batch, length, heads, case.head_dim, dtype=dtype),
        "dt_bias": normal(heads, *own) - 2,
        "start": normal(*states),
        "reverse_start": normal(*states),
    }


def scan(inputs: dict[str, Tensor], direction: str, backend: str = "triton", **options: Any) -> list[Tensor]:
    """y and the final states."""
    starts: dict[str, Any] = {"forward": inputs.get("start"), "reverse": inputs.get("reverse_start")}
    starts["both"] = None if starts["forward"] is None else tuple(starts.values())
    y, finals = ssd(
        *(inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D")),  # type: ignore[arg-type]
        z=inputs.get("z"),
        dt_bias=inputs.get("dt_bias"),
        initial_state=starts[direction],
        return_final_state=True,
        direction=direction,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        **{"dt_softplus": True, **options},
    )
    return [y, *(finals if isinstance(finals, tuple) else (finals,))]


def run(
    inputs: dict[str, Tensor], direction: str, backend: str = "triton", **options: Any
) -> dict[str, Tensor]:
    """y, final states and every gradient of a random function of them; in float64 but for the Triton backend."""
    narrow = inputs["x"].dtype
    given = {
        name: tensor.detach().to(tensor.dtype if backend == "triton" else torch.float64).requires_grad_()
        for name, tensor in inputs.items()
        if name != {"forward": "reverse_start", "reverse": "start"}.get(direction)
    }
    results = scan(given, direction, backend, **options)
    random = torch.Generator("cuda").manual_seed(9)
    cotangents = []
    for result in results:
        weights = torch.randn(result.shape, generator=random, device="cuda")
        cotangents.append((weights.to(narrow) if not cotangents else weights).to(result.dtype))
    gradients = torch.autograd.grad(results, list(given.values()), cotangents)
    return {
        **{("y", "final", "reverse final")[index]: result.detach() for index, result in enumerate(results)},
        **{f"d{name}": gradient for name, gradient in zip(given, gradients, strict=True)},
    }


def truth(inputs: dict[str, Tensor], direction: str, **options: Any) -> dict[str, Tensor]:
    return run(inputs, direction, "reference" if inputs["x"].shape[1] < 300 else "torch", **options)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    errors = {}
    for name, right in expected.items():
        assert torch.isfinite(got[name]).all(), name
        error = float((got[name].double() - right).norm() / right.double().norm().clamp(min=1e-30))
        if not error < tolerance * (3 if name in SUMMED else 1):
            errors[name] = error
    assert not errors


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_step_sizes_as_they_are(heads: int, direction: str) -> None:
    """Positive, without bias and softplus, heads next to each other: compiled otherwise."""
    inputs = {name: make(Case(300, heads=heads))[name] for name in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = inputs["dt"].abs() / 10
    expected = truth(inputs, direction, dt_softplus=False)
    assert_close(run(inputs, direction, dt_softplus=False), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("case", [*OF_LENGTHS, *OF_SIZES, *OF_DIRECTIONS, HALF], ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    inputs = make(case)
    assert_close(run(inputs, case.direction), truth(inputs, case.direction), TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", [Case(200), Case(1009), OF_DIRECTIONS[0]], ids=str)
def test_nothing_is_read_that_was_not_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, empty = make(case), torch.empty
    expected = run(inputs, case.direction)
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(torch.nan))
    got = run(inputs, case.direction)
    monkeypatch.undo()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def unaligned(tensor: Tensor) -> Tensor:
    """The same values, one element after a boundary of 16 bytes."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_another_dtype_or_alignment_of_the_same_shapes(direction: str) -> None:
    """Compiled kernels are launched again without a look at their tensors; these may differ between calls."""
    inputs = make(Case(301))
    others = ("D", "z", "dt", "A", "dt_bias", "start", "reverse_start")
    for moved in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            given = {
                name: tensor.to(dtype) if name in others else tensor.clone()
                for name, tensor in inputs.items()
            }
            if moved:
                given = {name: unaligned(tensor) for name, tensor in given.items()}
                assert all(tensor.data_ptr() % 16 for tensor in given.values())
            assert_close(run(given, direction), truth(given, direction), TOLERANCE[torch.bfloat16])
    # one at a time, and back: what the others compiled is not taken for it
    for name in others:
        for other in (inputs[name].bfloat16(), unaligned(inputs[name]), inputs[name].float()):
            given = {**inputs, name: other}
            assert_close(run(given, direction), truth(given, direction), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("case", [Case(65_536, heads=16, state=128), Case(65_536, separate=True)], ids=str)
def test_results_are_bitwise_repeatable(case: Case) -> None:
    inputs = make(case)
    first = run(inputs, case.direction)
    for _ in range(3):
        again = run(inputs, case.direction)
        assert [name for name in first if not torch.equal(again[name], first[name])] == []


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("case", [Case(1_000_000)], ids=str)
def test_a_million_zeros(case: Case, softplus: bool) -> None:
    inputs = {name: torch.zeros_like(tensor) for name, tensor in make(case).items()}
    inputs["A"] -= 1
    results = run(inputs, case.direction, dt_softplus=softplus)
    assert all(torch.isfinite(result).all() for result in results.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", [1e-6, 50.0])
def test_extreme_steps(step: float, dtype: torch.dtype) -> None:
    case = Case(1009, dtype)
    inputs = make(case)
    inputs["dt"] = torch.full_like(inputs["dt"], step)
    inputs["dt_bias"].zero_()
    got, right = (function(inputs, case.direction, dt_softplus=False) for function in (run, truth))
    if step == 50.0:
        # Nothing is left of dA but the rounding of sums of dt ddt, once more times dt.
        error = (got.pop("dA") - right.pop("dA")).abs().max()
        assert float(error) < 0.1 * TOLERANCE[dtype] * 50**2 * float(right["ddt"].abs().sum((0, 1)).max())
    # Decays are differences of float32 sums that reach 50 * 1.44 * chunk.
    assert_close(got, right, TOLERANCE[dtype] * (10 if step == 50.0 and dtype == torch.float32 else 1))


def test_a_split_sequence_equals_the_whole() -> None:
    inputs = make(Case(20_011, torch.float32))
    pieces = [
        {name: tensor[:, span] if name in BY_POSITION else tensor for name, tensor in inputs.items()}
        for span in (slice(0, 7_777), slice(7_777, 20_011))
    ]
    for direction, order in (("forward", pieces), ("reverse", pieces[::-1])):
        y, final = scan(inputs, direction)
        first, carried = scan(order[0], direction)
        second, end = scan({**order[1], "start": carried, "reverse_start": carried}, direction)
        parts = [first, second] if direction == "forward" else [second, first]
        assert_close({"y": torch.cat(parts, 1), "final": end}, {"y": y, "final": final}, 1e-5)
    # in both, each piece gets what leaves the other: the left one forward, the right one in reverse
    left, right = pieces
    _, carried = scan(left, "forward")
    _, entering = scan(right, "reverse")
    y, final, reverse_final = scan(inputs, "both")
    first, _, last = scan({**left, "reverse_start": entering}, "both")
    second, end, _ = scan({**right, "start": carried}, "both")
    got = {"y": torch.cat([first, second], 1), "final": end, "reverse final": last}
    assert_close(got, {"y": y, "final": final, "reverse final": reverse_final}, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [200, 1009])
def test_directions_belong_together(length: int, dtype: torch.dtype) -> None:
    inputs = make(Case(length, dtype))
    forward, reverse, both = (scan(inputs, direction) for direction in ("forward", "reverse", "both"))
    flipped = {name: tensor.flip(1) if name in BY_POSITION else tensor for name, tensor in inputs.items()}
    turned = scan({**flipped, "start": inputs["reverse_start"]}, "forward")
    got = {"y": reverse[0], "final": reverse[1]}
    assert_close(got, {"y": turned[0].flip(1), "final": turned[1]}, TOLERANCE[dtype])
    skip = inputs["D"][:, None] * inputs["x"].float() * F.silu(inputs["z"].float())
    expected = {"y": forward[0].float() + reverse[0].float() - skip, "final": forward[1], "last": reverse[1]}
    assert_close(dict(zip(expected, both, strict=True)), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_sequences(dtype: torch.dtype) -> None:
    bounds = [0, 1, 300, 812, 2_000]
    inputs = make(Case(2_000, dtype))
    random = torch.Generator("cuda").manual_seed(3)
    for name in ("start", "reverse_start"):
        inputs[name] = torch.randn(4, 4, 64, 64, generator=random, device="cuda")
    cu_seqlens = torch.tensor(bounds, device="cuda", dtype=torch.int32)
    got = run(inputs, "both", cu_seqlens=cu_seqlens)
    assert_close(got, truth(inputs, "both", cu_seqlens=cu_seqlens), TOLERANCE[dtype])
    for number, (first, end) in enumerate(pairwise(bounds)):
        alone = {
            name: tensor[:, first:end] if name in BY_POSITION else tensor for name, tensor in inputs.items()
        }
        alone |= {name: inputs[name][number : number + 1] for name in ("start", "reverse_start")}
        y, final, reverse_final = scan(alone, "both")
        here = {
            "y": got["y"][:, first:end],
            "final": got["final"][number : number + 1],
            "reverse final": got["reverse final"][number : number + 1],
        }
        assert_close(here, {"y": y, "final": final, "reverse final": reverse_final}, TOLERANCE[dtype])


def of_a_projection(length: int, heads: int = 16, state: int = 64) -> dict[str, Tensor]:
    """z, x, B, C and dt as views of one (1, length, 2192) buffer, and parameters."""
    random = torch.Generator("cuda").manual_seed(length)
    width = 2 * heads * 64 + 2 * state + heads
    packed = torch.empty(1, length, width, dtype=torch.bfloat16, device="cuda").normal_(generator=random)
    z, x, B, C, dt = packed.split([heads * 64, heads * 64, state, state, heads], -1)
    A = -torch.rand(heads, generator=random, device="cuda") - 0.05
    return {
        "x": x.unflatten(-1, (heads, 64)),
        "dt": dt,
        "A": A,
        "B": B.unsqueeze(2),
        "C": C.unsqueeze(2),
        "D": torch.ones_like(A),
        "z": z.unflatten(-1, (heads, 64)),
        "dt_bias": A - 1,
    }


@pytest.mark.xdist_group("memory")
def test_a_view_of_a_buffer_past_two_to_the_31() -> None:
    views = of_a_projection(2**20 + 17)
    assert views["x"].stride(1) * views["x"].shape[1] > 2**31
    got = run(views, "both")
    expected = run({name: tensor.contiguous() for name, tensor in views.items()}, "both")
    assert_close(got, expected, 1e-3)
    tails = (
        {name: tensor[:, -4_000:] for name, tensor in results.items() if tensor.shape[1:2] == (2**20 + 17,)}
        for results in (got, expected)
    )
    assert_close(*tails, 1e-3)


@pytest.mark.xdist_group("memory")
def test_a_view_of_a_buffer_past_two_to_the_32() -> None:
    views = of_a_projection(2**21 + 17)
    assert views["x"].stride(1) * views["x"].shape[1] > 2**32
    with torch.no_grad():
        y = scan(views, "both")[0][:, -1_000:]
        last = {
            name: tensor[:, -8_192:].contiguous() if name in BY_POSITION else tensor
            for name, tensor in views.items()
        }
        # what came thousands of steps before has decayed away
        expected = scan(last, "both")[0][:, -1_000:]
    assert_close({"y": y}, {"y": expected}, 1e-2)


@pytest.mark.parametrize("length", [200, 1_024])
def test_in_a_cuda_graph(length: int) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(Case(length)).items()}
    leaves = list(inputs.values())

    def forward_and_gradient() -> list[Tensor]:
        results = scan(inputs, "both")
        cotangents = [torch.ones_like(result) for result in results]
        gradients = torch.autograd.grad(results, leaves, cotangents)
        return [*(result.detach() for result in results), *gradients]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward_and_gradient()
    torch.cuda.current_stream().wait_stream(stream)
    graph, forward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_gradient()
    with torch.no_grad(), torch.cuda.graph(forward_graph):
        y = scan(inputs, "both")[0]
    with torch.no_grad():
        inputs["x"].mul_(0.5)
        inputs["dt"].add_(0.25)
    graph.replay()
    forward_graph.replay()
    expected = forward_and_gradient()
    assert torch.equal(y, expected[0])
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


class Mixer(nn.Module):
    """A projection, a scan in both directions, and a projection back."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(64, 2 * 256 + 2 * 64 + 4)
        self.out = nn.Linear(256, 64)
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.D = nn.Parameter(torch.ones(4))
        self.dt_bias = nn.Parameter(torch.zeros(4, 2))

    def forward(self, u: Tensor) -> Tensor:
        z, x, B, C, dt = self.into(u).split([256, 256, 64, 64, 4], -1)
        y = ssd(
            *(
                F.silu(x).unflatten(-1, (4, 64)),
                dt,
                -self.A_log.exp(),
                B.unsqueeze(2),
                C.unsqueeze(2),
                self.D,
            ),
            z=z.unflatten(-1, (4, 64)),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            direction="both",
        )
        assert isinstance(y, Tensor)
        out: Tensor = self.out(y.flatten(2))
        return out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
def test_through_compile_checkpoint_and_autocast() -> None:
    torch.manual_seed(0)
    module = Mixer().cuda()
    u = torch.randn(2, 300, 64, device="cuda")
    functions = {
        "eager": module,
        "compiled": torch.compile(module, fullgraph=True),
        "checkpointed": lambda value: checkpoint(module, value, use_reentrant=False),
    }

    def gradients(function: Any) -> dict[str, Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = function(u)
        assert y.dtype == torch.bfloat16
        found = torch.autograd.grad(y.float().square().sum(), list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        return {"y": y.detach(), **dict(zip(names, found, strict=True))}

    results = {name: gradients(function) for name, function in functions.items()}
    assert all(torch.equal(results["checkpointed"][name], right) for name, right in results["eager"].items())
    assert_close(results["compiled"], results["eager"], 2e-2)


def test_a_second_derivative_is_refused() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(Case(64)).items()}
    (dx,) = torch.autograd.grad(scan(inputs, "both")[0].sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="genossm::ssd_scan was computed by backend='triton'"):
        torch.autograd.grad(dx.sum() + inputs["dt"].sum(), inputs["dt"])


def test_tensors_of_two_devices_are_told() -> None:
    inputs = make(Case(64))
    inputs["A"] = inputs["A"].cpu()
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        scan(inputs, "both")
