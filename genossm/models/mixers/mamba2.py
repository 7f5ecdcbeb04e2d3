"""Mamba-2 mixer, bidirectional: one scan over x, B and C that runs both ways.

Letters: B batch, L length, D width, E inner width, H heads, P head_dim, G groups, N state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genossm.kernels.short_conv import short_conv
from genossm.kernels.ssd import ssd
from genossm.models.norm import GatedRMSNorm

DT_MIN, DT_MAX = 1e-3, 1e-1
A_MIN, A_MAX = 1.0, 16.0


class Mamba2(nn.Module):
    """Mamba-2 (Dao & Gu 2024, section 7) whose scan runs in both directions at once.

    x, B, C and the gate come from one projection and are shared by the directions; each direction has its own
    step size dt, decay A and dt bias. The short convolution is centred.

    Initialisation as in Mamba-2: A = -a with a uniform in [1, 16] (real S4D, a HiPPO-LegS diagonal), the dt bias such
    that softplus(bias) is log-uniform in [0.001, 0.1], D = 1.

    Args:
        width: D.
        state: N, size of the state of each channel.
        head_dim: P; must divide expand * width.
        expand: E / D.
        groups: G, heads that share B and C.
        conv_width: width of the depthwise convolution.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        groups: int = 1,
        conv_width: int = 5,
    ) -> None:
        super().__init__()
        inner = expand * width
        if inner % head_dim or (inner // head_dim) % groups:
            raise ValueError(
                f"head_dim {head_dim} and groups {groups} do not divide the inner width {inner}; "
                "choose a head_dim that divides expand * width, and groups that divide the heads"
            )
        self.inner, self.heads, self.head_dim = inner, inner // head_dim, head_dim
        self.groups, self.state = groups, state
        mixed = inner + 2 * groups * state
        self.in_projection = nn.Linear(width, inner + mixed + 2 * self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(mixed, conv_width))
        self.conv_bias = nn.Parameter(torch.zeros(mixed))
        self.A_log = nn.Parameter(torch.empty(self.heads, 2))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, 2))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(inner)
        self.out_projection = nn.Linear(inner, width, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        bound = 1 / math.sqrt(self.conv_weight.shape[1])
        self.conv_weight.uniform_(-bound, bound)
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(A_MIN, A_MAX).log())
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, _ = x_BLD.shape
        gate, mixed, dt = torch.split(
            self.in_projection(x_BLD),
            [self.inner, self.inner + 2 * self.groups * self.state, 2 * self.heads],
            dim=-1,
        )
        mixed = short_conv(mixed, self.conv_weight, self.conv_bias, activation="silu", padding="centered")
        x, B, C = torch.split(mixed, [self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        y = ssd(
            x.view(batch, length, self.heads, self.head_dim),
            dt.view(batch, length, self.heads, 2),
            -torch.exp(self.A_log.float()),
            B.view(batch, length, self.groups, self.state),
            C.view(batch, length, self.groups, self.state),
            self.D,
            direction="both",
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        assert isinstance(y, Tensor)
        mixed_BLD: Tensor = self.out_projection(self.norm(y.reshape(batch, length, self.inner), gate))
        return mixed_BLD
