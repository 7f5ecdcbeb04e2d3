"""State-space duality (Mamba-2) in chunked matmul form, plain torch: any device, differentiable, memory linear in length.

Letters: b batch, n chunks, q positions of a chunk, g groups, r heads of a group, h = g*r heads, p head_dim, s state.
Decays are exp of differences of cumulative sums, all of them <= 0, accumulated in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNKS_PER_BLOCK = 64
"""Chunk states passed on by one matrix product; longer sequences loop over blocks, so cost stays linear."""


def ssd_chunked(
    x: Tensor,
    dt: tuple[Tensor | None, Tensor | None],
    A: tuple[Tensor | None, Tensor | None],
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: tuple[Tensor | None, Tensor | None],
    *,
    chunk_size: int,
    shared: bool,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The SSD scan in one or both directions.

    Args:
        x: (batch, length, heads, head_dim).
        dt, A, initial: pairs (forward, reverse) of (batch, length, heads), (heads,), (batch, heads, head_dim, state);
            a direction whose dt is None is left out.
        B, C: (batch, length, groups, state).
        D: (heads,) or (heads, head_dim), added once.
        chunk_size: positions of a chunk; cost per position grows with it, the number of carried states falls.
        shared: both directions have the same dt and A, so that one exponential serves a pair of positions.

    Returns:
        y like x, and the pair of final states.
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    ratio = heads // groups
    padding = -length % chunk_size
    chunks = (length + padding) // chunk_size

    def chunked(tensor: Tensor, *tail: int) -> Tensor:
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding)) if padding else tensor
        return padded.reshape(batch, chunks, chunk_size, *tail)

    x_bngqrp = chunked(x, groups, ratio, head_dim).transpose(2, 3)
    B_bngqs = chunked(B, groups, state).transpose(2, 3).to(accumulate)
    C_bngqs = chunked(C, groups, state).transpose(2, 3).to(accumulate)
    scores_bngqq = C_bngqs @ B_bngqs.transpose(-1, -2)

    mixing: Tensor | None = None
    between: Tensor | None = None
    finals: list[Tensor | None] = []
    for reverse in (False, True):
        dt_direction, A_direction, start = dt[reverse], A[reverse], initial[reverse]
        if dt_direction is None or A_direction is None:
            finals.append(None)
            continue
        dt_bngrq = chunked(dt_direction, groups, ratio).to(accumulate).permute(0, 1, 3, 4, 2)
        step = dt_bngrq * A_direction.to(accumulate).view(groups, ratio, 1)
        inclusive = step.cumsum(-1)
        exclusive = inclusive - step
        total = inclusive[..., -1:]
        # weight of a position's input in the state that leaves its chunk; weight of the entering state at a position
        leaving = torch.exp(exclusive if reverse else total - inclusive) * dt_bngrq
        entering = torch.exp(total - exclusive if reverse else inclusive)
        if not (shared and reverse):
            part = _pair_weights(inclusive, exclusive, dt_bngrq, reverse=reverse, both=shared)
            mixing = part if mixing is None else mixing + part

        weighted = x_bngqrp.to(accumulate) * leaving.permute(0, 1, 2, 4, 3)[..., None]
        states = B_bngqs.transpose(-1, -2) @ weighted.flatten(-2)
        states_bnhsp = (
            states.view(batch, chunks, groups, state, ratio, head_dim).transpose(3, 4).flatten(2, 3)
        )
        start_bhsp = None if start is None else start.to(accumulate).transpose(-1, -2)
        before, final = _carry(states_bnhsp, total.flatten(2), start_bhsp, reverse=reverse)
        finals.append(final.transpose(-1, -2))
        before_bngsrp = before.view(batch, chunks, groups, ratio, state, head_dim).transpose(3, 4)
        carried = (C_bngqs @ before_bngsrp.flatten(-2)).view(
            batch, chunks, groups, chunk_size, ratio, head_dim
        )
        carried = carried * entering.permute(0, 1, 2, 4, 3)[..., None]
        between = carried if between is None else between + carried

    assert mixing is not None and between is not None
    within = (scores_bngqq.unsqueeze(3) * mixing).to(x.dtype) @ x_bngqrp.transpose(3, 4)
    y = within.transpose(3, 4).to(accumulate) + between
    if D is not None:
        y = y + x_bngqrp.to(accumulate) * D.to(accumulate).view(groups, 1, ratio, -1)
    y = y.transpose(2, 3).reshape(batch, length + padding, heads, head_dim)[:, :length]
    return y.to(x.dtype), (finals[0], finals[1])


def _pair_weights(inclusive: Tensor, exclusive: Tensor, dt: Tensor, *, reverse: bool, both: bool) -> Tensor:
    """Decay from the input at each position (last axis) to the output at each (axis before), times dt: (..., q, q)."""
    size = inclusive.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=inclusive.device)
    forward = inclusive[..., :, None] - inclusive[..., None, :]
    if both:  # below the diagonal the forward scan, above it the reverse one; the diagonal belongs to both
        backward = exclusive[..., None, :] - exclusive[..., :, None]
        exponent = torch.where(ones.tril(), forward, backward)
        twice = 1 + torch.eye(size, dtype=dt.dtype, device=dt.device)
        return torch.exp(exponent) * (dt[..., None, :] * twice)
    if reverse:
        exponent = (exclusive[..., None, :] - exclusive[..., :, None]).masked_fill(ones.tril(-1), -torch.inf)
    else:
        exponent = forward.masked_fill(ones.triu(1), -torch.inf)
    return torch.exp(exponent) * dt[..., None, :]


def _carry(
    states: Tensor, log_decay: Tensor, initial: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk, and the one that leaves the last.

    Args:
        states: (b, n, h, s, p), what each chunk adds. log_decay: (b, n, h), each chunk's whole decay.
        initial: (b, h, s, p) or None for zeros.
    """
    if reverse:
        states, log_decay = states.flip(1), log_decay.flip(1)
    shape = states.shape
    flat = states.flatten(-2).transpose(1, 2)
    decay = log_decay.transpose(1, 2)
    carry = flat.new_zeros(*flat.shape[:2], flat.shape[-1]) if initial is None else initial.flatten(-2)
    entering: list[Tensor] = []
    for block, block_decay in zip(
        torch.split(flat, CHUNKS_PER_BLOCK, 2), torch.split(decay, CHUNKS_PER_BLOCK, 2), strict=True
    ):
        reach = F.pad(block_decay.cumsum(-1), (1, 0))
        exponent = reach[..., :, None] - reach[..., None, :]
        ahead = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=exponent.device).triu(1)
        weights = torch.exp(exponent.masked_fill(ahead, -torch.inf))
        passed = weights @ torch.cat([carry.unsqueeze(2), block], dim=2)
        entering.append(passed[:, :, :-1])
        carry = passed[:, :, -1]
    before = torch.cat(entering, dim=2).transpose(1, 2).reshape(shape)
    return (before.flip(1) if reverse else before), carry.view(shape[0], *shape[2:])
