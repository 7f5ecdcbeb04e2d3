"""What the SSD scan launches: how its kernels are built, the buffers they share, and their order.

Forward: step sizes, chunk states of both directions, their passing on, output: four launches. The gradient keeps the
inputs only; it makes the states again, runs the same scan on dy for dx, and gets the rest from the pairs within a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from genossm.kernels.ssd_tiles import Tiles, padded
from genossm.kernels.ssd_triton_gradient import ssd_keys, ssd_pairs, ssd_skip_gradient, ssd_step_gradient
from genossm.kernels.ssd_triton_scan import ssd_output, ssd_pass, ssd_states, ssd_steps

PROGRAMS = 512
"""Programs that keep a device busy: longer inputs let more heads share a program."""
STEP_HEADS = 8
PASS_BLOCK = 512
PASS_STAGES = 4
"""Heads of a program for the step sizes; elements of a program and chunks in flight for passing states on."""

PRECISION = "tf32x3"
"""Products of float32 tensors: three of TF32 give float32's accuracy. Others are exact and summed in float32."""


@dataclass
class SsdLaunches:
    """Shapes, offsets and buffers that the launches of one call share."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None
    spans: Tensor | None
    firsts: Tensor | None
    forward: int
    reverse: int
    softplus: bool
    tiles: Tiles

    def __post_init__(self) -> None:
        x, B = self.x, self.B
        self.chunk = self.tiles.chunk
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state = B.shape[2], B.shape[3]
        self.packed = self.spans is not None
        self.even = not self.packed and self.length % self.chunk == 0
        if self.spans is None or self.firsts is None:
            self.chunks = -(-self.length // self.chunk)
            self.all_chunks = self.batch * self.chunks
            self.sequences = self.batch
        else:
            self.chunks = self.all_chunks = self.spans.shape[0]
            self.sequences = self.firsts.shape[0] - 1
        self.directions = self.forward + self.reverse
        self.separate = self.dt.dim() == 4 or (self.dt_bias is not None and self.dt_bias.dim() == 2)
        self.plane = self.batch * self.heads * self.length
        self.totals = self.all_chunks * self.heads
        self.state_plane = self.totals * self.head_dim * self.state
        # What is of the reverse direction comes after what is of the forward one, where both are run.
        self.sum_reverse = self.forward * self.plane
        self.step_reverse = self.forward * self.plane if self.separate else 0
        self.total_reverse = self.forward * self.totals
        self.padded = {
            "P": self.head_dim,
            "N": self.state,
            "BP": padded(self.head_dim),
            "BN": padded(self.state),
        }
        self.per_group = self.heads // self.groups

    def floats(self, *counts: int) -> list[Tensor]:
        """Float32 buffers of at least these many elements, by one allocation."""
        sizes = [-(-count // 32) * 32 for count in counts]
        return list(torch.split(self.empty(sum(sizes)), sizes))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def side(self, adjoint: bool) -> dict[str, int]:
        """Offsets and flags of what is seen from the left and from the right."""
        forward = {"sum": 0, "step": 0, "total": 0}
        reverse = {"sum": self.sum_reverse, "step": self.step_reverse, "total": self.total_reverse}
        left, right = (reverse, forward) if adjoint else (forward, reverse)
        return {
            "left": left["sum"],
            "right": right["sum"],
            "step_left": left["step"],
            "step_right": right["step"],
            "LEFT": self.reverse if adjoint else self.forward,
            "RIGHT": self.forward if adjoint else self.reverse,
            "ADJOINT": int(adjoint),
            "total_left": left["total"],
            "total_right": right["total"],
        }

    def dt_strides(self) -> tuple[int, ...]:
        strides = self.dt.stride()
        bias = (0, 0) if self.dt_bias is None else self.dt_bias.stride()
        A = self.A.stride()
        return (
            *strides[:3],
            strides[3] if len(strides) == 4 else 0,
            bias[0],
            bias[1] if len(bias) == 2 else 0,
            A[0],
            A[1] if len(A) == 2 else 0,
        )

    def sizes(self) -> None:
        """Step sizes, cumulative sums and totals."""
        planes = 2 if self.separate and self.directions == 2 else 1
        self.step, self.sum, self.stepped, self.far, self.far_adjoint, self.total = self.floats(
            planes * self.plane, self.directions * self.plane, self.directions * self.plane, self.plane, self.plane,
            self.directions * self.totals,
        )  # fmt: skip
        block = min(STEP_HEADS, triton.next_power_of_2(self.heads))
        ssd_steps[(self.all_chunks, -(-self.heads // block))](
            self.dt, self.dt_bias, self.A, self.step, self.sum, self.stepped, self.total, self.far, self.far_adjoint, self.spans,
            self.heads, self.length, self.chunks, self.plane, self.totals, *self.dt_strides(),
            Q=self.chunk, HB=block, FORWARD=self.forward, REVERSE=self.reverse, SEPARATE=int(self.separate),
            HAS_BIAS=self.dt_bias is not None, SOFTPLUS=self.softplus, PACKED=self.packed, EVEN=self.even, num_warps=4,
        )  # fmt: skip

    def carried(
        self, x: Tensor, B: Tensor, initial: Tensor | None, *, adjoint: bool
    ) -> tuple[Tensor, Tensor]:
        """The state that enters each chunk from either side, and the ones that leave the sequences."""
        side, tiles = self.side(adjoint), self.tiles.states
        local = self.empty(self.directions * self.state_plane)
        total_left, total_right = side.pop("total_left"), side.pop("total_right")
        ssd_states[(self.totals,)](
            x, B, self.sum, self.step, self.total, local, self.spans,
            self.heads, self.per_group, self.length, self.chunks, *x.stride()[:3], *B.stride()[:3],
            total_left=total_left, plane=self.state_plane, Q=self.chunk, BK=min(tiles.rows, self.chunk), **side,
            **self.padded, PACKED=self.packed, EVEN=self.even, PRECISION=PRECISION, **tiles.options(),
        )  # fmt: skip
        carry = self.empty(self.directions * self.state_plane, dtype=self.x.dtype)
        size = self.head_dim * self.state
        shape = (self.directions, self.sequences, self.heads, self.head_dim, self.state)
        final = self.empty(*shape)
        block = min(PASS_BLOCK, triton.next_power_of_2(size))
        blocks = -(-size // block)
        ssd_pass[(self.directions * self.sequences * self.heads * blocks,)](
            local, carry, self.total, initial, final, self.firsts, self.heads, self.chunks, size, blocks,
            self.state_plane, self.sequences * self.heads * size, total_left, total_right,
            LEFT=side["LEFT"], RIGHT=side["RIGHT"], ADJOINT=int(adjoint), HAS_INITIAL=initial is not None,
            PACKED=self.packed, BLOCK=block, STAGES=PASS_STAGES, num_warps=4,
        )  # fmt: skip
        return carry, final

    def output(
        self,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        carry: Tensor,
        *,
        adjoint: bool,
    ) -> Tensor:
        """y, or dx when x is dy and B and C have changed places."""
        side, tiles = self.side(adjoint), self.tiles.output
        side.pop("total_left")
        halves = self.all_chunks * 2
        heads = self.per_group
        while heads % 2 == 0 and halves * self.heads // heads < PROGRAMS:
            heads //= 2
        y = self.empty(*self.x.shape, dtype=self.x.dtype)
        ssd_output[(halves * (self.heads // heads),)](
            x, B, C, self.sum, self.stepped, self.step, self.total, self.far_adjoint if adjoint else self.far, carry, D, z, y, self.spans,
            self.heads, self.per_group, self.length, self.chunks, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
            *((0, 0, 0) if z is None else z.stride()[:3]), plane=self.state_plane, Q=self.chunk, HEADS=heads, **side,
            **self.padded, D_DIM=0 if D is None else D.dim(), HAS_Z=z is not None, PACKED=self.packed,
            EVEN=self.even, PRECISION=PRECISION, **tiles.options(),
        )  # fmt: skip
        return y

    def gradients(
        self, dy: Tensor, carry: Tensor, adjoint: Tensor, *, skip: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of dt, A, B, C, dt_bias, and of D by head where wanted."""
        x, B, C = self.x, self.B, self.C
        half = self.chunk // 2
        tile, keys = min(self.tiles.near.rows, half), self.tiles.keys
        blocks = half // tile
        pairs = self.empty(self.all_chunks, self.groups, self.chunk, self.chunk, dtype=x.dtype)
        rows, columns, diagonal, carried, inner = self.floats(
            3 * self.plane,
            3 * blocks * self.plane,
            2 * self.plane,
            4 * self.plane,
            2 * self.totals,
        )
        strides = (*x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3])
        flags = {
            "Q": self.chunk,
            "FORWARD": self.forward,
            "REVERSE": self.reverse,
            "PACKED": self.packed,
            "EVEN": self.even,
        }
        for near, launch in ((1, self.tiles.near), (0, self.tiles.far)):
            if near or self.length > half:
                ssd_pairs[(self.all_chunks * self.groups * blocks * 2,)](
                    x, dy, B, C, self.sum, self.step, self.far, pairs, rows, columns, diagonal, self.spans,
                    self.heads, self.groups, self.length, self.chunks, *strides,
                    forward=0, reverse=self.sum_reverse, step_forward=0, step_reverse=self.step_reverse,
                    plane=self.plane, **flags, BI=tile, NEAR=near, **self.padded, PRECISION=PRECISION,
                    **launch.options(),
                )  # fmt: skip
        dB, dC = self.empty(*B.shape, dtype=B.dtype), self.empty(*C.shape, dtype=C.dtype)
        tile_keys = min(keys.rows, half)
        for v, own, other, states, gradient in ((dy, C, B, carry, dC), (x, B, C, adjoint, dB)):
            ssd_keys[(self.all_chunks * self.groups * (self.chunk // tile_keys),)](
                v, own, other, self.sum, self.step, self.total, pairs, states, carry, gradient, carried, inner, self.spans,
                self.heads, self.groups, self.length, self.chunks, self.totals,
                *v.stride()[:3], *own.stride()[:3], *other.stride()[:3],
                plane=self.plane, state_plane=self.state_plane, **self.side(own is B), Q=self.chunk, BT=tile_keys,
                **self.padded, PACKED=self.packed, EVEN=self.even, PRECISION=PRECISION, **keys.options(),
            )  # fmt: skip
        ddt = self.empty(*self.dt.shape, dtype=self.dt.dtype)
        parts = self.empty(2, self.directions, self.all_chunks, self.heads)
        ssd_step_gradient[(self.totals,)](
            self.dt, self.dt_bias, self.A, self.step, self.total, rows, columns, diagonal, carried, inner,
            ddt, parts[1], parts[0], self.spans, self.heads, self.length, self.chunks, self.plane, self.totals,
            *self.dt_strides(), **flags, BLOCKS=blocks, SEPARATE_STEP=int(self.separate and self.directions == 2),
            SEPARATE_DT=int(self.dt.dim() == 4), HAS_BIAS=self.dt_bias is not None, SOFTPLUS=self.softplus, num_warps=4,
        )  # fmt: skip
        dA, dbias = parts.sum(2)
        by_position = diagonal[: self.plane].view(self.batch, self.heads, self.length)
        return (
            ddt,
            _by_parameter(dA, self.A),
            dB,
            dC,
            None if self.dt_bias is None else _by_parameter(dbias, self.dt_bias),
            by_position.sum((0, 2)) if skip else None,
        )

    def skip_gradient(self, dy: Tensor) -> Tensor:
        """Of D for every element of head_dim."""
        parts = self.empty(self.all_chunks, self.heads, self.head_dim)
        ssd_skip_gradient[(self.totals,)](
            self.x, dy, parts, self.spans, self.heads, self.length, self.chunks,
            *self.x.stride()[:3], *dy.stride()[:3], Q=self.chunk, BK=min(64, self.chunk), P=self.head_dim,
            BP=self.padded["BP"], PACKED=self.packed, EVEN=self.even, num_warps=4,
        )  # fmt: skip
        return parts.sum(0)


def _by_parameter(summed: Tensor, like: Tensor) -> Tensor:
    """(directions, heads) as the gradient of a parameter (heads,) or (heads, 2)."""
    return (summed.t() if like.dim() == 2 else summed.sum(0)).to(like.dtype)
