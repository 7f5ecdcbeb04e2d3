"""The decoder: from the trunk's bins back to finer ones, with the stem's features of each resolution.

Letters: B batch, L length, C channels, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genossm.models.norm import RMSNorm
from genossm.models.stem import NormGeluConv, StemConfig


@dataclass(frozen=True)
class DecoderConfig:
    """From the trunk's bins to finer ones.

    Attributes:
        bin_bp: base pairs of an output bin: one of the resolutions that the stem passes through.
        kernel: width of the convolutions, in bins of each resolution.
    """

    bin_bp: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.bin_bp < 1:
            raise ValueError(f"bin_bp of the decoder is {self.bin_bp}; it must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"kernel of the decoder is {self.kernel}; it must be odd, to stay centred, and at least 1"
            )

    def check(self, stem: StemConfig) -> None:
        """A ValueError where the stem does not pass through the resolution."""
        if self.bin_bp not in stem.finer:
            passed = ", ".join(map(str, stem.finer)) or "no other"
            raise ValueError(
                f"bin_bp of the decoder is {self.bin_bp}; the stem, which ends at {stem.bin_bp} bp, passes through "
                f"{passed}: choose one of these, or leave the decoder out"
            )


class Decoder(nn.Module):
    """Features (batch, bins, width) of the trunk to those of finer bins (batch, more bins, width).

    As in U-Net (Ronneberger et al. 2015) and, for DNA, Borzoi (Linder et al. 2025): from resolution to resolution,
    as the stem pooled, each position is repeated, the stem's features of the finer resolution are added after a
    linear map, and residual convolutions follow. The output is RMS-normed.

    Attributes:
        finer: the stem's resolutions that it needs, in base pairs, coarsest first.
        halo: trunk bins that a part of a sequence needs on each side, of trunk and stem features alike.

    Raises:
        ValueError: the stem does not pass through the configured resolution.
    """

    def __init__(self, config: DecoderConfig, stem: StemConfig, width: int) -> None:
        super().__init__()
        config.check(stem)
        self.finer = tuple(sorted((bp for bp in stem.finer if bp >= config.bin_bp), reverse=True))
        factors = [
            coarse // fine for coarse, fine in zip((stem.bin_bp, *self.finer), self.finer, strict=False)
        ]
        self.halo = 0
        for factor in reversed(factors):
            self.halo = -(-(self.halo + config.kernel // 2) // factor)
        self.levels = nn.ModuleList(
            _Level(width, stem.finer[bin_bp], factor, config.kernel, stem)
            for bin_bp, factor in zip(self.finer, factors, strict=True)
        )
        self.norm = RMSNorm(width)

    def forward(self, x_BLD: Tensor, finer: Mapping[int, Tensor]) -> Tensor:
        """Features of the trunk, and the stem's (batch, length / bin, channels) by base pairs of the bin."""
        for bin_bp, level in zip(self.finer, self.levels, strict=True):
            x_BLD = level(x_BLD, finer[bin_bp])
        y_BLD: Tensor = self.norm(x_BLD)
        return y_BLD


class _Level(nn.Module):
    def __init__(self, width: int, channels: int, factor: int, kernel: int, stem: StemConfig) -> None:
        super().__init__()
        self.factor = factor
        self.skip = nn.Linear(channels, width)
        self.conv = NormGeluConv(width, width, kernel, stem.norm)
        self.pointwise = NormGeluConv(width, width, 1, stem.norm)

    def forward(self, x_BLD: Tensor, skip_BLC: Tensor) -> Tensor:
        skip_BLD: Tensor = self.skip(skip_BLC)
        x_BLD = (x_BLD.unsqueeze(2) + torch.unflatten(skip_BLD, 1, (-1, self.factor))).flatten(1, 2)
        x_BLD = x_BLD + self.conv(x_BLD)
        x_BLD = x_BLD + self.pointwise(x_BLD)
        return x_BLD
