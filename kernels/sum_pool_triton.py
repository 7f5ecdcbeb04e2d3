"""The maximum of neighbours of a sum in Triton, registered with torch as genossm::sum_pool and its gradient."""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Functions of Triton's own language have no types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.kernels.triton_support import define_operator, differentiable, on_device

ELEMENTS = 2048
"""Outputs of a program."""


@triton.jit(do_not_specialize=["rows"])
def sum_pool_forward_kernel(
    x, other, y, index, rows,
    CHANNELS: tl.constexpr, POOL: tl.constexpr, TWO: tl.constexpr, INDEXED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y, and which of the POOL rows it is, of ROWS output rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    out = row[:, None] * CHANNELS + channel[None, :]
    read = row[:, None] * (POOL * CHANNELS) + channel[None, :]
    best = tl.full((ROWS, BLOCK_C), float("-inf"), tl.float32)
    which = tl.zeros((ROWS, BLOCK_C), tl.int32)
    for step in tl.static_range(POOL):
        value = tl.load(x + read + step * CHANNELS, mask=present, other=0.0).to(tl.float32)
        if TWO:
            value += tl.load(other + read + step * CHANNELS, mask=present, other=0.0).to(tl.float32)
            value = value.to(y.dtype.element_ty).to(tl.float32)
        larger = (value > best) | (value != value)
        best = tl.where(larger, value, best)
        which = tl.where(larger, step, which)
    tl.store(y + out, best.to(y.dtype.element_ty), mask=present)
    if INDEXED:
        tl.store(index + out, which.to(tl.uint8), mask=present)


@triton.jit(do_not_specialize=["rows"])
def sum_pool_backward_kernel(
    dy, index, dx, rows, CHANNELS: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dx of the rows that ROWS output rows were taken from: dy at one of them, else 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    out = row[:, None] * CHANNELS + channel[None, :]
    pooled = tl.load(dy + out, mask=present, other=0.0)
    which = tl.load(index + out, mask=present, other=0)
    for step in tl.static_range(POOL):
        own = tl.where(which == step, pooled, 0.0).to(pooled.dtype)
        tl.store(
            dx + row[:, None] * (POOL * CHANNELS) + step * CHANNELS + channel[None, :], own, mask=present
        )


def sum_pool_triton(x: Tensor, other: Tensor | None, pool: int) -> Tensor:
    """`sum_pool` of arguments that the caller has checked."""
    y, _ = _sum_pool(x, other, pool, torch.is_grad_enabled())
    return y  # type: ignore[no-any-return]


def _cut(channels: int) -> tuple[int, int]:
    """Rows and channels of a program."""
    block = min(512, triton.next_power_of_2(channels))
    return max(1, ELEMENTS // block), block


def _forward(x: Tensor, other: Tensor | None, pool: int, indexed: bool) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    y = x.new_empty((batch, length // pool, channels))
    index = torch.empty(y.shape if indexed else 0, dtype=torch.uint8, device=x.device)
    rows, (held, block) = batch * (length // pool), _cut(channels)
    with on_device(x):
        sum_pool_forward_kernel[(triton.cdiv(rows, held), triton.cdiv(channels, block))](
            x.contiguous(),
            None if other is None else other.contiguous(),
            y,
            index,
            rows,
            CHANNELS=channels,
            POOL=pool,
            TWO=other is not None,
            INDEXED=indexed,
            ROWS=held,
            BLOCK_C=block,
        )
    return y, index


def _backward(dy: Tensor, index: Tensor, pool: int) -> Tensor:
    batch, length, channels = dy.shape
    dx = dy.new_empty((batch, length * pool, channels))
    held, block = _cut(channels)
    with on_device(dy):
        sum_pool_backward_kernel[(triton.cdiv(batch * length, held), triton.cdiv(channels, block))](
            dy.contiguous(), index, dx, batch * length, CHANNELS=channels, POOL=pool, ROWS=held, BLOCK_C=block
        )
    return dx


def _forward_fake(x: Tensor, other: Tensor | None, pool: int, indexed: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] // pool, x.shape[2])
    return x.new_empty(shape), x.new_empty(shape if indexed else 0, dtype=torch.uint8)


def _backward_fake(dy: Tensor, index: Tensor, pool: int) -> Tensor:
    return dy.new_empty((dy.shape[0], dy.shape[1] * pool, dy.shape[2]))


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    _, other, ctx.pool, _ = inputs
    ctx.two = other is not None
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(outputs[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = torch.ops.genossm.sum_pool_backward(dy, *ctx.saved_tensors, ctx.pool)
    return dx, dx if ctx.two else None, None, None


define_operator(
    "sum_pool(Tensor x, Tensor? other, int pool, bool indexed) -> (Tensor, Tensor)", _forward, _forward_fake
)
define_operator("sum_pool_backward(Tensor dy, Tensor index, int pool) -> Tensor", _backward, _backward_fake)
_sum_pool = differentiable("sum_pool", _save, _gradients)
