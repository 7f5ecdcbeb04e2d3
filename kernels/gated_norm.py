"""RMS normalisation with what stands around it in a state-space block: a gate, groups and the residual sum."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.arguments import accumulation, check_devices, check_real, check_shape
from genossm.kernels.backend import Backend, choose_backend

WIDEST = 8192
"""The widest group that the Triton backend takes: a program holds whole rows of it."""


@overload
def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    residual: None = None,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    residual: Tensor,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...
def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last axis, gated by silu(z) as in Mamba-2 (Dao & Gu 2024, section 7).

    RMSNorm(v) = v / sqrt(mean(v^2) + eps) * weight, the mean over each group of neighbouring channels. With a gate
    y = RMSNorm(v * silu(z)), or RMSNorm(v) * silu(z) with `norm_before_gate`; v is x, or x + residual. Statistics
    and all arithmetic are in float32 (float64 for float64 inputs).

    Args:
        x: (..., channels).
        weight: (channels,).
        z: the gate, shaped as x, or None.
        groups: must divide channels.
        eps: added to the mean square.
        norm_before_gate: normalise first, then gate.
        residual: shaped as x; what x is added to before. The sum is rounded to the residual's dtype, and it is
            the rounded sum that is normalised.
        backend: `triton` (CUDA; groups of at most 8192 channels), `torch` (the truth), or `auto`.

    Returns:
        y in x's dtype; with a residual the pair (y, x + residual), the sum in the residual's dtype.

    Raises:
        ValueError: a shape, dtype, number of groups or backend that does not fit.
    """
    for name, tensor in (("x", x), ("weight", weight), ("z", z), ("residual", residual)):
        if tensor is not None:
            check_real(name, tensor)
    check_devices(x, weight=weight, z=z, residual=residual)
    if x.dim() < 1:
        raise ValueError("x has no axis; (..., channels) is needed")
    channels = x.shape[-1]
    check_shape("weight", weight, [(channels,)])
    for name, tensor in (("z", z), ("residual", residual)):
        if tensor is not None:
            check_shape(name, tensor, [tuple(x.shape)])
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}, which does not divide the {channels} channels; give a divisor")
    if choose_backend(backend, x, _unfit(x, groups), reference=False) == "triton":
        from genossm.kernels.gated_norm_triton import gated_rms_norm_triton

        return gated_rms_norm_triton(x, weight, z, residual, groups, eps, norm_before_gate)

    with torch.autocast(x.device.type, enabled=False):
        wide = (
            torch.float64
            if residual is not None and residual.dtype == torch.float64
            else accumulation(x.dtype)
        )
        total = None if residual is None else (x.to(wide) + residual.to(wide)).to(residual.dtype)
        value = (x if total is None else total).to(wide)
        gate = None if z is None else F.silu(z.to(wide))
        if gate is not None and not norm_before_gate:
            value = value * gate
        grouped = value.unflatten(-1, (groups, -1))  # type: ignore[no-untyped-call]
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
        y = (grouped * scale).flatten(-2) * weight.to(wide)
        if gate is not None and norm_before_gate:
            y = y * gate
        y = y.to(x.dtype)
    return y if total is None else (y, total)


def _unfit(x: Tensor, groups: int) -> str | None:
    """Why Triton cannot compute this, or None."""
    width = x.shape[-1] // groups
    if width > WIDEST:
        return (
            f"a group has {width} channels; backend='triton' takes up to {WIDEST}, backend='torch' any number"
        )
    if x.numel() == 0:
        return f"x has shape {tuple(x.shape)}, without elements; take backend='torch'"
    return None
