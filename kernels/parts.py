"""The programs' parts of a sum, added in order by Triton: torch's own reduction takes longer over few columns."""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Functions of Triton's own language have no types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from genossm.kernels.triton_support import on_device

PARTS = 512
"""Parts that are loaded at once."""
COLUMNS = 8
"""Columns of a program."""


@triton.jit
def added_up(parts, count, row, column, within, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums over `count` rows of `row` numbers each, in these columns."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, count, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        present = (part < count) & within[None, :]
        total += tl.sum(
            tl.load(parts + part.to(tl.int64) * row + column[None, :], mask=present, other=0.0), 0
        )
    return total


@triton.jit(do_not_specialize=["count"])
def add_parts_kernel(parts, total, count, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of COLUMNS columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < columns
    tl.store(total + column, added_up(parts, count, columns, column, within, PARTS, COLUMNS), mask=within)


def add_parts(parts: Tensor) -> Tensor:
    """The sum over the first axis of float32 (parts, ...), contiguous."""
    total = parts.new_empty(parts.shape[1:])
    if total.numel():
        with on_device(parts):
            add_parts_kernel[(triton.cdiv(total.numel(), COLUMNS),)](
                parts, total, len(parts), total.numel(), PARTS=PARTS, COLUMNS=COLUMNS
            )
    return total
