"""How the chunks of an SSD scan hand their states on: one after the other on a CPU, elsewhere one matrix product for every 64.

Letters: b batch, n chunks, g groups, r heads of a group, h = g*r heads, s state, p head_dim. States come and go in the layout of the
matrix products that make and use them, (b, n, g, s, r, p); the products here take them flat by head: f = s * p.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNKS_PER_BLOCK = 64
"""Chunk states passed on by one matrix product; longer sequences loop over blocks, so cost stays linear."""


def carry_states(
    states: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    counts: tuple[int, ...] | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk, and the one that leaves the last.

    Args:
        states: (b, n, g, s, r, p), what each chunk adds.
        log_decay: (b, n, h), each chunk's whole decay, of float64 where it can be.
        initial: (b, h, s, p), or None for zeros.
        counts: chunks of each of several sequences in one row (b is 1), n in all: nothing passes from one to the next,
            and `initial` and the final states are (sequences, h, s, p).
    """
    groups = states.shape[2]
    if states.device.type == "cpu" and not torch.compiler.is_compiling():
        decay = torch.exp(log_decay).to(states.dtype).unflatten(2, (groups, 1, -1, 1))  # type: ignore[no-untyped-call]
        start = None if initial is None else initial.unflatten(1, (groups, -1)).transpose(2, 3)  # type: ignore[no-untyped-call]
        before, final = _OneByOne.apply(states, decay, start, counts, reverse)  # type: ignore[no-untyped-call]
        return before, final.transpose(2, 3).flatten(1, 2)
    by_head = states.transpose(3, 4).flatten(2, 3)
    if counts is None:
        before, final = _carry(by_head, log_decay, initial, reverse=reverse)
    else:
        before, final = _carry_packed(by_head, log_decay, initial, counts, reverse=reverse)
    return before.unflatten(2, (groups, -1)).transpose(3, 4), final  # type: ignore[no-untyped-call]


def _carry(
    states: Tensor, log_decay: Tensor, initial: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """By matrix products, of states (b, n, h, s, p)."""
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


def _carry_packed(
    states: Tensor, log_decay: Tensor, initial: Tensor | None, counts: Sequence[int], *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The same for several sequences in one row, each of whole chunks."""
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


class _OneByOne(torch.autograd.Function):
    """Chunk after chunk: each step is one operation on one chunk's states, forward and for the gradient; decay (b, n, g, 1, r, 1)."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        decay: Tensor,
        initial: Tensor | None,
        counts: tuple[int, ...] | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        before = torch.empty_like(states, memory_format=torch.contiguous_format)
        sequences = states.shape[0] if counts is None else len(counts)
        final = states.new_empty(sequences, *states.shape[2:])
        for sequence, order in _orders(states.shape[1], counts, reverse):
            if initial is None:
                before[:, order[0]].zero_()
            else:
                before[:, order[0]] = initial[sequence]
            following = [*(before[:, chunk] for chunk in order[1:]), final[sequence]]
            for chunk, after in zip(order, following, strict=True):
                torch.addcmul(states[:, chunk], decay[:, chunk], before[:, chunk], out=after)
        ctx.save_for_backward(decay, before)
        ctx.options = (initial is not None, counts, reverse)
        return before, final

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        decay, before = ctx.saved_tensors
        with_initial, counts, reverse = ctx.options
        of_before, of_final = gradients
        # the same, the other way; so it has a gradient of its own
        of_states, of_initial = _OneByOne.apply(of_before, decay, of_final, counts, not reverse)  # type: ignore[no-untyped-call]
        of_decay = (of_states * before).sum((3, 5), keepdim=True)
        return of_states, of_decay, of_initial if with_initial else None, None, None


def _orders(chunks: int, counts: tuple[int, ...] | None, reverse: bool) -> list[tuple[slice, list[int]]]:
    """For each sequence, or all rows of a batch at once: which rows of final states are its own, and its chunks in order."""
    if counts is None:
        spans = [(slice(None), 0, chunks)]
    else:
        ends = list(accumulate(counts))
        spans = [
            (slice(i, i + 1), end - count, end)
            for i, (end, count) in enumerate(zip(ends, counts, strict=True))
        ]
    return [
        (rows, list(range(end - 1, first - 1, -1) if reverse else range(first, end)))
        for rows, first, end in spans
    ]
