"""Stored numbers: what is exact is exact, other errors are those stated, and columns decode as their tracks do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.errors import DataError
from genossm.storage import Coding, RelativeError, Storage, ValueRange, choose_coding, common_dtype

Values = npt.NDArray[np.float32]

# Down to what float32 holds with all its digits.
MAGNITUDES = st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32))
POSITIVE = st.lists(MAGNITUDES, min_size=1, max_size=40).map(lambda x: np.array(x, dtype=np.float32))
SIGNED = st.lists(
    st.one_of(MAGNITUDES, MAGNITUDES.map(lambda x: -x)), min_size=1, max_size=40
).map(lambda x: np.array(x, dtype=np.float32))  # fmt: skip


def stored(storage: str, values: Values) -> tuple[Coding, Values]:
    """The coding with its errors, and the values after a round trip."""
    known = ValueRange()
    for part in np.array_split(values, 3):
        known.add(part)
    coding = choose_coding(storage, known, track="t")  # type: ignore[arg-type]
    numbers = coding.encode(values)
    assert numbers.dtype == coding.dtype
    decoded = coding.decode(numbers)
    assert decoded.dtype == np.float32
    error = RelativeError()
    for part, back in zip(np.array_split(values, 3), np.array_split(decoded, 3), strict=True):
        error.add(part, back)
    return error.of(coding), decoded


@given(values=SIGNED, storage=st.sampled_from(["auto", "float16", "float32"]))
def test_the_stated_errors_are_those_of_the_round_trip(values: Values, storage: str) -> None:
    coding, decoded = stored(storage, values)
    there = values != 0
    true = values[there].astype(float)
    error = np.abs(decoded[there] - true) / np.abs(true)
    assert (decoded[~there] == 0).all()
    assert coding.largest_error == pytest.approx(error.max(initial=0.0), rel=1e-6, abs=1e-12)
    rms = float(np.sqrt(np.mean(error**2))) if error.size else 0.0
    assert coding.rms_error == pytest.approx(rms, rel=1e-6, abs=1e-12)
    if storage == "auto":
        assert coding.largest_error <= 1e-3
    if storage == "float32":
        assert coding.largest_error == 0


@given(values=POSITIVE)
def test_eight_bits_keep_the_order_of_magnitude_and_what_is_not_zero(values: Values) -> None:
    coding, decoded = stored("uint8", values)
    assert coding.dtype == "uint8"
    assert ((decoded == 0) == (values == 0)).all()
    positive = values[values > 0].astype(float)
    if positive.size:
        # A level more or less is a factor; half of one is the error, twice that at the smallest value.
        level = np.log1p(positive.max() / positive.min()) / 255
        assert coding.largest_error <= 1.02 * np.expm1(level) + 1e-6


@given(
    values=st.lists(st.integers(0, 255), min_size=1, max_size=30), storage=st.sampled_from(["auto", "uint8"])
)
def test_whole_numbers_up_to_255_are_exact_in_eight_bits(values: list[int], storage: str) -> None:
    array = np.array(values, dtype=np.float32)
    coding, decoded = stored(storage, array)
    assert (coding.dtype, coding.curve, coding.largest_error) == ("uint8", "linear", 0.0)
    assert np.array_equal(decoded, array)


@pytest.mark.parametrize(
    ("values", "dtype", "step"),
    [
        ([0.0], "uint8", 1.0),
        ([0, 255], "uint8", 1.0),
        ([0, 256], "float16", 1.0),
        ([0, -1], "float16", 1.0),
        ([0.5, 1], "float16", 1.0),
        ([0.5, 32_768], "float16", 1.0),
        ([0.5, 32_769], "float16", 2.0),
        ([1e-6, 2e-6], "float16", 2.0**-33),
        ([1e-6, 1e6], "float32", 1.0),
    ],
)
def test_auto_takes_the_narrowest_that_is_good_enough(values: list[float], dtype: str, step: float) -> None:
    coding, decoded = stored("auto", np.array(values, dtype=np.float32))
    assert (coding.dtype, coding.step) == (dtype, step)
    np.testing.assert_allclose(decoded, values, rtol=5e-4)


def test_counts_up_to_2048_are_exact_in_sixteen_bits() -> None:
    coding, _ = stored("float16", np.arange(2049, dtype=np.float32))
    assert (coding.dtype, coding.largest_error) == ("float16", 0.0)


def test_values_below_0_do_not_fit_into_eight_bits() -> None:
    with pytest.raises(DataError, match=r"track t has values below 0, which `storage: uint8` cannot hold"):
        stored("uint8", np.array([-0.5, 1.0], dtype=np.float32))


def test_the_common_dtype() -> None:
    narrow, half, wide = Coding("uint8"), Coding("float16"), Coding("float32")
    assert common_dtype("auto", [narrow, narrow]) == "uint8"
    assert common_dtype("auto", [narrow, half]) == "float16"
    assert common_dtype("auto", [wide, half]) == "float32"
    assert common_dtype("float32", [narrow]) == "float32"


@given(tracks=st.lists(POSITIVE.map(lambda x: np.resize(x, 12)), min_size=1, max_size=5),
       storage=st.sampled_from(["auto", "uint8", "float16", "float32"]))  # fmt: skip
def test_an_array_of_all_tracks_decodes_as_each_of_them(tracks: list[Values], storage: str) -> None:
    codings, expected = zip(*(stored(storage, track) for track in tracks), strict=True)
    dtype = common_dtype(storage, codings)  # type: ignore[arg-type]
    array = np.stack(
        [coding.encode(track).astype(dtype) for coding, track in zip(codings, tracks, strict=True)], axis=1
    )
    whole = Storage(dtype, codings)
    assert whole.dtype == dtype
    decoded = whole.decode(array)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, np.stack(expected, axis=1))
