"""Bins from intervals, against counting base by base."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import genossm.targets
from genossm.errors import DataError
from genossm.targets import bases_per_bin, masked_bins, no_base_runs, peak_bins

INTERVALS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), max_size=12)


def columns(pairs: list[tuple[int, int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(start, length) pairs as starts and ends."""
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 0] + table[:, 1]


def shares(pairs: list[tuple[int, int]], length_bp: int, bin_bp: int) -> list[float]:
    """The share of each bin's bases that lies in an interval, base by base."""
    inside = np.zeros(length_bp, dtype=bool)
    for start, length in pairs:
        inside[start : start + length] = True
    return [float(inside[start : start + bin_bp].mean()) for start in range(0, length_bp, bin_bp)]


@given(pairs=INTERVALS, length_bp=st.integers(1, 320), bin_bp=st.integers(1, 50))
def test_a_bin_is_positive_or_masked_by_the_share_of_its_bases(
    pairs: list[tuple[int, int]], length_bp: int, bin_bp: int
) -> None:
    expected = shares(pairs, length_bp, bin_bp)
    for overlap in (0.25, 0.5, 1.0):
        positive = peak_bins(*columns(pairs), length_bp, bin_bp, overlap)
        assert positive.dtype == np.float32
        assert positive.tolist() == [float(share >= overlap) for share in expected]
    assert masked_bins(*columns(pairs), length_bp, bin_bp).tolist() == [share >= 0.25 for share in expected]


@given(pairs=INTERVALS, length_bp=st.integers(1, 320), block=st.integers(1, 9))
def test_blocks_change_nothing(pairs: list[tuple[int, int]], length_bp: int, block: int) -> None:
    whole = peak_bins(*columns(pairs), length_bp, 7), masked_bins(*columns(pairs), length_bp, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genossm.targets, "_BLOCK_BINS", block)
        assert np.array_equal(peak_bins(*columns(pairs), length_bp, 7), whole[0])
        assert np.array_equal(masked_bins(*columns(pairs), length_bp, 7), whole[1])


def test_an_interval_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(DataError, match="ends before it starts"):
        peak_bins(np.array([50]), np.array([40]), 30, 10)


def test_the_last_bin_counts_the_bases_it_has() -> None:
    assert bases_per_bin(70, 32).tolist() == [32, 32, 6]
    assert bases_per_bin(64, 32).tolist() == [32, 32]
    starts, ends = np.array([16, 67]), np.array([32, 70])
    assert peak_bins(starts, ends, 70, 32).tolist() == [1, 0, 1]  # 16 of 32, 0 of 32, 3 of 6
    assert peak_bins(starts + 1, ends, 70, 32).tolist() == [0, 0, 0]


def test_a_tenth_of_thirty_bases_is_three() -> None:
    assert peak_bins(np.array([0]), np.array([3]), 30, 30, 0.1).tolist() == [1]


@given(codes=st.lists(st.integers(0, 4), max_size=60), slice_bp=st.integers(1, 20))
def test_runs_of_no_base_are_maximal_whatever_the_slice(codes: list[int], slice_bp: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genossm.targets, "_SLICE_BP", slice_bp)
        starts, ends = no_base_runs(np.array(codes, dtype=np.int8))
    covered = [
        any(start <= base < end for start, end in zip(starts, ends, strict=True))
        for base in range(len(codes))
    ]
    assert covered == [code == 4 for code in codes]
    assert (starts[1:] > ends[:-1]).all()
