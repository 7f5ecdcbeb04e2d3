"""Root-mean-square normalisation, plain and gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import accumulation
from genossm.kernels.gated_norm import gated_rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last axis, with the weight in x's dtype: autocast else leaves the fused kernel out.

    Args:
        width: size of the last axis.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedRMSNorm(nn.Module):
    """y = RMSNorm(x * silu(gate)) * weight, as at the end of a Mamba-2 mixer (Dao & Gu 2024, section 7).

    Args:
        width: size of the last axis.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, self.weight, gate)


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of a (batch, channels, length) tensor, each position on its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x_BDL: Tensor) -> Tensor:
        scale = x_BDL.to(accumulation(x_BDL.dtype)).square().mean(1, keepdim=True).add(1e-5).rsqrt()
        return x_BDL * scale.to(x_BDL.dtype) * self.weight.to(x_BDL.dtype)[:, None]
