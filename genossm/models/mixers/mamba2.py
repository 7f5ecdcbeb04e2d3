"""Mamba-2 mixer, bidirectional: one scan over x, B and C that runs both ways, or one for each direction.

Letters: B batch, L length, D width, E inner width, H heads, P head_dim, G groups, N state, M channels of the
convolution (x, B and C together).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import Direction, States, accumulation
from genossm.kernels.short_conv import short_conv
from genossm.kernels.ssd import ssd
from genossm.models.mixers.mixer import Mixer, State, core
from genossm.models.mixers.step_sizes import DT_MIN, initial_dt_bias
from genossm.models.norm import GatedRMSNorm

A_MIN, A_MAX = 1.0, 16.0

Bidirectional = Literal["fused", "tied"]


class Mamba2(Mixer):
    """Mamba-2 (Dao & Gu 2024, section 7), in both directions.

    One projection gives the gate z, the channels x, B, C and the step sizes dt; x, B and C go through a short
    convolution and SiLU. Per head, with dt_t = softplus(dt_t + bias) and the scalar decay exp(dt_t A) (section 2.1):

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t;    y_t = h_t . C_t + D x_t

    and out = W (RMSNorm(y * silu(z))), y the sum of the scan from the left and the one from the right.

    `fused`: the directions share x, B, C and D, after a centred convolution; dt, its bias and A are each direction's
    own. `tied`, as BiMamba in Caduceus (Schiff et al. 2024, section 3): the projections are shared; the convolution
    (causal for the scan from the left, its mirror image for the other), dt bias, A and D are each direction's own.

    Initialisation as in Mamba-2: A = -a with a uniform in [1, 16] (the range of S4D-Real's -1 to -16, but random), the dt
    bias such that softplus(bias) is log-uniform in [0.001, 0.1], D = 1.

    The state over a chunk's edge is h, (batch, heads, head_dim, state).

    Args:
        width: D.
        state: N, size of the state of each channel.
        head_dim: P; must divide expand * width.
        expand: E / D.
        dt_min: the shortest of the first step sizes; a bin is remembered for about 1 / (dt A) bins.
        groups: G, heads that share B and C.
        conv_width: width of the depthwise convolution; an even centred one sees one position more on the right.
        bidirectional: `fused` or `tied`.
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
        conv_width: int = 5,
        bidirectional: Bidirectional = "fused",
    ) -> None:
        super().__init__()
        check_sizes(width=width, state=state, expand=expand, conv_width=conv_width)
        check_bidirectional(bidirectional)
        self.tied = bidirectional == "tied"
        self.halo = conv_halo(conv_width, tied=self.tied)
        self.inner = inner = expand * width
        self.heads, self.head_dim = head_count(inner, head_dim, groups), head_dim
        self.groups, self.state = groups, state
        mixed = inner + 2 * groups * state
        own = (2,) if self.tied else ()
        self.scan_inputs = [mixed, self.heads if self.tied else 2 * self.heads]
        self.in_projection = nn.Linear(width, inner + sum(self.scan_inputs), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(*own, mixed, conv_width))
        self.conv_bias = nn.Parameter(torch.zeros(*own, mixed))
        self.A_log = nn.Parameter(torch.empty(self.heads, 2))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, 2))
        self.D = nn.Parameter(torch.ones(self.heads, *own))
        self.norm = GatedRMSNorm(inner)
        self.out_projection = nn.Linear(inner, width, bias=False)
        self._initialise(dt_min)

    @torch.no_grad()
    def _initialise(self, dt_min: float) -> None:
        bound = 1 / math.sqrt(self.conv_weight.shape[-1])
        self.conv_weight.uniform_(-bound, bound)
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(A_MIN, A_MAX).log())
        self.dt_bias.copy_(initial_dt_bias(self.dt_bias, dt_min))

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        gate_BLE, mixed_BLM, dt = torch.split(
            self.in_projection(x_BLD), [self.inner, *self.scan_inputs], dim=-1
        )
        dt = core(dt, left, right)
        if self.tied:
            causal_BLM, mirrored_BLM = short_conv(
                mixed_BLM, self.conv_weight, self.conv_bias, activation="silu", padding="both"
            )
            y, leaving = self._one_way(core(causal_BLM, left, right), dt, "forward", from_left)
            y = y + self._one_way(core(mirrored_BLM, left, right), dt, "reverse", from_right)[0]
        else:
            mixed_BLM = core(self._centred(mixed_BLM), left, right)
            y, states = self._scan(mixed_BLM, dt, "both", both_states(from_left, from_right))
            leaving = states[0]
        y_BLD: Tensor = self.out_projection(self.norm(y.flatten(2), core(gate_BLE, left, right)))
        return y_BLD, (leaving,)

    def leftward(
        self, x_BLD: Tensor, left: int = 0, right: int = 0, from_right: State | None = None
    ) -> State | None:
        without_gate = F.linear(x_BLD, self.in_projection.weight[self.inner :])
        mixed_BLM, dt = torch.split(without_gate, self.scan_inputs, dim=-1)
        if self.tied:
            weight, bias = self.conv_weight[1], self.conv_bias[1]
            mixed_BLM = short_conv(mixed_BLM, weight, bias, activation="silu", padding="reverse")
        else:
            mixed_BLM = self._centred(mixed_BLM)
        mixed_BLM, dt = core(mixed_BLM, left, right), core(dt, left, right)
        return (self._one_way(mixed_BLM, dt, "reverse", from_right)[1],)

    def _centred(self, mixed_BLM: Tensor) -> Tensor:
        return short_conv(mixed_BLM, self.conv_weight, self.conv_bias, activation="silu", padding="centered")

    def _one_way(
        self,
        mixed_BLM: Tensor,
        dt: Tensor,
        direction: Literal["forward", "reverse"],
        entering: State | None,
    ) -> tuple[Tensor, Tensor]:
        y, final = self._scan(mixed_BLM, dt, direction, None if entering is None else entering[0])
        assert isinstance(final, Tensor)
        return y, final

    def _scan(
        self, mixed_BLM: Tensor, dt: Tensor, direction: Direction, entering: States | None
    ) -> tuple[Tensor, States]:
        """y (batch, length, heads, head_dim) and the final state, from what the convolution gives and dt."""
        group_states = self.groups * self.state
        x, B, C = torch.split(mixed_BLM, [self.inner, group_states, group_states], dim=-1)
        A = -torch.exp(self.A_log.to(accumulation(self.A_log.dtype)))
        bias: Tensor = self.dt_bias
        D: Tensor = self.D
        if not self.tied:
            dt = torch.unflatten(dt, -1, (self.heads, 2))
        if direction != "both":
            own = int(direction == "reverse")
            A, bias = A[:, own], bias[:, own]
            dt, D = (dt, D[:, own]) if self.tied else (dt[..., own], D)
        result = ssd(
            torch.unflatten(x, -1, (self.heads, self.head_dim)),
            dt,
            A,
            torch.unflatten(B, -1, (self.groups, self.state)),
            torch.unflatten(C, -1, (self.groups, self.state)),
            D,
            direction=direction,
            dt_bias=bias,
            dt_softplus=True,
            initial_state=entering,
            return_final_state=True,
        )
        assert isinstance(result, tuple)
        return result


def both_states(from_left: State | None, from_right: State | None) -> States | None:
    """What enters a scan that runs both ways: the pair of states, zeros for one that is None."""
    given = from_left or from_right
    if given is None:
        return None
    zeros = torch.zeros_like(given[0])
    return from_left[0] if from_left else zeros, from_right[0] if from_right else zeros


def conv_halo(conv_width: int, *, tied: bool) -> tuple[int, int]:
    """Positions that the convolutions see on the left and on the right: centred, or causal and its mirror image."""
    return (conv_width - 1, conv_width - 1) if tied else ((conv_width - 1) // 2, conv_width // 2)


def head_count(inner: int, head_dim: int, groups: int) -> int:
    """Heads of `head_dim` channels; a ValueError where they or the groups do not come out even."""
    check_sizes(head_dim=head_dim, groups=groups)
    if inner % head_dim or (inner // head_dim) % groups:
        raise ValueError(
            f"head_dim {head_dim} and groups {groups} do not divide the inner width {inner}; "
            "choose a head_dim that divides expand * width, and groups that divide the heads"
        )
    return inner // head_dim


def check_sizes(**sizes: int) -> None:
    """A ValueError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def check_bidirectional(bidirectional: str) -> None:
    """A ValueError for a form that there is not."""
    if bidirectional not in ("fused", "tied"):
        raise ValueError(f"bidirectional is {bidirectional!r}; allowed are 'fused' and 'tied'")
