"""The launches of the selective scan's Triton kernels: how work is shared out, buffers, and gradients put together.

Three launches make the scan: each chunk's own part of the states, their passing from chunk to chunk, the outputs. For the
gradient the inputs alone are kept: the same first two launches find the states and, with them, the adjoints that enter the
chunks, and a third one does the rest. Gradients that many programs add to are written as parts and summed in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from genossm.kernels.backend import interpreting
from genossm.kernels.selective_scan_forward import output_kernel
from genossm.kernels.selective_scan_gradient import gradient_kernel
from genossm.kernels.selective_scan_guard import exchanges_fit
from genossm.kernels.selective_scan_pair_gradient import pair_gradient_kernel
from genossm.kernels.selective_scan_states import chunk_states_kernel, pass_states_kernel
from genossm.kernels.triton_support import contiguous, on_device


@dataclass(frozen=True)
class Shares:
    """How a kernel's work is shared out: states and channels of a thread, warps of a program, registers of a thread."""

    states: int
    channels: int
    warps: int
    registers: int | None = None


SHARES = {
    "states": Shares(8, 4, 2, 168),
    "pair_states": Shares(8, 4, 2, 224),
    "adjoints": Shares(8, 2, 4, 128),
    "pair_adjoints": Shares(8, 2, 1, 168),
    "output": Shares(8, 4, 2, 168),
    "gradient": Shares(8, 2, 4, 168),
    "pair_gradient": Shares(8, 2, 1, 168),
}
CHUNK = {"forward": 128, "backward": 128}
"""Positions of a chunk; shorter where there would be too few chunks to fill the device."""
SHORTEST_CHUNK = 32
WARPS_WANTED = 12
"""Warps for each multiprocessor that a chunk is shortened for, and that have a place to keep what waits between traversals."""
PASS_BLOCK, PASS_WARPS, PASS_AHEAD = 64, 2, 8
INTERPRETED_PROCESSORS = 1


def run_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """y and the final states (direction, sequence, channel, state) for the operator's arguments."""
    result: tuple[Tensor, Tensor] = _with_fitting_kernels(_forward, *inputs)
    return result


def run_backward(*inputs: Any) -> list[Tensor]:
    """The gradients by the operator's ten tensors, empty for those that are absent, given those by y and the final states."""
    result: list[Tensor] = _with_fitting_kernels(_backward, *inputs)
    return result


def chunk_length(purpose: str, x: Tensor, state: int) -> int:
    """Positions of a chunk, for a "forward" or "backward" call on x with so many states to a channel."""
    chunk = CHUNK[purpose]
    if interpreting():
        return chunk
    batch, length, channels = x.shape
    wanted = _processors(x.device) * WARPS_WANTED * 32 * 16  # states that a full device holds in registers
    while chunk > SHORTEST_CHUNK and batch * channels * state * (length // chunk) < wanted:
        chunk //= 2
    return chunk


class _Misfit(Exception):
    """A kernel was compiled to a layout that its exchanges between threads do not fit."""


_FITTING: dict[int, Any] = {}
"""Compiled kernels whose layout was looked at, by id, kept so that no other takes their id."""
_PLAIN = [interpreting()]
"""Whether kernels are compiled without exchanges of their own: in the interpreter, and once one did not fit."""


def _with_fitting_kernels(function: Callable[..., Any], *inputs: Any) -> Any:
    with on_device(inputs[-15]):  # x
        if not _PLAIN[0]:
            try:
                return function(*inputs, plain=False)
            except _Misfit:
                _PLAIN[0] = True
        return function(*inputs, plain=True)


def _forward(*inputs: Any, plain: bool) -> tuple[Tensor, Tensor]:
    call = _Call(inputs, "forward", plain=plain)
    states, _, ends = call.entering(None, None)
    options, tiles, per_tile = call.shares("output")
    y = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    programs = call.batch * call.chunks * tiles
    scratch = states
    if call.directions == 2:
        programs = call.programs(tiles, options["num_warps"])
        scratch = call.float32(programs, call.chunk, per_tile)
    call.launch(
        output_kernel,
        (programs,),
        *(
            call.x,
            call.dt,
            call.A,
            call.B,
            call.C,
            contiguous(call.D),
            call.bias,
            call.z,
            y,
            states,
            scratch,
        ),
        *call.sizes(tiles),
        *call.strides(),
        call.spans,
        DIRECTIONS=call.directions,
        HAS_D=call.D is not None,
        **options,
    )
    return y, ends


def _backward(dy: Tensor | None, dfinal: Tensor | None, *inputs: Any, plain: bool) -> list[Tensor]:
    call = _Call(inputs, "backward", plain=plain)
    x, dt, A, D, z, bias = call.x, call.dt, call.A, call.D, call.z, call.bias
    dy = torch.zeros_like(x) if dy is None else _unit_stride(dy)
    call.options["ALIGNED"] = call.options["ALIGNED"] and _aligned(dy)
    states, sums, ends = call.entering(dy, dfinal)
    options, tiles, per_tile = call.shares("pair_gradient" if call.pair else "gradient")
    programs = call.programs(tiles, options["num_warps"])
    scratch = call.float32(programs, call.chunk + 1, 3, per_tile)
    own = 1 if call.pair else call.directions  # parts of what each direction may have of its own
    parts = tiles * options["num_warps"]
    dBC = call.float32(2, own, call.batch, call.length, parts, call.state)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = dx if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    summed_dt = dt.dim() == 3 and own == 2
    if summed_dt:
        ddt = call.float32(2, *dt.shape).movedim(0, -1)
    else:
        ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    kernel = pair_gradient_kernel if call.pair else gradient_kernel
    call.launch(
        kernel,
        (programs,),
        *(x, dt, A, call.B, call.C, contiguous(D), bias, z, dy, states, sums, scratch, dx, ddt, dz, dBC),
        *call.sizes(tiles),
        *call.strides(),
        *dy.stride()[:2],
        *ddt.stride()[1:3],
        ddt.stride(3) if own == 2 else 0,
        call.spans,
        DIRECTIONS=call.directions,
        HAS_D=D is not None,
        **options,
    )
    by_B, by_C = (part.sum(-2) for part in dBC)
    dA = states[:own].sum((1, 2)).permute(2, 1, 0)
    by_channels = sums.sum((1, 2))

    def fitted(gradient: Tensor, like: Tensor, rank: int) -> Tensor:
        """A gradient whose last axis is the direction, as its input has it."""
        if like.dim() == rank:
            gradient = gradient.sum(-1) if own == 2 else gradient[..., 0]
        return gradient.to(like.dtype).contiguous()

    def none() -> Tensor:
        return dx.new_empty(0)

    # An operator may not give the same memory twice, not even an empty tensor.
    gradients = [
        dx,
        ddt.sum(-1).to(dt.dtype) if summed_dt else ddt,
        fitted(dA, A, 2),
        fitted(by_B.movedim(0, -1), call.B, 3),
        fitted(by_C.movedim(0, -1), call.C, 3),
        none() if D is None else by_channels[own].to(D.dtype, copy=True),
        none() if z is None else dz,
        none() if bias is None else fitted(by_channels[:own].t(), bias, 1),
        none(),
        none(),
    ]
    for slot, start in enumerate(call.starts, call.first):
        if start is not None:
            gradients[8 + slot] = ends[call.directions + slot - call.first].to(start.dtype, copy=True)
    return gradients


class _Call:
    """One call's inputs, sizes and strides, as the kernels take them."""

    def __init__(self, inputs: tuple[Any, ...], purpose: str, *, plain: bool) -> None:
        self.plain = plain
        self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias, start, reverse_start = inputs[:10]
        # what neighbouring threads and registers hold has to lie side by side, or the compiler exchanges it between threads
        self.x, self.z = _unit_stride(self.x), None if self.z is None else _unit_stride(self.z)
        self.B, self.C = _dense_rows(self.B), _dense_rows(self.C)
        self.A = _small_strides(self.A)
        self.spans, self.firsts, self.softplus, direction, packed_chunk = inputs[10:]
        self.batch, self.length, self.channels = self.x.shape
        self.state = self.A.shape[1]
        self.starts = (
            (start, reverse_start)
            if direction == "both"
            else (start if direction == "forward" else reverse_start,)
        )
        self.directions = len(self.starts)
        self.first = 1 if direction == "reverse" else 0
        bias_rank = 1 if self.bias is None else self.bias.dim()
        own = self.dt.dim() + self.A.dim() + self.B.dim() + self.C.dim() + bias_rank > 3 + 2 + 3 + 3 + 1
        self.pair = direction == "both" and not own
        if self.spans is None:
            self.chunk = chunk_length(purpose, self.x, self.state)
            self.chunks, self.sequences = triton.cdiv(self.length, self.chunk), self.batch
        else:
            self.chunk, self.chunks = packed_chunk, self.spans.shape[0]
            self.sequences = self.firsts.shape[0] - 1
        self.precise = self.dt.dtype == torch.float32
        self.options = {
            "HAS_BIAS": self.bias is not None,
            "HAS_Z": self.z is not None,
            "DT_UNIT": self.dt.stride(2) == 1,
            "ALIGNED": self.channels % 16 == 0 and _aligned(self.x, self.z, self.B, self.C),
            "SOFTPLUS": self.softplus,
            "PRECISE": self.precise,
            "T": self.chunk,
            "PACKED": self.spans is not None,
        }

    def shares(self, kernel: str) -> tuple[dict[str, Any], int, int]:
        """What one kernel's work is shared out by, the tiles of channels, and the channels of a tile."""
        wanted = SHARES[kernel]
        padded = max(2, triton.next_power_of_2(self.state))
        # as many as one load of 16 bytes takes: more would be laid out across threads
        item = max(tensor.element_size() for tensor in (self.x, self.B, self.C))
        states = max(min(padded, wanted.states, 16 // item), padded // 32)
        threads = padded // states
        channels, warps = min(wanted.channels, 16 // item), wanted.warps
        while warps > 1 and 32 * warps // threads * channels >= 2 * self.channels:
            warps //= 2
        per_tile = 32 * warps // threads * channels
        options = {
            "M": states,
            "K": channels,
            "LN": threads,
            "TH": 32 * warps,
            "EVEN_D": self.channels % per_tile == 0,
            "EVEN_N": self.state == padded,
            "PLAIN": self.plain,
            "num_warps": warps,
            "maxnreg": wanted.registers,
            **self.options,
        }
        return options, triton.cdiv(self.channels, per_tile), per_tile

    def sizes(self, tiles: int) -> tuple[int, ...]:
        return self.batch, self.length, self.channels, self.state, self.chunks, tiles, self.first

    def strides(self) -> tuple[int, ...]:
        """Of x, dt, A, B, C, dt_bias and z; 0 along the direction for what both share, and for what is absent."""
        bias = (0, 0) if self.bias is None else _with_direction(self.bias, 1)
        z = (0, 0) if self.z is None else self.z.stride()[:2]
        return (
            *self.x.stride()[:2],
            *_with_direction(self.dt, 3),
            *_with_direction(self.A, 2),
            *_rows_with_direction(self.B),
            *_rows_with_direction(self.C),
            *bias,
            *z,
        )

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def entering(self, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The states and, with dy, the adjoints that enter each chunk; a buffer of decay sums; what leaves the last chunks."""
        adjoint = dy is not None
        name = ("pair_" if self.pair else "") + ("adjoints" if adjoint else "states")
        options, tiles, _ = self.shares(name)
        slots = self.directions * (2 if adjoint else 1)
        states = self.float32(slots, self.batch, self.chunks, self.state, self.channels)
        sums = self.float32(self.directions + 1, self.batch, self.chunks, self.channels)
        ends = self.float32(slots, self.sequences, self.channels, self.state)
        grid = (self.batch * self.chunks * tiles, 1 if self.pair else self.directions)
        dy_strides = (0, 0) if dy is None else dy.stride()[:2]
        self.launch(
            chunk_states_kernel,
            grid,
            *(self.x, self.dt, self.A, self.B, self.C, self.bias, self.z, dy, states, sums),
            *self.sizes(tiles),
            *self.strides(),
            *dy_strides,
            self.spans,
            PAIR=self.pair,
            ADJOINT=adjoint,
            **options,
        )
        starts = self._stacked((*self.starts, *_each(dfinal, self.directions)) if adjoint else self.starts)
        pass_states_kernel[(self.sequences * triton.cdiv(self.state * self.channels, PASS_BLOCK), slots)](
            *(states, sums, self.A, starts, ends),
            *(self.sequences, self.channels, self.state, self.chunks, self.directions, self.first),
            *_with_direction(self.A, 2),
            0 if self.pair else sums.stride(0),
            self.firsts,
            HAS_START=starts is not None,
            BLOCK=PASS_BLOCK,
            AHEAD=PASS_AHEAD,
            PACKED=self.spans is not None,
            num_warps=PASS_WARPS,
        )
        return states, sums, ends

    def _stacked(self, starts: tuple[Tensor | None, ...]) -> Tensor | None:
        if all(start is None for start in starts):
            return None
        stacked = torch.zeros(
            (len(starts), self.sequences, self.channels, self.state),
            dtype=torch.float32,
            device=self.x.device,
        )
        for slot, start in enumerate(starts):
            if start is not None:
                stacked[slot].copy_(start)
        return stacked

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Run a kernel that exchanges numbers between threads; Misfit, if its layout turns out not to fit."""
        compiled = kernel[grid](*arguments, **options)
        if self.plain or compiled is None or id(compiled) in _FITTING:
            return
        if not exchanges_fit(compiled.asm["ttgir"]):
            raise _Misfit
        _FITTING[id(compiled)] = compiled

    def programs(self, tiles: int, warps: int) -> int:
        """Programs that take one chunk of a tile after another, so that what they keep between traversals stays few."""
        room = _processors(self.x.device) * max(1, WARPS_WANTED // warps)
        return int(min(self.batch * self.chunks * tiles, room))


def _with_direction(tensor: Tensor, rank: int) -> tuple[int, ...]:
    strides = tensor.stride()
    return strides if tensor.dim() > rank else (*strides, 0)


def _unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with its channels laid out densely; a copy if it has to be."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _dense_rows(tensor: Tensor) -> Tensor:
    """B or C with its states laid out densely and, where they can be, aligned; a copy if it has to be, which is small."""
    if tensor.stride(2) == 1 and (_aligned(tensor) or tensor.shape[2] % 16):
        return tensor
    if tensor.dim() == 4:
        return tensor.movedim(3, 0).clone(memory_format=torch.contiguous_format).movedim(0, 3)
    return tensor.clone(memory_format=torch.contiguous_format)


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether every row begins at a multiple of 16 elements and bytes, so that several elements may be loaded at once."""
    return all(
        tensor is None
        or (
            tensor.data_ptr() % 16 == 0
            and all(stride % 16 == 0 for axis, stride in enumerate(tensor.stride()) if axis != 2)
        )
        for tensor in tensors
    )


def _small_strides(A: Tensor) -> Tensor:
    """A itself, unless its offsets need 64 bits."""
    reach = sum(stride * (size - 1) for stride, size in zip(A.stride(), A.shape, strict=True))
    return A if reach < 2**31 else A.contiguous()


def _rows_with_direction(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of batch, length and direction."""
    return tensor.stride(0), tensor.stride(1), tensor.stride(3) if tensor.dim() == 4 else 0


def _each(stacked: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    return (None,) * count if stacked is None else tuple(stacked.unbind(0))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
