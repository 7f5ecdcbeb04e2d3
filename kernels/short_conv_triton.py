"""The short convolution in Triton, registered with torch as genossm::short_conv and its gradient.

Both take one pass over their inputs (short_conv_kernels.py); the gradient saves the inputs alone and adds up the
filters' sums in a fixed order, so that it is the same bit by bit whenever it is repeated.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from genossm.kernels.short_conv_kernels import (
    short_conv_backward_kernel,
    short_conv_forward_kernel,
    short_conv_reduce_kernel,
)
from genossm.kernels.triton_support import (
    PTX,
    define_operator,
    differentiable,
    on_device,
    processors,
    rows_of_channels,
)

CAUSAL, REVERSE, CENTERED, BOTH = range(4)
PADDINGS = {"causal": CAUSAL, "reverse": REVERSE, "centered": CENTERED, "both": BOTH}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Config(NamedTuple):
    """How a pass is cut into programs; measured, not searched at run time."""

    block: int
    """Channels of a program, at most."""
    lane: int
    """Channels of a thread."""
    unroll: int
    """Rows in flight."""
    registers: int
    """Of a thread, at most; what the compiler needs without spilling."""
    resident: int
    """Warps that a processor holds with that many registers."""
    longest: int
    """Windows of a program, at most."""


FORWARD = Config(block=512, lane=4, unroll=4, registers=96, resident=20, longest=128)
BACKWARD = Config(block=512, lane=4, unroll=2, registers=168, resident=12, longest=2048)
MANY_FORWARD = Config(block=256, lane=2, unroll=4, registers=96, resident=20, longest=128)
"""Where there is more to hold: more than MANY taps of both filters, or, for the gradient, states or float32."""
MANY_BACKWARD = Config(block=256, lane=2, unroll=4, registers=168, resident=12, longest=2048)
MANY = 8
SHORTEST = 16
"""Windows of a program, at least: each program reads width - 1 rows of its neighbours."""
REDUCE_ROWS, REDUCE_CHANNELS = 32, 64


class Cut(NamedTuple):
    """One call cut into programs."""

    block: int
    blocks: int
    warps: int
    unroll: int
    registers: int
    span: int
    """Windows of a program."""
    spans: int
    """Programs along a sequence."""
    grouped: int
    """Sequences of a program, one after the other."""
    rows: int
    """Programs of a block of channels."""


@functools.lru_cache(maxsize=256)
def cut_up(
    config: Config, device: torch.device, batch: int, windows: int, channels: int, *, group: bool
) -> Cut:
    """Programs that fill the device's processors a whole number of times; few of them where `group`."""
    block = config.block
    while block > 32 and -(-channels // block) * block > 1.125 * channels:
        block //= 2
    blocks = -(-channels // block)
    warps = max(1, block // (32 * config.lane))
    wave = max(1, processors(device) * (config.resident // warps) // blocks)
    waves = max(1, round(batch * windows / (wave * config.longest)))
    spans = max(1, min(round(waves * wave / batch), windows // SHORTEST))
    span = math.ceil(math.ceil(windows / spans) / config.unroll) * config.unroll
    spans = math.ceil(windows / span)
    grouped = max(1, batch * spans // (4 * wave)) if group else 1
    rows = math.ceil(batch / grouped) * spans
    return Cut(block, blocks, warps, config.unroll, config.registers, span, spans, grouped, rows)


def short_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    *,
    padding: str,
    silu: bool,
    final: bool,
) -> Outputs:
    """The convolution of x (batch, length, channels), checked by the caller.

    Args:
        x: float32, bfloat16 or float16, any strides.
        weight: (channels, width), or for padding `both` also (2, channels, width).
        bias: (channels,), or for `both` also (2, channels).
        left, right: (batch, width - 1, channels) in x's dtype, the rows before the first and after the last.
        padding: `causal`, `reverse`, `centered` or `both`.
        silu: apply it.
        final: give the last (causal, both) and first (reverse, both) width - 1 inputs.

    Returns:
        y, the reverse y of `both`, the last inputs, the first inputs; empty where there is none.
    """
    outputs: Outputs = _short_conv(x, weight, bias, left, right, PADDINGS[padding], silu, final)
    return outputs


def _windows(length: int, width: int, padding: int) -> int:
    """Windows that make an output: the last reaches over the end."""
    return length + {CAUSAL: 0, CENTERED: width // 2}.get(padding, width - 1)


def _config(x: Tensor, padding: int, width: int, *, gradient: bool, states: bool) -> Config:
    """The cut for a call that has no more to hold in registers than it can."""
    few = (2 if padding == BOTH else 1) * width <= MANY
    if not gradient:
        return FORWARD if few else MANY_FORWARD
    return BACKWARD if few and not states and x.element_size() == 2 else MANY_BACKWARD


def _constants(
    padding: int,
    width: int,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    cut: Cut,
) -> dict[str, Any]:
    return {
        "PADDING": padding,
        "WIDTH": width,
        "HAS_LEFT": left is not None and width > 1,
        "HAS_RIGHT": right is not None and width > 1,
        "HAS_BIAS": bias is not None,
        "ACTIVATION": (2 if PTX else 1) if silu else 0,
        "GROUPED": cut.grouped > 1,
        "BLOCK": cut.block,
        "UNROLL": cut.unroll,
        "num_warps": cut.warps,
        "num_stages": 1,
        "maxnreg": cut.registers,
    }


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    padding: int,
    silu: bool,
    final: bool,
) -> Outputs:
    batch, length, channels = x.shape
    width = weight.shape[-1]
    x, weight = rows_of_channels(x), weight.contiguous()
    bias, left, right = (None if tensor is None else tensor.contiguous() for tensor in (bias, left, right))
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    y_2 = torch.empty_like(y) if padding == BOTH else x.new_empty(0)
    config = _config(x, padding, width, gradient=False, states=False)
    cut = cut_up(config, x.device, batch, _windows(length, width, padding), channels, group=False)
    with on_device(x):
        short_conv_forward_kernel[(cut.rows * cut.blocks,)](
            x,
            x if left is None else left,
            x if right is None else right,
            weight,
            weight if bias is None else bias,
            y,
            y_2,
            batch,
            length,
            channels,
            cut.span,
            cut.spans,
            cut.grouped,
            x.stride(0),
            x.stride(1),
            channels * width if weight.dim() == 3 else 0,
            channels if bias is not None and bias.dim() == 2 else 0,
            **_constants(padding, width, left, right, bias, silu, cut),
        )
    return (
        y,
        y_2,
        edge_inputs(x, left, width, last=True) if final and padding in (CAUSAL, BOTH) else x.new_empty(0),
        edge_inputs(x, right, width, last=False) if final and padding in (REVERSE, BOTH) else x.new_empty(0),
    )


def edge_inputs(x: Tensor, beyond: Tensor | None, width: int, *, last: bool) -> Tensor:
    """A copy of the last or first width - 1 rows of x, with those beyond its other end where x is shorter."""
    batch, length, channels = x.shape
    missing = width - 1 - length
    if missing <= 0:
        edge = x[:, length - width + 1 :] if last else x[:, : width - 1]
        return edge.clone(memory_format=torch.contiguous_format)
    if beyond is None:
        beyond = x.new_zeros(batch, width - 1, channels)
    return torch.cat([beyond[:, -missing:], x] if last else [x, beyond[:, :missing]], 1)


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    dy: Tensor | None,
    dy_2: Tensor | None,
    dlast: Tensor | None,
    dfirst: Tensor | None,
    padding: int,
    silu: bool,
) -> Gradients:
    batch, length, channels = x.shape
    width = weight.shape[-1]
    filters = 2 if padding == BOTH else 1
    x, weight = rows_of_channels(x), weight.contiguous()
    bias, left, right = (None if tensor is None else tensor.contiguous() for tensor in (bias, left, right))
    if dy is None or (filters == 2 and dy_2 is None):
        nothing = x.new_zeros(channels).expand(batch, length, channels)
        dy, dy_2 = nothing if dy is None else dy, nothing if dy_2 is None else dy_2
    dy = rows_of_channels(dy)
    dy_2 = dy if dy_2 is None or filters == 1 else rows_of_channels(dy_2)
    states = left is not None or right is not None
    config = _config(x, padding, width, gradient=True, states=states)
    cut = cut_up(config, x.device, batch, _windows(length, width, padding), channels, group=True)
    dx = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    dweight = torch.empty_like(weight)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    dleft = x.new_empty(0) if left is None else torch.empty_like(left)
    dright = x.new_empty(0) if right is None else torch.empty_like(right)
    sums = torch.empty((cut.rows, filters * (width + 1), channels), dtype=torch.float32, device=x.device)
    with on_device(x):
        short_conv_backward_kernel[(cut.rows * cut.blocks,)](
            x,
            x if left is None else left,
            x if right is None else right,
            weight,
            weight if bias is None else bias,
            dy,
            dy_2,
            dx,
            dleft,
            dright,
            sums,
            batch,
            length,
            channels,
            cut.span,
            cut.spans,
            cut.grouped,
            x.stride(0),
            x.stride(1),
            channels * width if weight.dim() == 3 else 0,
            channels if bias is not None and bias.dim() == 2 else 0,
            dy.stride(0),
            dy.stride(1),
            dy_2.stride(0),
            dy_2.stride(1),
            **_constants(padding, width, left, right, bias, silu, cut),
        )
        short_conv_reduce_kernel[(-(-channels // REDUCE_CHANNELS), filters * (width + 1))](
            sums,
            dweight,
            dbias,
            cut.rows,
            channels,
            PADDING=padding,
            WIDTH=width,
            ONE_WEIGHT=weight.dim() == 2,
            ONE_BIAS=bias is None or bias.dim() == 1,
            HAS_BIAS=bias is not None,
            ROWS=REDUCE_ROWS,
            BLOCK=REDUCE_CHANNELS,
            num_warps=4,
        )
    rows = min(length, width - 1)
    if dlast is not None and rows:
        dx[:, length - rows :] += dlast[:, width - 1 - rows :]
        if left is not None:
            dleft[:, length:] += dlast[:, : width - 1 - rows]
    if dfirst is not None and rows:
        dx[:, :rows] += dfirst[:, :rows]
        if right is not None:
            dright[:, : width - 1 - rows] += dfirst[:, rows:]
    return dx, dweight, dbias, dleft, dright


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    padding: int,
    silu: bool,
    final: bool,
) -> Outputs:
    batch, _, channels = x.shape
    edge = (batch, weight.shape[-1] - 1, channels)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if padding == BOTH else 0),
        x.new_empty(edge if final and padding in (CAUSAL, BOTH) else 0),
        x.new_empty(edge if final and padding in (REVERSE, BOTH) else 0),
    )


def _backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    dy: Tensor | None,
    dy_2: Tensor | None,
    dlast: Tensor | None,
    dfirst: Tensor | None,
    padding: int,
    silu: bool,
) -> Gradients:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if left is None else left.new_empty(left.shape),
        x.new_empty(0) if right is None else right.new_empty(right.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, bias, left, right, ctx.padding, ctx.silu, ctx.final = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, left, right)


def _gradients(
    ctx: Any, dy: Tensor | None, dy_2: Tensor | None, dlast: Tensor | None, dfirst: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, bias, left, right = ctx.saved_tensors
    both, final = ctx.padding == BOTH, ctx.final
    dx, dweight, dbias, dleft, dright = torch.ops.genossm.short_conv_backward(
        x,
        weight,
        bias,
        left,
        right,
        dy,
        dy_2 if both else None,
        dlast if final and ctx.padding in (CAUSAL, BOTH) else None,
        dfirst if final and ctx.padding in (REVERSE, BOTH) else None,
        ctx.padding,
        ctx.silu,
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if left is None else dleft,
        None if right is None else dright,
        None,
        None,
        None,
    )


define_operator(
    "short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? left, Tensor? right, int padding, bool silu, "
    "bool final) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define_operator(
    "short_conv_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? left, Tensor? right, Tensor? dy, "
    "Tensor? dy_2, Tensor? dlast, Tensor? dfirst, int padding, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_short_conv = differentiable("short_conv", _save, _gradients)


@register_flop_formula(torch.ops.genossm.short_conv)
def _flops(x: Any, weight: Any, bias: Any, left: Any, right: Any, padding: int, *_: Any, **__: Any) -> int:
    """A multiplication and an addition for each tap of each filter."""
    return 2 * int(math.prod(x)) * int(weight[-1]) * (2 if padding == BOTH else 1)


@register_flop_formula(torch.ops.genossm.short_conv_backward)
def _backward_flops(
    x: Any, weight: Any, bias: Any, left: Any, right: Any, dy: Any, dy_2: Any, dlast: Any, dfirst: Any, padding: int,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Those of dx and of dweight; the pre-activations, computed again, are not counted."""
    return 4 * int(math.prod(x)) * int(weight[-1]) * (2 if padding == BOTH else 1)
