"""A Triton kernel that does nothing but exponentials: what limits a selective scan. Imported on CUDA alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 1024
ROUNDS = 512
PROGRAMS_PER_PROCESSOR = 64


def _exponentials(X, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x = 2 ** -(2 ** x), ROUNDS times; 2 ** x is one instruction (ex2), and e ** x is that and a product."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + place)
    for _ in range(ROUNDS):
        x = tl.exp2(x)
        x = tl.exp2(-x)
    tl.store(X + place, x)


exponentials_kernel = triton.jit(_exponentials)


def exponentials_step(device: torch.device) -> tuple[Callable[[], object], int]:
    """A step to time, and how many exponentials it takes."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_PROCESSOR
    values = torch.rand(programs * BLOCK, device=device)
    return (
        lambda: exponentials_kernel[(programs,)](values, ROUNDS, BLOCK, num_warps=4),
        2 * ROUNDS * values.numel(),
    )
