"""Which windows an epoch has, in what order, who reads which, and where each is read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.sampling import PADDING, Augmentation, Place, Places, count_steps, epoch_order, share
from genossm.windows import Window

WINDOWS = [Window("c", 100 * number, 100 * number + 120) for number in range(10)]


def everywhere(chrom: str, start: int) -> bool:
    """Every window counts."""
    return True


def places(length: int, **options: object) -> Places:
    """Of ten windows, as they are, unless `options` say otherwise."""
    settings: dict[str, object] = {"seed": 3, "augmentation": None, "counts": everywhere, **options}
    return Places(WINDOWS, length, **settings)  # type: ignore[arg-type]


@given(st.integers(1, 200), st.integers(0, 2**32), st.integers(0, 1000))
def test_an_epoch_has_each_position_once_in_an_order_of_its_own(length: int, seed: int, epoch: int) -> None:
    order = epoch_order(length, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(length))
    np.testing.assert_array_equal(order, epoch_order(length, seed=seed, epoch=epoch))
    if length > 20:
        assert order.tolist() != epoch_order(length, seed=seed, epoch=epoch + 1).tolist()
        assert order.tolist() != epoch_order(length, seed=seed + 1, epoch=epoch).tolist()


@given(st.integers(1, 150), st.integers(1, 9), st.integers(1, 7))
def test_ranks_share_an_epoch_evenly_with_nothing_lost_or_doubled(
    length: int, batch_size: int, ranks: int
) -> None:
    order = epoch_order(length, seed=1, epoch=2)
    shares = [share(order, batch_size=batch_size, rank=rank, ranks=ranks) for rank in range(ranks)]
    steps = count_steps(length, batch_size, ranks)
    assert all(part.shape == (steps, batch_size) for part in shares)
    dealt = np.stack(shares, axis=2).reshape(steps, batch_size * ranks)
    flat = dealt.reshape(-1)
    # The ranks together read what one process reads with larger batches, in the same order; padding is at the end.
    np.testing.assert_array_equal(dealt, share(order, batch_size=batch_size * ranks))
    np.testing.assert_array_equal(flat[:length], order)
    assert (flat[length:] == PADDING).all() and len(flat) - length < batch_size * ranks


def test_windows_come_round_in_turn() -> None:
    def starts(at: Places, length: int, epochs: int) -> list[int]:
        return [at(epoch, position).start for epoch in range(epochs) for position in range(length)]

    each = [window.start for window in WINDOWS]
    assert starts(places(10), 10, 2) == each + each
    assert starts(places(25), 25, 1) == each + each + each[:5]
    assert starts(places(4), 4, 5) == each + each  # an epoch of fewer goes on where the last one ended


@given(st.integers(0, 50), st.integers(0, 30), st.integers(1, 40))
def test_a_place_is_a_pure_function_within_its_bounds(epoch: int, position: int, shift_bins: int) -> None:
    by = Augmentation(bin_bp=4, shift_bins=shift_bins, jitter_bp=3, reverse_complement=True)
    at = places(31, augmentation=by)
    place = at(epoch, position)
    assert place == places(31, augmentation=by)(epoch, position)
    moved = place.start - WINDOWS[position % 10].start
    assert moved % 4 == 0 and -(shift_bins // 2) * 4 <= moved < (shift_bins - shift_bins // 2) * 4
    assert -3 <= place.jitter_bp <= 3


def test_places_differ_by_seed_epoch_and_position() -> None:
    by = Augmentation(bin_bp=1, shift_bins=10_000, jitter_bp=100, reverse_complement=True)
    found = [
        places(10, augmentation=by, seed=seed)(epoch, position)
        for seed in (1, 2)
        for epoch in (0, 1)
        for position in range(10)
    ]
    assert len(set(found)) == len(found) and {place.flip for place in found} == {False, True}
    plain = [places(10, augmentation=by._replace(reverse_complement=False))(0, i).flip for i in range(10)]
    assert not any(plain)


def test_a_moved_window_that_does_not_count_is_moved_elsewhere() -> None:
    by = Augmentation(bin_bp=10, shift_bins=10, jitter_bp=0, reverse_complement=True)
    free = places(10, augmentation=by)
    asked = places(10, augmentation=by, counts=lambda chrom, start: start % 20 == 0)
    nowhere = places(10, augmentation=by, counts=lambda chrom, start: False)
    moved = 0
    for epoch in range(20):
        for position in range(10):
            place, before = asked(epoch, position), free(epoch, position)
            assert place.start % 20 == 0 or place.start == WINDOWS[position].start
            assert (place.jitter_bp, place.flip) == (before.jitter_bp, before.flip)
            assert place == before or before.start % 20 != 0
            moved += place != before
            assert nowhere(epoch, position).start == WINDOWS[position].start
    assert moved > 50


def test_signal_is_drawn_in_proportion_and_the_rest_in_turn() -> None:
    weights = np.array([0, 0, 3, 0, 1, 0, 0, 0, 0, 0], dtype=np.float64)
    at = places(40, weights=weights, signal_fraction=0.75)
    drawn: Counter[int] = Counter()
    for epoch in range(200):
        here = Counter(at(epoch, position).start for position in range(40))
        drawn += here
        assert sum(here.values()) == 40
    in_turn = 200  # 10 positions of each epoch go round all ten windows
    assert all(drawn[window.start] == in_turn for index, window in enumerate(WINDOWS) if index not in (2, 4))
    assert drawn[200] + drawn[400] == 200 * 40 - 8 * in_turn
    assert (drawn[200] - in_turn) / (drawn[400] - in_turn) == pytest.approx(3, rel=0.1)
    again = places(40, weights=weights, signal_fraction=0.75)
    assert [at(7, position) for position in range(40)] == [again(7, position) for position in range(40)]


def test_signal_alone_never_takes_a_window_without_any() -> None:
    weights = np.array([0, 1e-9, 0, 0, 0, 0.1, 0, 0, 1e9, 0], dtype=np.float64)
    at = places(50, weights=weights, signal_fraction=1.0)
    seen = {at(epoch, position) for epoch in range(40) for position in range(50)}
    assert seen <= {Place("c", start, 0, False) for start in (100, 500, 800)} and len(seen) == 1
