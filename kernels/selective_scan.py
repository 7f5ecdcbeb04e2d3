"""Selective state-space scan (S6, the core of Mamba), forward, reverse or both directions at once."""

from __future__ import annotations

import torch
from torch import Tensor

from genossm.kernels.arguments import (
    Direction,
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
    state_pair,
    step_sizes,
)
from genossm.kernels.backend import Backend, choose_backend
from genossm.kernels.packing import sequence_bounds
from genossm.kernels.reference import selective_scan_reference
from genossm.kernels.selective_scan_torch import SideBySide, selective_scan_lanes

MAX_TRITON_STATE = 256
"""States that the 32 threads of a warp share, 8 for each."""


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: States | None = None,
    return_final_state: bool = False,
    direction: Direction = "forward",
    backend: Backend = "auto",
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, States]:
    """Selective scan (Gu & Dao 2023, "Mamba", algorithm 2), every channel with its own diagonal state.

        s_t = softplus(dt_t + dt_bias)   (or dt_t + dt_bias)
        h_t = exp(s_t A) h_{t-1} + s_t x_t B_t;    y_t = (C_t . h_t + D x_t) silu(z_t)

    `reverse` equals flip(selective_scan(flip(inputs))); `both` is the sum of forward and reverse, with D added once
    and the gate put on once. A complex A (and then B, C real or complex) stands for itself and its complex conjugate
    as in S4D (Gu et al. 2022): C_t . h_t is then 2 Re(sum_n C_t[n] h_t[n]), y and every other input real.

    Computed in float64 for float64 x, else in float32, autocast or not.

    Args:
        x: (batch, length, channels), float64, float32, bfloat16 or float16; any strides.
        dt: (batch, length, channels), > 0 after bias and softplus; for `both` also (batch, length, channels, 2).
        A: (channels, state), real < 0 or complex with a negative real part; for `both` also (channels, state, 2).
        B, C: (batch, length, state); for `both` also (batch, length, state, 2), each.
        D: (channels,) or None.
        z: (batch, length, channels), the gate, or None.
        dt_bias: (channels,) or None; for `both` also (channels, 2).
            In a last axis of 2, index 0 is the forward scan's and 1 the reverse scan's; without it both share.
        dt_softplus: whether dt + dt_bias goes through softplus.
        initial_state: (batch, channels, state), or (sequences, channels, state) with cu_seqlens; for `both` a pair (forward, reverse). Zeros when None.
        return_final_state: also return the state after the last step (a pair for `both`), in the dtype computed in,
            complex for complex A.
        direction: `forward`, `reverse` or `both`.
        backend: `triton` (CUDA, real A, up to 256 states), `torch` (any device, many lanes of the sequence at once),
            `reference` (step by step, slow), or `auto`: Triton where it can compute the call on a CUDA device, else torch.
            On CUDA `torch` multiplies float32 as torch.backends.cuda.matmul.fp32_precision says: in TF32 where you have
            set that; `triton` never does. Only `reference` has second derivatives.
        cu_seqlens: (sequences + 1,) int32 or int64, for several sequences one after another in a batch of 1: 0, the
            ends of all but the last, length. Each is scanned by itself, in both directions, and states are
            (sequences, channels, state).

    Returns:
        y like x; with `return_final_state`, the pair (y, final state).

    Raises:
        ValueError: a shape, dtype, direction, backend or boundary that does not fit.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, direction)
    accumulate = accumulation(x.dtype)
    inner = accumulate.to_complex() if A.is_complex() else accumulate
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, x.shape[0], x.shape[1])
    sequences = x.shape[0] if bounds is None else len(bounds)
    starts = state_pair(initial_state, direction, (sequences, x.shape[2], A.shape[1]))
    check_devices(x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    for start in starts:
        check_devices(x, initial_state=start)
        if start is not None:
            check_real("initial_state", start, or_complex=True)
            if start.is_complex() and not A.is_complex():
                raise ValueError(
                    "initial_state is complex and A is real; give a complex A, or a real initial_state"
                )
    chosen = choose_backend(backend, x, _unfit(A))
    if chosen == "triton":
        from genossm.kernels.selective_scan_triton import selective_scan_triton

        y, ends = selective_scan_triton(
            *(x, dt, A, B, C, D, z, dt_bias, starts),
            dt_softplus=dt_softplus,
            direction=direction,
            bounds=bounds,
        )
        return (y, final_states(ends, direction)) if return_final_state else y

    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(accumulate)
        dt = step_sizes(dt, dt_bias, softplus=dt_softplus, dtype=accumulate).to(accumulate)
        dts = by_direction(dt, separate=dt.dim() == 4)
        As = by_direction(A.to(inner), separate=A.dim() == 3)
        Bs = by_direction(B.to(inner), separate=B.dim() == 4)
        Cs = by_direction(C.to(inner), separate=C.dim() == 4)
        total: Tensor | None = None
        finals: list[Tensor | None] = [None, None]
        for index in {"forward": (0,), "reverse": (1,), "both": (0, 1)}[direction]:
            start, A_here = starts[index], As[index]
            start = A_here.new_zeros(sequences, *A_here.shape) if start is None else start.to(inner)
            scan = _by_steps if chosen == "reference" else _by_lanes
            part, finals[index] = scan(
                wide, dts[index], A_here, Bs[index], Cs[index], start, bounds, reverse=index == 1
            )
            total = part if total is None else total + part
        assert total is not None
        if D is not None:
            total = total + D.to(accumulate) * wide
        y = gated(total, z).to(x.dtype)
    return (y, final_states((finals[0], finals[1]), direction)) if return_final_state else y


def _by_steps(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor,
    bounds: list[tuple[int, int]] | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The reference backend, one sequence after the other where a row holds several."""
    if bounds is None:
        return selective_scan_reference(x, dt, A, B, C, start, reverse=reverse)
    lengths = [end - first for first, end in bounds]
    # split, not slices: the gradient of a slice fills a whole tensor, which would make the loop quadratic
    pieces = zip(*(row.split_with_sizes(lengths, 1) for row in (x, dt, B, C)), start.unbind(0), strict=True)
    results = [
        selective_scan_reference(x_i, dt_i, A, B_i, C_i, start_i[None], reverse=reverse)
        for x_i, dt_i, B_i, C_i, start_i in pieces
    ]
    return torch.cat([y for y, _ in results], 1), torch.cat([final for _, final in results])


def _by_lanes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor,
    bounds: list[tuple[int, int]] | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The torch backend; where a row holds several sequences, those of about the same length are scanned side by side."""
    if bounds is None:
        return selective_scan_lanes(x, dt, A, B, C, start, reverse=reverse)
    sides = SideBySide.of(bounds, x.device)
    xs, dts, Bs, Cs = (sides.batches(row) for row in (x, dt, B, C))
    starts = sides.states(start)
    results = [
        selective_scan_lanes(x_i, dt_i, A, B_i, C_i, start_i, reverse=reverse)
        for x_i, dt_i, B_i, C_i, start_i in zip(xs, dts, Bs, Cs, starts, strict=True)
    ]
    return sides.row([y for y, _ in results]), sides.in_order([final for _, final in results])


def _unfit(A: Tensor) -> str | None:
    """Why the Triton kernels cannot compute a scan with this A, or None."""
    if A.is_complex():
        return "A is complex; backend='triton' takes a real A, backend='torch' both"
    if A.shape[1] > MAX_TRITON_STATE:
        return f"A has {A.shape[1]} states; backend='triton' takes up to {MAX_TRITON_STATE}, backend='torch' any number"
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
) -> None:
    check_direction(direction)
    check_filled("x", x, "batch", "length", "channels")
    for name, tensor in (("x", x), ("dt", dt), ("D", D), ("z", z), ("dt_bias", dt_bias)):
        if tensor is not None:
            check_real(name, tensor)
    if A.dim() < 2 or A.shape[1] < 1:
        raise ValueError(f"A has shape {tuple(A.shape)}; (channels, state >= 1) is needed")
    check_real("A", A, or_complex=True)
    for name, tensor in (("B", B), ("C", C)):
        check_real(name, tensor, or_complex=True)
        if tensor.is_complex() and not A.is_complex():
            raise ValueError(f"{name} is complex and A is real; give a complex A, or a real {name}")
    batch, length, channels = x.shape
    state = A.shape[1]

    def allowed(*shape: int) -> list[tuple[int, ...]]:
        return [shape, (*shape, 2)] if direction == "both" else [shape]

    check_shape("dt", dt, allowed(batch, length, channels))
    check_shape("A", A, allowed(channels, state))
    check_shape("B", B, allowed(batch, length, state))
    check_shape("C", C, allowed(batch, length, state))
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, allowed(channels))
    if D is not None:
        check_shape("D", D, [(channels,)])
    if z is not None:
        check_shape("z", z, [(batch, length, channels)])
