"""Convolutional stem: tokens at one base pair to features at one bin."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.models.norm import ChannelNorm


@dataclass(frozen=True)
class StemConfig:
    """Convolutions and pooling from base pairs to bins.

    Attributes:
        channels: channels after the first convolution and after each pooling but the last, which gives the width.
        pool: pooling factors; their product is the bin in base pairs.
        first_kernel: width of the first convolution in base pairs (a transcription factor's motif).
        kernel: width of the others.
        norm: `batch` (BatchNorm) or `rms` (each position on its own).
    """

    channels: tuple[int, ...] = (96, 128, 160, 192)
    pool: tuple[int, ...] = (4, 2, 2, 2)
    first_kernel: int = 17
    kernel: int = 5
    norm: Literal["batch", "rms"] = "batch"

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.pool) or not self.pool:
            raise ValueError(
                f"channels {self.channels} and pool {self.pool} differ in length; give one of each per stage"
            )
        if min(self.channels) < 1 or min(self.pool) < 1:
            raise ValueError(f"channels {self.channels} and pool {self.pool} must all be at least 1")
        if self.first_kernel % 2 == 0 or self.kernel % 2 == 0:
            raise ValueError(
                f"kernels {self.first_kernel} and {self.kernel} must be odd, to stay centred on a position"
            )

    @property
    def bin_bp(self) -> int:
        """Base pairs of one output position."""
        return prod(self.pool)


class ConvStem(nn.Module):
    """Tokens (batch, length) to features (batch, length / bin, width).

    A motif-wide convolution at one base pair, then per stage: max-pooling, a convolution and a residual pointwise
    layer. "No base" (code 4) is the zero vector.
    """

    bases: Tensor

    def __init__(self, config: StemConfig, width: int) -> None:
        super().__init__()
        self.bin_bp = config.bin_bp
        self.register_buffer("bases", torch.eye(5)[:, :4].clone(), persistent=False)
        self.first = nn.Conv1d(4, config.channels[0], config.first_kernel, padding=config.first_kernel // 2)
        outputs = (*config.channels[1:], width)
        self.stages = nn.ModuleList(
            _Stage(inputs, output, pool, config)
            for inputs, output, pool in zip(config.channels, outputs, config.pool, strict=True)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] % self.bin_bp:
            raise ValueError(
                f"the length {tokens.shape[1]} is no multiple of the bin of {self.bin_bp} bp; pad with code 4"
            )
        x: Tensor = self.first(F.embedding(tokens.int(), self.bases).transpose(1, 2))
        for stage in self.stages:
            x = stage(x)
        return x.transpose(1, 2)


class _Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, pool: int, config: StemConfig) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm1d(channels) if config.norm == "batch" else ChannelNorm(channels)

        self.pool = nn.MaxPool1d(pool) if pool > 1 else nn.Identity()
        self.conv = nn.Sequential(
            norm(inputs), nn.GELU(), nn.Conv1d(inputs, outputs, config.kernel, padding=config.kernel // 2)
        )
        self.pointwise = nn.Sequential(norm(outputs), nn.GELU(), nn.Conv1d(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.conv(self.pool(x))
        refined: Tensor = self.pointwise(convolved)
        return convolved + refined
