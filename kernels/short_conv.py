"""Short depthwise convolution along the sequence, as it stands before a selective scan."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.arguments import accumulation, check_devices, check_real
from genossm.kernels.backend import Backend, choose_backend
from genossm.kernels.short_conv_torch import convolve_reference, convolve_torch, padded

OneWay = Literal["causal", "reverse", "centered"]
Padding = Literal["causal", "reverse", "centered", "both"]
Pair = tuple[Tensor, Tensor]

WIDEST = 8
"""The widest filter that the Triton backend takes."""


@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    padding: OneWay = "causal",
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    padding: OneWay = "causal",
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    backend: Backend = "auto",
) -> Pair: ...
@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    padding: Literal["both"],
    initial_state: Pair | None = None,
    return_final_state: Literal[False] = False,
    backend: Backend = "auto",
) -> Pair: ...
@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    padding: Literal["both"],
    initial_state: Pair | None = None,
    return_final_state: Literal[True],
    backend: Backend = "auto",
) -> tuple[Pair, Pair]: ...
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    padding: Padding = "causal",
    initial_state: Tensor | Pair | None = None,
    return_final_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | Pair | tuple[Pair, Pair]:
    """Depthwise convolution (cross-correlation) of each channel with its own short filter.

    `causal`: y_t = sum_k weight[k] x_{t - width + 1 + k}; `reverse` = flip(causal(flip(x))), so that only positions
    t and later are seen; `centered`: y_t = sum_k weight[k] x_{t - (width - 1) // 2 + k}; `both`: causal and reverse,
    in one pass over x. Outside the sequence x is 0. bfloat16 and float16 are computed in float32, weights as given.

    Args:
        x: (batch, length, channels).
        weight: (channels, width); for `both` also (2, channels, width), index 0 causal, 1 reverse.
        bias: (channels,) or None; for `both` also (2, channels).
        activation: `silu` or None.
        padding: which positions a filter sees.
        initial_state: (batch, width - 1, channels), the positions before the first (causal) or after the last
            (reverse), in sequence order; zeros when None. A pair (causal, reverse) for `both`; not for `centered`.
        return_final_state: also return what the next piece of a sequence needs as its initial_state: the last
            (causal) or first (reverse) width - 1 inputs; a pair for `both`; not for `centered`.
        backend: `triton` (CUDA; width of at most 8), `torch`, `reference` (sums written out, in x's dtype), or
            `auto` (triton on CUDA where it can, else torch). On CUDA `torch` convolves float32 as
            torch.backends.cudnn.conv.fp32_precision says, which may be in TF32; `triton` never does.

    Returns:
        (batch, length, channels) in x's dtype, for `both` the pair (causal, reverse); with `return_final_state`, the
        pair of that and the final state.

    Raises:
        ValueError: a shape, padding, activation, state or backend that does not fit.
    """
    _check(x, weight, bias, activation, padding)
    left, right = _states(x, weight.shape[-1], padding, initial_state, return_final_state)
    chosen = choose_backend(backend, x, _unfit(x, weight))
    causal, reverse = padding in ("causal", "both"), padding in ("reverse", "both")
    if chosen == "triton":
        from genossm.kernels.short_conv_triton import short_conv_triton

        y, y_reverse, last, first = short_conv_triton(
            x, weight, bias, left, right, padding=padding, silu=activation == "silu", final=return_final_state
        )
        outputs = [y, y_reverse] if padding == "both" else [y]
    else:
        width = weight.shape[-1]
        before = {"reverse": 0, "centered": (width - 1) // 2}.get(padding, width - 1)
        after = {"causal": 0, "centered": width // 2}.get(padding, width - 1)
        with torch.autocast(x.device.type, enabled=False):
            rows = padded(x, left, right, before, after)
            length = x.shape[1] + width - 1
            outputs = []
            if padding != "reverse":
                outputs.append(_one_way(rows[:, :length], weight, bias, activation, chosen, index=0))
            if reverse:
                outputs.append(_one_way(rows[:, -length:], weight, bias, activation, chosen, index=1))
            last, first = rows[:, x.shape[1] : length], rows[:, -length : rows.shape[1] - x.shape[1]]
    y = outputs[0]
    if not return_final_state:
        return (y, outputs[1]) if padding == "both" else y
    if padding == "both":
        return (y, outputs[1]), (last, first)
    return y, last if causal else first


def _one_way(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str, *, index: int
) -> Tensor:
    """The causal (index 0; centred too) or reverse (1) output, from the rows that its windows slide over."""
    weight = weight[index] if weight.dim() == 3 else weight
    bias = bias[index] if bias is not None and bias.dim() == 2 else bias
    filters = weight.flip(1) if index else weight
    if backend == "reference":
        dtype, convolve = rows.dtype, convolve_reference
    else:
        dtype, convolve = accumulation(rows.dtype), convolve_torch
    y = convolve(rows.to(dtype), filters.to(dtype), None if bias is None else bias.to(dtype))
    return (F.silu(y) if activation == "silu" else y).to(rows.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, padding: str) -> None:
    if padding not in ("causal", "reverse", "centered", "both"):
        raise ValueError(f"padding is {padding!r}; allowed are 'causal', 'reverse', 'centered' and 'both'")
    both = padding == "both"
    channels = x.shape[-1] if x.dim() else 0
    if (
        x.dim() != 3
        or x.shape[1] < 1
        or channels < 1
        or not (weight.dim() == 2 or (both and weight.dim() == 3 and weight.shape[0] == 2))
        or weight.shape[-2] != channels
        or weight.shape[-1] < 1
    ):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; (batch, length >= 1, channels >= 1) and "
            f"(channels, width) are needed{', or (2, channels, width)' if both else ''}"
        )
    if bias is not None and tuple(bias.shape) not in (
        [(channels,), (2, channels)] if both else [(channels,)]
    ):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; {(channels,)} is needed{f', or {(2, channels)}' if both else ''}"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_real(name, tensor)
    check_devices(x, weight=weight, bias=bias)
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; allowed are 'silu' and None")


def _states(
    x: Tensor, width: int, padding: str, states: Tensor | Pair | None, final: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The rows before the first and after the last position in x's dtype, None for zeros."""
    if padding == "centered" and (states is not None or final):
        name = "return_final_state" if states is None else "initial_state"
        raise ValueError(f"{name} does not go with padding='centered'; pad x itself instead")
    if states is None:
        return None, None
    if padding == "both":
        if not isinstance(states, tuple) or len(states) != 2:
            raise ValueError("initial_state for padding='both' is not a pair; give (causal, reverse)")
        pair: tuple[Tensor | None, Tensor | None] = states
    else:
        if not isinstance(states, Tensor):
            raise ValueError(
                f"initial_state for padding={padding!r} is a {type(states).__name__}; give one tensor"
            )
        pair = (states, None) if padding == "causal" else (None, states)
    shape = (x.shape[0], width - 1, x.shape[2])
    for state in pair:
        if state is not None:
            check_real("initial_state", state)
            if tuple(state.shape) != shape:
                raise ValueError(f"initial_state has shape {tuple(state.shape)}; {shape} is needed")
        check_devices(x, initial_state=state)
    left, right = pair
    return None if left is None else left.to(x.dtype), None if right is None else right.to(x.dtype)


def _unfit(x: Tensor, weight: Tensor) -> str | None:
    """Why Triton cannot compute this, or None."""
    if weight.shape[-1] > WIDEST:
        return (
            f"weight has width {weight.shape[-1]}; backend='triton' takes up to {WIDEST}, backend='torch' any"
        )
    if x.numel() == 0:
        return f"x has shape {tuple(x.shape)}, without elements; take backend='torch'"
    return None
