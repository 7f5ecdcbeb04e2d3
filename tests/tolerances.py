"""How near two ways to compute the same must come: one table, gone through on the CPU and on a CUDA device.

A difference counts as a part of the largest element of what is expected, so that a single wrong position is not lost
among many right ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Relation = Literal["reference", "fused", "recurrence", "stream", "device"]

EXACT, SINGLE = 1e-10, 1e-4
TOLERANCES: dict[Relation, dict[torch.dtype, float]] = {
    # a mixer, and its equations step by step in float64
    "reference": {torch.float64: EXACT, torch.float32: SINGLE},
    # both directions at once, and a scan of the sequence and one of the flipped sequence
    "fused": {torch.float64: EXACT, torch.float32: SINGLE},
    # a convolution by FFT, and the recurrence position by position
    "recurrence": {torch.float64: EXACT, torch.float32: SINGLE},
    # an encoder in one pass, and chunk by chunk
    "stream": {torch.float64: EXACT, torch.float32: SINGLE},
    # the CPU, and a CUDA device
    "device": {torch.float64: EXACT, torch.float32: SINGLE},
}
DTYPES = (torch.float64, torch.float32)
LENGTHS = (1, 7, 64, 65, 257, 331)
"""A single position; a power of two and one more of it, twice; primes."""
OUTPUT = "output"
SMALL = 1e-3
"""Gradients below this part of the largest one are measured against that part: some should be zero."""

Outcome = dict[str, Tensor]
"""What a computation gives, as `OUTPUT`, and gradients of a random function of it by what they are for."""


def differences(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, small: float = SMALL
) -> dict[str, float]:
    """How far two outcomes differ, tensor by tensor, as parts of the largest element that is expected."""
    assert got.keys() == expected.keys()
    largest = {name: float(right.abs().max()) for name, right in expected.items()}
    least = small * max((size for name, size in largest.items() if name != OUTPUT), default=0.0)
    found = {}
    for name, right in expected.items():
        left = got[name].to(right.device, torch.float64)
        assert left.shape == right.shape and torch.isfinite(left).all(), name
        size = largest[name] if name == OUTPUT else max(largest[name], least)
        assert size > 0, f"{name}: nothing but zeros is expected"
        found[name] = float((left - right.double()).abs().max()) / size
    return found


def assert_agree(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    relation: Relation,
    dtype: torch.dtype,
    *,
    small: float = SMALL,
) -> None:
    """That an outcome in this dtype is the expected one (in any dtype) as the table says."""
    assert all(tensor.dtype == dtype for tensor in got.values())
    tolerance = TOLERANCES[relation][dtype]
    errors = differences(got, expected, small=small)
    too_far = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not too_far, f"{relation} in {dtype}, where {tolerance} is allowed: {too_far}"
