"""Scalar-decay state-space scan (SSD, the core of Mamba-2), forward, reverse or both directions at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from genossm.kernels.reference import ssd_reference
from genossm.kernels.ssd_torch import ssd_chunked

Direction = Literal["forward", "reverse", "both"]
Backend = Literal["auto", "torch", "reference"]
States = Tensor | tuple[Tensor, Tensor]

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
) -> Tensor | tuple[Tensor, States]:
    """State-space duality scan (Dao & Gu 2024, "Transformers are SSMs", eqs. 1 and 6).

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t;    y_t = h_t . C_t + D x_t

    `reverse` equals flip(ssd(flip(inputs))); `both` is the sum of forward and reverse with D added once, in one pass
    over x, B and C.

    Args:
        x: (batch, length, heads, head_dim), float64, float32, bfloat16 or float16; any strides.
        dt: (batch, length, heads), > 0; for `both` also (batch, length, heads, 2), index 0 forward, 1 reverse.
        A: (heads,), < 0; for `both` also (heads, 2).
        B, C: (batch, length, groups, state); `groups` divides `heads`.
        D: (heads,) or (heads, head_dim), or None.
        initial_state: (batch, heads, head_dim, state); for `both` a pair (forward, reverse). Zeros when None.
        return_final_state: also return the state after the last step (a pair for `both`), float32 (float64 for
            float64 inputs).
        direction: `forward`, `reverse` or `both`.
        chunk_size: positions of a chunk of the torch backend; None takes 64 on a CPU and 128 elsewhere.
        backend: `torch` (chunked matmul form), `reference` (step by step, slow), or `auto` (torch).

    Returns:
        y like x; with `return_final_state`, the pair (y, final state).

    Raises:
        ValueError: a shape, dtype, direction or backend that does not fit.
    """
    _check(x, dt, A, B, C, D, direction, chunk_size, backend)
    forward, reverse = direction != "reverse", direction != "forward"
    starts = _pair(initial_state, direction)
    separate_dt, separate_A = dt.dim() == 4, A.dim() == 2
    dts = (dt[..., 0], dt[..., 1]) if separate_dt else (dt, dt)
    As = (A[:, 0], A[:, 1]) if separate_A else (A, A)
    _check_states(starts, x, B)

    with torch.autocast(x.device.type, enabled=False):
        if backend == "reference":
            y, finals = _by_steps(x, dts, As, B, C, D, starts, forward=forward, reverse=reverse)
        else:
            size = chunk_size or min(DEFAULT_CHUNK.get(x.device.type, 128), max(1, x.shape[1]))
            y, finals = ssd_chunked(
                x,
                (dts[0] if forward else None, dts[1] if reverse else None),
                As,
                B,
                C,
                D,
                starts,
                chunk_size=size,
                shared=direction == "both" and not (separate_dt or separate_A),
            )
    if not return_final_state:
        return y
    if direction == "both":
        assert finals[0] is not None and finals[1] is not None
        return y, (finals[0], finals[1])
    final = finals[0] if forward else finals[1]
    assert final is not None
    return y, final


def _by_steps(
    x: Tensor,
    dts: tuple[Tensor, Tensor],
    As: tuple[Tensor, Tensor],
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: tuple[Tensor | None, Tensor | None],
    *,
    forward: bool,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=accumulate, device=x.device)
    total: Tensor | None = None
    finals: list[Tensor | None] = [None, None]
    for index, wanted in enumerate((forward, reverse)):
        if not wanted:
            continue
        start = starts[index]
        once = D if total is None else None
        y, finals[index] = ssd_reference(
            x.to(accumulate),
            dts[index],
            As[index],
            B,
            C,
            once,
            zeros if start is None else start,
            reverse=index == 1,
        )
        total = y if total is None else total + y
    assert total is not None
    return total.to(x.dtype), (finals[0], finals[1])


def _pair(states: States | None, direction: Direction) -> tuple[Tensor | None, Tensor | None]:
    if states is None:
        return None, None
    if direction == "both":
        if not isinstance(states, tuple) or len(states) != 2:
            raise ValueError("initial_state for direction='both' is not a pair; give (forward, reverse)")
        return states
    if not isinstance(states, Tensor):
        raise ValueError(
            f"initial_state for direction={direction!r} is a {type(states).__name__}; give one tensor"
        )
    return (states, None) if direction == "forward" else (None, states)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    direction: str,
    chunk_size: int | None,
    backend: str,
) -> None:
    if direction not in ("forward", "reverse", "both"):
        raise ValueError(f"direction is {direction!r}; allowed are 'forward', 'reverse' and 'both'")
    if backend not in ("auto", "torch", "reference"):
        raise ValueError(f"backend is {backend!r}; allowed are 'auto', 'torch' and 'reference'")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give a whole number of at least 1, or None")
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; (batch, length >= 1, heads, head_dim) is needed")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; a floating-point dtype is needed")
    batch, length, heads, head_dim = x.shape
    dt_shapes: list[tuple[int, ...]] = [(batch, length, heads)]
    A_shapes: list[tuple[int, ...]] = [(heads,)]
    if direction == "both":
        dt_shapes.append((batch, length, heads, 2))
        A_shapes.append((heads, 2))
    groups, state = (B.shape[2], B.shape[3]) if B.dim() == 4 else (0, 0)
    if groups == 0 or heads % groups:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; (batch, length, groups, state) is needed, groups dividing the {heads} heads"
        )
    _check_shape("dt", dt, dt_shapes)
    _check_shape("A", A, A_shapes)
    _check_shape("B", B, [(batch, length, groups, state)])
    _check_shape("C", C, [(batch, length, groups, state)])
    if D is not None:
        _check_shape("D", D, [(heads,), (heads, head_dim)])


def _check_states(starts: tuple[Tensor | None, Tensor | None], x: Tensor, B: Tensor) -> None:
    for start in starts:
        if start is not None:
            _check_shape("initial_state", start, [(x.shape[0], x.shape[2], x.shape[3], B.shape[3])])


def _check_shape(name: str, tensor: Tensor, allowed: Sequence[tuple[int, ...]]) -> None:
    if tuple(tensor.shape) not in allowed:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; allowed is {' or '.join(map(str, allowed))}"
        )
