"""The SSD scan in Triton and its place in PyTorch: operators that torch.compile, autocast and checkpoints see, and the gradient."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from genossm.kernels.backend import shared_memory
from genossm.kernels.packing import chunk_spans
from genossm.kernels.ssd_launch import SsdLaunches
from genossm.kernels.ssd_plan import SsdPlan
from genossm.kernels.ssd_tiles import CHUNKS, chunk_for, tiles_for
from genossm.kernels.triton_launch import remembered, signature
from genossm.kernels.triton_support import contiguous, define_operator, differentiable, on_device

DIRECTIONS = ("forward", "reverse", "both")


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    bounds: list[tuple[int, int]] | None,
    direction: str,
    softplus: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """y, and the final states (directions, sequences, heads, head_dim, state) in float32.

    Args:
        initial: like the final states, or None.
        bounds: first and end position of each sequence of a packed row.
    """
    largest = chunk_for(x.dtype, x.shape[3], B.shape[3], shared_memory(x.device), chunk_size)
    assert largest is not None
    chunk = chunk_size or min(largest, max(CHUNKS[0], triton.next_power_of_2(x.shape[1])))
    spans = firsts = None
    if bounds is not None:
        spans, firsts = chunk_spans(bounds, chunk, x.device)
    inputs = (
        x, dt, A, B.to(x.dtype), C.to(x.dtype), D, z, dt_bias, initial, spans, firsts,
        DIRECTIONS.index(direction), softplus, chunk,
    )  # fmt: skip
    y, final = _ssd_scan(*inputs)
    return y, final


def _aligned(tensor: Tensor, chunk: int) -> Tensor:
    """With a last stride of 1, and rows near enough for 32-bit offsets within a chunk."""
    if tensor.stride(-1) == 1 and tensor.stride(1) * chunk < 2**31:
        return tensor
    return tensor.contiguous()


def _prepared(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, dy: Tensor | None,
    spans: Tensor | None, firsts: Tensor | None, direction: int, softplus: bool, chunk: int, *others: Tensor | None,
) -> SsdLaunches:  # fmt: skip
    """The plan for these tensors; `others` are those of the call that its launches are given later, as they will be."""
    x, B, C = (_aligned(tensor, chunk) for tensor in (x, B, C))
    key = (
        signature(x, dt, A, B, C, dt_bias, dy, spans, firsts, *others),
        x.device,
        direction,
        softplus,
        chunk,
    )

    def make() -> SsdPlan:
        tiles = tiles_for(x.dtype, x.shape[3], B.shape[3], shared_memory(x.device), chunk)
        assert tiles is not None
        return SsdPlan(
            x, dt, A, B, C, dt_bias, dy, spans, firsts, direction=direction, softplus=softplus, tiles=tiles
        )

    return SsdLaunches(remembered(_plans, key, make), x, dt, A, B, C, dt_bias, spans, firsts)


_plans: dict[Hashable, SsdPlan] = {}


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial: Tensor | None, spans: Tensor | None, firsts: Tensor | None,
    direction: int, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with on_device(x):
        skip, gate, initial = contiguous(D), None if z is None else _aligned(z, chunk), contiguous(initial)
        scan = _prepared(
            x, dt, A, B, C, dt_bias, None, spans, firsts, direction, softplus, chunk, skip, gate, initial
        )
        carry, final = scan.carried(scan.x, scan.B, initial, adjoint=False)
        return scan.output(skip, gate, carry), final


def _backward(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, spans: Tensor | None, firsts: Tensor | None,
    direction: int, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial; an empty tensor for what there is not."""
    with on_device(x):
        dy = torch.zeros_like(x) if dy is None else _aligned(dy.to(x.dtype), chunk)
        dy = dy if z is None else dy.contiguous()
        skip, initial, dfinal = contiguous(D), contiguous(initial), contiguous(dfinal)
        # z itself goes to no kernel here, but takes another dy to them than that of the plan
        scan = _prepared(
            x, dt, A, B, C, dt_bias, dy, spans, firsts, direction, softplus, chunk, skip, z, initial, dfinal
        )
        carry, _ = scan.carried(scan.x, scan.B, initial, adjoint=False)
        dz = scan.empty(0)
        if z is not None:
            y = scan.output(skip, None, carry)
            gate, wide = torch.sigmoid(z.float()), dy.float()
            dz = (wide * y.float() * gate * (1 + z.float() * (1 - gate))).to(z.dtype)
            dy = (wide * z.float() * gate).to(x.dtype).contiguous()
        adjoint, dinitial = scan.carried(dy, scan.C, dfinal, adjoint=True)
        by_head = D is not None and D.dim() == 1
        ddt, dA, dB, dC, dbias, dD = scan.gradients(dy, carry, adjoint, skip=by_head)
        if D is not None and D.dim() == 2:
            dD = scan.skip_gradient(dy)
        del carry
        dx = scan.input_gradient(dy, skip, adjoint)
        # An operator may not give the same tensor twice, not even an empty one.
        return (
            dx, ddt, dA, dB, dC, scan.empty(0) if D is None or dD is None else dD.to(D.dtype), dz,
            scan.empty(0) if dbias is None else dbias,
            scan.empty(0) if initial is None else dinitial.to(initial.dtype),
        )  # fmt: skip


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial, "
    "Tensor? spans, Tensor? firsts, int direction, bool softplus, int chunk"
)


def _forward_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial: Tensor | None, spans: Tensor | None, firsts: Tensor | None,
    direction: int, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences = x.shape[0] if firsts is None else firsts.shape[0] - 1
    shape = (2 if direction == 2 else 1, sequences, x.shape[2], x.shape[3], B.shape[3])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _backward_shapes(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, spans: Tensor | None, firsts: Tensor | None,
    direction: int, softplus: bool, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        x.new_empty(0, dtype=torch.float32) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (x, dt, A, B, C, D, z, dt_bias, initial)
    )


define_operator(f"ssd_scan({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_shapes)
define_operator(
    f"ssd_scan_backward(Tensor? dy, Tensor? dfinal, {_INPUTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_shapes,
)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
    """The inputs, and nothing else."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]


def _gradients(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    found = torch.ops.genossm.ssd_scan_backward.default(*of_outputs, *inputs, *ctx.options)
    present = [
        None if tensor is None else gradient for gradient, tensor in zip(found, inputs[:9], strict=True)
    ]
    return (*present, None, None, None, None, None)


_ssd_scan = differentiable("ssd_scan", _save, _gradients)


@register_flop_formula(torch.ops.genossm.ssd_scan)
def _forward_flops(
    x_shape: Any, dt_shape: Any, A_shape: Any, B_shape: Any, *rest: Any, **options: Any
) -> int:
    """Of the matrix products, one direction counted once: C B^T for each group, states in and out and pairs for each head."""
    batch, length, heads, head_dim = x_shape
    groups, state = B_shape[2:]
    direction, chunk = rest[-3], rest[-1]
    seen = chunk if direction == 2 else (chunk + 1) / 2
    states = (2 if direction == 2 else 1) * 2 * heads * head_dim * state
    return int(2 * batch * length * (seen * (groups * state + heads * head_dim) + states))


@register_flop_formula(torch.ops.genossm.ssd_scan_backward)
def _backward_flops(dy_shape: Any, dfinal_shape: Any, *inputs: Any, **options: Any) -> int:
    """The states again; the scan of dy; and the pairs and the states' part of dB and dC."""
    return int(2.5 * _forward_flops(*inputs))
