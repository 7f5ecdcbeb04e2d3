"""What the SSD scan launches for inputs of given shapes: sizes, offsets, grids and constants of every kernel."""

from __future__ import annotations

from functools import cached_property

import torch
import triton
from torch import Tensor

from genossm.kernels.ssd_tiles import Launch, Tiles, padded, padded_head
from genossm.kernels.ssd_triton_gradient import ssd_keys, ssd_pairs, ssd_skip_gradient, ssd_step_gradient
from genossm.kernels.ssd_triton_scan import ssd_output, ssd_pass, ssd_states, ssd_steps
from genossm.kernels.triton_launch import KernelLaunch

PROGRAMS = 512
"""Programs that keep a device busy: longer inputs let more heads share a program."""
STEP_HEADS = 8
PASS_BLOCK = 512
PASS_STAGES = 4
"""Heads of a program for the step sizes; elements of a program and chunks in flight for passing states on."""

PRECISION = "tf32x3"
"""Products of float32 tensors: three of TF32 give float32's accuracy. Others are exact and summed in float32."""

Strides = tuple[int, ...]


class SsdPlan:
    """Sizes, and the launches made of them; holds no tensor.

    One plan serves calls whose every tensor, also those that only a launch sees, has the same `signature`.

    What is of the reverse direction comes after what is of the forward one in every buffer, where both are run.
    "Adjoint" is the scan of dy with B and C changed for each other, which runs the other way.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        dy: Tensor | None,
        spans: Tensor | None,
        firsts: Tensor | None,
        *,
        direction: int,
        softplus: bool,
        tiles: Tiles,
    ) -> None:
        self.tiles, self.chunk, self.softplus = tiles, tiles.chunk, softplus
        self.forward, self.reverse = int(direction != 1), int(direction != 0)
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state = B.shape[2], B.shape[3]
        self.per_group = self.heads // self.groups
        self.packed = spans is not None
        self.even = not self.packed and self.length % self.chunk == 0
        if spans is None or firsts is None:
            self.chunks = -(-self.length // self.chunk)
            self.all_chunks = self.batch * self.chunks
            self.sequences = self.batch
        else:
            self.chunks = self.all_chunks = spans.shape[0]
            self.sequences = firsts.shape[0] - 1
        self.directions = self.forward + self.reverse
        self.biased = dt_bias is not None
        self.separate_dt = dt.dim() == 4
        self.separate = self.separate_dt or (dt_bias is not None and dt_bias.dim() == 2)
        self.step_planes = 2 if self.separate and self.directions == 2 else 1
        self.plane = self.batch * self.heads * self.length
        self.totals = self.all_chunks * self.heads
        self.state_size = self.head_dim * self.state
        self.state_plane = self.totals * self.state_size
        self.final_shape = (self.directions, self.sequences, self.heads, self.head_dim, self.state)
        self.rows = min(tiles.near.rows, self.chunk // 2)
        self.blocks = self.chunk // self.rows
        self._x, self._B, self._C = x.stride()[:3], B.stride()[:3], C.stride()[:3]
        self._dy = (0, 0, 0) if dy is None else dy.stride()[:3]
        strides, A_strides, bias = dt.stride(), A.stride(), () if dt_bias is None else dt_bias.stride()
        self._dt = (
            *strides[:3], *(strides[3:] or (0,)), *(bias[:1] or (0,)), *(bias[1:] or (0,)), A_strides[0],
            *(A_strides[1:] or (0,)),
        )  # fmt: skip
        self._sizes: dict[str, object] = {
            "P": self.head_dim,
            "N": self.state,
            "BP": padded_head(self.head_dim, x.dtype),
            "BN": padded(self.state),
        }
        self._form: dict[str, object] = {"Q": self.chunk, "PACKED": self.packed, "EVEN": self.even}
        self._outputs: dict[tuple[bool, int, Strides | None], KernelLaunch] = {}

    def _sides(self, adjoint: bool) -> dict[str, int]:
        """Offsets of what is seen from the left and from the right, and whether there is."""
        forward = {"sum": 0, "step": 0, "total": 0}
        reverse = {
            "sum": self.forward * self.plane,
            "step": self.forward * self.plane if self.separate else 0,
            "total": self.forward * self.totals,
        }
        left, right = (reverse, forward) if adjoint else (forward, reverse)
        return {
            "left": left["sum"],
            "right": right["sum"],
            "step_left": left["step"],
            "step_right": right["step"],
            "total_left": left["total"],
            "total_right": right["total"],
            "LEFT": self.reverse if adjoint else self.forward,
            "RIGHT": self.forward if adjoint else self.reverse,
            "ADJOINT": int(adjoint),
        }

    @cached_property
    def steps(self) -> KernelLaunch:
        """Tensors: dt, dt_bias, A, step, sum, stepped, total, far, far_adjoint, spans."""
        block = min(STEP_HEADS, triton.next_power_of_2(self.heads))
        return KernelLaunch(
            ssd_steps,
            (self.all_chunks, -(-self.heads // block)),
            (self.heads, self.length, self.chunks, self.plane, self.totals, *self._dt),
            {
                **self._form,
                "HB": block,
                "FORWARD": self.forward,
                "REVERSE": self.reverse,
                "SEPARATE": int(self.separate),
                "HAS_BIAS": self.biased,
                "SOFTPLUS": self.softplus,
            },
            {"num_warps": 4},
        )

    @cached_property
    def states(self) -> tuple[KernelLaunch, KernelLaunch]:
        """Of the scan and of the adjoint. Tensors: x, B, sum, step, total, local, spans."""
        return self._states(False), self._states(True)

    def _states(self, adjoint: bool) -> KernelLaunch:
        sides, tiles = self._sides(adjoint), self.tiles.states
        del sides["total_right"]
        x, B = (self._dy, self._C) if adjoint else (self._x, self._B)
        return KernelLaunch(
            ssd_states,
            (self.totals,),
            (self.heads, self.per_group, self.length, self.chunks, *x, *B),
            {
                **sides, **self._sizes, **self._form, "plane": self.state_plane, "BK": min(tiles.rows, self.chunk),
                "PRECISION": PRECISION,
            },
            tiles.options(),
        )  # fmt: skip

    @cached_property
    def passing(self) -> dict[tuple[bool, bool], KernelLaunch]:
        """By whether of the adjoint and whether states enter. Tensors: local, carry, total, initial, final, firsts."""
        cases = [(adjoint, entering) for adjoint in (False, True) for entering in (False, True)]
        return {case: self._passing(*case) for case in cases}

    def _passing(self, adjoint: bool, entering: bool) -> KernelLaunch:
        sides, size = self._sides(adjoint), self.state_size
        block = min(PASS_BLOCK, triton.next_power_of_2(size))
        blocks = -(-size // block)
        return KernelLaunch(
            ssd_pass,
            (self.directions * self.sequences * self.heads * blocks,),
            (
                self.heads, self.chunks, size, blocks, self.state_plane, self.sequences * self.heads * size,
                sides["total_left"], sides["total_right"],
            ),
            {
                "LEFT": sides["LEFT"], "RIGHT": sides["RIGHT"], "ADJOINT": int(adjoint), "HAS_INITIAL": entering,
                "PACKED": self.packed, "BLOCK": block, "STAGES": PASS_STAGES,
            },
            {"num_warps": 4},
        )  # fmt: skip

    def output(self, adjoint: bool, D: Tensor | None, z: Tensor | None) -> KernelLaunch:
        """Tensors: x, B, C, sum, stepped, step, total, far, carry, D, z, y, spans (x is dy, B is C in the adjoint)."""
        D_dim, z_strides = 0 if D is None else D.dim(), None if z is None else z.stride()[:3]
        key = (adjoint, D_dim, z_strides)
        if key not in self._outputs:
            self._outputs[key] = self._output(*key)
        return self._outputs[key]

    def _output(self, adjoint: bool, D_dim: int, z: Strides | None) -> KernelLaunch:
        sides = self._sides(adjoint)
        del sides["total_left"]
        halves = self.all_chunks * 2
        heads = self.per_group
        while heads % 2 == 0 and halves * self.heads // heads < PROGRAMS:
            heads //= 2
        x, B, C = (self._dy, self._C, self._B) if adjoint else (self._x, self._B, self._C)
        return KernelLaunch(
            ssd_output,
            (halves * (self.heads // heads),),
            (self.heads, self.per_group, self.length, self.chunks, *x, *B, *C, *(z or (0, 0, 0))),
            {
                **sides, **self._sizes, **self._form, "plane": self.state_plane, "HEADS": heads, "D_DIM": D_dim,
                "HAS_Z": z is not None, "PRECISION": PRECISION,
            },
            self.tiles.output.options(),
        )  # fmt: skip

    @cached_property
    def pairs(self) -> tuple[KernelLaunch, ...]:
        """Tensors: x, dy, B, C, sum, stepped, step, pairs, rows, columns, diagonal, spans."""
        launches = [self._pairs(True, self.tiles.near)]
        if self.length > self.rows:
            launches.append(self._pairs(False, self.tiles.far))
        return tuple(launches)

    def _pairs(self, itself: bool, tiles: Launch) -> KernelLaunch:
        blocks = self.blocks if itself else self.blocks * (self.blocks - 1)
        sides = self._sides(False)
        return KernelLaunch(
            ssd_pairs,
            (self.all_chunks * self.groups * blocks,),
            (
                self.heads, self.groups, self.length, self.chunks, *self._x, *self._dy, *self._B, *self._C,
                sides["right"], sides["step_right"], self.plane,
            ),
            {
                **self._sizes, **self._form, "BT": self.rows, "FORWARD": self.forward, "REVERSE": self.reverse,
                "ITSELF": int(itself), "PRECISION": PRECISION,
            },
            tiles.options(),
        )  # fmt: skip

    @cached_property
    def keys(self) -> tuple[KernelLaunch, KernelLaunch]:
        """Of dC and of dB. Tensors: v, own, other, sum, step, total, pairs, states, across, gradient, carried, inner, spans."""
        return self._keys(False), self._keys(True)

    def _keys(self, adjoint: bool) -> KernelLaunch:
        tiles = self.tiles.keys
        rows = min(tiles.rows, self.chunk // 2)
        strides = (*self._x, *self._B, *self._C) if adjoint else (*self._dy, *self._C, *self._B)
        return KernelLaunch(
            ssd_keys,
            (self.all_chunks * self.groups * (self.chunk // rows),),
            (self.heads, self.groups, self.length, self.chunks, self.totals, *strides),
            {
                **self._sides(adjoint), **self._sizes, **self._form, "plane": self.plane,
                "state_plane": self.state_plane, "BT": rows, "PRECISION": PRECISION,
            },
            tiles.options(),
        )  # fmt: skip

    @cached_property
    def step_gradient(self) -> KernelLaunch:
        """Tensors: dt, dt_bias, A, step, total, rows, columns, diagonal, carried, inner, ddt, dbias, dA, spans."""
        return KernelLaunch(
            ssd_step_gradient,
            (self.totals,),
            (self.heads, self.length, self.chunks, self.plane, self.totals, *self._dt),
            {
                **self._form, "BLOCKS": self.blocks, "FORWARD": self.forward, "REVERSE": self.reverse,
                "SEPARATE_STEP": int(self.step_planes == 2), "SEPARATE_DT": int(self.separate_dt),
                "HAS_BIAS": self.biased, "SOFTPLUS": self.softplus,
            },
            {"num_warps": 4},
        )  # fmt: skip

    @cached_property
    def skip_gradient(self) -> KernelLaunch:
        """Of D for every element of head_dim. Tensors: x, dy, parts, spans."""
        return KernelLaunch(
            ssd_skip_gradient,
            (self.totals,),
            (self.heads, self.length, self.chunks, *self._x, *self._dy),
            {**self._form, "BK": min(64, self.chunk), "P": self.head_dim, "BP": self._sizes["BP"]},
            {"num_warps": 4},
        )


def floats(device: torch.device, *counts: int) -> list[Tensor]:
    """Float32 buffers of at least these many elements, by one allocation."""
    sizes = [-(-count // 32) * 32 for count in counts]
    return list(torch.split(torch.empty(sum(sizes), dtype=torch.float32, device=device), sizes))
