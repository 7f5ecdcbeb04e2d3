"""Shares of a prediction: every part is one shard's, shares are alike in bases, and words become shards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.errors import ConfigError
from genossm.pipelines.shards import Shard, shards_of

SIZES = st.lists(st.integers(1, 2**40), min_size=1, max_size=60)


@given(SIZES, st.integers(1, 80))
def test_every_part_is_one_shards_and_shares_are_alike_in_bases(bases: list[int], count: int) -> None:
    shares = [Shard(index, count).share(bases) for index in range(1, count + 1)]
    assert [part for share in shares for part in share] == list(range(len(bases)))
    for share in shares:
        if share:  # an n-th, give or take half a part at either end
            size = sum(bases[part] for part in share)
            assert abs(size - sum(bases) / count) <= max(bases) + 1
        for part in share:
            assert shards_of(bases, count, [part]) == [Shard(shares.index(share) + 1, count)]


def test_bases_count_and_not_parts() -> None:
    bases = [1_000_000, *[1_000] * 1_000]
    assert list(Shard(1, 2).share(bases)) == [0]
    assert list(Shard(2, 2).share(bases)) == list(range(1, 1_001))


def test_more_shards_than_parts() -> None:
    assert [len(Shard(index, 5).share([7, 7])) for index in range(1, 6)] == [0, 1, 0, 1, 0]


@given(st.integers(1, 999), st.integers(1, 999))
def test_words(index: int, count: int) -> None:
    if index > count:
        with pytest.raises(ConfigError, match=f"the shard {index}/{count} is not there"):
            Shard.parse(f"{index}/{count}")
        return
    assert Shard.parse(f" {index}/{count}") == Shard(index, count)
    assert str(Shard(index, count)) == f"{index}/{count}"


@pytest.mark.parametrize(
    "text", ["", "4", "1/", "/4", "a/b", "1/4/2", "-1/4", "1.0/4", "0/4", "5/4", "0/0", "²/3"]
)
def test_words_that_are_no_shard(text: str) -> None:
    with pytest.raises(ConfigError, match=r"give i/n with i from 1 to n, such as"):
        Shard.parse(text)
