"""The short convolution in plain torch: as torch's own grouped convolution, and as sums written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(x: Tensor, left: Tensor | None, right: Tensor | None, before: int, after: int) -> Tensor:
    """x (batch, length, channels) with `before` and `after` further rows: those given, else zeros."""
    if left is None and right is None:
        return F.pad(x, (0, 0, before, after))
    parts = [x]
    if before:
        parts.insert(0, x.new_zeros(x.shape[0], before, x.shape[2]) if left is None else left)
    if after:
        parts.append(x.new_zeros(x.shape[0], after, x.shape[2]) if right is None else right)
    return torch.cat(parts, 1)


def convolve_torch(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each channel of rows (batch, length + width - 1, channels) with its filter, weight (channels, width)."""
    y = F.conv1d(rows.transpose(1, 2), weight.unsqueeze(1), bias, groups=weight.shape[0])
    return y.transpose(1, 2)


def convolve_reference(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as a sum of shifted products."""
    width = weight.shape[1]
    length = rows.shape[1] - width + 1
    y = rows[:, :length] * weight[:, 0]
    for tap in range(1, width):
        y = y + rows[:, tap : tap + length] * weight[:, tap]
    return y if bias is None else y + bias
