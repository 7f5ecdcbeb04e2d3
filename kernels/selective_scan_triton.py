"""The selective scan in Triton, as operators registered with torch.library: torch.compile, autocast and checkpoints see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from genossm.kernels.arguments import Direction, Pair
from genossm.kernels.packing import chunk_spans
from genossm.kernels.selective_scan_launch import chunk_length, run_backward, run_forward
from genossm.kernels.triton_support import define_operator, differentiable

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? start, Tensor? reverse_start, Tensor? spans, Tensor? firsts, "
    "bool dt_softplus, str direction, int packed_chunk"
)


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    starts: Pair,
    *,
    dt_softplus: bool,
    direction: Direction,
    bounds: list[tuple[int, int]] | None = None,
) -> tuple[Tensor, Pair]:
    """The selective scan as `genossm.kernels.selective_scan.selective_scan` defines it, from its checked arguments.

    Args:
        bounds: first and end position of each sequence of a packed row.

    Returns:
        y like x, and the final states (sequences, channels, state) in float32, None for a direction that is not run.
    """
    spans = firsts = None
    chunk = 0
    if bounds is not None:
        chunk = chunk_length("forward", x, A.shape[1])
        spans, firsts = chunk_spans(bounds, chunk, x.device)
    y, finals = _selective_scan(
        x, dt, A, B, C, D, z, dt_bias, starts[0], starts[1], spans, firsts, dt_softplus, direction, chunk
    )
    if direction == "both":
        return y, (finals[0], finals[1])
    return y, ((finals[0], None) if direction == "forward" else (None, finals[0]))


def _fake_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    x, A, firsts, direction = inputs[0], inputs[2], inputs[11], inputs[13]
    sequences = x.shape[0] if firsts is None else firsts.shape[0] - 1
    shape = (2 if direction == "both" else 1, sequences, x.shape[2], A.shape[1])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _fake_backward(dy: Tensor | None, dfinal: Tensor | None, *inputs: Any) -> list[Tensor]:
    x, direction = inputs[0], inputs[13]
    unused = {"forward": 9, "reverse": 8}.get(direction)
    return [
        x.new_empty(0) if tensor is None or place == unused else tensor.new_empty(tensor.shape)
        for place, tensor in enumerate(inputs[:10])
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:12])
    ctx.options = inputs[12:]


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = torch.ops.genossm.selective_scan_backward(dy, dfinal, *inputs, *ctx.options)
    wanted = [
        None if tensor is None or not needed else gradient
        for tensor, gradient, needed in zip(inputs, gradients, ctx.needs_input_grad, strict=False)
    ]
    return (*wanted, None, None, None, None, None)


define_operator(f"selective_scan({_INPUTS}) -> (Tensor, Tensor)", run_forward, _fake_forward)
define_operator(
    f"selective_scan_backward(Tensor? dy, Tensor? dfinal, {_INPUTS}) -> Tensor[]",
    run_backward,
    _fake_backward,
)
_selective_scan = differentiable("selective_scan", _save, _gradients)


@register_flop_formula(torch.ops.genossm.selective_scan)
def _forward_flops(
    x_shape: Any, dt_shape: Any, A_shape: Any, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    """Two each for the decay, its exponent, the input and the output of a state and step, once for each direction."""
    directions = 2 if rest[-2] == "both" else 1
    return directions * 8 * int(x_shape[0] * x_shape[1] * x_shape[2] * A_shape[1])


@register_flop_formula(torch.ops.genossm.selective_scan_backward)
def _backward_flops(dy_shape: Any, dfinal_shape: Any, *inputs: Any, **options: Any) -> int:
    """The states again, and twice the scan's own work for the gradients."""
    return 3 * _forward_flops(*inputs)
