"""The step sizes that state-space models begin with: log-uniform, as in S4, Mamba and Mamba-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DT_MIN, DT_MAX = 1e-3, 1e-1


def initial_log_dt(like: Tensor, dt_min: float) -> Tensor:
    """Logarithms of steps that are log-uniform in [dt_min, DT_MAX], shaped like the tensor.

    Raises:
        ValueError: dt_min is not between 0 and DT_MAX.
    """
    if not 0 < dt_min <= DT_MAX:
        raise ValueError(f"dt_min is {dt_min}; it must be above 0 and at most {DT_MAX}")
    return torch.empty_like(like).uniform_(math.log(dt_min), math.log(DT_MAX))


def initial_dt_bias(like: Tensor, dt_min: float) -> Tensor:
    """The inverse of softplus of such steps."""
    dt = initial_log_dt(like, dt_min).exp()
    return dt + torch.log(-torch.expm1(-dt))
