"""One call of the SSD scan: the buffers that its kernels share, and their order.

Forward: step sizes, chunk states of both directions, their passing on, output: four launches. The gradient keeps the
inputs only; it makes the states again, runs the same scan on dy for dx, and gets the rest from the pairs within a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genossm.kernels.ssd_plan import SsdPlan, floats


class SsdLaunches:
    """Step sizes and their sums, and what is computed from them.

    What a chunk adds to the state is kept in the inputs' dtype, like the states that enter the chunks, which are a factor
    of products; they are summed in float32.
    """

    def __init__(
        self,
        plan: SsdPlan,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        spans: Tensor | None,
        firsts: Tensor | None,
    ) -> None:
        self.plan = plan
        self.x, self.dt, self.A, self.B, self.C, self.dt_bias = x, dt, A, B, C, dt_bias
        self.spans, self.firsts = spans, firsts
        plane = plan.plane
        self.step, self.sum, self.stepped, self.far, self.far_adjoint, self.total = floats(
            x.device, plan.step_planes * plane, plan.directions * plane, plan.directions * plane, plane, plane,
            plan.directions * plan.totals,
        )  # fmt: skip
        plan.steps(
            dt, dt_bias, A, self.step, self.sum, self.stepped, self.total, self.far, self.far_adjoint, spans
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def carried(
        self, x: Tensor, B: Tensor, initial: Tensor | None, *, adjoint: bool
    ) -> tuple[Tensor, Tensor]:
        """The state that enters each chunk from either side, and the ones that leave the sequences."""
        plan = self.plan
        count = plan.directions * plan.state_plane
        local, carry = (self.empty(count, dtype=x.dtype) for _ in range(2))
        final = self.empty(*plan.final_shape)
        plan.states[adjoint](x, B, self.sum, self.step, self.total, local, self.spans)
        plan.passing[adjoint, initial is not None](local, carry, self.total, initial, final, self.firsts)
        return carry, final

    def output(self, D: Tensor | None, z: Tensor | None, carry: Tensor) -> Tensor:
        """y."""
        y = self.empty(*self.x.shape, dtype=self.x.dtype)
        self.plan.output(False, D, z)(
            self.x, self.B, self.C, self.sum, self.stepped, self.step, self.total, self.far, carry, D, z, y, self.spans
        )  # fmt: skip
        return y

    def input_gradient(self, dy: Tensor, D: Tensor | None, adjoint: Tensor) -> Tensor:
        """dx: the scan of dy, with B and C changed for each other."""
        dx = self.empty(*self.x.shape, dtype=self.x.dtype)
        self.plan.output(True, D, None)(
            dy, self.C, self.B, self.sum, self.stepped, self.step, self.total, self.far_adjoint, adjoint, D, None, dx,
            self.spans,
        )  # fmt: skip
        return dx

    def gradients(
        self, dy: Tensor, carry: Tensor, adjoint: Tensor, *, skip: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of dt, A, B, C, dt_bias, and of D by head where wanted."""
        plan, x, B, C, spans = self.plan, self.x, self.B, self.C, self.spans
        pairs = self.empty(plan.all_chunks, plan.groups, plan.chunk, plan.chunk, dtype=x.dtype)
        by_block = (plan.blocks + 1) * plan.plane
        rows, columns, diagonal, carried, inner = floats(
            x.device, by_block, by_block, 2 * plan.plane, 4 * plan.plane, 2 * plan.totals
        )
        for launch in plan.pairs:
            launch(x, dy, B, C, self.sum, self.stepped, self.step, pairs, rows, columns, diagonal, spans)
        dB, dC = self.empty(*B.shape, dtype=B.dtype), self.empty(*C.shape, dtype=C.dtype)
        of_C, of_B = plan.keys
        of_C(dy, C, B, self.sum, self.step, self.total, pairs, carry, carry, dC, carried, inner, spans)
        of_B(x, B, C, self.sum, self.step, self.total, pairs, adjoint, carry, dB, carried, inner, spans)
        ddt = self.empty(*self.dt.shape, dtype=self.dt.dtype)
        parts = self.empty(2, plan.directions, plan.all_chunks, plan.heads)
        plan.step_gradient(
            self.dt, self.dt_bias, self.A, self.step, self.total, rows, columns, diagonal, carried, inner, ddt, parts[1],
            parts[0], spans,
        )  # fmt: skip
        dA, dbias = parts.sum(2)
        by_position = diagonal[: plan.plane].view(plan.batch, plan.heads, plan.length)
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
        parts = self.empty(self.plan.all_chunks, self.plan.heads, self.plan.head_dim)
        self.plan.skip_gradient(self.x, dy, parts, self.spans)
        return parts.sum(0)


def _by_parameter(summed: Tensor, like: Tensor) -> Tensor:
    """(directions, heads) as the gradient of a parameter (heads,) or (heads, 2)."""
    return (summed.t().contiguous() if like.dim() == 2 else summed.sum(0)).to(like.dtype)
