"""What the sequence operators check alike: a tensor on another device than x is told, not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genossm.kernels.gated_norm import gated_rms_norm
from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.short_conv import short_conv
from genossm.kernels.ssd import ssd

OPERATORS: list[tuple[Callable[..., Any], list[Tensor], int, str]] = [
    (
        ssd,
        [torch.zeros(1, 8, 2, 4), torch.ones(1, 8, 2), -torch.ones(2), *[torch.zeros(1, 8, 1, 3)] * 2],
        3,
        "B",
    ),
    (
        selective_scan,
        [torch.zeros(1, 8, 4), torch.ones(1, 8, 4), -torch.ones(4, 3), *[torch.zeros(1, 8, 3)] * 2],
        2,
        "A",
    ),
    (short_conv, [torch.zeros(1, 8, 4), torch.zeros(4, 3)], 1, "weight"),
    (gated_rms_norm, [torch.zeros(1, 8, 4), torch.zeros(4)], 1, "weight"),
]


@pytest.mark.parametrize(
    ("operator", "arguments", "index", "name"), OPERATORS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_tensor_elsewhere_is_told(
    operator: Callable[..., Any], arguments: list[Tensor], index: int, name: str
) -> None:
    elsewhere = [tensor.to("meta") if place == index else tensor for place, tensor in enumerate(arguments)]
    with pytest.raises(ValueError, match=f"{name} is on meta and x on cpu; move {name} to cpu"):
        operator(*elsewhere)
    operator(*arguments)
