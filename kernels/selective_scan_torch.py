"""The selective scan (Mamba, S6) in plain torch: any device, differentiable, memory linear in length.

The sequence is cut into lanes that advance side by side, step by step, every step updating the whole state of all lanes
in place. Each lane runs twice: from zero, to learn what leaves it, and, after a pass over the lanes, from its true
state. Where batch * channels * state alone fills a processor there is one lane and one run. Decays are exp(dt A) of single
steps and exp(A sum(dt)) of whole lanes, multiplied and never divided, so that no step size can overflow.

For the gradient the inputs are kept and the state at every SEGMENT-th step; the states between are computed again.

Letters: b batch, l length, d channels, n state, k lanes, q steps of a lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Item = TypeVar("Item")

SEGMENT = 32
"""Steps between kept states; a gradient holds two states for each step of one segment."""
FULL = {"cpu": 2**15}
"""Elements of one step that need no further lanes; below it lanes are added up to four times as many."""
FULL_ELSEWHERE = 2**20


def selective_scan_lanes(
    x_bld: Tensor,
    dt_bld: Tensor,
    A_dn: Tensor,
    B_bln: Tensor,
    C_bln: Tensor,
    initial_bdn: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """One direction of h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = C_t . h_t (2 Re(C_t . h_t) for complex A).

    Args:
        x_bld, dt_bld: real, in the dtype to compute in (float32 or float64).
        A_dn, B_bln, C_bln: of one dtype, the same or its complex counterpart.
        initial_bdn: in A's dtype, zeros when None.
        reverse: run from the last position to the first.

    Returns:
        y (b, l, d) real, and the final state (b, d, n) in A's dtype.
    """
    if initial_bdn is None:
        initial_bdn = A_dn.new_zeros(x_bld.shape[0], *A_dn.shape)
    inputs = (x_bld, dt_bld, A_dn, B_bln, C_bln, initial_bdn)
    # asked here, since within a Function gradients are always off
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    y, final = _Scan.apply(*inputs, reverse, keep)  # type: ignore[no-untyped-call]
    return y, final


@dataclass(frozen=True)
class SideBySide:
    """Sequences of one row as batches of those of about the same length, so that less than half of a batch is padding.

    Attributes:
        order: (sequences,) int64, the sequences batch by batch.
        positions: (length,) int64, the place in the row of every position, sequence by sequence in that order.
        places: for each batch, (its positions,) int64, their places in the padded batch, its first two axes joined.
        shapes: for each batch, how many sequences it has and the longest one's length.
    """

    order: Tensor
    positions: Tensor
    places: list[Tensor]
    shapes: list[tuple[int, int]]

    @classmethod
    def of(cls, bounds: list[tuple[int, int]], device: torch.device) -> SideBySide:
        """The batches of sequences with these first and end positions."""
        doublings = [(end - first - 1).bit_length() for first, end in bounds]
        order = torch.tensor(sorted(range(len(bounds)), key=doublings.__getitem__))
        spans = torch.tensor(bounds)[order]
        firsts, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
        counts = [count for count in torch.bincount(torch.tensor(doublings)).tolist() if count]
        positions: list[Tensor] = []
        places: list[Tensor] = []
        shapes: list[tuple[int, int]] = []
        for first, length in zip(
            firsts.split_with_sizes(counts), lengths.split_with_sizes(counts), strict=True
        ):
            longest = int(length.max())
            inside = torch.arange(longest) < length[:, None]
            positions.append((first[:, None] + torch.arange(longest))[inside])
            places.append(inside.flatten().nonzero()[:, 0].to(device))
            shapes.append((len(first), longest))
        return cls(order.to(device), torch.cat(positions).to(device), places, shapes)

    def batches(self, row: Tensor) -> list[Tensor]:
        """(1, length, c) as one (sequences, longest, c) for each batch; zeros after the end, where dt = 0 keeps the state."""
        parts = (
            row[0].index_select(0, self.positions).split_with_sizes([len(places) for places in self.places])
        )
        return [
            row.new_zeros(count * longest, row.shape[2])
            .index_copy(0, places, part)
            .view(count, longest, row.shape[2])
            for part, places, (count, longest) in zip(parts, self.places, self.shapes, strict=True)
        ]

    def row(self, batches: list[Tensor]) -> Tensor:
        """The inverse of `batches`."""
        parts = [
            batch.flatten(0, 1).index_select(0, places)
            for batch, places in zip(batches, self.places, strict=True)
        ]
        ordered = torch.cat(parts)
        return torch.empty_like(ordered).index_copy(0, self.positions, ordered)[None]

    def states(self, states: Tensor) -> Sequence[Tensor]:
        """(sequences, ...) as the states of each batch."""
        return states.index_select(0, self.order).split_with_sizes([count for count, _ in self.shapes])

    def in_order(self, states: list[Tensor]) -> Tensor:
        """The inverse of `states`."""
        ordered = torch.cat(states)
        return torch.empty_like(ordered).index_copy(0, self.order, ordered)


class _Scan(torch.autograd.Function):
    """The scan with a gradient that recomputes its states."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial: Tensor,
        reverse: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        lanes = _Lanes(x, A, reverse=reverse)
        x_kqd, dt_kqd, B_kqn, C_kqn = (lanes.split(tensor) for tensor in (x, dt, B, C))
        A_nd = A.t().contiguous()
        factor = 2 if A.is_complex() else 1
        input_kqd = (dt_kqd * x_kqd).to(A.dtype)
        state = initial.transpose(1, 2).to(A.dtype)
        decay = A.new_empty(lanes.rows, *A_nd.shape)
        if lanes.count > 1:
            local = torch.zeros_like(decay)
            for span in lanes.segments():
                steps = zip(_rows(dt_kqd, span), _rows(input_kqd, span), _columns(B_kqn, span), strict=True)
                for dt_t, input_t, B_t in lanes.ordered(list(steps)):
                    local.mul_(torch.mul(dt_t, A_nd, out=decay).exp_()).addcmul_(input_t, B_t)
            state = lanes.passed(local, dt_kqd, A_nd, state, reverse=reverse)
        state = state.clone(memory_format=torch.contiguous_format)

        y_kqd = torch.empty_like(x_kqd)
        marks: list[Tensor] = []
        for span in lanes.segments():
            if keep:
                marks.append(state.clone())
            outputs: list[Tensor] = []
            steps_C = zip(
                _rows(dt_kqd, span),
                _rows(input_kqd, span),
                _columns(B_kqn, span),
                _rows(C_kqn, span),
                strict=True,
            )
            for dt_t, input_t, B_t, C_t in lanes.ordered(list(steps_C)):
                state.mul_(torch.mul(dt_t, A_nd, out=decay).exp_()).addcmul_(input_t, B_t)
                outputs.append(torch.bmm(C_t, state))
            here = torch.cat(lanes.ordered(outputs), 1)
            y_kqd[:, span] = factor * here.real if here.is_complex() else here
        final = lanes.last(state, reverse=reverse).transpose(1, 2).contiguous()
        ctx.save_for_backward(x, dt, A, B, C, *marks)
        ctx.reverse = reverse
        return lanes.join(y_kqd), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, *marks = ctx.saved_tensors
        reverse: bool = ctx.reverse
        lanes = _Lanes(x, A, reverse=reverse)
        x_kqd, dt_kqd, B_kqn = (lanes.split(tensor) for tensor in (x, dt, B))
        C_kqn = lanes.split(C).conj().resolve_conj()
        A_nd = A.t().contiguous()
        A_conj = A_nd.conj().resolve_conj()
        input_kqd = (dt_kqd * x_kqd).to(A.dtype)
        # of the complex sum, whose real part is doubled
        gy_kqd = lanes.split(grad_y).to(A.dtype) * (2 if A.is_complex() else 1)
        adjoint = grad_final.transpose(1, 2).to(A.dtype)
        decay = A.new_empty(lanes.rows, *A_nd.shape)
        backwards = list(lanes.segments())[::-1]
        if lanes.count > 1:
            local = torch.zeros_like(decay)
            for span in backwards:
                steps = zip(_rows(dt_kqd, span), _rows(gy_kqd, span), _columns(C_kqn, span), strict=True)
                for dt_t, gy_t, C_t in lanes.ordered(list(steps))[::-1]:
                    local.addcmul_(gy_t, C_t).mul_(torch.mul(dt_t, A_conj, out=decay).exp_())
            adjoint = lanes.passed(local, dt_kqd, A_conj, adjoint, reverse=not reverse)
        adjoint = adjoint.clone(memory_format=torch.contiguous_format)

        grad_input, grad_dt = torch.empty_like(x_kqd), torch.empty_like(dt_kqd)
        grad_B, grad_C = torch.empty_like(B_kqn), torch.empty_like(C_kqn)
        grad_A = torch.zeros_like(A_nd)
        decays, carried = (A.new_empty(SEGMENT, *decay.shape) for _ in range(2))
        for span, mark in zip(backwards, reversed(marks), strict=True):
            order = lanes.ordered(list(range(span.stop - span.start)))
            dts, inputs, gys = (_rows(tensor, span) for tensor in (dt_kqd, input_kqd, gy_kqd))
            Bs, Cs = _columns(B_kqn, span), _columns(C_kqn, span)
            state = mark.clone()
            for i in order:
                torch.mul(dts[i], A_nd, out=decays[i]).exp_()
                torch.mul(decays[i], state, out=carried[i])
                torch.addcmul(carried[i], inputs[i], Bs[i], out=state)
                grad_C[:, span.start + i] = torch.bmm(state.conj(), gys[i].transpose(1, 2))[..., 0]
            grad_A_here = torch.zeros_like(decay)
            for i in reversed(order):
                t = span.start + i
                adjoint.addcmul_(gys[i], Cs[i])
                along_B = torch.bmm(Bs[i].transpose(1, 2).conj(), adjoint)[:, 0]
                grad_input[:, t] = along_B.real if along_B.is_complex() else along_B
                grad_B[:, t] = torch.bmm(adjoint, inputs[i].transpose(1, 2))[..., 0]
                # by the exponent dt A, whose derivative of the state is exp(dt A) h_{t-1}
                exponent = carried[i].conj().resolve_conj().mul_(adjoint)
                grad_A_here.addcmul_(dts[i].to(A.dtype), exponent)
                along_A = exponent.mul_(A_conj).sum(1)
                grad_dt[:, t] = along_A.real if along_A.is_complex() else along_A
                adjoint.mul_(decays[i].conj())
            grad_A += grad_A_here.sum(0)
        grad_dt.addcmul_(grad_input, x_kqd)
        grads = [lanes.join(grad) for grad in (grad_input.mul_(dt_kqd), grad_dt, grad_B, grad_C)]
        first = lanes.last(adjoint, reverse=not reverse).transpose(1, 2)
        return grads[0], grads[1], grad_A.t(), grads[2], grads[3], first, None, None


class _Lanes:
    """How a sequence is cut into lanes: row b * count + k holds positions k q to (k + 1) q of sequence b."""

    def __init__(self, x: Tensor, A: Tensor, *, reverse: bool) -> None:
        self.batch, self.length = x.shape[:2]
        one_step = self.batch * A.numel()
        full = FULL.get(x.device.type, FULL_ELSEWHERE)
        wanted = 1 if one_step >= full else min(4 * full // one_step, self.length // SEGMENT)
        self.steps = -(-self.length // max(1, wanted))
        self.count = -(-self.length // self.steps)
        self.rows = self.batch * self.count
        self.reverse = reverse

    def split(self, tensor: Tensor) -> Tensor:
        """(b, l, c) as contiguous (b * k, q, c); zeros after the end, where dt = 0 leaves the state as it is."""
        padding = self.count * self.steps - self.length
        padded = F.pad(tensor, (0, 0, 0, padding)) if padding else tensor
        return padded.reshape(self.rows, self.steps, tensor.shape[2]).contiguous()

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of `split`."""
        return tensor.view(self.batch, self.count * self.steps, tensor.shape[2])[:, : self.length]

    def segments(self) -> Iterator[slice]:
        """Spans of at most SEGMENT steps, in the order of the scan."""
        starts = range(0, self.steps, SEGMENT)
        for start in reversed(starts) if self.reverse else starts:
            yield slice(start, min(start + SEGMENT, self.steps))

    def ordered(self, steps: list[Item]) -> list[Item]:
        """Steps of a segment in the order of the scan; applied twice, as they were."""
        return steps[::-1] if self.reverse else steps

    def passed(self, local: Tensor, dt: Tensor, A_nd: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        """The state that enters each lane, from what each adds, its whole decay and what enters the first."""
        whole = torch.exp(dt.sum(1).unsqueeze(1) * A_nd).view(self.batch, self.count, *A_nd.shape)
        added = local.view(self.batch, self.count, *A_nd.shape)
        entering = torch.empty_like(added)
        state = initial
        for k in reversed(range(self.count)) if reverse else range(self.count):
            entering[:, k] = state
            state = whole[:, k] * state + added[:, k]
        return entering.flatten(0, 1)

    def last(self, state: Tensor, *, reverse: bool) -> Tensor:
        """The state of the lane that a scan in this direction leaves last, (b, n, d)."""
        return state.view(self.batch, self.count, *state.shape[1:])[:, 0 if reverse else -1]


def _rows(tensor: Tensor, span: slice) -> Sequence[Tensor]:
    """(rows, q, c) as one (rows, 1, c) for each step of the span."""
    return tensor[:, span].unsqueeze(2).unbind(1)


def _columns(tensor: Tensor, span: slice) -> Sequence[Tensor]:
    """(rows, q, c) as one (rows, c, 1) for each step of the span."""
    return tensor[:, span].unsqueeze(3).unbind(1)
