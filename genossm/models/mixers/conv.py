"""Convolutional mixer: gated dilated convolutions, the CNN that state-space models are to be compared with.

Letters: B batch, L length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from genossm.models.mixers.mixer import Mixer, State, core
from genossm.models.norm import RMSNorm


class DilatedConv(Mixer):
    """Gated dilated convolutions in the form of ConvNova (Bo et al. 2025, its gated convolution block).

    For the dilations d_1, d_2, ... one after another, with y_0 = 0,

        u = x (the first) or RMSNorm(x + y) (those after it),
        y <- y + W (gelu(conv_value(u)) * sigmoid(conv_gate(u))),   conv(u)_t = b + sum_k w_k u_{t + (k - (kernel-1)/2) d},

    and the mixer gives y: the x within belongs to the layer around it. Convolutions are centred, u is zero beyond the
    sequence, and value and gate are separate filters. Unlike ConvNova, whose gates form a second residual stream of
    their own, both branches read the same stream; W is the pointwise projection of WaveNet (van den Oord et al. 2016,
    section 2.4). A position reaches (kernel - 1) / 2 * sum(dilations) positions on either side.

    One mixer may hold a whole cycle of dilations, or, with a single one, be a layer of a stack whose dilations grow.
    Weights start as torch's convolution and linear layers do.

    Args:
        width: D.
        kernel: width of each filter; odd.
        dilations: one gated convolution for each.
        depthwise: each channel has its own filter, after a pointwise projection to value and gate (about
            3 D^2 parameters for each dilation), instead of full convolutions ((2 kernel + 1) D^2).
    """

    def __init__(
        self,
        width: int,
        *,
        kernel: int = 5,
        dilations: Sequence[int] = (1, 4, 16),
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel of conv is {kernel}; it must be odd and at least 1")
        if not dilations or min(dilations) < 1:
            raise ValueError(
                f"dilations of conv are {list(dilations)}; at least one is needed, each at least 1"
            )
        reach = (kernel - 1) // 2 * sum(dilations)
        self.halo = (reach, reach)
        self.convolutions = nn.ModuleList(
            GatedConv(width, kernel, dilation, depthwise) for dilation in dilations
        )
        self.norms = nn.ModuleList(RMSNorm(width) for _ in dilations[1:])

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        y_BLD: Tensor = self.convolutions[0](x_BLD)
        for norm, convolution in zip(self.norms, self.convolutions[1:], strict=True):
            y_BLD = y_BLD + convolution(norm(x_BLD + y_BLD))
        return core(y_BLD, left, right), None


class GatedConv(nn.Module):
    """W (gelu(value) * sigmoid(gate)) of one dilation."""

    def __init__(self, width: int, kernel: int, dilation: int, depthwise: bool) -> None:
        super().__init__()
        self.in_projection = nn.Linear(width, 2 * width, bias=False) if depthwise else nn.Identity()
        self.conv = nn.Conv1d(
            2 * width if depthwise else width,
            2 * width,
            kernel,
            padding=(kernel - 1) // 2 * dilation,
            dilation=dilation,
            groups=2 * width if depthwise else 1,
        )
        self.out_projection = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        branches: Tensor = self.conv(self.in_projection(x_BLD).transpose(1, 2)).transpose(1, 2)
        value, gate = branches.chunk(2, dim=-1)
        y_BLD: Tensor = self.out_projection(F.gelu(value) * gate.sigmoid())
        return y_BLD
