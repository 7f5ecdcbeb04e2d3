"""Packed batches: what is cleared where all tracks are masked, and how stored numbers become targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genossm.dataset import MaskParts
from genossm.packed import Unpacker, clear_masked, complement, torch_dtype
from genossm.sequence import reverse_complement
from tests.random_dataset import random_dataset


@given(
    bins=st.lists(st.booleans(), min_size=1, max_size=120),
    first=st.integers(0, 60),
    count=st.integers(1, 60),
)
def test_masked_rows_are_cleared_and_no_others(bins: list[bool], first: int, count: int) -> None:
    masked = np.array(bins)
    first = min(first, len(masked) - 1)
    here = masked[first : first + count]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], masked, [False])).astype(np.int8)))
    parts = MaskParts(edges[0::2], edges[1::2], np.zeros(0, dtype=np.int64), False)
    targets, usable = np.full((len(here), 3), 7, dtype=np.uint8), np.ones((len(here), 1), dtype=np.bool_)
    clear_masked(parts, first, targets, usable)
    np.testing.assert_array_equal(usable[:, 0], ~here)
    np.testing.assert_array_equal(targets, np.where(here, 0, 7)[:, None].repeat(3, axis=1))


def test_the_complement_is_that_of_codes() -> None:
    codes = torch.randint(0, 5, (4, 30), dtype=torch.int8)
    np.testing.assert_array_equal(complement(codes).flip(1), reverse_complement(codes.numpy()))
    assert complement(codes).dtype == torch.int8


@pytest.mark.parametrize(("seed", "dtype"), [(0, "float16"), (1, "float32"), (2, "uint8")])
def test_stored_numbers_become_the_values_that_the_dataset_gives(
    tmp_path: Path, seed: int, dtype: str
) -> None:
    data = random_dataset(tmp_path, seed)
    assert data.storage.dtype == dtype
    stored = data.stored("c0")
    unpacker = Unpacker(data, torch.device("cpu"))
    decoded = unpacker._decode(torch.from_numpy(stored)[None])
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded[0], data.targets("c0"))
    assert torch_dtype(data.storage.dtype) == torch.from_numpy(stored).dtype
