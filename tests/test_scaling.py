"""Scaled targets: there and back, percentiles and means against numpy, and what cannot be fitted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.errors import DataError
from genossm.scaling import ScaleConfig, Scaling, Squash, ValueCounts, fit_scaling

Values = npt.NDArray[np.float32]
VALUES = st.lists(st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=60).map(
    lambda x: np.array(x, dtype=np.float32)
)
SQUASHES = st.sampled_from(["none", "sqrt", "log1p"])


def counted(values: Values) -> ValueCounts:
    counts = ValueCounts()
    for part in np.array_split(values, 2):
        counts.add(part)
    return counts


@given(values=VALUES, squash=SQUASHES, factor=st.floats(1e-3, 1e3), clip=st.none() | st.floats(0.1, 1e4))
def test_inverse_undoes_forward_up_to_the_clip(
    values: Values, squash: Squash, factor: float, clip: float | None
) -> None:
    scaling = Scaling(clip, squash, factor)
    scaled = scaling.forward(values)
    assert scaled.dtype == np.float32
    assert (np.sign(scaled) * np.sign(values) >= 0).all()
    limit = np.inf if clip is None else clip
    back = scaling.inverse(scaled)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, np.clip(values, -limit, limit), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("squash", ["none", "sqrt", "log1p"])
@pytest.mark.parametrize("clip", [None, 50.0])
def test_in_float64_the_inverse_is_exact(squash: Squash, clip: float | None) -> None:
    values = np.array([0, 1e-6, 0.3, 7, 49.9, 50, 51, 1e6, -3, -80])
    scaling = Scaling(clip, squash, 0.37)
    limit = clip or np.inf
    back = scaling.inverse(scaling.forward(values))
    np.testing.assert_allclose(back, np.clip(values, -limit, limit), rtol=1e-9, atol=1e-12)


@given(values=VALUES.map(np.abs), squash=SQUASHES, clip=st.none() | st.floats(0.1, 1e4))
def test_mean_and_spread_of_scaled_values(values: Values, squash: Squash, clip: float | None) -> None:
    scaling = Scaling(clip, squash, 3.0)
    scaled = scaling.forward(values.astype(np.float64))
    mean, spread = counted(values).mean_and_spread(scaling.forward)
    size = float(np.sqrt(np.square(scaled).mean()))  # values of one cell, below 1 % wide, have no spread
    assert mean == pytest.approx(scaled.mean(), rel=0.005, abs=1e-30)
    assert spread == pytest.approx(scaled.std(), abs=0.005 * size + 1e-30)


def test_no_values_have_no_mean_and_no_spread() -> None:
    assert np.isnan(ValueCounts().mean_and_spread(Scaling().forward)).all()


def test_known_values() -> None:
    values = np.array([0, 1, 4, 9, -4], dtype=np.float32)
    assert Scaling(4.0, "sqrt", 10.0).forward(values).tolist() == [0, 10, 20, 20, -20]
    np.testing.assert_allclose(
        Scaling(squash="log1p").forward(values), [0, *np.log([2, 5, 10]), -np.log(5)], rtol=1e-6
    )


@given(values=VALUES, percent=st.floats(0.5, 100))
def test_a_percentile_is_within_a_cell_of_the_true_one(values: Values, percent: float) -> None:
    found = counted(values).magnitude(percent)
    magnitudes = np.sort(np.abs(values))
    # The least magnitude that this share of the values does not exceed.
    true = magnitudes[max(0, int(np.ceil(percent / 100 * values.size - 1e-9)) - 1)]
    assert found == pytest.approx(float(true), rel=0.01, abs=1e-30)


@given(values=VALUES.map(np.abs), squash=SQUASHES, mean=st.floats(0.01, 100))
def test_the_training_bins_get_the_mean_asked_for(values: Values, squash: Squash, mean: float) -> None:
    config = ScaleConfig(squash=squash, mean=mean)
    if not values.astype(float).sum() > 1e-20:
        return
    scaling = fit_scaling(config, counted(values), track="t")
    assert float(scaling.forward(values).astype(float).mean()) == pytest.approx(mean, rel=0.01)
    assert scaling.clip is None


def test_counts_of_partners_add_up() -> None:
    first, second = np.arange(10, dtype=np.float32), np.arange(5, 30, dtype=np.float32)
    both = counted(first) + counted(second)
    whole = counted(np.concatenate((first, second)))
    assert np.array_equal(both.counts, whole.counts) and np.allclose(both.sums, whole.sums)
    scaling = fit_scaling(ScaleConfig("90%", "sqrt", 2.0), both, track="t")
    assert scaling == fit_scaling(ScaleConfig("90%", "sqrt", 2.0), whole, track="t")
    assert scaling.clip == pytest.approx(26, rel=0.01)


@pytest.mark.parametrize(
    ("clip", "mean", "message"),
    [
        ("lots", None, "clip is 'lots': give a number"),
        ("0%", None, "a percentile above 0%"),
        ("101%", None, "up to 100%"),
        ("1.2.3%", None, "up to 100%"),
        (-1.0, None, "clip is -1.0: give a number above 0"),
        (float("inf"), None, "clip is inf"),
        (None, 0.0, "mean is 0.0: give a number above 0"),
        (None, float("nan"), "mean is nan"),
    ],
)
def test_a_scale_that_makes_no_sense_is_refused(clip: float | str, mean: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleConfig(clip=clip, mean=mean)


def test_what_cannot_be_fitted_is_refused() -> None:
    zeros = np.zeros(100, dtype=np.float32)
    with pytest.raises(DataError, match="the scale of track t needs training bins, and all are masked"):
        fit_scaling(ScaleConfig(mean=1.0), ValueCounts(), track="t")
    with pytest.raises(DataError, match=r"the clip 99% of track t is 0"):
        fit_scaling(ScaleConfig(clip="99%"), counted(zeros), track="t")
    with pytest.raises(DataError, match=r"the mean of track t is 0 on the training bins"):
        fit_scaling(ScaleConfig(mean=1.0), counted(zeros), track="t")
    assert fit_scaling(ScaleConfig(clip=3.0), ValueCounts(), track="t") == Scaling(3.0)
