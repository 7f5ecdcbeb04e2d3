"""Stems: tokens at one base pair to features at one bin, and at the resolutions on the way there.

Letters: B batch, L length, C channels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.batch_norm_gelu import batch_norm_gelu
from genossm.kernels.motif_conv import motif_conv
from genossm.kernels.sum_pool import sum_pool
from genossm.models.norm import RMSNorm

NO_BASE = 4
"""The code of a position without a base."""


@dataclass(frozen=True)
class StemConfig:
    """From base pairs to bins.

    Attributes:
        kind: `conv` (convolutions and pooling) or `base` (a learned vector per base, one position per base pair; it
            uses none of the other fields).
        channels: channels after the first convolution and after each pooling but the last, which gives the width.
        pool: pooling factors; their product is the bin in base pairs. A stage of factor 1 does not pool.
        first_kernel: width of the first convolution in base pairs (a transcription factor's motif).
        kernel: width of the others.
        norm: `batch` (BatchNorm) or `rms` (each position on its own).
    """

    channels: tuple[int, ...] = (96, 128, 160, 192)
    pool: tuple[int, ...] = (4, 2, 2, 2)
    first_kernel: int = 17
    kernel: int = 5
    norm: Literal["batch", "rms"] = "batch"
    kind: Literal["conv", "base"] = "conv"

    def __post_init__(self) -> None:
        if self.kind not in ("conv", "base"):
            raise ValueError(f"kind of the stem is {self.kind!r}; allowed are 'conv' and 'base'")
        if len(self.channels) != len(self.pool) or not self.pool:
            raise ValueError(
                f"channels {self.channels} and pool {self.pool} differ in length; give one of each per stage"
            )
        if min(self.channels) < 1 or min(self.pool) < 1:
            raise ValueError(f"channels {self.channels} and pool {self.pool} must all be at least 1")
        for name, kernel in (("first_kernel", self.first_kernel), ("kernel", self.kernel)):
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(
                    f"{name} of the stem is {kernel}; it must be odd, to stay centred on a position, and at least 1"
                )

    @property
    def bin_bp(self) -> int:
        """Base pairs of one output position."""
        return 1 if self.kind == "base" else prod(self.pool)

    @property
    def finer(self) -> dict[int, int]:
        """The resolutions on the way to a bin, which a decoder can return to: channels by base pairs, finest first."""
        if self.kind == "base":
            return {}
        found = {}
        for stage, channels in enumerate(self.channels):
            found[prod(self.pool[:stage])] = channels  # stages that do not pool leave the last one's channels
        return {bin_bp: channels for bin_bp, channels in found.items() if bin_bp < self.bin_bp}


class ConvStem(nn.Module):
    """Tokens (batch, length) to features (batch, length / bin, width).

    A motif-wide convolution at one base pair, then per stage: max-pooling, a convolution and a residual pointwise
    layer. "No base" (code 4) is the zero vector.

    Attributes:
        bin_bp: base pairs of an output position.
        reach_bp: base pairs that an output position sees on each side of its own.
        halo_bp: the same in whole bins: what a part of a sequence needs on each side to have its features.
    """

    def __init__(self, config: StemConfig, width: int) -> None:
        super().__init__()
        self.bin_bp = config.bin_bp
        reach = 0
        for pool in reversed(config.pool):
            reach = (reach + config.kernel // 2) * pool
        self.reach_bp = reach + config.first_kernel // 2
        self.halo_bp = -(-self.reach_bp // self.bin_bp) * self.bin_bp
        self.first = nn.Conv1d(NO_BASE, config.channels[0], config.first_kernel, bias=config.norm != "batch")
        outputs = (*config.channels[1:], width)
        self.stages = nn.ModuleList(
            _Stage(inputs, output, config) for inputs, output in zip(config.channels, outputs, strict=True)
        )
        self.pool = config.pool
        self.stage_bp = tuple(prod(config.pool[: stage + 1]) for stage in range(len(config.pool)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.with_finer(tokens, ())[0]

    def with_finer(self, tokens: Tensor, finer: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The features, and those at finer bins: (batch, length / bin, channels) by base pairs of the bin."""
        if tokens.shape[1] % self.bin_bp:
            raise ValueError(
                f"the length {tokens.shape[1]} is no multiple of the bin of {self.bin_bp} bp; pad with code 4"
            )
        found: dict[int, Tensor] = {}
        x_BLC, pools = self._first(tokens, 1 if 1 in finer else self.pool[0]), list(self.pool)
        if 1 in finer:
            found[1] = x_BLC
        else:
            pools[0] = 1
        more_BLC: Tensor | None = None
        for bin_bp, pool, stage in zip(self.stage_bp, pools, self.stages, strict=True):
            x_BLC, more_BLC = stage(sum_pool(x_BLC, more_BLC, pool))
            if bin_bp in finer:
                found[bin_bp] = x_BLC = sum_pool(x_BLC, more_BLC, 1)
                more_BLC = None
        return sum_pool(x_BLC, more_BLC, 1), found

    def _first(self, tokens: Tensor, pool: int) -> Tensor:
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.first.weight.dtype
        return motif_conv(tokens, self.first.weight, self.first.bias, pool=pool, dtype=dtype)


class BaseStem(nn.Embedding):
    """Tokens (batch, length) to a learned vector for each base, and one for "no base": (batch, length, width).

    A zero vector would stay zero in every layer, where norms multiply gradients by thousands. Attributes as of `ConvStem`;
    it sees nothing but the position itself.
    """

    bin_bp = 1
    reach_bp = 0
    halo_bp = 0

    def __init__(self, width: int) -> None:
        super().__init__(NO_BASE + 1, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.int())

    def with_finer(self, tokens: Tensor, finer: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The features; there are no finer ones."""
        return self(tokens), {}


Stem = ConvStem | BaseStem


def build_stem(config: StemConfig, width: int) -> Stem:
    """The stem of the configured kind."""
    return BaseStem(width) if config.kind == "base" else ConvStem(config, width)


class _Stage(nn.Module):
    """Pooled features to the two summands of the stage's: a convolution's, and what a pointwise layer makes of them."""

    def __init__(self, inputs: int, outputs: int, config: StemConfig) -> None:
        super().__init__()
        self.conv = NormGeluConv(inputs, outputs, config.kernel, config.norm)
        self.pointwise = NormGeluConv(outputs, outputs, 1, config.norm)

    def forward(self, x_BLC: Tensor) -> tuple[Tensor, Tensor]:
        convolved_BLC: Tensor = self.conv(x_BLC)
        return convolved_BLC, self.pointwise(convolved_BLC)


class NormGeluConv(nn.Module):
    """(batch, length, inputs) to (batch, length, outputs): norm, GELU and a centred convolution.

    With BatchNorm the convolution has no bias: another norm, or a linear layer, takes what it gives.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: Literal["batch", "rms"]) -> None:
        super().__init__()
        self.norm = BatchNormGelu(inputs) if norm == "batch" else RMSNormGelu(inputs)
        self.conv = nn.Conv1d(inputs, outputs, kernel, bias=norm != "batch")

    def forward(self, x_BLC: Tensor) -> Tensor:
        y_BLC, weight, bias = self.norm(x_BLC), self.conv.weight, self.conv.bias
        kernel = weight.shape[2]
        if kernel == 1:
            return F.linear(y_BLC, weight[:, :, 0], bias)
        # an image of height 1, for which libraries have channels last
        y_BCHL = y_BLC.transpose(1, 2).unsqueeze(2)
        y_BCHL = F.conv2d(y_BCHL, weight.unsqueeze(2), bias, padding=(0, kernel // 2))
        return y_BCHL.squeeze(2).transpose(1, 2)


class BatchNormGelu(nn.BatchNorm1d):
    """BatchNorm and GELU of (batch, length, channels), with torch's parameters and running statistics."""

    def forward(self, x_BLC: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        if not self.training:
            known = self.running_mean, self.running_var
            return batch_norm_gelu(x_BLC, self.weight, self.bias, known, eps=self.eps)[0]
        y_BLC, mean, variance = batch_norm_gelu(x_BLC, self.weight, self.bias, eps=self.eps)
        self._track(mean, variance, x_BLC.numel() // x_BLC.shape[-1])
        return y_BLC

    def _track(self, mean: Tensor, variance: Tensor, positions: int) -> None:
        """Take a batch's statistics into the running ones."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (positions / max(1, positions - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class RMSNormGelu(RMSNorm):
    """RMSNorm of each position's channels, and GELU."""

    def forward(self, x_BLC: Tensor) -> Tensor:
        return F.gelu(super().forward(x_BLC))
