"""How the chunks of an SSD scan hand their states on: one matrix product for every 64 chunks.

Letters: b batch, n chunks, h heads, s state, p head_dim. States here are flat: f = s * p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNKS_PER_BLOCK = 64
"""Chunk states passed on by one matrix product; longer sequences loop over blocks, so cost stays linear."""


def carry_states(
    states: Tensor, log_decay: Tensor, initial: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk, and the one that leaves the last.

    Args:
        states: (b, n, h, s, p), what each chunk adds.
        log_decay: (b, n, h), each chunk's whole decay, of float64 where it can be.
        initial: (b, h, s, p), or None for zeros.
    """
    if reverse:
        states, log_decay = states.flip(1), log_decay.flip(1)
    shape = states.shape
    flat_bhnf = states.flatten(-2).transpose(1, 2)
    start = flat_bhnf.new_zeros(*flat_bhnf.shape[:2], 1, flat_bhnf.shape[-1])
    if initial is not None:
        start = initial.flatten(-2).unsqueeze(2)
    after = _passed(torch.cat([start, flat_bhnf], 2), F.pad(log_decay.transpose(1, 2), (1, 0)), None)
    before = after[:, :, :-1].transpose(1, 2).reshape(shape)
    return (before.flip(1) if reverse else before), after[:, :, -1].view(shape[0], *shape[2:])


def carry_packed_states(
    states: Tensor, log_decay: Tensor, initial: Tensor | None, counts: Sequence[int], *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The same for several sequences in one row, each of whole chunks: nothing passes from one to the next.

    Args:
        states: (1, n, h, s, p). log_decay: (1, n, h).
        initial: (sequences, h, s, p), or None for zeros.
        counts: chunks of each sequence, n in all.

    Returns:
        (1, n, h, s, p), and the final states (sequences, h, s, p).
    """
    number = len(counts)
    if reverse:
        states, log_decay = states.flip(1), log_decay.flip(1)
        counts, initial = counts[::-1], None if initial is None else initial.flip(0)
    shape, device = states.shape, states.device
    starts = states.new_zeros(number, *shape[2:]) if initial is None else initial
    # Each sequence's initial state stands before its chunks, like a chunk of its own.
    per_sequence = torch.tensor(counts, device=device)
    sequence_of_chunk = torch.arange(number, device=device).repeat_interleave(per_sequence)
    place = torch.arange(shape[1], device=device) + sequence_of_chunk + 1
    place_of_start = per_sequence.cumsum(0) - per_sequence + torch.arange(number, device=device)
    places = torch.cat([place_of_start, place])
    order = torch.empty_like(places)
    order[places] = torch.arange(len(places), device=device)
    sequence = torch.cat([torch.arange(number, device=device), sequence_of_chunk])[order]

    flat = torch.cat([starts, states[0]]).flatten(-2).index_select(0, order).transpose(0, 1)
    decay = torch.cat([log_decay.new_zeros(number, shape[2]), log_decay[0]]).index_select(0, order)
    after = _passed(flat.unsqueeze(0), decay.t().unsqueeze(0), sequence)[0].transpose(0, 1)
    before = after.index_select(0, place - 1).view(shape)
    final = after.index_select(0, place_of_start + per_sequence).view(number, *shape[2:])
    return (before.flip(1), final.flip(0)) if reverse else (before, final)


def _passed(added: Tensor, log_decay: Tensor, sequence: Tensor | None) -> Tensor:
    """The state after each element: what it adds, and what came before it decayed.

    Args:
        added: (b, h, n, f). log_decay: (b, h, n). sequence: (n,), elements of another number are not seen.
    """
    carry: Tensor | None = None
    after: list[Tensor] = []
    for first in range(0, added.shape[2], CHUNKS_PER_BLOCK):
        block = added[:, :, first : first + CHUNKS_PER_BLOCK]
        reach = log_decay[:, :, first : first + CHUNKS_PER_BLOCK].cumsum(-1)
        numbers = None if sequence is None else sequence[first : first + CHUNKS_PER_BLOCK]
        if carry is not None:
            block = torch.cat([carry, block], 2)
            reach = F.pad(reach, (1, 0))
            numbers = None if sequence is None else sequence[first - 1 : first + CHUNKS_PER_BLOCK]
        size = block.shape[2]
        unseen = torch.ones(size, size, dtype=torch.bool, device=added.device).triu(1)
        if numbers is not None:
            unseen = unseen | (numbers[:, None] != numbers[None, :])
        exponent = (reach[..., :, None] - reach[..., None, :]).masked_fill(unseen, -torch.inf)
        passed = torch.exp(exponent).to(block.dtype) @ block
        after.append(passed if carry is None else passed[:, :, 1:])
        carry = passed[:, :, -1:]
    return torch.cat(after, 2)
