"""Selective state-space scan (S6, the core of Mamba), forward, reverse or both directions at once."""

from __future__ import annotations

import torch
from torch import Tensor

from genossm.kernels.arguments import (
    Backend,
    Direction,
    States,
    accumulation,
    by_direction,
    check_choices,
    check_real,
    check_shape,
    final_states,
    gated,
    state_pair,
    step_sizes,
)
from genossm.kernels.reference import selective_scan_reference
from genossm.kernels.selective_scan_torch import selective_scan_lanes


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
        initial_state: (batch, channels, state); for `both` a pair (forward, reverse). Zeros when None.
        return_final_state: also return the state after the last step (a pair for `both`), in the dtype computed in,
            complex for complex A.
        direction: `forward`, `reverse` or `both`.
        backend: `torch` (many lanes of the sequence at once), `reference` (step by step, slow), or `auto` (torch).

    Returns:
        y like x; with `return_final_state`, the pair (y, final state).

    Raises:
        ValueError: a shape, dtype, direction or backend that does not fit.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, direction, backend)
    accumulate = accumulation(x.dtype)
    inner = accumulate.to_complex() if A.is_complex() else accumulate
    starts = state_pair(initial_state, direction, (x.shape[0], x.shape[2], A.shape[1]))
    if not A.is_complex() and any(start is not None and start.is_complex() for start in starts):
        raise ValueError("initial_state is complex and A is real; give a complex A, or a real initial_state")

    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(accumulate)
        dt = step_sizes(dt, dt_bias, softplus=dt_softplus, dtype=accumulate).to(accumulate)
        dts = by_direction(dt, separate=dt.dim() == 4)
        As = by_direction(A.to(inner), separate=A.dim() == 3)
        Bs = by_direction(B.to(inner), separate=B.dim() == 4)
        Cs = by_direction(C.to(inner), separate=C.dim() == 4)
        y: Tensor | None = None
        finals: list[Tensor | None] = [None, None]
        for index in {"forward": (0,), "reverse": (1,), "both": (0, 1)}[direction]:
            start = starts[index]
            arguments = (wide, dts[index], As[index], Bs[index], Cs[index])
            if backend == "reference":
                zeros = torch.zeros((), dtype=inner, device=x.device).expand(x.shape[0], *As[index].shape)
                part, finals[index] = selective_scan_reference(
                    *arguments, zeros if start is None else start, reverse=index == 1
                )
            else:
                part, finals[index] = selective_scan_lanes(
                    *arguments, None if start is None else start.to(inner), reverse=index == 1
                )
            y = part if y is None else y + part
        assert y is not None
        if D is not None:
            y = y + D.to(accumulate) * wide
        y = gated(y, z).to(x.dtype)
    return (y, final_states((finals[0], finals[1]), direction)) if return_final_state else y


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
    backend: str,
) -> None:
    check_choices(direction, backend)
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; (batch, length >= 1, channels) is needed")
    for name, tensor in (("x", x), ("dt", dt), ("D", D), ("z", z), ("dt_bias", dt_bias)):
        if tensor is not None:
            check_real(name, tensor)
    if A.dim() < 2:
        raise ValueError(f"A has shape {tuple(A.shape)}; (channels, state) is needed")
    for name, tensor in (("B", B), ("C", C)):
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
