"""Root-mean-square normalisation, plain and gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.gated_norm import gated_rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last axis; on CUDA as one kernel each way, whatever the weight's dtype.

    Args:
        width: size of the last axis.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.eps is not None
        if x.is_cuda:
            return gated_rms_norm(x, self.weight, eps=self.eps)
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
