"""Batch normalisation with GELU in Triton, registered with torch as genossm::batch_norm_gelu and its gradient.

Positions are shared between programs, which add up their own part of the sums that a channel needs, element by element of
a tile, and only at the end over the tile; the parts are added in order. Sums of squares are of differences from the mean
of the first few positions. x is read twice in each pass, y and dx are written once; z is not kept.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Functions of Triton's own language have no types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.kernels.parts import COLUMNS, PARTS, add_parts, added_up
from genossm.kernels.triton_support import PTX, define_operator, differentiable, on_device, processors

TILE = 4096
"""Elements that a program holds at once; half as many of more than 256 channels."""
WARPS = 4
RESIDENT = 4
"""Programs of a processor that share the positions, where sums are taken."""


@triton.jit
def _normal(z, PTX: tl.constexpr):
    """Phi(z) and phi(z) of the normal distribution, to 1e-7 (Abramowitz & Stegun 1964, 7.1.26)."""
    a = tl.abs(z) * 0.7071067811865476
    if PTX:
        t, density = tl.inline_asm_elementwise(
            """{
            .reg .f32 u;
            fma.rn.f32 u, $2, 0f3EA7BA05, 0f3F800000;
            rcp.approx.ftz.f32 $0, u;
            mul.f32 u, $2, $2;
            mul.f32 u, u, 0fBFB8AA3B;
            ex2.approx.ftz.f32 $1, u;
            }""",
            "=f,=f,f",
            [a],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        t = 1.0 / (1.0 + 0.3275911 * a)
        density = tl.exp2(-1.4426950408889634 * a * a)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * density
    return tl.where(z > 0, 1.0 - tail, tail), density * 0.3989422804014327


@triton.jit
def _channels(CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, channel < CHANNELS


@triton.jit(do_not_specialize=["rows"])
def batch_norm_sums_kernel(
    x, shift, sums, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A program's part of the sums of x - shift and of its square; the shift is written by the first program."""
    channel, within = _channels(CHANNELS, BLOCK_C)
    row = tl.arange(0, ROWS)
    begin = tl.load(
        x + row[:, None] * CHANNELS + channel[None, :],
        mask=(row < rows)[:, None] & within[None, :],
        other=0.0,
    )
    centre = tl.sum(begin.to(tl.float32), 0) / tl.minimum(rows, ROWS)
    if tl.program_id(0) == 0:
        tl.store(shift + channel, centre, mask=within)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        present = (first + row < rows)[:, None] & within[None, :]
        place = (first + row).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        value = tl.load(x + place, mask=present, other=0.0).to(tl.float32)
        value = tl.where(present, value - centre[None, :], 0.0)
        total += value
        squares += value * value
    out = sums + tl.program_id(0) * (2 * CHANNELS) + channel
    tl.store(out, tl.sum(total, 0), mask=within)
    tl.store(out + CHANNELS, tl.sum(squares, 0), mask=within)


@triton.jit
def _moments(shift, sums, rows, parts, channels, channel, within, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean and variance of channels from the programs' sums."""
    difference = added_up(sums, parts, 2 * channels, channel, within, PARTS, COLUMNS) / rows
    squares = added_up(sums, parts, 2 * channels, channels + channel, within, PARTS, COLUMNS) / rows
    centre = tl.load(shift + channel, mask=within, other=0.0) + difference
    return centre, tl.maximum(squares - difference * difference, 0.0)


@triton.jit(do_not_specialize=["rows", "parts"])
def batch_norm_statistics_kernel(
    shift, sums, mean, variance, rows, parts, channels,
    PAIRED: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean and variance from the programs' sums, or those of a channel and its mirror image together."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = channel < channels
    centre, spread = _moments(shift, sums, rows, parts, channels, channel, within, PARTS, COLUMNS)
    if PAIRED:
        mirrored = channels - 1 - channel
        other, its_spread = _moments(shift, sums, rows, parts, channels, mirrored, within, PARTS, COLUMNS)
        apart = 0.5 * (centre - other)
        centre, spread = 0.5 * (centre + other), 0.5 * (spread + its_spread) + apart * apart
    tl.store(mean + channel, centre, mask=within)
    tl.store(variance + channel, spread, mask=within)


@triton.jit
def _scale(weight, variance, eps, channel, within):
    """1 / the standard deviation, and that times the weight."""
    inverse = 1.0 / tl.sqrt(tl.load(variance + channel, mask=within, other=1.0).to(tl.float32) + eps)
    return inverse, inverse * tl.load(weight + channel, mask=within, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def batch_norm_gelu_forward_kernel(
    x, weight, bias, mean, variance, y, rows, eps,
    CHANNELS: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of ROWS positions."""
    channel, within = _channels(CHANNELS, BLOCK_C)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = (row < rows)[:, None] & within[None, :]
    place = row[:, None] * CHANNELS + channel[None, :]
    centre = tl.load(mean + channel, mask=within, other=0.0).to(tl.float32)
    _, scale = _scale(weight, variance, eps, channel, within)
    added = tl.load(bias + channel, mask=within, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=present, other=0.0).to(tl.float32)
    z = (value - centre[None, :]) * scale[None, :] + added[None, :]
    below, _ = _normal(z, PTX)
    tl.store(y + place, (z * below).to(y.dtype.element_ty), mask=present)


@triton.jit
def _dz(x, dy, place, present, centre, inverse, factor, added, PTX: tl.constexpr):
    """The normalised x, and the gradient of what goes into the GELU."""
    value = tl.load(x + place, mask=present, other=0.0).to(tl.float32)
    normalised = (value - centre[None, :]) * inverse[None, :]
    z = normalised * factor[None, :] + added[None, :]
    below, density = _normal(z, PTX)
    gradient = tl.load(dy + place, mask=present, other=0.0).to(tl.float32)
    return normalised, gradient * (below + z * density)


@triton.jit(do_not_specialize=["rows"])
def batch_norm_gelu_sums_kernel(
    x, dy, weight, bias, mean, variance, sums, rows, eps,
    CHANNELS: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's part of the sums of dz and of dz times the normalised x."""
    channel, within = _channels(CHANNELS, BLOCK_C)
    centre = tl.load(mean + channel, mask=within, other=0.0).to(tl.float32)
    inverse, _ = _scale(weight, variance, eps, channel, within)
    factor = tl.load(weight + channel, mask=within, other=0.0).to(tl.float32)
    added = tl.load(bias + channel, mask=within, other=0.0).to(tl.float32)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    products = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        present = (first + row < rows)[:, None] & within[None, :]
        place = (first + row).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        normalised, dz = _dz(x, dy, place, present, centre, inverse, factor, added, PTX)
        total += dz
        products += dz * normalised
    out = sums + tl.program_id(0) * (2 * CHANNELS) + channel
    tl.store(out, tl.sum(total, 0), mask=within)
    tl.store(out + CHANNELS, tl.sum(products, 0), mask=within)


@triton.jit(do_not_specialize=["rows"])
def batch_norm_gelu_backward_kernel(
    x, dy, weight, bias, mean, variance, gradients, dx, rows, eps,
    CHANNELS: tl.constexpr, OF_BATCH: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of ROWS positions; with statistics of the batch, also through these."""
    channel, within = _channels(CHANNELS, BLOCK_C)
    centre = tl.load(mean + channel, mask=within, other=0.0).to(tl.float32)
    inverse, _ = _scale(weight, variance, eps, channel, within)
    factor = tl.load(weight + channel, mask=within, other=0.0).to(tl.float32)
    added = tl.load(bias + channel, mask=within, other=0.0).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = (row < rows)[:, None] & within[None, :]
    place = row[:, None] * CHANNELS + channel[None, :]
    normalised, dz = _dz(x, dy, place, present, centre, inverse, factor, added, PTX)
    gradient = dz * factor[None, :]
    if OF_BATCH:
        average, slope = _averages(gradients, factor, rows, channel, within, CHANNELS)
        if PAIRED:
            mirrored = CHANNELS - 1 - channel
            its_factor = tl.load(weight + mirrored, mask=within, other=0.0).to(tl.float32)
            its_average, its_slope = _averages(gradients, its_factor, rows, mirrored, within, CHANNELS)
            average, slope = 0.5 * (average + its_average), 0.5 * (slope + its_slope)
        gradient -= average[None, :] + normalised * slope[None, :]
    tl.store(dx + place, (gradient * inverse[None, :]).to(dx.dtype.element_ty), mask=present)


@triton.jit
def _averages(gradients, factor, rows, channel, within, CHANNELS: tl.constexpr):
    """The averages of the normalised x's gradient, and of that times the normalised x."""
    average = tl.load(gradients + channel, mask=within, other=0.0) * factor / rows
    slope = tl.load(gradients + CHANNELS + channel, mask=within, other=0.0) * factor / rows
    return average, slope


def batch_norm_gelu_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm_gelu` of arguments that the caller has checked."""
    y, of_batch, its_variance = _batch_norm_gelu(x, weight, bias, mean, variance, eps, paired)
    if mean is None or variance is None:
        return y, of_batch, its_variance
    return y, mean.float(), variance.float()


class _Launch:
    """Sizes of a call: (rows, channels), and how programs share them."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.shape[-1]
        self.rows = x.numel() // self.channels
        self.block = min(512, triton.next_power_of_2(self.channels))
        self.held = max(1, (TILE if self.block <= 256 else TILE // 2) // self.block)
        self.columns = triton.cdiv(self.channels, self.block)
        self.programs = triton.cdiv(self.rows, self.held)
        self.parts = min(self.programs, max(1, processors(x.device) * RESIDENT // self.columns))

    @property
    def tile(self) -> dict[str, int]:
        return {"CHANNELS": self.channels, "ROWS": self.held, "BLOCK_C": self.block, "num_warps": WARPS}


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, launch = x.contiguous(), _Launch(x)
    y = torch.empty_like(x)
    of_batch = mean is None or variance is None
    found = [x.new_empty(launch.channels if of_batch else 0, dtype=torch.float32) for _ in range(3)]
    with on_device(x):
        if of_batch:
            mean, variance, shift = found
            sums = x.new_empty((launch.parts, 2, launch.channels), dtype=torch.float32)
            batch_norm_sums_kernel[launch.parts, launch.columns](x, shift, sums, launch.rows, **launch.tile)
            batch_norm_statistics_kernel[(triton.cdiv(launch.channels, COLUMNS),)](
                shift,
                sums,
                mean,
                variance,
                launch.rows,
                launch.parts,
                launch.channels,
                PAIRED=paired,
                PARTS=PARTS,
                COLUMNS=COLUMNS,
            )
        batch_norm_gelu_forward_kernel[launch.programs, launch.columns](
            x,
            weight.contiguous(),
            bias.contiguous(),
            mean,
            variance,
            y,
            launch.rows,
            eps,
            PTX=PTX,
            **launch.tile,
        )
    return y, found[0], found[1]


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    of_batch: bool,
    eps: float,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and those of bias and weight (2, channels)."""
    x, dy, launch = x.contiguous(), dy.contiguous(), _Launch(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    dx = torch.empty_like(x)
    sums = x.new_empty((launch.parts, 2, launch.channels), dtype=torch.float32)
    with on_device(x):
        batch_norm_gelu_sums_kernel[launch.parts, launch.columns](
            x, dy, weight, bias, mean, variance, sums, launch.rows, eps, PTX=PTX, **launch.tile
        )
        gradients = add_parts(sums)
        batch_norm_gelu_backward_kernel[launch.programs, launch.columns](
            x, dy, weight, bias, mean, variance, gradients, dx, launch.rows, eps,
            OF_BATCH=of_batch, PAIRED=paired, PTX=PTX, **launch.tile,
        )  # fmt: skip
    return dx, gradients


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_batch = x.new_empty(x.shape[-1] if mean is None or variance is None else 0, dtype=torch.float32)
    return x.new_empty(x.shape), of_batch, torch.empty_like(of_batch)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    of_batch: bool,
    eps: float,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, mean, variance, ctx.eps, ctx.paired = inputs
    ctx.of_batch = mean is None or variance is None
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(x, weight, bias, *(outputs[1:] if ctx.of_batch else (mean, variance)))


def _gradients(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, variance = ctx.saved_tensors
    dx, (dbias, dweight) = torch.ops.genossm.batch_norm_gelu_backward(
        dy, x, weight, bias, mean, variance, ctx.of_batch, ctx.eps, ctx.paired
    )
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None, None


define_operator(
    "batch_norm_gelu(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? variance, float eps, "
    "bool paired) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define_operator(
    "batch_norm_gelu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
    "bool of_batch, float eps, bool paired) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_batch_norm_gelu = differentiable("batch_norm_gelu", _save, _gradients)
