"""The gated RMS normalisation in Triton, registered with torch as genossm::gated_rms_norm and its gradient.

A program holds whole rows of one group, so each input is read once and each output written once. The gradient
computes the statistics again; every program adds up dweight over its rows, and the programs' sums are added in order.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Functions of Triton's own language have no types.

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.kernels.parts import add_parts
from genossm.kernels.triton_support import (
    PTX,
    define_operator,
    differentiable,
    on_device,
    processors,
    rows_of_channels,
    sigmoid,
)


class Config(NamedTuple):
    """How a pass is cut into programs; measured, not searched at run time."""

    rows: int
    """Rows that a program holds at once."""
    lane: int
    """Channels of a thread in each of them."""
    resident: int
    """Warps that a processor holds; those of a whole device share the rows."""


FORWARD = Config(rows=4, lane=8, resident=0)
BACKWARD = Config(rows=2, lane=8, resident=12)


class Cut(NamedTuple):
    """One call cut into programs."""

    rows: int
    block: int
    warps: int
    programs: int


@functools.lru_cache(maxsize=256)
def cut_up(config: Config, device: torch.device, rows: int, width: int, groups: int) -> Cut:
    """Rows at once, padded width of a group, warps, and programs that share the rows of a group."""
    block = max(16, 1 << (width - 1).bit_length())
    warps = min(max(1, block // (32 * config.lane)), 16)
    # wide groups leave room for fewer rows at once
    held = max(1, min(config.rows, 4096 // block))
    steps = -(-rows // held)
    programs = min(steps, max(1, processors(device) * (config.resident // warps) // groups))
    return Cut(held, block, warps, programs)


@triton.jit(do_not_specialize=["rows"])
def gated_norm_forward_kernel(
    x, weight, z, residual, y, total, rows, width, eps, x_row, z_row, residual_row,
    GROUPS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM_FIRST: tl.constexpr,
    PTX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y, and x + residual, of ROWS rows of one group."""
    program = tl.program_id(0)
    row = ((program // GROUPS).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    within = tl.arange(0, BLOCK)[None, :]
    column = (program % GROUPS) * width + within
    present = (row < rows) & (within < width)
    out = row * (width * GROUPS) + column
    value = tl.load(x + row * x_row + column, mask=present, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(z + row * z_row + column, mask=present, other=0.0).to(tl.float32)
        gate = gate * sigmoid(gate, PTX)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_row + column, mask=present, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + out, rounded, mask=present)
        value = rounded.to(tl.float32)
    if HAS_GATE and not NORM_FIRST:
        value *= gate
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    result = value * scale * tl.load(weight + column, mask=within < width, other=0.0).to(tl.float32)
    if HAS_GATE and NORM_FIRST:
        result *= gate
    tl.store(y + out, result.to(y.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["rows", "programs"])
def gated_norm_backward_kernel(
    value, weight, z, dy, dtotal, dx, dresidual, dz, sums, rows, width, programs, eps,
    value_row, z_row, dy_row, dtotal_row,
    GROUPS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_TOTAL: tl.constexpr, TWO_SUMMANDS: tl.constexpr,
    NORM_FIRST: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (and dresidual, where its dtype differs), dz, and this program's sum for dweight."""
    program = tl.program_id(0)
    first = (program // GROUPS).to(tl.int64)
    within = tl.arange(0, BLOCK)[None, :]
    column = (program % GROUPS) * width + within
    factor = tl.load(weight + column, mask=within < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first * ROWS, rows, programs.to(tl.int64) * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        present = (row < rows) & (within < width)
        v = tl.load(value + row * value_row + column, mask=present, other=0.0).to(tl.float32)
        d = tl.load(dy + row * dy_row + column, mask=present, other=0.0).to(tl.float32)
        u = v
        if HAS_GATE:
            t = tl.load(z + row * z_row + column, mask=present, other=0.0).to(tl.float32)
            s = sigmoid(t, PTX)
            gate = t * s
            slope = s + (gate - gate * s)
            if NORM_FIRST:
                ungated = d
                d = d * gate
            else:
                u = v * gate
        if HAS_TOTAL:
            also = tl.load(dtotal + row * dtotal_row + column, mask=present, other=0.0).to(tl.float32)
        along = d * factor
        squares = tl.sum(u * u, 1) / width
        common = tl.sum(along * u, 1) / width
        scale = tl.rsqrt(squares + eps)
        # of u / sqrt(mean(u^2) + eps)
        du = scale[:, None] * along - (scale * scale * scale * common)[:, None] * u
        normal = u * scale[:, None]
        dweight += d * normal
        out = row * (width * GROUPS) + column
        dv = du
        if HAS_GATE:
            if NORM_FIRST:
                dt = ungated * normal * factor * slope
            else:
                dv = du * gate
                dt = du * v * slope
            tl.store(dz + out, dt.to(dz.dtype.element_ty), mask=present)
        if HAS_TOTAL:
            dv += also
        tl.store(dx + out, dv.to(dx.dtype.element_ty), mask=present)
        if TWO_SUMMANDS:
            tl.store(dresidual + out, dv.to(dresidual.dtype.element_ty), mask=present)
    tl.store(sums + first * (width * GROUPS) + column, tl.sum(dweight, 0)[None, :], mask=within < width)


def gated_rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    norm_before_gate: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gated_rms_norm` of arguments that the caller has checked."""
    y, total = _gated_rms_norm(x, weight, z, residual, groups, eps, norm_before_gate)
    return y if residual is None else (y, total)


def _rows(tensor: Tensor) -> Tensor:
    """(rows, channels) with contiguous channels, a view where there is one."""
    return rows_of_channels(tensor.reshape(-1, tensor.shape[-1]))


def _forward(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    norm_first: bool,
) -> tuple[Tensor, Tensor]:
    x_rows = _rows(x)
    z_rows = x_rows if z is None else _rows(z)
    residual_rows = x_rows if residual is None else _rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = (
        x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    )
    rows, channels = x_rows.shape
    cut = cut_up(FORWARD, x.device, rows, channels // groups, groups)
    with on_device(x):
        gated_norm_forward_kernel[(-(-rows // cut.rows) * groups,)](
            x_rows,
            weight.contiguous(),
            z_rows,
            residual_rows,
            y,
            total,
            rows,
            channels // groups,
            eps,
            x_rows.stride(0),
            z_rows.stride(0),
            residual_rows.stride(0),
            GROUPS=groups,
            HAS_GATE=z is not None,
            HAS_RESIDUAL=residual is not None,
            NORM_FIRST=norm_first,
            PTX=PTX,
            ROWS=cut.rows,
            BLOCK=cut.block,
            num_warps=cut.warps,
            num_stages=1,
        )
    return y, total


def _backward(
    value: Tensor,
    weight: Tensor,
    z: Tensor | None,
    dy: Tensor | None,
    dtotal: Tensor | None,
    groups: int,
    eps: float,
    norm_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx in `dtype`, dresidual where value (x + residual, or x) is of another, dweight and dz."""
    value_rows = _rows(value)
    z_rows = value_rows if z is None else _rows(z)
    dy_rows = value.new_zeros(value.shape[-1]).expand(value_rows.shape) if dy is None else _rows(dy)
    dtotal_rows = value_rows if dtotal is None else _rows(dtotal)
    rows, channels = value_rows.shape
    cut = cut_up(BACKWARD, value.device, rows, channels // groups, groups)
    dx = torch.empty(value.shape, dtype=dtype, device=value.device)
    two = value.dtype != dtype
    dresidual = (
        torch.empty(value.shape, dtype=value.dtype, device=value.device) if two else value.new_empty(0)
    )
    dz = value.new_empty(0) if z is None else torch.empty(value.shape, dtype=z.dtype, device=value.device)
    sums = torch.empty((cut.programs, channels), dtype=torch.float32, device=value.device)
    with on_device(value):
        gated_norm_backward_kernel[(cut.programs * groups,)](
            value_rows,
            weight.contiguous(),
            z_rows,
            dy_rows,
            dtotal_rows,
            dx,
            dresidual,
            dz,
            sums,
            rows,
            channels // groups,
            cut.programs,
            eps,
            value_rows.stride(0),
            z_rows.stride(0),
            dy_rows.stride(0),
            dtotal_rows.stride(0),
            GROUPS=groups,
            HAS_GATE=z is not None,
            HAS_TOTAL=dtotal is not None,
            TWO_SUMMANDS=two,
            NORM_FIRST=norm_first,
            PTX=PTX,
            ROWS=cut.rows,
            BLOCK=cut.block,
            num_warps=cut.warps,
            num_stages=1,
        )
    return dx, dresidual, add_parts(sums).to(weight.dtype), dz


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    norm_first: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape)


def _backward_fake(
    value: Tensor,
    weight: Tensor,
    z: Tensor | None,
    dy: Tensor | None,
    dtotal: Tensor | None,
    groups: int,
    eps: float,
    norm_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape, dtype=dtype),
        value.new_empty(value.shape if value.dtype != dtype else 0),
        weight.new_empty(weight.shape),
        value.new_empty(0) if z is None else z.new_empty(z.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, z, residual, ctx.groups, ctx.eps, ctx.norm_first = inputs
    ctx.set_materialize_grads(False)
    ctx.summed, ctx.dtype = residual is not None, x.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight, z)


def _gradients(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    value, weight, z = ctx.saved_tensors
    dx, dresidual, dweight, dz = torch.ops.genossm.gated_rms_norm_backward(
        value, weight, z, dy, dtotal if ctx.summed else None, ctx.groups, ctx.eps, ctx.norm_first, ctx.dtype
    )
    if not ctx.summed:
        dresidual = None
    elif value.dtype == ctx.dtype:
        dresidual = dx
    return dx, dweight, None if z is None else dz, dresidual, None, None, None


define_operator(
    "gated_rms_norm(Tensor x, Tensor weight, Tensor? z, Tensor? residual, int groups, float eps, bool norm_first) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define_operator(
    "gated_rms_norm_backward(Tensor value, Tensor weight, Tensor? z, Tensor? dy, Tensor? dtotal, int groups, "
    "float eps, bool norm_first, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_gated_rms_norm = differentiable("gated_rms_norm", _save, _gradients)
