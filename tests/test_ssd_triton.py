"""The SSD scan in Triton against the step-by-step recurrence in float64: outputs and every gradient.

On a CPU the kernels run in Triton's interpreter, on short inputs in small tiles, so that there are several chunks, and several
tiles of each. Tolerances are relative to a tensor's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from genossm.kernels import backend as backends
from genossm.kernels import ssd_plan, ssd_tiles, ssd_triton
from genossm.kernels.ssd import ssd

FLOAT32 = 1e-5
SUMMED = {"dA", "dD", "ddt_bias"}
SUMMED_FLOAT32 = 1e-4
"""Of gradients that are sums over all positions, most of which cancels here."""
LARGE_STEPS = 10.0
"""Times that: decays are differences of float32 sums of steps of 30 and more."""
CHUNK = ssd_tiles.CHUNKS[0]
TENSORS = ("x", "dt", "A", "B", "C", "D")
BY_POSITION = ("x", "dt", "B", "C", "z")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of several sizes in each chunk, and programs of several heads."""
    original = ssd_triton.tiles_for

    def tiles_for(*arguments: Any) -> ssd_tiles.Tiles | None:
        tiles = original(*arguments)
        if tiles is None:
            return None
        narrow = replace(tiles.near, rows=16)
        keys = replace(tiles.keys, rows=min(32, tiles.chunk // 2))
        return replace(tiles, states=replace(tiles.states, rows=16), near=narrow, far=narrow, keys=keys)

    monkeypatch.setattr(ssd_triton, "tiles_for", tiles_for)
    monkeypatch.setattr(ssd_triton, "_plans", {})
    monkeypatch.setattr(ssd_plan, "PROGRAMS", 1)


def make(
    length: int,
    device: str,
    *,
    batch: int = 1,
    heads: int = 3,
    groups: int = 1,
    head_dim: int = 5,
    state: int = 6,
    separate: str = "",
    wide_D: bool = False,
    sequences: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs in float32; `separate` names what each direction has of its own."""
    random = torch.Generator().manual_seed(seed + length)

    def normal(name: str, *shape: int) -> Tensor:
        return torch.randn(*shape, *((2,) if name in separate.split() else ()), generator=random)

    states = (sequences or batch, heads, head_dim, state)
    inputs = {
        "x": normal("x", batch, length, heads, head_dim),
        "dt": normal("dt", batch, length, heads),
        "A": -normal("A", heads).abs() - 0.05,
        "B": normal("B", batch, length, groups, state),
        "C": normal("C", batch, length, groups, state),
        "D": normal("D", heads, *((head_dim,) if wide_D else ())),
        "z": normal("z", batch, length, heads, head_dim),
        "dt_bias": normal("dt_bias", heads),
        "start": normal("start", *states),
        "reverse_start": normal("reverse_start", *states),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def scan(inputs: dict[str, Tensor], direction: str, backend: str = "triton", **options: Any) -> list[Tensor]:
    """y and the final states."""
    starts = {"forward": inputs.get("start"), "reverse": inputs.get("reverse_start")}
    initial: Any = tuple(starts.values()) if direction == "both" else starts[direction]
    y, finals = ssd(
        *(inputs.get(name) for name in TENSORS),  # type: ignore[arg-type]
        z=inputs.get("z"),
        dt_bias=inputs.get("dt_bias"),
        initial_state=None if "start" not in inputs else initial,
        return_final_state=True,
        direction=direction,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        **{"dt_softplus": True, "chunk_size": CHUNK, **options},
    )
    return [y, *(finals if isinstance(finals, tuple) else (finals,))]


def run(
    inputs: dict[str, Tensor], direction: str, backend: str = "triton", **options: Any
) -> dict[str, Tensor]:
    """y, the final states, and the gradient of a random function of them by every input that has a part in it."""
    wide = torch.float64 if backend == "reference" else torch.float32
    given = {name: tensor.detach().to(wide).requires_grad_() for name, tensor in inputs.items()}
    results = scan(given, direction, backend, **options)
    random = torch.Generator().manual_seed(9)
    loss = sum((out * torch.randn(out.shape, generator=random).to(out)).sum() for out in results)
    unused = {"forward": "reverse_start", "reverse": "start"}.get(direction)
    names = [name for name in given if name != unused]
    gradients = torch.autograd.grad(loss, [given[name] for name in names])  # type: ignore[arg-type]
    return {
        **{("y", "final", "reverse final")[index]: result.detach() for index, result in enumerate(results)},
        **{f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)},
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], scale: float = 1.0) -> None:
    assert got.keys() == expected.keys()
    errors = {}
    for name, truth in expected.items():
        assert got[name].shape == truth.shape, name
        error = float((got[name].double() - truth).norm() / truth.double().norm().clamp(min=1e-30))
        if not error < scale * (SUMMED_FLOAT32 if name in SUMMED else FLOAT32):
            errors[name] = error
    assert not errors


def check(inputs: dict[str, Tensor], direction: str, scale: float = 1.0, **options: Any) -> None:
    expected = run(inputs, direction, "reference", **options)
    assert_close(run(inputs, direction, **options), expected, scale)


@pytest.mark.parametrize(
    ("direction", "length", "chunk", "shape"),
    [
        ("forward", 65, 64, {}),
        ("forward", 13, CHUNK, {"heads": 6, "groups": 2}),
        ("forward", 64, 64, {"heads": 1, "head_dim": 16, "state": 16}),
        ("reverse", 37, CHUNK, {"wide_D": True}),
        ("reverse", 63, 64, {"heads": 2, "groups": 2}),
        ("both", 1, None, {}),
        ("both", 15, None, {"batch": 2, "heads": 4, "groups": 2}),
        ("both", 64, 64, {"heads": 1}),
        ("both", 67, 64, {"heads": 2, "wide_D": True, "separate": "dt A dt_bias"}),
        ("both", 11, CHUNK, {"heads": 1, "head_dim": 33, "state": 20}),
        ("both", 41, CHUNK, {"heads": 2, "separate": "dt"}),
        ("both", 19, CHUNK, {"heads": 2, "separate": "A"}),
        ("both", 17, CHUNK, {"heads": 2, "separate": "A dt_bias"}),
    ],
)
def test_outputs_and_gradients(
    direction: str, length: int, chunk: int | None, shape: dict[str, Any], device: str
) -> None:
    check(make(length, device, **shape), direction, chunk_size=chunk)


@pytest.mark.parametrize(("direction", "separate"), [("reverse", ""), ("both", "dt")])
def test_without_what_is_optional(direction: str, separate: str, device: str) -> None:
    inputs = make(20, device, heads=2, separate=separate)
    few = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    few["dt"] = F.softplus(few["dt"])
    check(few, direction, dt_softplus=False)


@pytest.mark.parametrize("direction", ["reverse", "both"])
def test_packed_sequences(direction: str, device: str) -> None:
    bounds = torch.tensor([0, 1, CHUNK + 6, CHUNK + 13])
    check(make(CHUNK + 13, device, heads=2, sequences=3), direction, cu_seqlens=bounds)


def test_packed_sequences_equal_each_alone(device: str) -> None:
    bounds = [0, 9, 20]
    inputs = make(20, device, heads=2, sequences=2)
    y, *finals = scan(inputs, "both", cu_seqlens=torch.tensor(bounds))
    for number, (first, end) in enumerate(pairwise(bounds)):
        alone = {
            name: tensor[:, first:end]
            if name in BY_POSITION
            else tensor[number : number + 1]
            if "start" in name
            else tensor
            for name, tensor in inputs.items()
        }
        one, *ends = scan(alone, "both")
        torch.testing.assert_close(y[:, first:end], one)
        torch.testing.assert_close([final[number : number + 1] for final in finals], ends)


@pytest.mark.parametrize("step", [1e-6, 50.0, "mixed", "zero"])
def test_extreme_steps(step: float | str, device: str) -> None:
    inputs = make(CHUNK + 5, device, heads=2)
    random = torch.Generator().manual_seed(5)
    uniform = torch.rand(inputs["dt"].shape, generator=random)
    if step == "zero":
        steps = torch.where(uniform < 0.3, 0.0, uniform)
    else:
        # mixed: 1e-6 to 50
        steps = (uniform * 17.7 - 13.8).exp() if isinstance(step, str) else torch.full_like(uniform, step)
    inputs["dt"] = steps.to(device)
    del inputs["dt_bias"]
    expected = run(inputs, "both", "reference", dt_softplus=False)
    got = run(inputs, "both", dt_softplus=False)
    if step == 50.0:
        # Nothing is left of dA but the rounding of sums of dt ddt, once more times dt.
        error = (got.pop("dA") - expected.pop("dA")).norm()
        assert float(error) < 1e-6 * 50**2 * float(expected["ddt"].abs().sum())
    assert_close(got, expected, LARGE_STEPS if step in (50.0, "mixed") else 1.0)


def test_softplus_far_from_zero(device: str) -> None:
    inputs = make(20, device)
    inputs["dt_bias"] = torch.tensor([-14.0, 30.0, -80.0], device=device)
    inputs["A"] *= 0.05  # or nothing but rounding is left of dA
    check(inputs, "forward", LARGE_STEPS)


def test_directions_belong_together(device: str) -> None:
    inputs = make(37, device)
    forward, reverse, both = (scan(inputs, direction) for direction in ("forward", "reverse", "both"))
    flipped = {name: tensor.flip(1) if name in BY_POSITION else tensor for name, tensor in inputs.items()}
    flipped["start"] = inputs["reverse_start"]
    turned = scan(flipped, "forward")
    torch.testing.assert_close(reverse, [turned[0].flip(1), turned[1]])
    skip = inputs["D"][:, None] * inputs["x"] * F.silu(inputs["z"])
    torch.testing.assert_close(
        both, [forward[0] + reverse[0] - skip, forward[1], reverse[1]], rtol=1e-5, atol=1e-4
    )


def test_a_split_sequence_equals_the_whole(device: str) -> None:
    inputs = make(45, device)
    pieces = [
        {name: tensor[:, span] if name in BY_POSITION else tensor for name, tensor in inputs.items()}
        for span in (slice(0, 38), slice(38, 45))
    ]
    for direction, order in (("forward", pieces), ("reverse", pieces[::-1])):
        y, final = scan(inputs, direction)
        first, carried = scan(order[0], direction)
        start = {"start": carried, "reverse_start": carried}
        second, end = scan({**order[1], **start}, direction)
        parts = [first, second] if direction == "forward" else [second, first]
        torch.testing.assert_close([torch.cat(parts, 1), end], [y, final], rtol=1e-5, atol=1e-4)


def in_one_projection(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """z, x, B, C and dt as views of one (batch, length, width) buffer."""
    names = ("z", "x", "B", "C", "dt")
    packed = torch.cat([inputs[name].flatten(2) for name in names], -1)
    parts = packed.split([inputs[name].flatten(2).shape[2] for name in names], -1)
    views = {name: part.unflatten(2, inputs[name].shape[2:]) for name, part in zip(names, parts, strict=True)}
    return {**inputs, **views}


def test_views_give_the_same(device: str) -> None:
    inputs = make(9, device, batch=2, heads=2)
    changes: list[Callable[[dict[str, Tensor]], dict[str, Tensor]]] = [
        in_one_projection,
        lambda inputs: {
            name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in inputs.items()
        },
        lambda inputs: {
            name: tensor.transpose(1, 2).repeat_interleave(2, 0)[::2].transpose(1, 2)
            if name in BY_POSITION
            else tensor
            for name, tensor in inputs.items()
        },
    ]
    expected = run(inputs, "both")
    for change in changes:
        views = change(inputs)
        assert not views["x"].is_contiguous()
        torch.testing.assert_close(run(views, "both"), expected)


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_gradients_that_are_not_contiguous(direction: str, device: str) -> None:
    inputs = {
        name: tensor.requires_grad_() for name, tensor in make(9, device, heads=2).items() if name != "z"
    }
    y = scan(inputs, direction)[0]
    wanted = [inputs[name] for name in TENSORS]
    expected = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
    # of strides 0
    got = torch.autograd.grad(y, wanted, torch.ones((), device=device).expand_as(y))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("direction", "length", "options"),
    [
        ("both", 39, {"chunk_size": 64}),
        ("forward", 70, {"chunk_size": 64}),
        ("reverse", 20, {"chunk_size": 64, "cu_seqlens": torch.tensor([0, 3, 20])}),
    ],
)
def test_nothing_is_read_that_was_not_written_and_results_repeat(
    direction: str, length: int, options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(length, device, heads=1, sequences=2 if "cu_seqlens" in options else None)
    empty = torch.empty

    def results(poison: float) -> dict[str, Tensor]:
        monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(poison))
        got = run(inputs, direction, **options)
        monkeypatch.setattr(torch, "empty", empty)
        return got

    expected, got = results(0.0), results(torch.nan)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("only", ["y", "final"])
def test_one_output_alone(only: str, device: str) -> None:
    inputs = {
        name: tensor.requires_grad_() for name, tensor in make(7, device, heads=1).items() if name != "z"
    }
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    names = ("x", "dt", "A", "B", "C", "start") if only == "y" else ("x", "dt", "A", "B", "start")
    got, expected = (
        torch.autograd.grad(
            scan(given, "forward", backend)[only == "final"].sum(), [given[name] for name in names]
        )
        for given, backend in ((inputs, "triton"), (wide, "reference"))
    )
    assert_close(dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)))


def test_the_operators_as_torch_library_wants_them(device: str) -> None:
    """Without the check of their autograd: the gradient is that of an autograd.Function around them, not registered."""
    inputs = make(3, device, heads=1, head_dim=2, state=2)
    inputs["dt"] = inputs["dt"].abs()
    x, initial = inputs["x"], torch.stack([inputs["start"], inputs["reverse_start"]])
    names = (*TENSORS, "z", "dt_bias")
    full = (*(inputs[name] for name in names), initial, None, None, 2, True, CHUNK)
    few = (*(inputs[name] for name in names[:5]), *[None] * 6, 0, False, CHUNK)
    checks = ("test_schema", "test_faketensor")
    for arguments, final in ((full, initial), (few, None)):
        torch.library.opcheck(torch.ops.genossm.ssd_scan.default, arguments, test_utils=checks)
        torch.library.opcheck(
            torch.ops.genossm.ssd_scan_backward.default, (x.clone(), final, *arguments), test_utils=checks
        )


# torch.compile itself makes an object of the autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_checkpointed_and_under_autocast(device: str) -> None:
    inputs = make(7, device, heads=1, head_dim=3, state=2)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    leaves = list(tensors.values())

    def loss(*given: Tensor) -> Tensor:
        y, *finals = scan(dict(zip(tensors, given, strict=True)), "both")
        return y.square().sum() + sum(final.square().sum() for final in finals)

    expected = torch.autograd.grad(loss(*leaves), leaves)
    again = checkpoint(loss, *leaves, use_reentrant=False)
    assert isinstance(again, Tensor)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = loss(*leaves)
    for value in (again, compiled, cast):
        torch.testing.assert_close(torch.autograd.grad(value, leaves), expected, rtol=0, atol=0)


def test_a_second_derivative_is_refused(device: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(3, device, heads=1).items()}
    y = checkpoint(lambda: scan(inputs, "both")[0], use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="genossm::ssd_scan was computed by backend='triton'"):
        torch.autograd.grad(dx.sum() + inputs["dt"].sum(), inputs["dt"])


def test_flops_are_counted(device: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(4, device, heads=1).items()}
    counts = []
    for direction in ("forward", "both"):
        with FlopCounterMode(display=False) as counter:
            y = scan(inputs, direction)[0]
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        counts += [forward, counter.get_total_flops()]
    assert 0 < counts[0] < counts[2] and counts[0] < counts[1] < counts[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_size": 48}, "chunk_size is 48; backend='triton' takes"),
        ({"chunk_size": 1024}, "chunk_size is 1024"),
        ({"x": torch.zeros(1, 4, 2, 129)}, "head_dim 129"),
        ({"B": torch.zeros(1, 4, 1, 300), "C": torch.zeros(1, 4, 1, 300)}, "state 300"),
        ({"x": torch.zeros(1, 4, 2, 3, dtype=torch.float64)}, "x has dtype torch.float64"),
    ],
)
def test_what_it_cannot_compute_is_told(change: dict[str, Any], words: str, device: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 4, 2, 3),
        "dt": torch.ones(1, 4, 2),
        "A": -torch.ones(2),
        "B": torch.ones(1, 4, 1, 5),
        "C": torch.ones(1, 4, 1, 5),
        **change,
    }
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    with pytest.raises(ValueError) as caught:
        ssd(**arguments, backend="triton")
    assert words in str(caught.value)
    assert isinstance(ssd(**arguments), Tensor)


def test_a_tensor_of_the_cpu_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="backend is 'triton' and x is on cpu; move x to a CUDA device"):
        scan(make(3, "cpu"), "forward")
