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

from genossm.models.norm import ChannelNorm

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

    bases: Tensor

    def __init__(self, config: StemConfig, width: int) -> None:
        super().__init__()
        self.bin_bp = config.bin_bp
        reach = 0
        for pool in reversed(config.pool):
            reach = (reach + config.kernel // 2) * pool
        self.reach_bp = reach + config.first_kernel // 2
        self.halo_bp = -(-self.reach_bp // self.bin_bp) * self.bin_bp
        self.register_buffer("bases", torch.eye(5)[:, :NO_BASE].clone(), persistent=False)
        self.first = nn.Conv1d(
            NO_BASE, config.channels[0], config.first_kernel, padding=config.first_kernel // 2
        )
        outputs = (*config.channels[1:], width)
        self.stages = nn.ModuleList(
            _Stage(inputs, output, pool, config)
            for inputs, output, pool in zip(config.channels, outputs, config.pool, strict=True)
        )
        self.stage_bp = tuple(prod(config.pool[: stage + 1]) for stage in range(len(config.pool)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.with_finer(tokens, ())[0]

    def with_finer(self, tokens: Tensor, finer: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The features, and those at finer bins: (batch, channels, length / bin) by base pairs of the bin."""
        if tokens.shape[1] % self.bin_bp:
            raise ValueError(
                f"the length {tokens.shape[1]} is no multiple of the bin of {self.bin_bp} bp; pad with code 4"
            )
        x_BCL: Tensor = self.first(F.embedding(tokens.int(), self.bases).transpose(1, 2))
        found = {1: x_BCL} if 1 in finer else {}
        for bin_bp, stage in zip(self.stage_bp, self.stages, strict=True):
            x_BCL = stage(x_BCL)
            if bin_bp in finer:
                found[bin_bp] = x_BCL
        return x_BCL.transpose(1, 2), found


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
    def __init__(self, inputs: int, outputs: int, pool: int, config: StemConfig) -> None:
        super().__init__()
        self.pool = nn.MaxPool1d(pool) if pool > 1 else nn.Identity()
        self.conv = norm_gelu_conv(inputs, outputs, config.kernel, config.norm)
        self.pointwise = norm_gelu_conv(outputs, outputs, 1, config.norm)

    def forward(self, x_BCL: Tensor) -> Tensor:
        convolved: Tensor = self.conv(self.pool(x_BCL))
        refined: Tensor = self.pointwise(convolved)
        return convolved + refined


def norm_gelu_conv(inputs: int, outputs: int, kernel: int, norm: Literal["batch", "rms"]) -> nn.Sequential:
    """(batch, inputs, length) to (batch, outputs, length): norm, GELU and a centred convolution."""
    return nn.Sequential(
        nn.BatchNorm1d(inputs) if norm == "batch" else ChannelNorm(inputs),
        nn.GELU(),
        nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2),
    )
