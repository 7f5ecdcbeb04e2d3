"""Tests of genossm.external_sort: all numbers come back in order, in blocks of bounded size."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import genossm.external_sort as module
from genossm.external_sort import ExternalSort

NUMBERS = st.integers(0, 2**64 - 1) | st.integers(0, 5) | st.integers(2**32 - 2, 2**32 + 2)


@given(st.lists(st.lists(NUMBERS, max_size=40), max_size=12), st.integers(1, 30), st.integers(1, 30))
def test_numbers_come_back_sorted(parts: list[list[int]], buffered: int, merged: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BUFFERED", buffered)
        patch.setattr(module, "_MERGED", merged)
        with ExternalSort(Path(folder)) as numbers:
            for part in parts:
                numbers.add(np.array(part, dtype=np.uint64))
            numbers.finish()
            blocks = list(numbers.merged())
    everything = sorted(number for part in parts for number in part)
    assert [int(number) for block in blocks for number in block] == everything
    assert numbers.total == len(everything)
    assert numbers.upper == Counter(number >> 32 for number in everything)


def test_blocks_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUFFERED", 1_000)
    monkeypatch.setattr(module, "_MERGED", 1_000)
    random = np.random.default_rng(0)
    with ExternalSort(tmp_path) as numbers:
        for _ in range(50):
            numbers.add(random.integers(0, 2**60, 997).astype(np.uint64))
        numbers.finish()
        sizes = [block.size for block in numbers.merged()]
    assert sum(sizes) == 50 * 997 and max(sizes) <= 2_500
