"""Tests of genossm.homology against sets of 50-mers in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import genossm.homology as module
from genossm.homology import K, sample_kmers, shared_share
from genossm.sequence import decode, encode

COMPLEMENT = str.maketrans("ACGT", "TGCA")


def canonical_kmers(text: str) -> list[str]:
    """Every 50-mer without N, in the strand that comes first in the alphabet."""
    found = (text[at : at + K] for at in range(len(text) - K + 1))
    return [min(kmer, kmer.translate(COMPLEMENT)[::-1]) for kmer in found if "N" not in kmer]


@given(st.integers(0, 2**32), st.integers(0, 400), st.floats(0, 0.03), st.integers(1, 90))
def test_hashes_are_alike_where_kmers_are(seed: int, length: int, unknown: float, slice_bp: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 4, length).astype(np.int8)
    codes[length // 2 :] = codes[: length - length // 2]  # copies
    codes[random.random(length) < unknown] = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE_BP", slice_bp)
        hashes = sample_kmers(codes, 1).tolist()
    kmers = canonical_kmers(decode(codes))
    assert len(hashes) == len(kmers)
    assert len(set(zip(hashes, kmers, strict=True))) == len(set(hashes)) == len(set(kmers))


def test_a_sample_is_of_the_size_asked_for_and_the_same_on_both_strands() -> None:
    codes = np.random.default_rng(1).integers(0, 4, 400_000).astype(np.int8)
    other = (3 - codes)[::-1]
    for every in (10, 100):
        sample = sample_kmers(codes, every)
        assert sample.size == pytest.approx(codes.size / every, rel=0.1)
        assert np.array_equal(sample_kmers(other, every)[::-1], sample)
        assert set(sample.tolist()) <= set(sample_kmers(codes, 1).tolist())


def test_the_share_of_a_copy_is_found() -> None:
    random = np.random.default_rng(2)
    train, test = (random.integers(0, 4, size).astype(np.int8) for size in (300_000, 100_000))
    assert shared_share(sample_kmers(test, 10), sample_kmers(train, 10)) == 0
    test[20_000:50_000] = (3 - train[40_000:70_000])[::-1]
    share = shared_share(sample_kmers(test, 10), sample_kmers(train, 10))
    assert share == pytest.approx(0.3, abs=0.02)
    test[20_000:50_000] = 4
    assert shared_share(sample_kmers(test, 10), sample_kmers(train, 10)) == 0


def test_too_short_a_sequence_has_none() -> None:
    assert sample_kmers(encode("ACGT" * 12), 1).size == 0
    assert sample_kmers(encode("ACGT" * 12 + "AC"), 1).size == 1
    assert math.isnan(shared_share(np.zeros(0, np.uint64), np.ones(3, np.uint64)))
