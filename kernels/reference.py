"""The truth: state-space recurrences step by step in plain torch, obvious, differentiable and slow.

Letters: B batch, L length, H heads, P head_dim, G groups, N state, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genossm.kernels.arguments import accumulation


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
    accumulate = accumulation(x_BLHP.dtype)
    heads, groups = x_BLHP.shape[2], B_BLGN.shape[2]
    x, A = x_BLHP.to(accumulate), A_H.to(accumulate)
    # unbind, not x[:, t]: the gradient of an index fills a whole tensor, which would make the loop quadratic
    xs, dts = x.unbind(1), dt_BLH.to(accumulate).unbind(1)
    Bs = B_BLGN.to(accumulate).repeat_interleave(heads // groups, dim=2).unbind(1)
    Cs = C_BLGN.to(accumulate).repeat_interleave(heads // groups, dim=2).unbind(1)
    state = initial_BHPN.to(accumulate)
    outputs: list[Tensor] = []
    length = x.shape[1]
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(dts[t] * A)[..., None, None]
        state = decay * state + (dts[t][..., None] * xs[t])[..., None] * Bs[t][:, :, None, :]
        outputs.append((state * Cs[t][:, :, None, :]).sum(-1))
    y = torch.stack(outputs[::-1] if reverse else outputs, dim=1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(accumulate) * x
    return y.to(x_BLHP.dtype), state


def selective_scan_reference(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    initial_BDN: Tensor,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """One direction of the selective scan, one step at a time.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = sum_n C_t[n] h_t[n]   (Gu & Dao 2023, eq. 2 and algorithm 2, with
    the input discretised by dt B); with complex A the sum is 2 Re(sum_n C_t[n] h_t[n]).

    Computed in float64 (complex128) for float64 x, else in float32 (complex64).

    Returns:
        y (batch, length, channels) real, in the dtype computed in, and the final state (batch, channels, state).
    """
    accumulate = accumulation(x_BLD.dtype)
    inner = accumulate.to_complex() if A_DN.is_complex() else accumulate
    A, state = A_DN.to(inner), initial_BDN.to(inner)
    xs, dts = x_BLD.to(accumulate).unbind(1), dt_BLD.to(accumulate).unbind(1)
    Bs, Cs = B_BLN.to(inner).unbind(1), C_BLN.to(inner).unbind(1)
    outputs: list[Tensor] = []
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        state = torch.exp(dts[t][..., None] * A) * state + (dts[t] * xs[t])[..., None] * Bs[t][:, None]
        y = (state * Cs[t][:, None]).sum(-1)
        outputs.append(2 * y.real if y.is_complex() else y)
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), state
