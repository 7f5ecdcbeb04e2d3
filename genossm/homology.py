"""How much of one set of chromosomes stands in another, too: a sample of their 50-mers, either strand.

A position is sampled by the 16-mer in the middle of its 50-mer alone, whichever strand it is read from, so that
copies are sampled wherever they lie. One pass over the bases, about 20 ns each, and some tens of MB.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from genossm.sequence import NO_BASE

K = 50
_ANCHOR = 16
_SIDE = (K - _ANCHOR) // 2
_SLICE_BP = 1 << 17
_MIX = np.uint64(0x9E3779B97F4A7C15)

Kmers = npt.NDArray[np.uint64]


def sample_kmers(codes: npt.NDArray[np.int8], every: int) -> Kmers:
    """Hashes of about one in `every` of a chromosome's 50-mers, uint64 (n,), in order; of all of them for 1.

    A 50-mer and its reverse complement have one hash. 50-mers with a "no base" are left out: hide regions that
    should not count behind it.

    Args:
        codes: int8 (length,), 0..3 = ACGT, 4 = no base.
        every: the sampling; must be the same for all that is compared.
    """
    found = [np.zeros(0, dtype=np.uint64)]
    for start in range(0, max(codes.size - K + 1, 0), _SLICE_BP):
        found.append(_sample_slice(np.asarray(codes[start : start + _SLICE_BP + K - 1]), every))
    return np.concatenate(found)


def shared_share(kmers: Kmers, others: Kmers) -> float:
    """Which share of `kmers` is among `others`; NaN where there are none."""
    return float(np.isin(kmers, others).mean()) if kmers.size else float("nan")


def _sample_slice(codes: npt.NDArray[np.int8], every: int) -> Kmers:
    """The sampled 50-mers of a piece of at least 50 bases."""
    present = codes != NO_BASE
    bases = np.where(present, codes, 0).astype(np.uint32)
    anchors = np.minimum(_words(bases), _words(3 - bases[::-1])[::-1])[_SIDE:]
    anchors = anchors[: codes.size - K + 1]
    # The upper half of the product depends on all of the anchor's bits.
    chance = (anchors.astype(np.uint64) * _MIX) >> np.uint64(32)
    absent = np.concatenate(([0], np.cumsum(~present)))
    whole = absent[K:] == absent[:-K]
    picked = np.flatnonzero(whole & (chance < (1 << 32) // every))
    kmers = bases[picked[:, None] + np.arange(K)].astype(np.uint64)
    return np.minimum(_hash(kmers), _hash(3 - kmers[:, ::-1]))


def _words(bases: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The 16 bases from each position on as one number, uint32 (n - 15,)."""
    words, width = bases, 1
    while width < _ANCHOR:
        words = (words[:-width] << np.uint32(2 * width)) | words[width:]
        width *= 2
    return words


def _hash(kmers: Kmers) -> Kmers:
    """One number for each row of 50 codes: two numbers that hold all of its bits, mixed."""
    half = K // 2
    weights = np.uint64(1) << (2 * np.arange(half, dtype=np.uint64))
    first, second = (kmers[:, :half] * weights).sum(axis=1), (kmers[:, half:] * weights).sum(axis=1)
    mixed = (first * _MIX) ^ ((first * _MIX) >> np.uint64(31))
    mixed = (mixed + second) * _MIX
    return np.asarray(mixed ^ (mixed >> np.uint64(29)), dtype=np.uint64)
