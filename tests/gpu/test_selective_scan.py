"""On a CUDA device: the selective scan in Triton in every dtype, at lengths and sizes that Triton's interpreter is too slow for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genossm.kernels import selective_scan_launch as launches
from genossm.kernels.selective_scan import selective_scan

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
LENGTHS = (1, 15, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1009, 4099)


def make(
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 2,
    channels: int = 96,
    state: int = 16,
    separate: bool = False,
    gate: bool = True,
    dt_shift: float = -2.0,
) -> dict[str, Tensor]:
    random = torch.Generator("cuda").manual_seed(length + channels)
    end = (2,) if separate else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device="cuda")

    inputs = {
        "x": normal(batch, length, channels).to(dtype),
        "dt": normal(batch, length, channels, *end).to(dtype),
        "A": -normal(channels, state, *end).abs() - 0.05,
        "B": normal(batch, length, state, *end).to(dtype),
        "C": normal(batch, length, state, *end).to(dtype),
        "D": normal(channels),
        "dt_bias": normal(channels, *end) + dt_shift,
        "start": normal(batch, channels, state),
        "reverse_start": normal(batch, channels, state),
    }
    if gate:
        inputs["z"] = normal(batch, length, channels).to(dtype)
    return inputs


def run(
    inputs: dict[str, Tensor],
    direction: str,
    backend: str,
    wide: torch.dtype | None = None,
    bounds: Tensor | None = None,
    *,
    softplus: bool = True,
) -> dict[str, Tensor]:
    """y, final states and every gradient of a random function of them; in `wide` if given."""
    given = {
        name: tensor.detach().to(wide or tensor.dtype).requires_grad_() for name, tensor in inputs.items()
    }
    initial: Any = (given["start"], given["reverse_start"])
    if direction != "both":
        del given["reverse_start" if direction == "forward" else "start"]
        initial = initial[direction == "reverse"]
    y, finals = selective_scan(
        *(given.get(name) for name in ("x", "dt", "A", "B", "C", "D", "z")),  # type: ignore[arg-type]
        dt_bias=given["dt_bias"],
        dt_softplus=softplus,
        initial_state=initial,
        return_final_state=True,
        direction=direction,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        cu_seqlens=bounds,
    )
    results = {
        "y": y,
        **{f"final {i}": f for i, f in enumerate(finals if isinstance(finals, tuple) else (finals,))},
    }
    random = torch.Generator("cuda").manual_seed(9)
    weights = [torch.randn(result.shape, generator=random, device="cuda") for result in results.values()]
    loss = sum(
        (result.to(wide or torch.float32) * weight).sum()
        for result, weight in zip(results.values(), weights, strict=True)
    )
    gradients = torch.autograd.grad(loss, list(given.values()))  # type: ignore[arg-type]
    return {**results, **{f"d{name}": gradient for name, gradient in zip(given, gradients, strict=True)}}


def assert_close(got: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == truth.keys()
    for name, expected in truth.items():
        error = (
            got[name].double() - expected.double()
        ).detach().norm() / expected.detach().double().norm().clamp(min=1e-30)
        assert float(error) < tolerance, (name, float(error))


@pytest.mark.parametrize("direction", ["forward", "reverse", "both", "separate"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(length: int, direction: str) -> None:
    separate = direction == "separate"
    inputs = make(length, torch.float32, separate=separate)
    direction = "both" if separate else direction
    backend = "reference" if length < 300 else "torch"
    assert_close(
        run(inputs, direction, "auto"),
        run(inputs, direction, backend, torch.float64),
        TOLERANCE[torch.float32],
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("channels", "state"), [(1, 1), (33, 5), (64, 8), (100, 16), (1024, 16), (96, 64), (40, 200), (7, 256)]
)
def test_every_size_and_dtype(channels: int, state: int, separate: bool, dtype: torch.dtype) -> None:
    inputs = make(301, dtype, channels=channels, state=state, separate=separate)
    assert_close(run(inputs, "both", "triton"), run(inputs, "both", "torch", torch.float64), TOLERANCE[dtype])
    assert not launches._PLAIN[0], "a kernel's layout did not fit its exchanges between threads"


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_kernels_without_exchanges_give_the_same(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(300, torch.float32, channels=64)
    expected = run(inputs, direction, "triton")
    monkeypatch.setattr(launches, "_PLAIN", [True])
    assert_close(run(inputs, direction, "triton"), expected, 1e-6)


@pytest.mark.parametrize("separate", [False, True])
def test_results_are_bitwise_repeatable(separate: bool) -> None:
    inputs = make(20_011, channels=512, separate=separate)
    first = run(inputs, "both", "triton")
    for _ in range(3):
        again = run(inputs, "both", "triton")
        assert all(torch.equal(again[name], first[name]) for name in first)


def packed(
    lengths: tuple[int, ...], dtype: torch.dtype, *, separate: bool = False, channels: int = 96
) -> tuple[dict[str, Tensor], Tensor]:
    """A row of sequences with a state for each, and its boundaries."""
    inputs = make(sum(lengths), dtype, batch=1, separate=separate, channels=channels)
    for name in ("start", "reverse_start"):
        inputs[name] = torch.randn(len(lengths), *inputs[name].shape[1:], device="cuda")
    return inputs, torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


PACKED = ((1,), (1, 15, 64, 1, 127, 128, 129), (1009, 3, 4099, 256), (7,) * 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "reverse", "both", "separate"])
@pytest.mark.parametrize("lengths", PACKED)
def test_packed_sequences(lengths: tuple[int, ...], direction: str, dtype: torch.dtype) -> None:
    separate = direction == "separate"
    inputs, bounds = packed(lengths, dtype, separate=separate)
    direction = "both" if separate else direction
    truth = run(inputs, direction, "torch", torch.float64, bounds)
    assert_close(run(inputs, direction, "auto", None, bounds), truth, TOLERANCE[dtype])
    assert not launches._PLAIN[0], "a kernel's layout did not fit its exchanges between threads"


@pytest.mark.parametrize("separate", [False, True])
def test_packed_results_are_bitwise_repeatable_and_each_sequence_its_own(separate: bool) -> None:
    inputs, bounds = packed((20_011, 5, 4096), torch.bfloat16, separate=separate, channels=512)
    first = run(inputs, "both", "triton", None, bounds)
    again = run(inputs, "both", "triton", None, bounds)
    assert all(torch.equal(again[name], first[name]) for name in first)
    # what another sequence holds makes no difference to a bit
    changed = dict(inputs)
    for name in ("x", "dt", "B", "C", "z"):
        changed[name] = inputs[name].clone()
        changed[name][:, :20_016] = 3.0
    other = run(changed, "both", "triton", None, bounds)
    for name in ("y", "dx", "ddt", "dB", "dC", "dz"):
        assert torch.equal(other[name][:, 20_016:], first[name][:, 20_016:]), name
        assert not torch.equal(other[name][:, :20_016], first[name][:, :20_016]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dt", [1e-6, 50.0])
@pytest.mark.parametrize("softplus", [False, True])
def test_extreme_steps(softplus: bool, dt: float, dtype: torch.dtype) -> None:
    inputs = make(1000, dtype)
    # softplus(t) is close to exp(t) far below 0
    before = math.log(dt) if softplus and dt < 1 else dt
    inputs["dt"] = torch.full_like(inputs["dt"], before)
    inputs["dt_bias"].zero_()
    got = run(inputs, "both", "triton", softplus=softplus)
    truth = run(inputs, "both", "torch", torch.float64, softplus=softplus)
    assert all(torch.isfinite(result).all() for result in got.values())
    assert_close(got, truth, TOLERANCE[dtype])


BY_POSITION = ("x", "dt", "B", "C", "z")


def scan(inputs: dict[str, Tensor], direction: str, initial: Any) -> tuple[Tensor, Any]:
    """y and the final states."""
    y, finals = selective_scan(
        *(inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D", "z")),  # type: ignore[arg-type]
        dt_bias=inputs["dt_bias"],
        dt_softplus=True,
        initial_state=initial,
        return_final_state=True,
        direction=direction,  # type: ignore[arg-type]
        backend="triton",
    )
    return y, finals


def changed(inputs: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The inputs with what has positions changed."""
    return {name: change(tensor) if name in BY_POSITION else tensor for name, tensor in inputs.items()}


def named(y: Tensor, *finals: Tensor) -> dict[str, Tensor]:
    return {"y": y, **{f"final {index}": final for index, final in enumerate(finals)}}


def test_a_split_sequence_equals_the_whole() -> None:
    inputs = make(5_011, torch.float32)
    left = changed(inputs, lambda tensor: tensor[:, :1_777])
    right = changed(inputs, lambda tensor: tensor[:, 1_777:])
    start, reverse_start = inputs["start"], inputs["reverse_start"]
    y, final = scan(inputs, "forward", start)
    first, carried = scan(left, "forward", start)
    second, end = scan(right, "forward", carried)
    assert_close(named(torch.cat([first, second], 1), end), named(y, final), 2e-5)
    y, final = scan(inputs, "reverse", reverse_start)
    second, entering = scan(right, "reverse", reverse_start)
    first, end = scan(left, "reverse", entering)
    assert_close(named(torch.cat([first, second], 1), end), named(y, final), 2e-5)
    # in both, each piece gets what leaves the other: the left one forward, the right one in reverse
    y, finals = scan(inputs, "both", (start, reverse_start))
    first, (_, last) = scan(left, "both", (start, entering))
    second, (end, _) = scan(right, "both", (carried, reverse_start))
    assert_close(named(torch.cat([first, second], 1), end, last), named(y, *finals), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [100, 1009])
def test_directions_belong_together(length: int, dtype: torch.dtype) -> None:
    inputs = make(length, dtype)
    start, reverse_start = inputs["start"], inputs["reverse_start"]
    forward, final = scan(inputs, "forward", start)
    reverse, last = scan(inputs, "reverse", reverse_start)
    turned, end = scan(changed(inputs, lambda tensor: tensor.flip(1)), "forward", reverse_start)
    assert_close(named(reverse, last), named(turned.flip(1), end), TOLERANCE[dtype])
    both, finals = scan(inputs, "both", (start, reverse_start))
    skip = inputs["D"] * inputs["x"].float() * torch.nn.functional.silu(inputs["z"].float())
    expected = named(forward.float() + reverse.float() - skip, final, last)
    assert_close(named(both, *finals), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("direction", ["forward", "both", "separate"])
@pytest.mark.parametrize("length", [65, 1009])
def test_nothing_is_read_that_was_not_written(
    length: int, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, empty = make(length, separate=direction == "separate"), torch.empty
    direction = "both" if direction == "separate" else direction
    expected = run(inputs, direction, "triton")
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(torch.nan))
    got = run(inputs, direction, "triton")
    monkeypatch.undo()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_a_million_zeros() -> None:
    inputs = {name: torch.zeros_like(tensor) for name, tensor in make(2**20, batch=1, channels=64).items()}
    inputs["A"] -= 1
    assert all(torch.isfinite(result).all() for result in run(inputs, "both", "triton").values())


@pytest.mark.xdist_group("memory")
def test_rows_past_two_to_the_31() -> None:
    length, channels, width = 2**20 + 17, 64, 2192
    packed = torch.zeros(1, length, width, dtype=torch.bfloat16, device="cuda")
    assert packed.numel() > 2**31
    small = make(length, batch=1, channels=channels, gate=False)
    views = dict(small)
    for index, name in enumerate(("x", "dt", "B", "C")):
        view = packed[..., 512 * index + 3 : 512 * index + 3 + small[name].shape[2]]
        view.copy_(small[name])
        views[name] = view

    def tail(given: dict[str, Tensor]) -> Tensor:
        y = selective_scan(
            *(given[name] for name in ("x", "dt", "A", "B", "C", "D")),
            dt_bias=given["dt_bias"],
            dt_softplus=True,
            direction="both",
            backend="triton",
        )
        assert isinstance(y, Tensor)
        return y

    got, expected = tail(views), tail(small)  # rows that are not aligned to 16 bytes: other instructions
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-2)


FAR = 2**22 + 4_096 + 5
"""Positions: of 1,024 channels more than 2^32 elements, of 512 more than 2^31."""
WINDOW = slice(FAR - 8_192, None)
"""What comes before has decayed away where the last thousands of positions are looked at."""


def far(channels: int, state: int) -> dict[str, Tensor]:
    inputs = make(FAR, batch=1, channels=channels, state=state, gate=False)
    inputs["A"] -= 1
    return {name: tensor for name, tensor in inputs.items() if "start" not in name}


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_more_elements_than_32_bits_count(direction: str) -> None:
    inputs = far(1024, 16)
    y, _ = scan(inputs, direction, None)
    again, _ = scan(changed(inputs, lambda tensor: tensor[:, WINDOW].contiguous()), direction, None)
    torch.testing.assert_close(y[:, -4_200:].float(), again[:, -4_200:].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_gradients_of_more_elements_than_31_bits_count(direction: str) -> None:
    """In 40 GB: with this few states a position's parts of dB and dC are few."""
    inputs = far(512, 8)

    def gradients(given: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
        y, _ = scan(leaves, direction, None)
        dy = torch.zeros_like(y)
        dy[:, -4_200:] = weights
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

    random = torch.Generator("cuda").manual_seed(5)
    weights = torch.randn(1, 4_200, 512, generator=random, device="cuda").bfloat16()
    window = changed(inputs, lambda tensor: tensor[:, WINDOW].clone())
    expected = gradients({name: tensor.detach().clone() for name, tensor in window.items()})
    got = gradients(inputs)
    assert not any(got[name][:, :1_000].any() for name in ("x", "dt", "B", "C"))
    assert_close(changed(got, lambda tensor: tensor[:, WINDOW]), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
def test_through_compile_checkpoint_and_autocast() -> None:
    inputs = make(300, channels=64, gate=False)
    names = ("x", "dt", "A", "B", "C", "D")
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*tensors: Tensor) -> Any:
        return selective_scan(*tensors, direction="both", dt_softplus=True)  # type: ignore[arg-type]

    def gradients(run: Callable[..., Any]) -> dict[str, Tensor]:
        y = run(*leaves)
        random = torch.Generator("cuda").manual_seed(9)
        dy = torch.randn(y.shape, generator=random, device="cuda").to(y.dtype)
        return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))}

    def under_autocast(*tensors: Tensor) -> Any:
        with torch.autocast("cuda", dtype=torch.float16):
            return function(*tensors)

    expected = gradients(function)
    for other in (lambda *tensors: checkpoint(function, *tensors, use_reentrant=False), under_autocast):
        got = gradients(other)
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert_close(gradients(torch.compile(function, fullgraph=True)), expected, 1e-3)


def test_a_second_derivative_is_refused() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(64, gate=False).items()}
    y, _ = scan(inputs, "both", None)
    (dx,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="genossm::selective_scan was computed by backend='triton'"):
        torch.autograd.grad(dx.sum() + inputs["dt"].sum(), inputs["dt"])
