"""How values become stored numbers of 8, 16 or 32 bits and come back, and the error that this makes.

A track of 0 and 1, or of whole numbers up to 255, is exact in 8 bits. Other values keep their sign and about
three digits in 16 bits, or (none below 0) their order of magnitude in 8 bits: the stored number is then a logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from genossm.errors import DataError

StorageName = Literal["auto", "uint8", "float16", "float32"]
DtypeName = Literal["uint8", "float16", "float32"]
DTYPES: tuple[DtypeName, ...] = ("uint8", "float16", "float32")
"""From the narrowest to the widest; what a narrower one holds exactly, the wider ones do."""

_LEVELS = 255
_HALF_LARGEST = 2.0**15
_HALF_SMALLEST = 2.0**-14  # below it float16 loses digits


@dataclass
class ValueRange:
    """What is known of a track's values before they are stored; grows by `add`."""

    smallest: float = math.inf
    largest: float = 0.0
    negative: bool = False
    whole: bool = True

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Take in more values: the smallest magnitude above 0 and the largest, signs, and whole numbers."""
        magnitude = np.abs(values)
        above = magnitude[magnitude > 0]
        if above.size:
            self.smallest = min(self.smallest, float(above.min()))
            self.largest = max(self.largest, float(above.max()))
            self.negative = self.negative or bool((values < 0).any())
            self.whole = self.whole and bool((above == np.rint(above)).all())


@dataclass(frozen=True, slots=True)
class Coding:
    """How one track is stored, and what that costs.

    `linear`: value = stored * step. `log`: value = floor * (exp(stored * step) - 1). The errors are those of
    the values that are not 0 (0 is always exact): |decoded - value| / |value|, the largest and the root mean
    square; 0 where the track is exact.
    """

    dtype: DtypeName
    curve: Literal["linear", "log"] = "linear"
    step: float = 1.0
    floor: float = 0.0
    largest_error: float = 0.0
    rms_error: float = 0.0

    def encode(self, values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """The stored numbers of float32 values, same shape."""
        if self.curve == "log":
            levels = np.log1p(values.astype(np.float64) / self.floor) / self.step
            return np.asarray(np.rint(levels), dtype=np.uint8)
        scaled: npt.NDArray[np.float32] = values if self.step == 1.0 else values * np.float32(1 / self.step)
        return scaled.astype(self.dtype)

    def decode(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The float32 values of stored numbers, same shape."""
        if self.curve == "log":
            levels: npt.NDArray[np.float32] = self._levels()[stored]
            return levels
        values: npt.NDArray[np.float32] = stored.astype(np.float32)
        return values if self.step == 1.0 else values * np.float32(self.step)

    def table(self) -> npt.NDArray[np.float32]:
        """float32 (256,): the value of each number that 8 bits can store."""
        return self.decode(np.arange(_LEVELS + 1, dtype=np.uint8))

    def _levels(self) -> npt.NDArray[np.float32]:
        numbers = np.arange(_LEVELS + 1, dtype=np.float64)
        return (self.floor * np.expm1(numbers * self.step)).astype(np.float32)


def choose_coding(storage: StorageName, values: ValueRange, *, track: str) -> Coding:
    """The coding of a track with such values, without its errors.

    A track that is exact in 8 bits is stored in 8 bits whatever `storage` says. `auto` takes 16 bits where
    that keeps every relative error below 0.1 %, else 32.

    Raises:
        DataError: `storage` is uint8 and there are values below 0.
    """
    if values.whole and not values.negative and values.largest <= _LEVELS:
        return Coding("uint8")
    if storage == "uint8":
        if values.negative:
            raise DataError(
                f"track {track} has values below 0, which `storage: uint8` cannot hold: set storage to auto or "
                "float16 in the dataset YAML"
            )
        return Coding("uint8", "log", math.log1p(values.largest / values.smallest) / _LEVELS, values.smallest)
    fits = values.largest <= _HALF_LARGEST and values.smallest >= _HALF_SMALLEST
    # A power of two: the digits stay as they are.
    step = 1.0 if fits else 2.0 ** max(-100, math.ceil(math.log2(values.largest / _HALF_LARGEST)))
    if storage == "float32" or (storage == "auto" and values.smallest / step < _HALF_SMALLEST):
        return Coding("float32")
    return Coding("float16", step=step)


class RelativeError:
    """The largest and the root mean square relative error of decoded values that are not 0."""

    def __init__(self) -> None:
        self._largest, self._squares, self._count = 0.0, 0.0, 0

    def add(self, values: npt.NDArray[np.float32], decoded: npt.NDArray[np.float32]) -> None:
        """Compare more values with what became of them."""
        there = values != 0
        true = values[there].astype(np.float64)
        error = np.abs(decoded[there] / true - 1)
        self._largest = max(self._largest, float(error.max(initial=0.0)))
        self._squares += float(np.square(error).sum())
        self._count += error.size

    def of(self, coding: Coding) -> Coding:
        """`coding` with these errors."""
        rms = math.sqrt(self._squares / max(self._count, 1))
        return replace(coding, largest_error=self._largest, rms_error=rms)


def common_dtype(storage: StorageName, codings: Sequence[Coding]) -> DtypeName:
    """The dtype of an array of all tracks: the one asked for, or for `auto` the widest that a track needs."""
    return DTYPES[max(DTYPES.index(coding.dtype) for coding in codings)] if storage == "auto" else storage


class Storage:
    """The codings of all tracks of an array (bins, tracks), decoded together.

    Attributes:
        dtype: of the stored array; each coding's own or a wider one.
        codings: one per track, in the order of the columns.
        steps: float32 (tracks,), what stored numbers are multiplied by; None where all are 1.
        table: float32 (256 * tracks,), the value of stored number n of track t at 256 t + n; None where no coding
            is logarithmic, and `steps` are all there is.
        offsets: int64 (tracks,), where a track begins in `table`.
    """

    def __init__(self, dtype: DtypeName, codings: Sequence[Coding]) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.codings = tuple(codings)
        steps = np.array([coding.step for coding in codings], dtype=np.float32)
        self.steps = None if (steps == 1).all() else steps
        logarithmic = any(coding.curve == "log" for coding in codings)
        self.table = np.concatenate([coding.table() for coding in codings]) if logarithmic else None
        self.offsets = (_LEVELS + 1) * np.arange(len(codings), dtype=np.intp)

    def decode(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 (bins, tracks): the values of stored numbers (bins, tracks), in each track's unit."""
        if self.table is not None:
            return self.table[stored + self.offsets]
        values = stored.astype(np.float32)
        if self.steps is not None:
            values *= self.steps
        return values
