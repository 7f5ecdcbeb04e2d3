"""Tests of genossm.splits: every chromosome in one split, folds of alike load, fold files in their forms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.errors import ConfigError, DataError
from genossm.splits import SPLITS, fold_of, rotate, spread

SIZES = st.dictionaries(
    st.text("chr123XY", min_size=1, max_size=6), st.integers(1, 10**6), min_size=3, max_size=40
)


@given(SIZES, st.integers(1, 12), st.integers(0, 5), st.data())
def test_every_chromosome_is_in_one_group_of_alike_load(
    sizes: dict[str, int], folds: int, seed: int, data: st.DataObject
) -> None:
    folds = min(folds, len(sizes))
    positives = None
    if data.draw(st.booleans()):
        positives = {name: data.draw(st.integers(0, 1000)) for name in sizes}
    groups = spread(sizes, folds, seed=seed, positives=positives)
    assert len(groups) == folds and all(groups)
    assert sorted(name for group in groups for name in group) == sorted(sizes)
    loads = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    if positives is not None and sum(positives.values()):
        shares = {name: count / sum(positives.values()) for name, count in positives.items()}
        loads = {name: (loads[name] + shares[name]) / 2 for name in sizes}
    totals = [sum(loads[name] for name in group) for group in groups]
    assert max(totals) - min(totals) <= max(loads.values()) + 1e-12
    assert groups == spread(dict(sizes), folds, seed=seed, positives=positives)


@given(SIZES, st.integers(3, 12), st.integers(0, 3))
def test_the_folds_turn_through_the_splits(sizes: dict[str, int], folds: int, seed: int) -> None:
    folds = min(folds, len(sizes))
    groups = spread(sizes, folds, seed=seed)
    tested, validated = [], []
    for fold in range(folds):
        splits = rotate(groups, fold)
        assert sorted(name for split in SPLITS for name in splits[split]) == sorted(sizes)
        assert splits["train"]
        tested += splits["test"]
        validated += splits["valid"]
    assert sorted(tested) == sorted(validated) == sorted(sizes)
    assert rotate(groups, 0)["valid"] == rotate(groups, 1)["test"]


def test_yeast_in_five_folds() -> None:
    sizes = dict(chrI=230, chrII=813, chrIII=317, chrIV=1532, chrV=577, chrVI=270, chrVII=1091, chrVIII=563)
    sizes |= dict(
        chrIX=440, chrX=746, chrXI=667, chrXII=1078, chrXIII=924, chrXIV=784, chrXV=1091, chrXVI=948
    )
    totals = [sum(sizes[name] for name in group) for group in spread(sizes, 5)]
    assert max(totals) - min(totals) < 0.1 * sum(sizes.values()) / 5
    assert len({spread(sizes, 5, seed=seed) for seed in range(5)}) > 1
    order = list(sizes)
    assert all(list(group) == sorted(group, key=order.index) for group in spread(sizes, 5))


def test_positives_are_spread_too() -> None:
    sizes = {f"chr{number}": 100 for number in range(12)}
    positives = {name: 1000 if name in ("chr0", "chr1", "chr2") else 1 for name in sizes}
    groups = spread(sizes, 3, positives=positives)
    assert all(len({"chr0", "chr1", "chr2"} & set(group)) == 1 for group in groups)
    assert spread(sizes, 3, positives=dict.fromkeys(sizes, 0)) == spread(sizes, 3)


def test_more_folds_than_chromosomes_are_refused() -> None:
    with pytest.raises(DataError, match="2 chromosomes cannot be spread over 3 folds"):
        spread({"chr1": 5, "chr2": 5}, 3)


FOLD = {"train": ["chr2"], "valid": ["chr8"], "test": ["chr1"]}


@pytest.mark.parametrize(
    ("content", "fold", "expected"),
    [
        ({"folds": [{"valid": [1], "test": [2]}, FOLD]}, 1, FOLD),
        ({"folds": [{"val": ["a"], "test": ["b"]}]}, None, {"valid": ["a"], "test": ["b"]}),
        (
            {"fold_0": {"validation": ["a"], "test": ["b"]}, "fold_1": FOLD},
            0,
            {"valid": ["a"], "test": ["b"]},
        ),
        (FOLD, None, FOLD),
        (FOLD, 0, FOLD),
    ],
)
def test_the_forms_of_a_fold_file(content: Any, fold: int | None, expected: Any) -> None:
    assert fold_of(content, fold, "folds.json") == expected


@pytest.mark.parametrize(
    ("content", "fold", "message"),
    [
        (
            {"folds": [FOLD, FOLD]},
            None,
            r"folds\.json has 2 folds, and fold is None: give `fold: k` from 0 to 1",
        ),
        ({"folds": [FOLD, FOLD]}, 2, "has 2 folds, and fold is 2"),
        ({"folds": [FOLD, FOLD]}, "one", "fold is one"),
        ({"folds": [FOLD, FOLD]}, True, "fold is True"),
        (FOLD, 1, "has one fold, and fold is 1"),
        ({"folds": [{"valid": ["a"]}]}, 0, "fold 0 has the keys valid: give valid, test and perhaps train"),
        ({"folds": [{**FOLD, "tset": []}]}, 0, "fold 0 has the keys test, train, tset, valid"),
        ({"folds": ["chr1"]}, 0, "fold 0 has the keys of no mapping"),
        ({}, 0, "fold 0 has the keys of no mapping"),
    ],
)
def test_a_bad_fold_file_is_told(content: Any, fold: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fold_of(content, fold, "folds.json")
