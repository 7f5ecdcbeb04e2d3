"""Tests of genossm.interval against counting base by base."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import genossm.interval as module
from genossm.errors import DataError
from genossm.interval import Interval, bin_count, covered_bases, merge

CHROMOSOME_BP = 200

pairs = st.lists(
    st.tuples(st.integers(-30, CHROMOSOME_BP + 30), st.integers(0, 40)).map(
        lambda at: (at[0], at[0] + at[1])
    ),
    max_size=25,
)


def columns(intervals: list[tuple[int, int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    table = np.array(intervals, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def bases_of(intervals: list[tuple[int, int]]) -> set[int]:
    return {base for start, end in intervals for base in range(start, end)}


@given(pairs)
def test_merge_is_the_union(intervals: list[tuple[int, int]]) -> None:
    starts, ends = merge(*columns(intervals))
    assert starts.dtype == ends.dtype == np.int64
    assert bases_of(list(zip(starts.tolist(), ends.tolist(), strict=True))) == bases_of(intervals)
    assert np.all(starts < ends)
    assert np.all(ends[:-1] < starts[1:])  # disjoint and not even touching


@given(pairs)
def test_merge_of_a_merge_changes_nothing(intervals: list[tuple[int, int]]) -> None:
    once = merge(*columns(intervals))
    twice = merge(*once)
    assert np.array_equal(once[0], twice[0]) and np.array_equal(once[1], twice[1])


@given(pairs, st.integers(1, 60), st.integers(0, CHROMOSOME_BP))
def test_covered_bases_counts_each_base_once(
    intervals: list[tuple[int, int]], bin_bp: int, length_bp: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BINS", 7)
        covered = covered_bases(*columns(intervals), length_bp, bin_bp)
    bases = bases_of(intervals)
    expected = [
        len(bases & set(range(start, min(start + bin_bp, length_bp))))
        for start in range(0, length_bp, bin_bp)
    ]
    assert covered.dtype == np.int64
    assert covered.tolist() == expected


def test_covered_bases_of_a_real_chromosome_length() -> None:
    length_bp = 248_956_422
    starts = np.arange(0, length_bp, 1000, dtype=np.int64)
    covered = covered_bases(starts, starts + 100, length_bp, 32)
    assert covered.shape == (7_779_889,)
    assert covered.sum() == 100 * len(starts)
    assert covered[:5].tolist() == [32, 32, 32, 4, 0]


@pytest.mark.parametrize(("starts", "ends"), [([5], [4]), ([0, 9], [3, 2]), ([0, 1], [3]), ([[0]], [[1]])])
def test_impossible_intervals_are_refused(starts: list[int], ends: list[int]) -> None:
    with pytest.raises(DataError):
        merge(np.array(starts), np.array(ends))


@pytest.mark.parametrize(("length_bp", "bin_bp", "bins"), [(0, 32, 0), (1, 32, 1), (32, 32, 1), (33, 32, 2)])
def test_bin_count_rounds_up(length_bp: int, bin_bp: int, bins: int) -> None:
    assert bin_count(length_bp, bin_bp) == bins


@pytest.mark.parametrize(("length_bp", "bin_bp"), [(-1, 32), (10, 0), (10, -5)])
def test_bin_count_refuses_impossible_sizes(length_bp: int, bin_bp: int) -> None:
    with pytest.raises(DataError, match="bins of"):
        bin_count(length_bp, bin_bp)


@given(
    st.text(st.characters(categories=["L", "N"], include_characters="_-.*:"), min_size=1),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
)
def test_a_region_string_reads_back(chrom: str, start: int, length: int) -> None:
    interval = Interval(chrom, start, start + length)
    assert Interval.parse(str(interval)) == interval
    assert Interval.parse(f" {chrom}:{start:,}-{start + length:,}\n") == interval


def test_a_region_is_checked_against_the_genome() -> None:
    lengths = {"chr1": 1000, "HLA-A*01:01": 50}
    assert Interval.parse("chr1", lengths) == Interval("chr1", 0, 1000)
    assert Interval.parse("HLA-A*01:01", lengths) == Interval("HLA-A*01:01", 0, 50)
    assert Interval.parse("HLA-A*01:01:3-9", lengths) == Interval("HLA-A*01:01", 3, 9)
    assert Interval.parse("chr1:900-1,000", lengths).length == 100
    with pytest.raises(DataError, match=r"past the end of chr1, which has 1,000 bp"):
        Interval.parse("chr1:900-1001", lengths)
    with pytest.raises(DataError, match="'chr2'"):
        Interval.parse("chr2:1-2", lengths)


@pytest.mark.parametrize(
    "text", ["", "chr1", "chr1:", "chr1:5", "chr1:-5-10", "chr1:1-2-3", ":1-2", "chr1:a-b"]
)
def test_what_is_no_region_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"is no region"):
        Interval.parse(text)


def test_an_interval_orders_and_may_hang_over_the_start() -> None:
    assert sorted([Interval("chr2", 0, 1), Interval("chr1", 5, 9), Interval("chr1", -5, 9)]) == [
        Interval("chr1", -5, 9),
        Interval("chr1", 5, 9),
        Interval("chr2", 0, 1),
    ]
    assert Interval("chr1", -5, 9).length == 14
    with pytest.raises(DataError, match="ends before it starts"):
        Interval("chr1", 5, 4)
