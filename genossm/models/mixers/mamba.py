"""Mamba mixer (S6), bidirectional: one selective scan that runs both ways, or one for each direction.

Letters: B batch, L length, D width, E inner width (channels), N state, R rank of the step sizes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import Direction, States, accumulation
from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.short_conv import short_conv
from genossm.models.mixers.mamba2 import (
    Bidirectional,
    both_states,
    check_bidirectional,
    check_sizes,
    conv_halo,
)
from genossm.models.mixers.mixer import Mixer, State, core
from genossm.models.mixers.step_sizes import DT_MIN, initial_dt_bias


class Mamba(Mixer):
    """Mamba (Gu & Dao 2023, section 3), in both directions.

    One projection gives the channels x and the gate z; x goes through a short convolution and SiLU. From it come B, C
    and, through a low rank, the step sizes (algorithm 2). Each channel has its own diagonal A and, with
    dt_t = softplus(W_dt r_t + bias), discretised by zero-order hold for A and Euler for B (eqs. 2 and 4):

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;    y_t = C_t . h_t + D x_t

    and out = W (y * silu(z)), y the sum of the scan from the left and the one from the right.

    `fused`: the directions share x, W_dt r, B, C and D, after a centred convolution; A and dt bias are each
    direction's own. `tied`, as BiMamba in Caduceus (Schiff et al. 2024, section 3): the projections to x and z and the
    one out are shared; the convolution (causal for the scan from the left, its mirror image for the other), the
    projections to B, C and dt, dt bias, A and D are each direction's own.

    Initialisation as in Mamba (section 3.6): A = -(1, 2, ..., N) for each channel (S4D-Real), the dt bias such that
    softplus(bias) is log-uniform in [0.001, 0.1], W_dt uniform in +-1 / sqrt(R), D = 1.

    The state over a chunk's edge is h, (batch, channels, state).

    Args:
        width: D.
        state: N, size of the state of each channel.
        expand: E / D.
        dt_min: the shortest of the first step sizes; a bin is remembered for about 1 / (dt A) bins.
        conv_width: width of the depthwise convolution; None takes 4 (Mamba's) for `tied`, and 5, which can be
            centred, for `fused`. An even centred one sees one position more on the right.
        dt_rank: R; None takes width / 16, rounded up.
        bidirectional: `fused` or `tied`.
    """

    recurrent = True
    state_parameters: tuple[str, ...] = ("A_log", "dt_bias", "D")

    def __init__(
        self,
        width: int,
        *,
        state: int = 16,
        expand: int = 2,
        dt_min: float = DT_MIN,
        conv_width: int | None = None,
        dt_rank: int | None = None,
        bidirectional: Bidirectional = "fused",
    ) -> None:
        super().__init__()
        check_bidirectional(bidirectional)
        self.tied = bidirectional == "tied"
        if conv_width is None:
            conv_width = 4 if self.tied else 5
        rank = -(-width // 16) if dt_rank is None else dt_rank
        check_sizes(width=width, state=state, expand=expand, conv_width=conv_width, dt_rank=rank)
        self.halo = conv_halo(conv_width, tied=self.tied)
        self.inner = inner = expand * width
        self.low_rank_B_C = [rank, state, state]
        own = (2,) if self.tied else ()
        projections = 2 if self.tied else 1
        self.in_projection = nn.Linear(width, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(*own, inner, conv_width))
        self.conv_bias = nn.Parameter(torch.zeros(*own, inner))
        self.x_projection = nn.ModuleList(
            nn.Linear(inner, sum(self.low_rank_B_C), bias=False) for _ in range(projections)
        )
        self.dt_projection = nn.ModuleList(nn.Linear(rank, inner, bias=False) for _ in range(projections))
        self.A_log = nn.Parameter(torch.empty(inner, state, 2))
        self.dt_bias = nn.Parameter(torch.empty(inner, 2))
        self.D = nn.Parameter(torch.ones(inner, *own))
        self.out_projection = nn.Linear(inner, width, bias=False)
        self._initialise(dt_min)

    @torch.no_grad()
    def _initialise(self, dt_min: float) -> None:
        bound = 1 / math.sqrt(self.conv_weight.shape[-1])
        self.conv_weight.uniform_(-bound, bound)
        self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1).log()[:, None].expand_as(self.A_log))
        self.dt_bias.copy_(initial_dt_bias(self.dt_bias, dt_min))
        for projection in self.dt_projection:
            assert isinstance(projection, nn.Linear)
            bound = 1 / math.sqrt(projection.in_features)
            projection.weight.uniform_(-bound, bound)

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        x_BLE, gate_BLE = torch.chunk(self.in_projection(x_BLD), 2, dim=-1)
        gate_BLE = core(gate_BLE, left, right)
        if self.tied:
            causal_BLE, mirrored_BLE = short_conv(
                x_BLE, self.conv_weight, self.conv_bias, activation="silu", padding="both"
            )
            y, leaving = self._one_way(core(causal_BLE, left, right), gate_BLE, "forward", from_left)
            y = y + self._one_way(core(mirrored_BLE, left, right), gate_BLE, "reverse", from_right)[0]
        else:
            x_BLE = core(self._centred(x_BLE), left, right)
            y, states = self._scan(x_BLE, gate_BLE, "both", both_states(from_left, from_right))
            leaving = states[0]
        y_BLD: Tensor = self.out_projection(y)
        return y_BLD, (leaving,)

    def leftward(
        self, x_BLD: Tensor, left: int = 0, right: int = 0, from_right: State | None = None
    ) -> State | None:
        x_BLE = F.linear(x_BLD, self.in_projection.weight[: self.inner])
        if self.tied:
            weight, bias = self.conv_weight[1], self.conv_bias[1]
            x_BLE = short_conv(x_BLE, weight, bias, activation="silu", padding="reverse")
        else:
            x_BLE = self._centred(x_BLE)
        return (self._one_way(core(x_BLE, left, right), None, "reverse", from_right)[1],)

    def _centred(self, x_BLE: Tensor) -> Tensor:
        return short_conv(x_BLE, self.conv_weight, self.conv_bias, activation="silu", padding="centered")

    def _one_way(
        self,
        x_BLE: Tensor,
        gate_BLE: Tensor | None,
        direction: Literal["forward", "reverse"],
        entering: State | None,
    ) -> tuple[Tensor, Tensor]:
        y, final = self._scan(x_BLE, gate_BLE, direction, None if entering is None else entering[0])
        assert isinstance(final, Tensor)
        return y, final

    def _scan(
        self, x_BLE: Tensor, gate_BLE: Tensor | None, direction: Direction, entering: States | None
    ) -> tuple[Tensor, States]:
        """y (batch, length, channels), gated, and the final state, from what the convolution gives."""
        own = int(direction == "reverse")
        shared_or_own = own if self.tied else 0
        low_rank_BLR, B_BLN, C_BLN = torch.split(
            self.x_projection[shared_or_own](x_BLE), self.low_rank_B_C, dim=-1
        )
        A = -torch.exp(self.A_log.to(accumulation(self.A_log.dtype)))
        bias: Tensor = self.dt_bias
        D: Tensor = self.D
        if direction != "both":
            A, bias = A[..., own], bias[:, own]
            D = D[:, own] if self.tied else D
        result = selective_scan(
            x_BLE,
            self.dt_projection[shared_or_own](low_rank_BLR),
            A,
            B_BLN,
            C_BLN,
            D,
            gate_BLE,
            dt_bias=bias,
            dt_softplus=True,
            direction=direction,
            initial_state=entering,
            return_final_state=True,
        )
        assert isinstance(result, tuple)
        return result
