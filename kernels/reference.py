"""The truth: state-space recurrences step by step in plain torch, obvious, differentiable and slow.

Letters: B batch, L length, H heads, P head_dim, G groups, N state.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_reference(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None,
    initial_BHPN: Tensor,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """One direction of the state-space-duality recurrence, one step at a time.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t;  y_t = h_t . C_t + D x_t   (Dao & Gu 2024, eq. 1 with scalar A).

    Computed in float64 for float64 inputs, else in float32.

    Returns:
        y (batch, length, heads, head_dim) in x's dtype, and the final state (batch, heads, head_dim, state).
    """
    accumulate = torch.float64 if x_BLHP.dtype == torch.float64 else torch.float32
    heads, groups = x_BLHP.shape[2], B_BLGN.shape[2]
    x, dt, A = x_BLHP.to(accumulate), dt_BLH.to(accumulate), A_H.to(accumulate)
    B = B_BLGN.to(accumulate).repeat_interleave(heads // groups, dim=2)
    C = C_BLGN.to(accumulate).repeat_interleave(heads // groups, dim=2)
    state = initial_BHPN.to(accumulate)
    outputs: list[Tensor] = []
    length = x.shape[1]
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs[::-1] if reverse else outputs, dim=1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(accumulate) * x
    return y.to(x_BLHP.dtype), state
