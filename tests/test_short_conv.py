"""The short depthwise convolution against sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.short_conv import OneWay, short_conv


def written_out(x: Tensor, weight: Tensor, bias: Tensor, padding: OneWay) -> Tensor:
    length = x.shape[1]
    width = weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(length):
        for k in range(width):
            at = {
                "causal": t - (width - 1) + k,
                "reverse": t + (width - 1) - k,
                "centered": t - (width - 1) // 2 + k,
            }
            source = at[padding]
            if 0 <= source < length:
                y[:, t] += weight[:, k] * x[:, source]
    return y + bias


@pytest.mark.parametrize("padding", ["causal", "reverse", "centered"])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (3, 4), (20, 4), (20, 5), (7, 1)])
def test_equals_the_sum(length: int, width: int, padding: OneWay) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, 3, generator=random, dtype=torch.float64)
    weight = torch.randn(3, width, generator=random, dtype=torch.float64)
    bias = torch.randn(3, generator=random, dtype=torch.float64)
    expected = written_out(x, weight, bias, padding)
    for backend in ("torch", "reference"):
        found = short_conv(x, weight, bias, padding=padding, backend=backend)  # type: ignore[call-overload]
        torch.testing.assert_close(found, expected)
    activated = short_conv(x, weight, bias, padding=padding, activation="silu")
    torch.testing.assert_close(activated, F.silu(expected))


def test_reverse_is_flip_causal_flip_and_states_join_pieces() -> None:
    random = torch.Generator().manual_seed(2)
    x, weight = torch.randn(1, 30, 4, generator=random), torch.randn(4, 4, generator=random)
    whole = short_conv(x, weight)
    torch.testing.assert_close(
        short_conv(x, weight, padding="reverse"), short_conv(x.flip(1), weight).flip(1)
    )
    second = short_conv(x[:, 11:], weight, initial_state=x[:, 8:11])
    torch.testing.assert_close(torch.cat([short_conv(x[:, :11], weight), second], 1), whole)
    reverse = short_conv(x, weight, padding="reverse")
    first = short_conv(x[:, :11], weight, padding="reverse", initial_state=x[:, 11:14])
    torch.testing.assert_close(first, reverse[:, :11])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_both_is_causal_and_reverse(backend: Any, length: int) -> None:
    random = torch.Generator().manual_seed(length)
    x, left, right = (torch.randn(2, n, 3, generator=random).double() for n in (length, 3, 3))
    weight, bias = (
        torch.randn(2, 3, 4, generator=random).double(),
        torch.randn(2, 3, generator=random).double(),
    )
    options: dict[str, Any] = {"activation": "silu", "backend": backend, "return_final_state": True}
    found = short_conv(x, weight, bias, padding="both", initial_state=(left, right), **options)
    causal, last = short_conv(x, weight[0], bias[0], initial_state=left, **options)
    reverse, first = short_conv(x, weight[1], bias[1], padding="reverse", initial_state=right, **options)
    torch.testing.assert_close(found, ((causal, reverse), (last, first)))
    assert torch.equal(last, torch.cat([left, x], 1)[:, -3:])
    assert torch.equal(first, torch.cat([x, right], 1)[:, :3])
    shared = short_conv(x, weight[0], bias[0], padding="both", backend=backend)
    same = short_conv(
        x, torch.stack([weight[0]] * 2), torch.stack([bias[0]] * 2), padding="both", backend=backend
    )
    torch.testing.assert_close(shared, same)


@pytest.mark.parametrize("padding", ["causal", "reverse"])
def test_pieces_through_states_equal_the_whole_and_its_gradients(padding: Any) -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, 11, 3, generator=random).double().requires_grad_()
    weight = torch.randn(3, 4, generator=random).double().requires_grad_()
    whole = short_conv(x, weight, padding=padding)
    pieces: dict[int, Tensor] = {}
    state = None
    for start in (0, 5, 6) if padding == "causal" else (6, 5, 0):
        piece = x[:, start : {0: 5, 5: 6, 6: 11}[start]]
        pieces[start], state = short_conv(
            piece, weight, padding=padding, initial_state=state, return_final_state=True
        )
    joined = torch.cat([pieces[start] for start in (0, 5, 6)], 1)
    torch.testing.assert_close(joined, whole)
    factors = torch.randn(whole.shape, generator=random).double()
    found, expected = (torch.autograd.grad((y * factors).sum(), (x, weight)) for y in (joined, whole))
    torch.testing.assert_close(found, expected)


def test_half_precision_is_computed_in_float32_with_the_weights_as_given() -> None:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(1, 40, 8, generator=random).bfloat16()
    weight, bias = torch.randn(8, 4, generator=random), torch.randn(8, generator=random)
    found = short_conv(x, weight, bias, activation="silu")
    expected = short_conv(x.double(), weight.double(), bias.double(), activation="silu")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_by_differences(backend: Any) -> None:
    random = torch.Generator().manual_seed(6)
    tensors = [
        torch.randn(shape, generator=random).double().requires_grad_()
        for shape in ((2, 4, 3), (2, 3, 3), (2, 3), (2, 2, 3), (2, 2, 3))
    ]

    def function(*values: Tensor) -> Any:
        x, weight, bias, left, right = values
        y, states = short_conv(
            x, weight, bias, activation="silu", padding="both", initial_state=(left, right), return_final_state=True,
            backend=backend,
        )  # fmt: skip
        centered = short_conv(x, weight[0], bias[0], padding="centered", backend=backend)
        return *y, *states, centered

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(3, 4)}, "(channels, width) are needed"),
        ({"x": torch.zeros(())}, "x has shape () and weight (4, 4)"),
        ({"x": torch.zeros(1, 9, 0), "weight": torch.zeros(0, 4)}, "channels >= 1"),
        ({"padding": "same"}, "padding is 'same'"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"weight": torch.zeros(2, 4, 4)}, "(channels, width) are needed"),
        ({"weight": torch.zeros(3, 4, 4), "padding": "both"}, "or (2, channels, width)"),
        ({"bias": torch.zeros(2, 4)}, "(4,) is needed"),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, "bias has dtype torch.int32"),
        ({"initial_state": torch.zeros(1, 3, 4), "padding": "both"}, "is not a pair"),
        ({"initial_state": (torch.zeros(1, 3, 4),) * 2}, "give one tensor"),
        ({"return_final_state": True, "padding": "centered"}, "return_final_state does not go"),
        ({"initial_state": torch.zeros(1, 2, 4)}, "(1, 3, 4) is needed"),
        (
            {"initial_state": torch.zeros(1, 3, 4, dtype=torch.complex64)},
            "initial_state has dtype torch.complex64",
        ),
        ({"initial_state": torch.zeros(1, 3, 4), "padding": "centered"}, "does not go with"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(1, 9, 4), "weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError) as caught:
        short_conv(**{**arguments, **change})
    assert words in str(caught.value)
