"""Motif filters in Triton, registered with torch as genossm::motif_conv and its gradient.

A program builds the one-hot bases of its positions in registers, tap by tap and base by base (4 width rows of the filters),
and multiplies them by the filters as matrices. Of the positions that are pooled it goes through one after another, and
keeps the largest and which it was. The gradient multiplies the same one-hot bases by dy, put back where it came from;
every program adds up its own part, and the parts are added in order.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Functions of Triton's own language have no types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from genossm.kernels.parts import add_parts
from genossm.kernels.sum_pool import sum_pool
from genossm.kernels.triton_support import define_operator, differentiable, on_device, processors

BLOCK_K = 16
"""Rows of the filters, of four a tap, that are multiplied at once in the forward pass."""
BLOCK_K_BACKWARD = 128
"""And of which a program of the gradient adds up all positions."""
ROWS = 64
"""Output positions of a program."""
WARPS, WARPS_BACKWARD = 4, 8
LARGEST_POOL = 255
"""Which position was the largest is a byte."""


@triton.jit
def _one_hot(tokens, start, place, row, K, HALF: tl.constexpr, length, there):
    """1 where the base at `place` + tap is the one of this row of the filters."""
    seen = place + row // 4 - HALF
    code = tl.load(tokens + start + seen, mask=there & (row < K) & (seen >= 0) & (seen < length), other=4)
    return code == row % 4


@triton.jit(do_not_specialize=["length", "tiles"])
def motif_conv_forward_kernel(
    tokens, weight, bias, y, index, length, tiles, token_row,
    K: tl.constexpr, CHANNELS: tl.constexpr, POOL: tl.constexpr, HAS_BIAS: tl.constexpr, INDEXED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y, and which of the pooled positions it is, at ROWS output positions."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within, there = channel < CHANNELS, (row < length // POOL)[:, None]
    best = tl.full((ROWS, BLOCK_C), float("-inf"), tl.float32)
    which = tl.zeros((ROWS, BLOCK_C), tl.int32)
    for step in range(POOL):
        place = (row * POOL + step)[:, None]
        value = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for first in tl.static_range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            hot = _one_hot(tokens, batch * token_row, place, k[None, :], K, K // 8, length, there)
            filters = tl.load(
                weight + k[:, None] * CHANNELS + channel[None, :],
                mask=(k < K)[:, None] & within[None, :],
                other=0.0,
            ).to(y.dtype.element_ty)
            value = tl.dot(hot.to(filters.dtype), filters, value, input_precision="ieee")
        larger = (value > best) | (value != value)
        best = tl.where(larger, value, best)
        which = tl.where(larger, step, which)
    if HAS_BIAS:
        best += tl.load(bias + channel, mask=within, other=0.0).to(tl.float32)[None, :]
    out = (batch * (length // POOL) + row)[:, None] * CHANNELS + channel[None, :]
    tl.store(y + out, best.to(y.dtype.element_ty), mask=there & within[None, :])
    if INDEXED:
        tl.store(index + out, which.to(tl.uint8), mask=there & within[None, :])


@triton.jit(do_not_specialize=["length", "tiles", "total", "programs"])
def motif_conv_backward_kernel(
    tokens, dy, index, sums, bias_sums, length, tiles, total, programs, token_row,
    K: tl.constexpr, CHANNELS: tl.constexpr, POOL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's part of the sums over all positions of one-hot bases times dy, and of dy."""
    first = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = channel < CHANNELS
    dweight = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(first, total, programs):
        batch = (tile // tiles).to(tl.int64)
        row = (tile % tiles) * ROWS + tl.arange(0, ROWS)
        there = row < length // POOL
        out = (batch * (length // POOL) + row)[:, None] * CHANNELS + channel[None, :]
        present = there[:, None] & within[None, :]
        pooled = tl.load(dy + out, mask=present, other=0.0)
        if HAS_BIAS:
            dbias += tl.sum(pooled.to(tl.float32), 0)
        if POOL > 1:
            which = tl.load(index + out, mask=present, other=0)
        for step in range(POOL):
            place = (row * POOL + step)[None, :]
            hot = _one_hot(tokens, batch * token_row, place, k[:, None], K, K // 8, length, there[None, :])
            own = pooled
            if POOL > 1:
                own = tl.where(which == step, pooled, 0.0).to(pooled.dtype)
            dweight = tl.dot(hot.to(pooled.dtype), own, dweight, input_precision="ieee")
    at = first.to(tl.int64) * K * CHANNELS + k[:, None] * CHANNELS + channel[None, :]
    tl.store(sums + at, dweight, mask=(k < K)[:, None] & within[None, :])
    if HAS_BIAS and tl.program_id(1) == 0:
        tl.store(bias_sums + first * CHANNELS + channel, dbias, mask=within)


def motif_conv_triton(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, pool: int, dtype: torch.dtype
) -> Tensor:
    """`motif_conv` of arguments that the caller has checked."""
    channels, _, width = weight.shape
    if pool > LARGEST_POOL:
        y = motif_conv_triton(tokens, weight, bias, 1, dtype)
        return sum_pool(y, None, pool)
    filters = weight.permute(2, 1, 0).reshape(4 * width, channels)
    indexed = pool > 1 and torch.is_grad_enabled()
    y, _ = _motif_conv(tokens, filters, bias, pool, indexed, dtype)
    return y  # type: ignore[no-any-return]


def _blocks(channels: int) -> int:
    return int(min(128, max(16, triton.next_power_of_2(channels))))


def _forward(
    tokens: Tensor, filters: Tensor, bias: Tensor | None, pool: int, indexed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    (batch, length), (rows, channels) = tokens.shape, filters.shape
    y = torch.empty((batch, length // pool, channels), dtype=dtype, device=filters.device)
    index = torch.empty(y.shape if indexed else 0, dtype=torch.uint8, device=filters.device)
    tiles, block = triton.cdiv(length // pool, ROWS), _blocks(channels)
    with on_device(filters):
        motif_conv_forward_kernel[(batch * tiles, triton.cdiv(channels, block))](
            tokens,
            filters.contiguous(),
            bias,
            y,
            index,
            length,
            tiles,
            tokens.stride(0),
            K=rows,
            CHANNELS=channels,
            POOL=pool,
            HAS_BIAS=bias is not None,
            INDEXED=indexed,
            ROWS=ROWS,
            BLOCK_K=BLOCK_K,
            BLOCK_C=block,
            num_warps=WARPS,
        )
    return y, index


def _backward(
    tokens: Tensor, dy: Tensor, index: Tensor, rows: int, pool: int, biased: bool
) -> tuple[Tensor, Tensor]:
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    dy = dy.contiguous()
    (batch, length), channels = tokens.shape, dy.shape[2]
    tiles, block = triton.cdiv(length // pool, ROWS), _blocks(channels)
    programs = min(batch * tiles, processors(dy.device))
    sums = dy.new_empty((programs, rows, channels), dtype=torch.float32)
    bias_sums = dy.new_empty((programs, channels if biased else 0), dtype=torch.float32)
    with on_device(dy):
        motif_conv_backward_kernel[
            (programs, triton.cdiv(rows, BLOCK_K_BACKWARD), triton.cdiv(channels, block))
        ](
            tokens,
            dy,
            index,
            sums,
            bias_sums,
            length,
            tiles,
            batch * tiles,
            programs,
            tokens.stride(0),
            K=rows,
            CHANNELS=channels,
            POOL=pool,
            HAS_BIAS=biased,
            ROWS=ROWS,
            BLOCK_K=BLOCK_K_BACKWARD,
            BLOCK_C=block,
            num_warps=WARPS_BACKWARD,
        )
    return add_parts(sums), add_parts(bias_sums)


def _forward_fake(
    tokens: Tensor, filters: Tensor, bias: Tensor | None, pool: int, indexed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (tokens.shape[0], tokens.shape[1] // pool, filters.shape[1])
    return filters.new_empty(shape, dtype=dtype), filters.new_empty(
        shape if indexed else 0, dtype=torch.uint8
    )


def _backward_fake(
    tokens: Tensor, dy: Tensor, index: Tensor, rows: int, pool: int, biased: bool
) -> tuple[Tensor, Tensor]:
    channels = dy.shape[2]
    return dy.new_empty((rows, channels), dtype=torch.float32), dy.new_empty(
        channels if biased else 0, dtype=torch.float32
    )


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    tokens, filters, bias, ctx.pool, _, _ = inputs
    ctx.rows, ctx.dtype, ctx.bias_dtype = len(filters), filters.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(tokens, outputs[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    tokens, index = ctx.saved_tensors
    dfilters, dbias = torch.ops.genossm.motif_conv_backward(
        tokens, dy, index, ctx.rows, ctx.pool, ctx.bias_dtype is not None
    )
    return (
        None,
        dfilters.to(ctx.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
        None,
    )


define_operator(
    "motif_conv(Tensor tokens, Tensor filters, Tensor? bias, int pool, bool indexed, ScalarType dtype) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define_operator(
    "motif_conv_backward(Tensor tokens, Tensor dy, Tensor index, int rows, int pool, bool biased) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_motif_conv = differentiable("motif_conv", _save, _gradients)


@register_flop_formula(torch.ops.genossm.motif_conv)
def _flops(tokens: Any, filters: Any, *_: Any, **__: Any) -> int:
    return 2 * int(tokens[0]) * int(tokens[1]) * int(filters[0]) * int(filters[1])


@register_flop_formula(torch.ops.genossm.motif_conv_backward)
def _backward_flops(tokens: Any, dy: Any, index: Any, rows: int, *_: Any, **__: Any) -> int:
    return 2 * int(tokens[0]) * int(tokens[1]) * rows * int(dy[2])
