"""Scalar-decay state-space scan (SSD, the core of Mamba-2), forward, reverse or both directions at once."""

from __future__ import annotations

import torch
from torch import Tensor

from genossm.kernels.arguments import (
    Direction,
    Pair,
    States,
    accumulation,
    by_direction,
    check_devices,
    check_direction,
    check_filled,
    check_real,
    check_shape,
    final_states,
    gated,
    stacked_states,
    state_pair,
    step_sizes,
)
from genossm.kernels.backend import TRITON_DTYPES, Backend, choose_backend, interpreting, shared_memory
from genossm.kernels.packing import ChunkLayout, sequence_bounds
from genossm.kernels.reference import ssd_reference
from genossm.kernels.ssd_tiles import CHUNKS, HEAD_DIM, STATE, STATE_ELEMENTS, chunk_for, padded
from genossm.kernels.ssd_torch import ssd_chunked

DEFAULT_CHUNK = {"cpu": 64, "cuda": 128}


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: States | None = None,
    return_final_state: bool = False,
    direction: Direction = "forward",
    chunk_size: int | None = None,
    backend: Backend = "auto",
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, States]:
    """State-space duality scan (Dao & Gu 2024, "Transformers are SSMs", eqs. 1 and 6).

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t;    y_t = h_t . C_t + D x_t

    `reverse` equals flip(ssd(flip(inputs))); `both` is the sum of forward and reverse with D added once, in one pass
    over x, B and C. With dt_bias and dt_softplus, softplus(dt + dt_bias) stands for dt; with z, y * silu(z) for y.

    Args:
        x: (batch, length, heads, head_dim), float64, float32, bfloat16 or float16; any strides.
        dt: (batch, length, heads), > 0 after bias and softplus; for `both` also (batch, length, heads, 2), index 0 forward, 1 reverse.
        A: (heads,), < 0; for `both` also (heads, 2).
        B, C: (batch, length, groups, state); `groups` divides `heads`.
        D: (heads,) or (heads, head_dim), or None.
        initial_state: (batch, heads, head_dim, state); for `both` a pair (forward, reverse). Zeros when None.
        return_final_state: also return the state after the last step (a pair for `both`), float32 (float64 for
            float64 inputs).
        direction: `forward`, `reverse` or `both`.
        chunk_size: positions of a chunk; None takes what is fast on the device. `triton` takes 64, 128 or 256.
        backend: `triton` (CUDA; float32, bfloat16 or float16; head_dim up to 128, state up to 256, and, each rounded up
            to a power of two, a product up to 16,384), `torch` (chunked matmul form, any device), `reference` (step by
            step, slow), or `auto`: triton for what it takes, else torch. On CUDA `torch` multiplies float32 as
            torch.backends.cuda.matmul.fp32_precision says: in float32 by default, in TF32 where you have set that;
            `triton` keeps float32's accuracy either way. Only `torch` and `reference` have second derivatives.
        z: shaped like x, the gate, or None.
        dt_bias: (heads,) or None; for `both` also (heads, 2).
        dt_softplus: whether dt + dt_bias goes through softplus.
        cu_seqlens: (sequences + 1,) int32 or int64, for several sequences one after another in a batch of 1: 0, the
            ends of all but the last, length. Each is scanned by itself, in both directions, and states are
            (sequences, heads, head_dim, state).

    Returns:
        y like x; with `return_final_state`, the pair (y, final state).

    Raises:
        ValueError: a shape, dtype, direction, backend or boundary that does not fit.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, direction, chunk_size)
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, x.shape[0], x.shape[1])
    sequences = x.shape[0] if bounds is None else len(bounds)
    starts = state_pair(initial_state, direction, (sequences, x.shape[2], x.shape[3], B.shape[3]))
    check_devices(x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    for start in starts:
        check_devices(x, initial_state=start)
        if start is not None:
            check_real("initial_state", start)
    chosen = choose_backend(backend, x, _unfit_for_triton(x, B, chunk_size))
    if chosen == "triton":
        from genossm.kernels.ssd_triton import ssd_scan

        initial = stacked_states(starts, direction)
        with torch.autocast(x.device.type, enabled=False):
            y, final = ssd_scan(
                x, dt, A, B, C, D, z, dt_bias, initial, bounds, direction, dt_softplus, chunk_size
            )
        return (y, (final[0], final[1]) if direction == "both" else final[0]) if return_final_state else y

    with torch.autocast(x.device.type, enabled=False):
        dt = step_sizes(dt, dt_bias, softplus=dt_softplus, dtype=accumulation(x.dtype))
        separate = dt.dim() == 4 or A.dim() == 2
        dts = by_direction(dt, separate=dt.dim() == 4)
        dt_pair: Pair = (
            None if direction == "reverse" else dts[0],
            None if direction == "forward" else dts[1],
        )
        As = by_direction(A, separate=A.dim() == 2)
        if chosen == "reference":
            y, finals = _by_steps(x, dt_pair, As, B, C, D, starts, bounds)
        else:
            size = chunk_size or min(DEFAULT_CHUNK.get(x.device.type, 128), x.shape[1])
            y, finals = _by_chunks(
                x, dt_pair, As, B, C, D, starts, bounds, size, shared=direction == "both" and not separate
            )
        y = gated(y, z).to(x.dtype)
    return (y, final_states(finals, direction)) if return_final_state else y


def _by_chunks(
    x: Tensor,
    dts: Pair,
    As: tuple[Tensor, Tensor],
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Pair,
    bounds: list[tuple[int, int]] | None,
    chunk_size: int,
    *,
    shared: bool,
) -> tuple[Tensor, Pair]:
    """The torch backend; several sequences are first moved apart to chunks of their own."""
    if bounds is None:
        return ssd_chunked(x, dts, As, B, C, D, starts, chunk_size=chunk_size, shared=shared)
    layout = ChunkLayout.of(bounds, chunk_size, x.device)
    x, B, C = (layout.spread(tensor) for tensor in (x, B, C))
    spread: Pair = (
        None if dts[0] is None else layout.spread(dts[0]),
        None if dts[1] is None else layout.spread(dts[1]),
    )
    y, finals = ssd_chunked(
        x, spread, As, B, C, D, starts, chunk_size=chunk_size, shared=shared, counts=layout.counts
    )
    return layout.gather(y), finals


def _by_steps(
    x: Tensor,
    dts: Pair,
    As: tuple[Tensor, Tensor],
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Pair,
    bounds: list[tuple[int, int]] | None,
) -> tuple[Tensor, Pair]:
    """The reference backend, one sequence after the other where a row holds several."""
    accumulate = accumulation(x.dtype)
    wide = x.to(accumulate)
    zeros = torch.zeros((), dtype=accumulate, device=x.device).expand(x.shape[0], *x.shape[2:], B.shape[3])
    total: Tensor | None = None
    finals: list[Tensor | None] = [None, None]
    for index, (dt, A, start) in enumerate(zip(dts, As, starts, strict=True)):
        if dt is None:
            continue
        once = D if total is None else None
        pieces: list[tuple[Tensor, Tensor]] = []
        for number, (first, end) in enumerate(bounds or [(0, x.shape[1])]):
            here = slice(first, end)
            state = zeros if start is None else start if bounds is None else start[number : number + 1]
            pieces.append(
                ssd_reference(
                    wide[:, here], dt[:, here], A, B[:, here], C[:, here], once, state, reverse=index == 1
                )
            )
        y = torch.cat([piece for piece, _ in pieces], 1)
        finals[index] = torch.cat([final for _, final in pieces])
        total = y if total is None else total + y
    assert total is not None
    return total, (finals[0], finals[1])


def _unfit_for_triton(x: Tensor, B: Tensor, chunk_size: int | None) -> str | None:
    """Why the Triton kernels cannot compute this call, or None."""
    head_dim, state = x.shape[-1], B.shape[-1]
    if head_dim > HEAD_DIM or state > STATE or padded(head_dim) * padded(state) > STATE_ELEMENTS:
        return (
            f"x has head_dim {head_dim} and B state {state}; backend='triton' takes head_dim up to {HEAD_DIM}, state "
            f"up to {STATE} and a product up to {STATE_ELEMENTS}, backend='torch' any"
        )
    if chunk_size is not None and chunk_size not in CHUNKS:
        return f"chunk_size is {chunk_size}; backend='triton' takes one of {', '.join(map(str, CHUNKS))}, or None"
    if x.dtype in TRITON_DTYPES and (x.is_cuda or interpreting()):
        budget = shared_memory(x.device)
        if chunk_for(x.dtype, head_dim, state, budget, chunk_size) is None:
            return (
                f"head_dim {head_dim}, state {state} and chunk_size {chunk_size} in {x.dtype} need more than the "
                f"{budget // 1024} KiB of shared memory of {x.device}; take a smaller chunk_size, or backend='torch'"
            )
    return None


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    direction: str,
    chunk_size: int | None,
) -> None:
    check_direction(direction)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give a whole number of at least 1, or None")
    check_filled("x", x, "batch", "length", "heads", "head_dim")
    for name, tensor in (
        ("x", x),
        ("dt", dt),
        ("A", A),
        ("B", B),
        ("C", C),
        ("D", D),
        ("z", z),
        ("dt_bias", dt_bias),
    ):
        if tensor is not None:
            check_real(name, tensor)
    batch, length, heads, head_dim = x.shape
    both = direction == "both"
    check_filled("B", B, "batch", "length", "groups", "state")
    groups, state = B.shape[2:]
    if heads % groups:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; (batch, length, groups, state) is needed, groups dividing the {heads} heads"
        )
    check_shape("dt", dt, [(batch, length, heads), *([(batch, length, heads, 2)] if both else [])])
    check_shape("A", A, [(heads,), *([(heads, 2)] if both else [])])
    check_shape("B", B, [(batch, length, groups, state)])
    check_shape("C", C, [(batch, length, groups, state)])
    if D is not None:
        check_shape("D", D, [(heads,), (heads, head_dim)])
    if z is not None:
        check_shape("z", z, [(batch, length, heads, head_dim)])
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, [(heads,), *([(heads, 2)] if both else [])])
