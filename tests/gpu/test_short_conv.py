"""The short convolution on a CUDA device: half precision, long and large inputs, repeats, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genossm.kernels.short_conv import short_conv

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative to a tensor's norm."""


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: tuple[Tensor, Tensor] | None,
    padding: str,
    backend: str,
) -> list[Tensor]:
    """Outputs, final states, and the gradients of a fixed function of them by every input."""
    leaves = [x, weight, *([] if bias is None else [bias]), *(states or ())]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    pair = tuple(leaves[-2:]) if states is not None else None
    initial: Any = {"causal": pair and pair[0], "reverse": pair and pair[1], "both": pair, "centered": None}[
        padding
    ]
    found = short_conv(  # type: ignore[call-overload]
        leaves[0],
        leaves[1],
        leaves[2] if bias is not None else None,
        activation="silu",
        padding=padding,
        initial_state=initial,
        return_final_state=padding != "centered",
        backend=backend,
    )
    outputs: list[Tensor] = torch.utils._pytree.tree_leaves(found)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for index, y in enumerate(outputs):
        random = torch.Generator(x.device).manual_seed(index)
        cotangent = torch.randn(y.shape, generator=random, device=x.device).to(x.dtype)
        loss = loss + (y * cotangent).sum(dtype=torch.float64)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [y.detach() for y in outputs] + [g for g in grads if g is not None]


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for index, (got, truth) in enumerate(zip(found, expected, strict=True)):
        assert torch.isfinite(got).all()
        error = (got.double() - truth).norm() / truth.norm().clamp_min(1e-6)
        assert error < tolerance, f"tensor {index}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["causal", "reverse", "centered", "both"])
@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 255, 256, 257, 1000, 4099])
def test_equals_float64(length: int, padding: str, dtype: torch.dtype) -> None:
    random = torch.Generator("cuda").manual_seed(length)
    for width, channels, batch in ((4, 1024, 1), (5, 96, 3), (8, 33, 2), (1, 200, 2)):
        filters = (2,) if padding == "both" and width != 5 else ()

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device="cuda")

        x = normal(batch, length, channels).to(dtype)
        weight, bias = normal(*filters, channels, width), normal(*filters, channels)
        states = None
        if width == 4 and padding != "centered":
            states = (normal(batch, 3, channels).to(dtype), normal(batch, 3, channels).to(dtype))
        found = run(x, weight, bias, states, padding, "triton")
        doubles = None if states is None else (states[0].double(), states[1].double())
        truth = run(x.double(), weight.double(), bias.double(), doubles, padding, "reference")
        compare(found, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("padding", ["causal", "both"])
def test_gradients_repeat_bit_by_bit(padding: str) -> None:
    random = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(1, 131_101, 512, generator=random, device="cuda").bfloat16()
    weight, bias = (torch.randn(s, generator=random, device="cuda") for s in ((512, 4), (512,)))
    first = run(x, weight, bias, None, padding, "triton")
    junk = torch.full((2**26,), float("nan"), device="cuda")
    del junk  # what new tensors hold before they are written
    again = run(x, weight, bias, None, padding, "triton")
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("padding", ["causal", "reverse", "centered", "both"])
@pytest.mark.parametrize("length", [2, 65, 1009])
def test_nothing_is_read_that_was_not_written(
    length: int, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator("cuda").manual_seed(length)
    x, left, right = (
        torch.randn(2, n, 96, generator=random, device="cuda").bfloat16() for n in (length, 3, 3)
    )
    weight, bias = (torch.randn(shape, generator=random, device="cuda") for shape in ((96, 4), (96,)))
    states = None if padding == "centered" else (left, right)
    expected = run(x, weight, bias, states, padding, "triton")
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *shape, made=made, **how: made(*shape, **how).fill_(torch.nan)
        )
    got = run(x, weight, bias, states, padding, "triton")
    monkeypatch.undo()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [65, 4_099])
def test_directions_and_pieces_belong_together(length: int, dtype: torch.dtype) -> None:
    random = torch.Generator("cuda").manual_seed(length)
    x, left, right = (
        torch.randn(2, n, 256, generator=random, device="cuda").to(dtype) for n in (length, 3, 3)
    )
    weight, bias = (torch.randn(shape, generator=random, device="cuda") for shape in ((2, 256, 4), (2, 256)))
    options: dict[str, Any] = {"activation": "silu", "backend": "triton", "return_final_state": True}
    causal, last = short_conv(x, weight[0], bias[0], initial_state=left, **options)
    reverse, first = short_conv(x, weight[1], bias[1], padding="reverse", initial_state=right, **options)
    # reverse = flip of causal of flip
    turned, end = short_conv(x.flip(1), weight[1], bias[1], initial_state=right.flip(1), **options)
    compare([reverse, first], [turned.flip(1).double(), end.flip(1).double()], TOLERANCE[dtype])
    # both = causal and reverse
    both, states = short_conv(x, weight, bias, padding="both", initial_state=(left, right), **options)
    compare([*both, *states], [t.double() for t in (causal, reverse, last, first)], TOLERANCE[dtype])
    # pieces = the whole; in both, each gets what leaves the other
    at = 38
    one, state = short_conv(x[:, :at], weight[0], bias[0], initial_state=left, **options)
    two, end = short_conv(x[:, at:], weight[0], bias[0], initial_state=state, **options)
    compare([torch.cat([one, two], 1), end], [causal.double(), last.double()], TOLERANCE[dtype])
    two, entering = short_conv(
        x[:, at:], weight[1], bias[1], padding="reverse", initial_state=right, **options
    )
    one, end = short_conv(x[:, :at], weight[1], bias[1], padding="reverse", initial_state=entering, **options)
    compare([torch.cat([one, two], 1), end], [reverse.double(), first.double()], TOLERANCE[dtype])
    ones, (_, start) = short_conv(
        x[:, :at], weight, bias, padding="both", initial_state=(left, entering), **options
    )
    twos, (end, _) = short_conv(
        x[:, at:], weight, bias, padding="both", initial_state=(state, right), **options
    )
    got = [torch.cat(pair, 1) for pair in zip(ones, twos, strict=True)]
    compare([*got, end, start], [t.double() for t in (*both, *states)], TOLERANCE[dtype])


def test_many_short_sequences() -> None:
    random = torch.Generator("cuda").manual_seed(2)
    x = torch.randn(70_001, 9, 64, generator=random, device="cuda").bfloat16()
    weight, bias = torch.randn(2, 64, 4, generator=random, device="cuda"), torch.zeros(2, 64, device="cuda")
    found = run(x, weight, bias, None, "both", "triton")
    compare(found, run(x.double(), weight.double(), bias.double(), None, "both", "reference"), 8e-3)


def test_a_million_zeros() -> None:
    x = torch.zeros(1, 1_000_003, 256, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2, 256, 4, device="cuda"), torch.randn(2, 256, device="cuda")
    causal, reverse, *rest = run(x, weight, bias, None, "both", "triton")
    for y, offset in zip((causal, reverse), bias, strict=True):
        assert torch.equal(y, y[:, :1].expand_as(y))
        compare([y[0, 0]], [torch.nn.functional.silu(offset).double()], 8e-3)
    assert all(torch.isfinite(tensor).all() for tensor in rest)


@pytest.mark.xdist_group("memory")
def test_a_view_of_a_packed_buffer_past_two_to_the_31() -> None:
    length, channels, width = 1_048_583, 64, 2192
    random = torch.Generator("cuda").manual_seed(3)
    packed = torch.zeros(1, length, width, device="cuda", dtype=torch.bfloat16)
    x = packed[:, :, -channels:]
    x.copy_(torch.randn(1, length, channels, generator=random, device="cuda"))
    assert (length - 1) * width > 2**31
    weight, bias = torch.randn(2, channels, 4, device="cuda"), torch.randn(channels, device="cuda")
    found = run(x, weight, bias, None, "both", "triton")
    expected = run(x.contiguous(), weight, bias, None, "both", "triton")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    tail = run(x[:, -300:].double(), weight.double(), bias.double(), None, "both", "reference")
    compare([found[0][:, -200:], found[1][:, -200:]], [tail[0][:, -200:], tail[1][:, -200:]], 8e-3)


@pytest.mark.xdist_group("memory")
def test_more_than_two_to_the_32_elements() -> None:
    length, channels = 4_200_001, 1024
    if torch.cuda.mem_get_info()[0] < 5 * length * channels * 2:
        pytest.skip("too little GPU memory is free")
    x = torch.empty(1, length, channels, device="cuda", dtype=torch.bfloat16)
    x.normal_(generator=torch.Generator("cuda").manual_seed(4))
    weight = torch.randn(channels, 4, device="cuda").requires_grad_()
    leaf = x.requires_grad_()
    y = short_conv(leaf, weight, activation="silu", backend="triton")
    expected = short_conv(
        x[:, -1003:].detach().double(), weight.detach().double(), activation="silu", backend="reference"
    )
    compare([y[:, -1000:].detach()], [expected[:, 3:]], 8e-3)
    dy = torch.zeros_like(y)
    dy[:, -500:] = 1
    (dx,) = torch.autograd.grad(y, leaf, dy)
    end = x[:, -1003:].detach().double().requires_grad_()
    z = short_conv(end, weight.detach().double(), activation="silu", backend="reference")
    (truth,) = torch.autograd.grad(z[:, -500:].sum(), end)
    compare([dx[:, -1000:]], [truth[:, 3:]], 8e-3)
    assert not dx[:, :1000].any()


@pytest.mark.xdist_group("memory")
def test_no_memory_but_inputs_and_outputs() -> None:
    x = torch.randn(1, 262_144, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(2, 1024, 4, device="cuda").requires_grad_()
    size = x.numel() * x.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    causal, reverse = short_conv(x, weight, activation="silu", padding="both", backend="triton")
    assert torch.cuda.memory_allocated() - before < 2.1 * size
    torch.autograd.grad((causal, reverse), (x, weight), (causal.detach(), reverse.detach()))
    assert torch.cuda.max_memory_allocated() - before < 3.2 * size


def test_autocast_and_the_default_backend() -> None:
    x = torch.randn(2, 500, 64, device="cuda")
    weight = torch.randn(64, 4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = short_conv(x, weight)
    assert y.dtype == torch.float32
    compare([y], [short_conv(x.double(), weight.double(), backend="reference")], 1e-5)
    assert torch.equal(y, short_conv(x, weight, backend="triton"))


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x, weight = torch.randn(1, 100, 64, device="cuda:1"), torch.randn(64, 4, device="cuda:1")
    compare([short_conv(x, weight)], [short_conv(x.double(), weight.double(), backend="reference")], 1e-5)
