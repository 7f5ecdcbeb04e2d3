"""genossm.rebin against base-by-base arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genossm import rebin
from genossm.errors import DataError

sizes = st.tuples(st.integers(1, 17), st.integers(1, 90), st.integers(1, 23), st.integers(0, 10_000))


def per_base(values: np.ndarray, bin_bp: int, length_bp: int) -> np.ndarray:
    return np.repeat(values, bin_bp, axis=0)[:length_bp]


@given(sizes)
@settings(max_examples=80, deadline=None)
def test_mean_and_sum_equal_the_base_by_base_ones(case: tuple[int, int, int, int]) -> None:
    bin_bp, length_bp, resolution_bp, seed = case
    rng = np.random.default_rng(seed)
    bins = -(-length_bp // bin_bp)
    values = rng.random((bins, 2)).astype(np.float32)
    values[rng.random((bins, 2)) < 0.3] = np.nan
    bases = per_base(values.astype(np.float64), bin_bp, length_bp)
    old_sizes = np.minimum(bin_bp, length_bp - np.arange(bins) * bin_bp)
    density = per_base(values / old_sizes[:, None], bin_bp, length_bp)

    mean = rebin.rebin_mean(values, bin_bp, length_bp, resolution_bp)
    total = rebin.rebin_sum(values, bin_bp, length_bp, resolution_bp)
    highest = rebin.rebin(values, bin_bp, length_bp, resolution_bp, "max")
    assert mean.shape == (-(-length_bp // resolution_bp), 2)
    for i, start in enumerate(range(0, length_bp, resolution_bp)):
        for track in range(2):
            column = bases[start : start + resolution_bp, track]
            present = ~np.isnan(column)
            if present.any():
                assert mean[i, track] == pytest.approx(column[present].mean())
                assert total[i, track] == pytest.approx(
                    density[start : start + resolution_bp, track][present].sum()
                )
                assert highest[i, track] == column[present].max()
            else:
                assert np.isnan(mean[i, track]) and np.isnan(total[i, track]) and np.isnan(highest[i, track])


def test_32_to_200_by_hand() -> None:
    # 13 bins of 32 bp cover 400 bp (the last has 16): 200 = 6 x 32 + 8
    values = np.arange(13, dtype=np.float32)
    result = rebin.rebin_mean(values, 32, 400, 200)
    first = (sum(range(6)) * 32 + 6 * 8) / 200
    second = (6 * 24 + sum(range(7, 12)) * 32 + 12 * 16) / 200
    assert result == pytest.approx([first, second])


def test_sum_keeps_the_total_and_the_same_resolution_changes_nothing() -> None:
    counts = np.random.default_rng(4).poisson(3, size=(32, 3)).astype(np.float32)
    length_bp = 31 * 32 + 5
    for resolution_bp in (1, 7, 200, 5000):
        again = rebin.rebin_sum(counts, 32, length_bp, resolution_bp)
        assert again.sum(axis=0) == pytest.approx(counts.sum(axis=0))
    assert rebin.rebin_mean(counts, 32, length_bp, 32) == pytest.approx(counts)
    assert rebin.rebin(counts, 32, length_bp, 32, "sum") == pytest.approx(counts)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(
        DataError, match="5 values cannot be the 32-bp bins of a chromosome of 100 bp, which has 4"
    ):
        rebin.rebin_mean(np.zeros(5), 32, 100, 200)
    with pytest.raises(DataError, match="positive resolution"):
        rebin.rebin_mean(np.zeros(4), 32, 100, 0)
    with pytest.raises(DataError, match="'median'"):
        rebin.rebin(np.zeros(4), 32, 100, 50, "median")  # type: ignore[arg-type]
