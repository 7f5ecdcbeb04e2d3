"""State-space duality (Mamba-2) in chunked matmul form, plain torch: any device, differentiable, memory linear in length.

A few chunks are worked on at a time, so that what lies between stays small; for the gradient of a long sequence only the
inputs and the state that enters each chunk are kept, and the rest is computed again.

Letters: b batch, n chunks, q positions of a chunk, g groups, r heads of a group, h = g*r heads, p head_dim, s state.
Decays are exp of differences of cumulative sums, all of them <= 0, computed in float32 (float64 for float64 inputs). On a CPU,
where it costs nothing that could be measured, the sums are of float64: a step of 50 among small ones takes digits of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genossm.kernels.arguments import Pair, accumulation
from genossm.kernels.ssd_carry import carry_states

BLOCK_ELEMENTS = {"cpu": 2**21}
"""Elements of x that are worked on at a time, at least one chunk."""
BLOCK_ELEMENTS_ELSEWHERE = 2**25
RECOMPUTE_ABOVE = 2**26
"""Pairs of positions within chunks, over all heads, above which a gradient computes them again."""


def ssd_chunked(
    x: Tensor,
    dt: Pair,
    A: Pair,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Pair,
    *,
    chunk_size: int,
    shared: bool,
    counts: tuple[int, ...] | None = None,
) -> tuple[Tensor, Pair]:
    """The SSD scan in one or both directions.

    Args:
        x: (batch, length, heads, head_dim).
        dt, A, initial: pairs (forward, reverse) of (batch, length, heads), (heads,), (batch, heads, head_dim, state);
            a direction whose dt is None is left out.
        B, C: (batch, length, groups, state).
        D: (heads,) or (heads, head_dim), added once.
        chunk_size: positions of a chunk; cost per position grows with it, the number of carried states falls.
        shared: both directions have the same dt and A, so that one exponential serves a pair of positions.
        counts: chunks of each of several sequences in one row (batch 1); states are then (sequences, ...).

    Returns:
        y, shaped like x, in the dtype computed in, and the pair of final states.
    """
    batch, length, heads, head_dim = x.shape
    padding = -length % chunk_size
    elements = BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    per_block = max(1, elements // (batch * chunk_size * heads * head_dim))

    pairs = batch * (length + padding) * heads * chunk_size
    run = _recomputed if torch.is_grad_enabled() and pairs > RECOMPUTE_ABOVE else _kept

    def blocks(tensor: Tensor) -> list[Tensor]:
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding)) if padding else tensor
        return list(torch.split(padded.unflatten(1, (-1, chunk_size)), per_block, 1))  # type: ignore[no-untyped-call]

    x_blocks, B_blocks, C_blocks = blocks(x), blocks(B), blocks(C)
    entering: list[list[Tensor]] = []
    finals: list[Tensor | None] = [None, None]
    directions: list[tuple[bool, list[Tensor], Tensor]] = []
    for reverse, dt_direction, A_direction, start in zip((False, True), dt, A, initial, strict=True):
        if dt_direction is None or A_direction is None:
            continue
        dt_blocks = blocks(dt_direction)
        directions.append((reverse, dt_blocks, A_direction))
        parts = [
            run(_added_states, *block, A_direction, reverse)
            for block in zip(x_blocks, dt_blocks, B_blocks, strict=True)
        ]
        states, log_decay = (_joined(part) for part in zip(*parts, strict=True))
        start_bhsp = None if start is None else start.to(states.dtype).transpose(-1, -2)
        before, final = carry_states(states, log_decay, start_bhsp, counts, reverse=reverse)
        finals[reverse] = final.transpose(-1, -2)
        entering.append(list(torch.split(before, per_block, 1)))

    outputs: list[Tensor] = []
    for i, (x_i, B_i, C_i) in enumerate(zip(x_blocks, B_blocks, C_blocks, strict=True)):
        scans = [
            (reverse, dt_blocks[i], A_direction, states[i])
            for (reverse, dt_blocks, A_direction), states in zip(directions, entering, strict=True)
        ]
        flat = [item for scan in scans for item in scan]
        outputs.append(run(_outputs, x_i, B_i, C_i, D, shared, *flat))
    y = _joined(outputs).flatten(1, 2)[:, :length]
    return y, (finals[0], finals[1])


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks of chunks one after the other; a single one as it is."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), 1)


def _kept(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, of which autograd keeps the arguments only."""
    return checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )


def _log_decays(dt_bnqh: Tensor, A_h: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative sums of dt A within each chunk, with and without the position itself, (b, n, h, q)."""
    precise = torch.float64 if dt_bnqh.device.type == "cpu" else accumulation(dt_bnqh.dtype)
    step = (dt_bnqh.to(precise) * A_h.to(precise)).transpose(2, 3)
    inclusive = step.cumsum(-1)
    return inclusive, inclusive - step


def _added_states(
    x_bnqhp: Tensor, dt_bnqh: Tensor, B_bnqgs: Tensor, A_h: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each chunk adds to the state, (b, n, g, s, r, p), and its whole decay, (b, n, h)."""
    accumulate = accumulation(x_bnqhp.dtype)
    batch, chunks, _, groups, state = B_bnqgs.shape
    inclusive, exclusive = _log_decays(dt_bnqh, A_h)
    total = inclusive[..., -1:]
    leaving = torch.exp((exclusive if reverse else total - inclusive).to(accumulate))
    weighted = x_bnqhp.to(accumulate) * (leaving.transpose(2, 3) * dt_bnqh)[..., None]
    by_group = weighted.unflatten(3, (groups, -1)).flatten(-2).transpose(2, 3)  # type: ignore[no-untyped-call]
    states = B_bnqgs.to(accumulate).permute(0, 1, 3, 4, 2) @ by_group
    return states.view(batch, chunks, groups, state, -1, x_bnqhp.shape[-1]), total[..., 0]


class _DecayMatrix(torch.autograd.Function):
    """The decay from each position (columns) to each (rows) of a chunk, (b, n, h, q, q), zero where the scan does not go.

    From sums with and without the position itself, (b, n, h, q), which are kept in their own precision until they are
    subtracted. For `both`, below the diagonal the forward scan and above it the reverse one; the diagonal belongs to
    both, and is 2.
    """

    @staticmethod
    def forward(ctx: Any, inclusive: Tensor, exclusive: Tensor, direction: str, dtype: torch.dtype) -> Tensor:
        weights = torch.empty(*inclusive.shape, inclusive.shape[-1], dtype=dtype, device=inclusive.device)
        if direction == "reverse":
            torch.sub(exclusive[..., None, :], exclusive[..., :, None], out=weights).exp_().triu_()
        else:
            torch.sub(inclusive[..., :, None], inclusive[..., None, :], out=weights).exp_().tril_()
        if direction == "both":
            weights += (
                torch.sub(exclusive[..., None, :], exclusive[..., :, None], out=torch.empty_like(weights))
                .exp_()
                .triu_()
            )
        ctx.save_for_backward(weights)
        ctx.direction, ctx.sums_dtype = direction, inclusive.dtype
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (weights,) = ctx.saved_tensors
        pairs = gradients[0] * weights

        def of(part: Tensor, sign: int) -> Tensor:
            by_row, by_column = (part.sum(axis, dtype=ctx.sums_dtype) for axis in (-1, -2))
            return (by_row - by_column) * sign

        if ctx.direction == "both":
            return of(pairs.tril(-1), 1), of(pairs.triu(1), -1), None, None
        if ctx.direction == "reverse":
            return None, of(pairs, -1), None, None
        return of(pairs, 1), None, None, None


def _outputs(
    x_bnqhp: Tensor, B_bnqgs: Tensor, C_bnqgs: Tensor, D: Tensor | None, shared: bool, *scans: Any
) -> Tensor:
    """y (b, n, q, h, p) from each chunk's own inputs and the states that enter it.

    Args:
        scans: for each direction, one after the other: reverse, dt (b, n, q, h), A (h,), entering (b, n, g, s, r, p).
    """
    accumulate = accumulation(x_bnqhp.dtype)
    batch, chunks, size, heads, head_dim = x_bnqhp.shape
    groups = B_bnqgs.shape[3]
    x = x_bnqhp.to(accumulate)
    C_bngqs = C_bnqgs.to(accumulate).transpose(2, 3)
    scores_bngqq = C_bngqs @ B_bnqgs.to(accumulate).permute(0, 1, 3, 4, 2)
    mixing: Tensor | None = None
    between: Tensor | None = None
    x_dt, one_dt = x, shared or len(scans) == 4  # else each direction's dt goes to its weights
    for reverse, dt_bnqh, A_h, entering in zip(*(scans[i::4] for i in range(4)), strict=True):
        inclusive, exclusive = _log_decays(dt_bnqh, A_h)
        decay = torch.exp((inclusive[..., -1:] - exclusive if reverse else inclusive).to(accumulate))
        carried = (
            (C_bngqs @ entering.flatten(-2)).transpose(2, 3).reshape(batch, chunks, size, heads, head_dim)
        )
        carried = carried * decay.transpose(2, 3)[..., None]
        between = carried if between is None else between + carried
        if shared and reverse:
            continue
        weights = _DecayMatrix.apply(
            inclusive, exclusive, "both" if shared else "reverse" if reverse else "forward", accumulate
        )  # type: ignore[no-untyped-call]
        if one_dt:
            x_dt = x * dt_bnqh.to(accumulate)[..., None]
        else:
            weights = weights * dt_bnqh.to(accumulate).transpose(2, 3)[..., None, :]
        mixing = weights if mixing is None else mixing + weights
    assert mixing is not None and between is not None
    mixing = scores_bngqq.unsqueeze(3) * mixing.view(batch, chunks, groups, -1, size, size)
    within = mixing.flatten(2, 3).to(x_bnqhp.dtype) @ x_dt.to(x_bnqhp.dtype).transpose(2, 3)
    y = within.transpose(2, 3).to(accumulate) + between
    return y if D is None else y + x * (D if D.dim() == 2 else D[:, None]).to(accumulate)
