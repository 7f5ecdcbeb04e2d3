"""What the scan operators accept alike: directions, states, shapes, step sizes and gates, checked and made ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Direction = Literal["forward", "reverse", "both"]
States = Tensor | tuple[Tensor, Tensor]
Pair = tuple[Tensor | None, Tensor | None]
"""One tensor for each direction, (forward, reverse)."""

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)

SOFTPLUS_LINEAR_ABOVE = 40.0
"""softplus(t) = t above this, exact in float64; torch's own 20 would leave 1e-10."""


def check_direction(direction: str) -> None:
    """Raise a ValueError for a direction that there is not."""
    if direction not in ("forward", "reverse", "both"):
        raise ValueError(f"direction is {direction!r}; allowed are 'forward', 'reverse' and 'both'")


def check_shape(name: str, tensor: Tensor, allowed: Sequence[tuple[int, ...]]) -> None:
    """Raise a ValueError unless the tensor has one of the allowed shapes."""
    if tuple(tensor.shape) not in allowed:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; allowed is {' or '.join(map(str, allowed))}"
        )


def check_real(name: str, tensor: Tensor, *, or_complex: bool = False) -> None:
    """Raise a ValueError unless the tensor is of a real (or complex) floating-point dtype that torch calculates in."""
    if tensor.dtype not in REAL and not (or_complex and tensor.dtype in COMPLEX):
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; a floating-point dtype is needed: float64, float32, bfloat16"
            f"{', float16, complex64 or complex128' if or_complex else ' or float16'}"
        )


def check_filled(name: str, tensor: Tensor, *axes: str) -> None:
    """Raise a ValueError unless the tensor has these axes, and at least one element along each."""
    if tensor.dim() != len(axes) or 0 in tensor.shape:
        needed = ", ".join(f"{axis} >= 1" for axis in axes)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; ({needed}) is needed")


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError for a tensor that is not where x is: a kernel would read what is not there."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move {name} to {x.device}")


def state_pair(states: States | None, direction: Direction, shape: tuple[int, ...]) -> Pair:
    """The initial states as a pair (forward, reverse), None for zeros and for a direction that is not run."""
    pair: Pair = (None, None)
    if states is not None and direction == "both":
        if not isinstance(states, tuple) or len(states) != 2:
            raise ValueError("initial_state for direction='both' is not a pair; give (forward, reverse)")
        pair = states
    elif states is not None:
        if not isinstance(states, Tensor):
            raise ValueError(
                f"initial_state for direction={direction!r} is a {type(states).__name__}; give one tensor"
            )
        pair = (states, None) if direction == "forward" else (None, states)
    for state in pair:
        if state is not None:
            check_shape("initial_state", state, [shape])
    return pair


def stacked_states(pair: Pair, direction: Direction) -> Tensor | None:
    """The initial states that are run as one tensor (directions, ...), or None where none is given."""
    wanted = pair if direction == "both" else pair[:1] if direction == "forward" else pair[1:]
    given = [state for state in wanted if state is not None]
    if not given:
        return None
    return torch.stack([torch.zeros_like(given[0]) if state is None else state for state in wanted])


def final_states(finals: Pair, direction: Direction) -> States:
    """What `return_final_state` gives: the one that was computed, or both."""
    if direction == "both":
        assert finals[0] is not None and finals[1] is not None
        return finals[0], finals[1]
    final = finals[0] if direction == "forward" else finals[1]
    assert final is not None
    return final


def by_direction(tensor: Tensor, *, separate: bool) -> tuple[Tensor, Tensor]:
    """The forward and the reverse part of a tensor whose last axis of 2 means direction, or twice the same."""
    return (tensor[..., 0], tensor[..., 1]) if separate else (tensor, tensor)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """What a scan of this dtype is computed in: float64 in itself, all else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def step_sizes(dt: Tensor, dt_bias: Tensor | None, *, softplus: bool, dtype: torch.dtype) -> Tensor:
    """dt + dt_bias, through softplus where wanted.

    Args:
        dt: (batch, length, channels) or (batch, length, channels, 2).
        dt_bias: (channels,) or (channels, 2); a bias for each direction makes dt one for each direction.
        softplus: take log(1 + exp(.)) of the sum.
        dtype: what to compute in.
    """
    if dt_bias is not None:
        wide, bias = dt.to(dtype), dt_bias.to(dtype)
        if bias.dim() == 2 and dt.dim() == 3:
            wide = wide.unsqueeze(-1)
        elif bias.dim() == 1 and dt.dim() == 4:
            bias = bias.unsqueeze(-1)
        dt = wide + bias
    return F.softplus(dt.to(dtype), threshold=SOFTPLUS_LINEAR_ABOVE) if softplus else dt


def gated(y: Tensor, z: Tensor | None) -> Tensor:
    """y * silu(z) in y's dtype, or y alone."""
    return y if z is None else y * F.silu(z.to(y.dtype))
