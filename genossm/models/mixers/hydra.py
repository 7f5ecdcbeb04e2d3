"""Hydra mixer: a quasiseparable matrix, bidirectional by construction, from two shifted scans and a diagonal.

Letters: B batch, L length, D width, E inner width, H heads, P head_dim, G groups, N state, M channels of the
convolution (x, and B and C of each direction).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import accumulation
from genossm.kernels.gated_norm import gated_rms_norm
from genossm.kernels.short_conv import short_conv
from genossm.kernels.ssd import ssd
from genossm.models.mixers.mamba2 import check_sizes, conv_halo, head_count
from genossm.models.mixers.mixer import Mixer, State, core
from genossm.models.mixers.step_sizes import DT_MIN, initial_dt_bias


class Hydra(Mixer):
    """Hydra (Hwang, Lahoti, Puduppully, Dao & Gu 2024, section 3.3).

    One projection gives the gate z, the channels x, and B, C and the step sizes dt of each direction; x, B and C go
    through a centred short convolution and SiLU. Per head, with dt_t = softplus(dt_t + bias), SS is the scan of Mamba-2

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t;    SS(x)_t = h_t . C_t

    and the mixer (proposition 3.7), whose matrix has the scans' rank off the diagonal and a free diagonal (eq. 3),

        y = shift(SS(x)) + flip(shift(SS(flip(x)))) + d x,    d_t = w . x_t + D

    where shift moves a sequence on by one position and begins it with zeros, and each direction's scan takes its own
    B, C and dt; out = W (RMSNorm(y) * silu(z)).

    The directions share the projection to x, A, the dt bias and D (figures 4 and 5, and the authors' code).

    Initialisation as in the authors' code: A = -1, the dt bias such that softplus(bias) is log-uniform in
    [0.001, 0.1], D = 1; w and the projections as torch's Linear.

    The state over a chunk's edge is h, (batch, heads, head_dim, state), and the last position's SS(x), (batch, 1,
    heads, head_dim), which the shift moves over the edge.

    Args:
        width: D.
        state: N, size of the state of each channel.
        head_dim: P; must divide expand * width.
        expand: E / D.
        dt_min: the shortest of the first step sizes; a bin is remembered for about 1 / (dt A) bins.
        groups: G, heads that share B and C.
        conv_width: width of the depthwise convolution; an even one sees one position more on the right.
    """

    recurrent = True
    state_parameters: tuple[str, ...] = ("A_log", "dt_bias", "D")

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        dt_min: float = DT_MIN,
        groups: int = 1,
        conv_width: int = 7,
    ) -> None:
        super().__init__()
        check_sizes(width=width, state=state, expand=expand, conv_width=conv_width)
        self.halo = conv_halo(conv_width, tied=False)
        self.inner = inner = expand * width
        self.heads, self.head_dim = head_count(inner, head_dim, groups), head_dim
        self.groups, self.state = groups, state
        mixed = inner + 4 * groups * state
        self.scan_inputs = [mixed, 2 * self.heads]
        self.in_projection = nn.Linear(width, inner + sum(self.scan_inputs), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(mixed, conv_width))
        self.conv_bias = nn.Parameter(torch.zeros(mixed))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.diagonal = nn.Linear(inner, self.heads, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_projection = nn.Linear(inner, width, bias=False)
        self._initialise(dt_min)

    @torch.no_grad()
    def _initialise(self, dt_min: float) -> None:
        bound = 1 / math.sqrt(self.conv_weight.shape[1])
        self.conv_weight.uniform_(-bound, bound)
        self.dt_bias.copy_(initial_dt_bias(self.dt_bias, dt_min))

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        gate_BLE, mixed_BLM, dt_BLT = torch.split(
            self.in_projection(x_BLD), [self.inner, *self.scan_inputs], dim=-1
        )
        mixed_BLM, dt_BLT = core(self._convolved(mixed_BLM), left, right), core(dt_BLT, left, right)
        forward_BLHP, leaving = self._scan(mixed_BLM, dt_BLT, "forward", from_left)
        reverse_BLHP, _ = self._scan(mixed_BLM, dt_BLT, "reverse", from_right)
        edge = torch.zeros_like(forward_BLHP[:, :1])
        before = edge if from_left is None else from_left[1]
        after = edge if from_right is None else from_right[1]
        x_BLE = mixed_BLM[..., : self.inner]
        d_BLH = self.diagonal(x_BLE) + self.D
        y_BLHP = (
            torch.cat([before, forward_BLHP[:, :-1]], 1)
            + torch.cat([reverse_BLHP[:, 1:], after], 1)
            + torch.unflatten(x_BLE, -1, (self.heads, self.head_dim)) * d_BLH[..., None]
        )
        y_BLE = y_BLHP.flatten(2).to(x_BLE.dtype)
        gate_BLE = core(gate_BLE, left, right)
        y_BLD: Tensor = self.out_projection(
            gated_rms_norm(y_BLE, self.norm_weight, gate_BLE, norm_before_gate=True)
        )
        return y_BLD, leaving

    def leftward(
        self, x_BLD: Tensor, left: int = 0, right: int = 0, from_right: State | None = None
    ) -> State | None:
        without_gate = F.linear(x_BLD, self.in_projection.weight[self.inner :])
        mixed_BLM, dt_BLT = torch.split(without_gate, self.scan_inputs, dim=-1)
        mixed_BLM, dt_BLT = core(self._convolved(mixed_BLM), left, right), core(dt_BLT, left, right)
        return self._scan(mixed_BLM, dt_BLT, "reverse", from_right)[1]

    def _convolved(self, mixed_BLM: Tensor) -> Tensor:
        return short_conv(mixed_BLM, self.conv_weight, self.conv_bias, activation="silu", padding="centered")

    def _scan(
        self,
        mixed_BLM: Tensor,
        dt_BLT: Tensor,
        direction: Literal["forward", "reverse"],
        entering: State | None,
    ) -> tuple[Tensor, State]:
        """SS(x) in one direction (batch, length, heads, head_dim), and the state that leaves with its last position."""
        own = int(direction == "reverse")
        group_states = self.groups * self.state
        x, *B_and_C = torch.split(mixed_BLM, [self.inner, *[group_states] * 4], dim=-1)
        B, C = (
            torch.unflatten(tensor, -1, (self.groups, self.state))
            for tensor in B_and_C[2 * own : 2 * own + 2]
        )
        result = ssd(
            torch.unflatten(x, -1, (self.heads, self.head_dim)),
            torch.unflatten(dt_BLT, -1, (self.heads, 2))[..., own],
            -torch.exp(self.A_log.to(accumulation(self.A_log.dtype))),
            B,
            C,
            direction=direction,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_state=None if entering is None else entering[0],
            return_final_state=True,
        )
        assert isinstance(result, tuple)
        y_BLHP, final = result
        assert isinstance(final, Tensor)
        return y_BLHP, (final, y_BLHP[:, :1] if own else y_BLHP[:, -1:])
