"""On a CUDA device: the selective scan in Triton in every dtype, at lengths and sizes that Triton's interpreter is too slow for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
        dt_softplus=True,
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


@pytest.mark.parametrize("dt", [1e-6, 50.0])
def test_extreme_steps(dt: float) -> None:
    inputs = make(1000, torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], dt)
    inputs["dt_bias"].zero_()
    got, truth = run(inputs, "both", "triton"), run(inputs, "both", "torch", torch.float64)
    assert all(torch.isfinite(result).all() for result in got.values())
    assert_close(got, truth, TOLERANCE[torch.float32])


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


@pytest.mark.xdist_group("memory")
def test_more_elements_than_32_bits_count() -> None:
    inputs = make(2**22 + 5, batch=1, channels=1024, gate=False)
    inputs["A"] -= 1  # so that what came 4,096 steps before has decayed away
    y, final = selective_scan(
        *(inputs[name] for name in ("x", "dt", "A", "B", "C", "D")),
        dt_bias=inputs["dt_bias"],
        dt_softplus=True,
        return_final_state=True,
        backend="triton",
    )
    last = slice(2**22 + 5 - 4096, None)
    assert isinstance(final, Tensor)
    again = selective_scan(
        *(inputs[name][:, last] for name in ("x", "dt")),
        inputs["A"],
        *(inputs[name][:, last] for name in ("B", "C")),
        inputs["D"],
        dt_bias=inputs["dt_bias"],
        dt_softplus=True,
        backend="triton",
    )
    assert isinstance(y, Tensor) and isinstance(again, Tensor)
    torch.testing.assert_close(y[:, -256:].float(), again[:, -256:].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
def test_through_compile_checkpoint_and_autocast() -> None:
    inputs = make(300, channels=64, gate=False)
    arguments = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D")]

    def scan(*tensors: Tensor) -> Any:
        return selective_scan(*tensors, direction="both", dt_softplus=True)  # type: ignore[arg-type]

    expected = scan(*arguments)

    assert torch.equal(torch.compile(scan, fullgraph=True)(*arguments), expected)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(scan(*arguments), expected)
    x = inputs["x"].clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(scan, x, *arguments[1:], use_reentrant=False).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
