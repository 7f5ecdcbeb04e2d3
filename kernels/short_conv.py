"""Short depthwise convolution along the sequence, as it stands before a selective scan."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = Literal["causal", "reverse", "centered"]


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    padding: Padding = "causal",
    initial_state: Tensor | None = None,
    backend: Literal["auto", "torch"] = "auto",
) -> Tensor:
    """Depthwise convolution (cross-correlation) of each channel with its own short filter.

    `causal`: y_t = sum_k weight[k] x_{t - width + 1 + k}; `reverse` = flip(causal(flip(x))), so that only positions
    t and later are seen; `centered`: y_t = sum_k weight[k] x_{t - (width - 1) // 2 + k}. Outside the sequence x is 0.

    Args:
        x: (batch, length, channels).
        weight: (channels, width).
        bias: (channels,) or None.
        activation: `silu` or None.
        padding: which positions a filter sees.
        initial_state: (batch, width - 1, channels), the positions before the first (causal) or after the last
            (reverse), in sequence order; zeros when None. Not for `centered`.
        backend: `torch`, or `auto` (torch).

    Returns:
        (batch, length, channels) in x's dtype.

    Raises:
        ValueError: a shape, padding, activation or backend that does not fit.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "(batch, length, channels) and (channels, width) are needed"
        )
    if padding not in ("causal", "reverse", "centered"):
        raise ValueError(f"padding is {padding!r}; allowed are 'causal', 'reverse' and 'centered'")
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; allowed are 'silu' and None")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend is {backend!r}; allowed are 'auto' and 'torch'")
    batch, _, channels = x.shape
    width = weight.shape[1]
    if initial_state is not None:
        if padding == "centered":
            raise ValueError("initial_state does not go with padding='centered'; pad x itself instead")
        if tuple(initial_state.shape) != (batch, width - 1, channels):
            raise ValueError(
                f"initial_state has shape {tuple(initial_state.shape)}; {(batch, width - 1, channels)} is needed"
            )
        outside = initial_state.to(x.dtype)
        padded = torch.cat([outside, x] if padding == "causal" else [x, outside], dim=1)
    else:
        left = {"causal": width - 1, "reverse": 0, "centered": (width - 1) // 2}[padding]
        padded = F.pad(x, (0, 0, left, width - 1 - left))
    filters = weight.flip(1) if padding == "reverse" else weight
    dtype = x.dtype
    y = F.conv1d(
        padded.transpose(1, 2),
        filters.to(dtype).unsqueeze(1),
        None if bias is None else bias.to(dtype),
        groups=channels,
    )
    y = F.silu(y) if activation == "silu" else y
    return y.transpose(1, 2)
