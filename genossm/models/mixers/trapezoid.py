"""What Mamba-3 puts around a scan: trapezoidal weights, the ranks of a position one after another, and rotations.

Letters: B batch, L length, R rank, H heads, G groups, M pairs of state channels that rotate together (N / 2).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16
"""Angles that are summed in float32; the sums of whole blocks are summed in float64."""
LARGEST_SHARE = 1.0
"""The largest exponent of a position's later ranks, so that what makes up for it stays below e^(R - 1)."""


def input_weights(now_BLH: Tensor, before_BLH: Tensor, *, reverse: bool) -> Tensor:
    """How much of each input is in the later states, decays aside: lambda_s dt_s + (1 - lambda_{s+1}) dt_{s+1}.

    The recurrence adds an input twice, at its own step (`now`, lambda dt) and at the following one (`before`,
    (1 - lambda) dt, in the following state's frame: decayed and rotated as the state is). `reverse`: the following
    step is s - 1. Beyond the last step there is none.
    """
    if reverse:
        return now_BLH + F.pad(before_BLH[:, :-1], (0, 0, 1, 0))
    return now_BLH + F.pad(before_BLH[:, 1:], (0, 0, 0, 1))


def rank_steps(
    exponent_BLH: Tensor, weight_BLH: Tensor, rank: int, *, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each position as R steps of a scan whose step size is both exponent and factor of the input.

    A position's exponent e is split: the first of its steps decays by e - (R - 1) c and the others by c, with
    c = min(e / R, LARGEST_SHARE). Where j steps of the position are still to come, the input is taken e^(j c) fold and
    the output e^(-j c) fold; then the position's last state, and what any rank reads of other positions, are as if the
    whole decay came first and all ranks entered after it.

    Args:
        exponent_BLH: -dt A > 0.
        weight_BLH: the factor of the input.
        rank: R.
        reverse: whether the scan comes to the last rank first.

    Returns:
        The steps' exponents, what to multiply the inputs with before the scan and the outputs after it, each
        (batch, length, R, heads).
    """
    share_BLRH = (exponent_BLH / rank).clamp(max=LARGEST_SHARE)[:, :, None]
    to_come = torch.arange(rank, device=exponent_BLH.device)[:, None]
    to_come = to_come if reverse else to_come.flip(0)
    first_BLRH = exponent_BLH[:, :, None] - (rank - 1) * share_BLRH
    exponents_BLRH = torch.where(to_come == rank - 1, first_BLRH, share_BLRH)
    owed_BLRH = to_come * share_BLRH
    scale_BLRH = weight_BLH[:, :, None] / exponents_BLRH * torch.exp(owed_BLRH)
    return exponents_BLRH, scale_BLRH, torch.exp(-owed_BLRH)


def phases(angle_BLGM: Tensor, *, reverse: bool) -> Tensor:
    """Cumulative angles up to and with each position, whole turns left out: sums of millions stay exact to 1e-5 rad.

    Sums of up to BLOCK angles are taken in their own dtype, those of blocks in float64, modulo 2 pi.
    """
    if reverse:
        return phases(angle_BLGM.flip(1), reverse=False).flip(1)
    length = angle_BLGM.shape[1]
    padded = F.pad(angle_BLGM, (0, 0, 0, 0, 0, -length % BLOCK))
    blocks = torch.unflatten(padded, 1, (-1, BLOCK))
    totals = blocks.sum(2, dtype=torch.float64).movedim(1, -1)  # a scan along the last axis is the fast one
    before = (totals.cumsum(-1) - totals).remainder(2 * math.pi).movedim(-1, 1)
    summed = blocks.cumsum(2) + before.to(angle_BLGM.dtype)[:, :, None]
    return summed.flatten(1, 2)[:, :length]


def rotated(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last axis (N) as N / 2 complex numbers, real parts first, times cos + i sin (..., N / 2)."""
    real, imaginary = values.chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
