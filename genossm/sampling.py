"""Which windows an epoch has, in what order, and where each is read: pure functions of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genossm.windows import Window

PADDING = -1
"""Stands for an index in the last batch of an epoch where no window is left."""

_MOST_MOVES = 8

Counts = Callable[[str, int], bool]
"""Whether a window on a chromosome that starts at a base has a bin that counts."""


def epoch_order(length: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The positions 0 .. length - 1 of an epoch, int64 (length,), in an order that depends on the arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def count_steps(length: int, batch_size: int, ranks: int = 1) -> int:
    """Batches that each rank has of `length` windows."""
    return -(-length // (batch_size * ranks))


def share(
    order: npt.NDArray[np.int64], *, batch_size: int, rank: int = 0, ranks: int = 1
) -> npt.NDArray[np.int64]:
    """What one rank reads of `order`, int64 (steps, batch_size).

    Step k of all ranks together is the next `batch_size * ranks` of `order`, dealt out in turn: ranks of
    batches of b see in each step what one process sees with batches of b * ranks. Nothing is lost or doubled:
    the last step is filled up with PADDING, so that all ranks have as many batches, and all of one size.
    """
    steps = count_steps(len(order), batch_size, ranks)
    dealt = np.full(steps * batch_size * ranks, PADDING, dtype=np.int64)
    dealt[: len(order)] = order
    return dealt.reshape(steps, batch_size, ranks)[:, :, rank]


class Place(NamedTuple):
    """Where an item is read.

    Attributes:
        chrom: chromosome.
        start: first base of the window, margins included; its bins are those of this place.
        jitter_bp: by how much the sequence is moved against the bins.
        flip: whether it is reverse-complemented.
    """

    chrom: str
    start: int
    jitter_bp: int
    flip: bool


class Augmentation(NamedTuple):
    """How windows are moved and flipped.

    Attributes:
        bin_bp: windows are moved by whole bins,
        shift_bins: by up to half of this many either way, so that they begin anywhere;
        jitter_bp: and their sequence by up to this either way.
        reverse_complement: whether half of them are flipped.
    """

    bin_bp: int
    shift_bins: int
    jitter_bp: int
    reverse_complement: bool


class Places:
    """The place of each position of each epoch.

    Without `weights` the windows come round in turn: an epoch of as many positions as windows has each once, one of
    fewer goes on where the last one ended, one of more begins anew. With them a share `signal_fraction` of each epoch's positions is drawn, window i in proportion to weights[i];
    the rest come round in turn.

    Args:
        windows: tile the split, each with a bin that counts.
        length: positions of an epoch.
        seed: of all that is random.
        augmentation: None for the windows as they are.
        counts: a moved window for which this is False is moved elsewhere.
        weights: float64 (windows,), at least 0 and not all 0.
        signal_fraction: above 0 and at most 1.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        length: int,
        *,
        seed: int,
        augmentation: Augmentation | None,
        counts: Counts,
        weights: npt.NDArray[np.float64] | None = None,
        signal_fraction: float = 0.5,
    ) -> None:
        self._windows = windows
        self._length = length
        self._seed = seed
        self._augmentation = augmentation
        self._counts = counts
        self._fraction = 0.0 if weights is None else signal_fraction
        self._cumulative = None if weights is None else np.cumsum(weights) / np.cumsum(weights)[-1]

    def __call__(self, epoch: int, position: int) -> Place:
        """The place of a position of an epoch, 0 <= position < length."""
        if self._augmentation is None and self._cumulative is None:
            window = self._windows[self._in_turn(epoch, position, self._length)]
            return Place(window.chrom, window.start, 0, False)
        random = np.random.default_rng([self._seed, epoch, position])
        window = self._windows[self._window(epoch, position, random)]
        if self._augmentation is None:
            return Place(window.chrom, window.start, 0, False)
        return self._moved(window, self._augmentation, random)

    def _window(self, epoch: int, position: int, random: np.random.Generator) -> int:
        # Before this position, and in a whole epoch, so many are drawn; the others come round in turn.
        drawn = int(position * self._fraction)
        if self._cumulative is not None and int((position + 1) * self._fraction) > drawn:
            return int(np.searchsorted(self._cumulative, random.random(), side="right"))
        return self._in_turn(epoch, position - drawn, self._length - int(self._length * self._fraction))

    def _in_turn(self, epoch: int, place: int, places: int) -> int:
        """The window at one of the places of an epoch that go to all in turn."""
        count = len(self._windows)
        return (epoch * places + place) % count if places < count else place % count

    def _moved(self, window: Window, by: Augmentation, random: np.random.Generator) -> Place:
        low, high = -(by.shift_bins // 2), by.shift_bins - by.shift_bins // 2
        start = window.start + by.bin_bp * int(random.integers(low, high))
        jitter = int(random.integers(-by.jitter_bp, by.jitter_bp + 1))
        flip = by.reverse_complement and bool(random.integers(2))
        for _ in range(_MOST_MOVES):
            if self._counts(window.chrom, start):
                return Place(window.chrom, start, jitter, flip)
            start = window.start + by.bin_bp * int(random.integers(low, high))
        return Place(window.chrom, window.start, jitter, flip)
