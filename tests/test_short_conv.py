"""The short depthwise convolution against sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.short_conv import Padding, short_conv


def written_out(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding) -> Tensor:
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
def test_equals_the_sum(length: int, width: int, padding: Padding) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, 3, generator=random, dtype=torch.float64)
    weight = torch.randn(3, width, generator=random, dtype=torch.float64)
    bias = torch.randn(3, generator=random, dtype=torch.float64)
    expected = written_out(x, weight, bias, padding)
    torch.testing.assert_close(short_conv(x, weight, bias, padding=padding), expected)
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(3, 4)}, "(channels, width) are needed"),
        ({"padding": "same"}, "padding is 'same'"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"backend": "triton"}, "backend is 'triton'"),
        ({"initial_state": torch.zeros(1, 2, 4)}, "(1, 3, 4) is needed"),
        ({"initial_state": torch.zeros(1, 3, 4), "padding": "centered"}, "does not go with"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(1, 9, 4), "weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError) as caught:
        short_conv(**{**arguments, **change})
    assert words in str(caught.value)
