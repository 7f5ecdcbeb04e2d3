"""Mamba-3 mixer, bidirectional: trapezoidal steps, a complex state, optionally several inputs and outputs per state.

Letters: B batch, L length, D width, E inner width, H heads, P head_dim, G groups, N state, M = N / 2 complex numbers,
R rank, T the 2 directions, K channels of the convolution (x, B and C together).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import accumulation, step_sizes
from genossm.kernels.short_conv import short_conv
from genossm.kernels.ssd import ssd
from genossm.models.mixers.mamba2 import check_sizes, conv_halo, head_count
from genossm.models.mixers.mixer import Mixer, State, core
from genossm.models.mixers.step_sizes import DT_MIN, initial_dt_bias
from genossm.models.mixers.trapezoid import input_weights, phases, rank_steps, rotated

DT_FLOOR, A_FLOOR = 1e-6, 1e-4
NORM_EPS = 1e-5


class Mamba3(Mixer):
    """Mamba-3 (Lahoti, Li, Chen, Wang, Bick, Kolter, Dao & Gu 2026, sections 3.1 to 3.4), in both directions.

    One projection gives the gate z, the channels x and, for each group, R vectors B and C of N numbers and the rates
    theta of N / 2 rotations, all shared by the directions; and for each head and direction the step dt > 0, the decay
    A < 0 and lambda in (0, 1). B and C are RMS-normed and get a bias. With X_t = sum_r x_t^r (outer) B_t^r over the
    ranks, and B, C and h read as N / 2 complex numbers, a head's recurrence (propositions 1 and 4) is

        h_t = exp(dt_t A_t + i a_t) (h_{t-1} + (1 - lambda_t) dt_t X_{t-1}) + lambda_t dt_t X_t
        y_t^r = Re <C_t^r, h_t> + D x_t^r,    a_t = pi tanh(theta_t) dt_t

    and from the right the same with t + 1 for t - 1. y is the sum of both, with D once, and
    out = W sum_r o^r * y^r * silu(z * g^r), where x^r = v^r * x; v, g and o (section 3.3) are vectors of each head,
    absent for R = 1. lambda = 1 is Mamba-2's Euler rule, lambda = 1/2 the trapezoidal one.

    How the ssd scan, which is real and takes one input at each step, computes exactly that:

        Trapezoid. x_s is in every later state with w_s = lambda_s dt_s + (1 - lambda_{s+1}) dt_{s+1} times the decay
        since s, in its own with lambda_s dt_s. So x w / (-dt A) goes in, -dt A is both the step and the exponent, and
        (w_t - lambda_t dt_t) (C_t . B_t) x_t comes off the output.
        Rotation. With phi_t the sum of a up to t, e^(-i phi) h does not turn, where B and C are turned by -phi.
        Rank. A position is R steps of the scan, see `rank_steps`; what a rank does not see of its own position is
        added to the output.

    Each direction has its own w and phi, hence inputs, so that one scan cannot run both ways: there are two, of R L
    positions (a scan for each pair of ranks would be R^2 of L), which together cost less than 2 R of Mamba-2's fused
    scan, and passes over x for the weights and the own position.

    As in the paper there is no short convolution (unless asked for: of x, B and C, with SiLU) and no norm of the
    output. Other than there, the heads of a group share theta and the biases, and a_t takes the mean dt of the group, so
    that they share B and C; with groups = heads each has its own, as in the paper.

    Initialisation as in the authors' code: dt bias such that softplus(bias) is log-uniform in [0.001, 0.1]; A =
    -softplus and lambda = sigmoid of a projection without bias; norms and biases of B and C, D and g are 1, v and o are
    1 / R; projections as torch's Linear. dt and -A are kept above DT_FLOOR and A_FLOOR; x w / (-dt A) can leave the
    range of float16.

    The state over a chunk's edge is h with what the next step adds of X, (batch, heads, head_dim, state), where phi is 0
    at the edge. The halo of 1 is for the neighbour's dt and lambda.

    Args:
        width: D.
        state: N, real numbers in the state of each channel; even.
        head_dim: P; must divide expand * width.
        expand: E / D.
        dt_min: the shortest of the first step sizes; a bin is remembered for about 1 / (dt A) bins.
        groups: G, heads that share B, C and the angles.
        rank: R, inputs and outputs that share a state (MIMO); 1 for none.
        conv_width: width of a centred depthwise convolution of x, B and C; 0 for none.
    """

    recurrent = True
    state_parameters: tuple[str, ...] = ("dt_bias", "D")

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        dt_min: float = DT_MIN,
        groups: int = 1,
        rank: int = 1,
        conv_width: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(width=width, state=state, expand=expand, rank=rank)
        if state % 2:
            raise ValueError(f"state is {state}; it must be even: pairs of numbers rotate")
        if conv_width < 0:
            raise ValueError(f"conv_width is {conv_width}; it must be at least 0, which is no convolution")
        conv_left, conv_right = conv_halo(conv_width, tied=False)
        self.halo = max(1, conv_left), max(1, conv_right)
        self.inner = inner = expand * width
        self.heads, self.head_dim = head_count(inner, head_dim, groups), head_dim
        self.groups, self.state, self.rank, self.conv_width = groups, state, rank, conv_width
        vectors = rank * groups * state
        self.scan_inputs = [inner + 2 * vectors, 3 * self.heads * 2, groups * state // 2]
        self.in_projection = nn.Linear(width, inner + sum(self.scan_inputs), bias=False)
        if conv_width:
            self.conv_weight = nn.Parameter(torch.empty(self.scan_inputs[0], conv_width))
            self.conv_bias = nn.Parameter(torch.zeros(self.scan_inputs[0]))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, 2))
        self.B_norm, self.C_norm = (nn.Parameter(torch.ones(state)) for _ in range(2))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(vectors)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(self.heads))
        if rank > 1:
            self.state_parameters = (*self.state_parameters, "rank_x", "rank_gate", "rank_out")
            self.rank_x = nn.Parameter(torch.full((rank, self.heads, head_dim), 1 / rank))
            self.rank_gate = nn.Parameter(torch.ones(rank, self.heads, head_dim))
            self.rank_out = nn.Parameter(torch.full((rank, self.heads, head_dim), 1 / rank))
        self.out_projection = nn.Linear(inner, width, bias=False)
        self._initialise(dt_min)

    @torch.no_grad()
    def _initialise(self, dt_min: float) -> None:
        if self.conv_width:
            bound = 1 / math.sqrt(self.conv_width)
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
        gate_BLE, mixed_BLK, steps, theta = torch.split(
            self.in_projection(x_BLD), [self.inner, *self.scan_inputs], dim=-1
        )
        inputs = self._inputs(mixed_BLK, steps, theta, left, right)
        y_BLRHP, leaving = self._scan(inputs, "forward", from_left)
        y_BLRHP = y_BLRHP + self._scan(inputs, "reverse", from_right)[0]
        y_BLRHP = self._with_own_position(y_BLRHP, inputs)
        gate_BLRHP = torch.unflatten(core(gate_BLE, left, right), -1, (1, self.heads, self.head_dim))
        if self.rank > 1:
            gate_BLRHP = gate_BLRHP * self.rank_gate.to(gate_BLRHP.dtype)
        y_BLRHP = y_BLRHP * F.silu(gate_BLRHP)
        y_BLHP = y_BLRHP[:, :, 0] if self.rank == 1 else (y_BLRHP * self.rank_out.to(y_BLRHP.dtype)).sum(2)
        y_BLD: Tensor = self.out_projection(y_BLHP.flatten(2))
        return y_BLD, (leaving,)

    def leftward(
        self, x_BLD: Tensor, left: int = 0, right: int = 0, from_right: State | None = None
    ) -> State | None:
        without_gate = F.linear(x_BLD, self.in_projection.weight[self.inner :])
        mixed_BLK, steps, theta = torch.split(without_gate, self.scan_inputs, dim=-1)
        inputs = self._inputs(mixed_BLK, steps, theta, left, right)
        return (self._scan(inputs, "reverse", from_right)[1],)

    def _inputs(self, mixed_BLK: Tensor, steps: Tensor, theta: Tensor, left: int, right: int) -> _Inputs:
        """What the scans of the chunk take, from the projections of the chunk with its halo."""
        if self.conv_width:
            mixed_BLK = short_conv(
                mixed_BLK, self.conv_weight, self.conv_bias, activation="silu", padding="centered"
            )
        vectors = self.B_bias.shape[0]
        x_BLE, B, C = torch.split(core(mixed_BLK, left, right), [self.inner, vectors, vectors], dim=-1)
        x_BLRHP = torch.unflatten(x_BLE, -1, (1, self.heads, self.head_dim))
        if self.rank > 1:
            x_BLRHP = x_BLRHP * self.rank_x.to(x_BLRHP.dtype)
        wide = accumulation(x_BLE.dtype)
        dt, A, weighing = torch.unflatten(steps, -1, (3, self.heads, 2)).unbind(2)
        dt_BLHT = step_sizes(dt, self.dt_bias, softplus=True, dtype=wide).clamp(min=DT_FLOOR)
        minus_A_BLHT = step_sizes(A, None, softplus=True, dtype=wide).clamp(min=A_FLOOR)
        now_BLHT = torch.sigmoid(weighing.to(wide)) * dt_BLHT
        before_BLHT = dt_BLHT - now_BLHT
        weights = [
            input_weights(now_BLHT[..., own], before_BLHT[..., own], reverse=own == 1) for own in (0, 1)
        ]
        weight_BLHT, dt_BLHT, minus_A_BLHT, now_BLHT, theta = (
            core(tensor, left, right)
            for tensor in (torch.stack(weights, -1), dt_BLHT, minus_A_BLHT, now_BLHT, theta)
        )
        return _Inputs(
            x_BLRHP,
            self._normed(B.to(wide), self.B_norm, self.B_bias),
            self._normed(C.to(wide), self.C_norm, self.C_bias),
            dt_BLHT,
            dt_BLHT * minus_A_BLHT,
            weight_BLHT,
            weight_BLHT - now_BLHT,
            now_BLHT,
            math.pi * torch.tanh(torch.unflatten(theta.to(wide), -1, (self.groups, -1))),
        )

    def _normed(self, values: Tensor, weight_N: Tensor, bias: Tensor) -> Tensor:
        """B or C (batch, length, R, groups, state), normed and with its bias."""
        shape = (self.rank, self.groups, self.state)
        values_BLRGN = torch.unflatten(values, -1, shape)
        normed = F.rms_norm(values_BLRGN, shape[-1:], weight_N.to(values.dtype), NORM_EPS)
        return normed + bias.to(values.dtype).view(shape)

    def _scan(
        self, inputs: _Inputs, direction: Literal["forward", "reverse"], entering: State | None
    ) -> tuple[Tensor, Tensor]:
        """y (batch, length, R, heads, head_dim) of one direction, but for the own position, and the state that leaves."""
        own, reverse = int(direction == "reverse"), direction == "reverse"
        mean_dt_BLG = torch.unflatten(inputs.dt_BLHT[..., own], -1, (self.groups, -1)).mean(-1)
        phase_BLGM = phases(mean_dt_BLG[..., None] * inputs.rate_BLGM, reverse=reverse)
        cos_BLGM, sin_BLGM = torch.cos(phase_BLGM), torch.sin(phase_BLGM)
        x_BLRHP = inputs.x_BLRHP
        B_BLRGN, C_BLRGN = (
            rotated(values, cos_BLGM[:, :, None], -sin_BLGM[:, :, None]).to(x_BLRHP.dtype)
            for values in (inputs.B_BLRGN, inputs.C_BLRGN)
        )
        exponent_BLRH, scale_BLRH, read_BLRH = rank_steps(
            inputs.exponent_BLHT[..., own], inputs.weight_BLHT[..., own], self.rank, reverse=reverse
        )
        result = ssd(
            (x_BLRHP * scale_BLRH[..., None]).to(x_BLRHP.dtype).flatten(1, 2),
            exponent_BLRH.flatten(1, 2),
            exponent_BLRH.new_full((self.heads,), -1.0),
            B_BLRGN.flatten(1, 2),
            C_BLRGN.flatten(1, 2),
            direction=direction,
            initial_state=None if entering is None else entering[0],
            return_final_state=True,
        )
        assert isinstance(result, tuple) and isinstance(result[1], Tensor)
        y_BLRHP = torch.unflatten(result[0], 1, (-1, self.rank))
        if self.rank > 1:
            y_BLRHP = (y_BLRHP * read_BLRH[..., None]).to(y_BLRHP.dtype)
        last = 0 if reverse else -1
        turn = (
            part[:, last].repeat_interleave(self.heads // self.groups, 1)[:, :, None]
            for part in (cos_BLGM, sin_BLGM)
        )
        return y_BLRHP, rotated(result[1], *turn)

    def _with_own_position(self, y_BLRHP: Tensor, inputs: _Inputs) -> Tensor:
        """The scans' y with D x, and what each rank sees of its own position as the recurrence has it.

        The scan from the left shows rank r the ranks up to r with w, the other one those from r on; lambda dt of all
        ranks is due. B and C are turned alike, so their products are those before the rotation.
        """
        ranks = torch.arange(self.rank, device=y_BLRHP.device)
        now_BLHT, excess_BLHT = inputs.now_BLHT[:, :, None], inputs.excess_BLHT[:, :, None]
        for other in range(self.rank):
            seen = torch.stack([ranks >= other, ranks <= other], -1)[:, None]
            due_BLRH = torch.where(seen, -excess_BLHT, now_BLHT).sum(-1)
            product_BLRG = (inputs.C_BLRGN * inputs.B_BLRGN[:, :, other, None]).sum(-1)
            due_BLRH = (torch.unflatten(due_BLRH, -1, (self.groups, -1)) * product_BLRG[..., None]).flatten(3)
            due_BLRH = due_BLRH + self.D.to(due_BLRH.dtype) * (ranks == other)[:, None]
            y_BLRHP = y_BLRHP + due_BLRH.to(y_BLRHP.dtype)[..., None] * inputs.x_BLRHP[:, :, other, None]
        return y_BLRHP


@dataclass(frozen=True)
class _Inputs:
    """What the scans of a chunk take; the steps' numbers are of each direction."""

    x_BLRHP: Tensor
    B_BLRGN: Tensor
    C_BLRGN: Tensor
    dt_BLHT: Tensor
    exponent_BLHT: Tensor
    """-dt A"""
    weight_BLHT: Tensor
    """w, of `input_weights`"""
    excess_BLHT: Tensor
    """w - lambda dt"""
    now_BLHT: Tensor
    """lambda dt"""
    rate_BLGM: Tensor
    """Radians by unit of dt"""
