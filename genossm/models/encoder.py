"""The encoder: stem, then residual layers of sequence mixers and gated MLPs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from genossm.models.mixers.mamba2 import Mamba2
from genossm.models.stem import ConvStem, StemConfig

MixerName = Literal["mamba2"]


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder.

    Attributes:
        width: features of a bin.
        pattern: the mixer of each layer, first to last.
        stem: base pairs to bins.
        state: state size of a channel (mamba2).
        head_dim: channels that share one decay (mamba2).
        expand: inner width of a mixer over `width`.
        groups: heads share B and C within a group (mamba2).
        conv_width: width of the mixers' short convolution, in bins.
        mlp_ratio: inner width of the gated MLP after each mixer over `width`; 0 leaves the MLPs out.
        dropout: on each residual branch.
    """

    width: int = 256
    pattern: tuple[MixerName, ...] = ("mamba2",) * 6
    stem: StemConfig = field(default_factory=StemConfig)
    state: int = 64
    head_dim: int = 64
    expand: int = 2
    groups: int = 1
    conv_width: int = 5
    mlp_ratio: float = 0.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ValueError("pattern is empty; name a mixer per layer, for example [mamba2, mamba2]")
        inner = self.expand * self.width
        if inner % self.head_dim or (inner // self.head_dim) % self.groups:
            raise ValueError(
                f"head_dim {self.head_dim} and groups {self.groups} do not divide expand * width = {inner}; "
                "choose a head_dim that divides it, and groups that divide the heads"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.mlp_ratio < 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; it must be at least 0")


class Encoder(nn.Module):
    """Tokens (batch, length) int8 in {0, 1, 2, 3 = ACGT, 4 = none} to features (batch, length / bin, width)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.bin_bp = config.stem.bin_bp
        self.stem = ConvStem(config.stem, config.width)
        self.layers = nn.ModuleList(_Layer(config) for _ in config.pattern)
        self.norm = nn.RMSNorm(config.width, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        x_BLD: Tensor = self.stem(tokens)
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        x_BLD = self.norm(x_BLD)
        return x_BLD


class _Layer(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.mixer = Mamba2(
            config.width,
            state=config.state,
            head_dim=config.head_dim,
            expand=config.expand,
            groups=config.groups,
            conv_width=config.conv_width,
        )
        self.mlp = _GatedMLP(config.width, config.mlp_ratio) if config.mlp_ratio else None
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-5) if config.mlp_ratio else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.mixer(self.mixer_norm(x_BLD)))
        if self.mlp is not None and self.mlp_norm is not None:
            x_BLD = x_BLD + self.dropout(self.mlp(self.mlp_norm(x_BLD)))
        return x_BLD


class _GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        inner = int(width * ratio)
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        down: Tensor = self.down(value * F.silu(gate))
        return down
