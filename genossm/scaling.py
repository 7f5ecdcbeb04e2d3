"""Scaled targets: signal cut off at a height, squashed and brought to a mean, and the way back to its unit.

scaled = squash(min(value, clip)) * factor; values below 0 likewise, with their sign.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from genossm.errors import DataError

Squash = Literal["none", "sqrt", "log1p"]
Float = TypeVar("Float", np.float32, np.float64)
_CELLS = 1 << 16
_PERCENT = re.compile(r"\s*([0-9.]+)\s*%\s*")


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """How a signal track's targets are scaled for training.

    `clip` is the largest value, a number in the track's unit or a percentile of the training bins
    (`99.9%`); `squash` what is then done to the values; `mean` what the mean of the training bins becomes.
    """

    clip: float | str | None = None
    squash: Squash = "none"
    mean: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.clip, str):
            self.percentile()
        elif self.clip is not None and not 0 < self.clip < np.inf:
            raise ValueError(f"clip is {self.clip}: give a number above 0, or a percentile such as 99.9%")
        if self.mean is not None and not 0 < self.mean < np.inf:
            raise ValueError(f"mean is {self.mean}: give a number above 0, or leave the key out")

    def percentile(self) -> float | None:
        """`clip` as a percentile above 0 and up to 100, None where it is none.

        Raises:
            ValueError: it is a text and no percentile.
        """
        if not isinstance(self.clip, str):
            return None
        found = _PERCENT.fullmatch(self.clip)
        try:
            percent = float(found[1]) if found is not None else 0.0
        except ValueError:
            percent = 0.0
        if not 0 < percent <= 100:
            raise ValueError(
                f"clip is {self.clip!r}: give a number in the track's unit, or a percentile above 0% and up to 100%"
            )
        return percent


@dataclass(frozen=True, slots=True)
class Scaling:
    """A fitted scaling; `inverse` undoes `forward` but for what `clip` cut off, which comes back as `clip`.

    The default leaves values as they are. `genossm.models.heads` does the same with tensors.
    """

    clip: float | None = None
    squash: Squash = "none"
    factor: float = 1.0

    def forward(self, values: npt.NDArray[Float]) -> npt.NDArray[Float]:
        """Values in the track's unit, scaled; same shape and dtype."""
        limit = np.inf if self.clip is None else self.clip
        scaled: npt.NDArray[Float] = _squashed(np.clip(values, -limit, limit), self.squash)
        return scaled * self.factor

    def inverse(self, scaled: npt.NDArray[Float]) -> npt.NDArray[Float]:
        """Scaled values, such as a model's, back in the track's unit; same shape and dtype."""
        values: npt.NDArray[Float] = scaled / self.factor
        if self.squash == "sqrt":
            return np.sign(values) * np.square(values)
        return np.sign(values) * np.expm1(np.abs(values)) if self.squash == "log1p" else values


UNSCALED = Scaling()
"""Of a track without a scale."""


class ValueCounts:
    """How many values there are of each magnitude, in cells less than 1 % wide, and their sums.

    Attributes:
        counts: int64 (65536,), by the upper half of the float32's bits.
        sums: float64 (65536,), of the values in each cell.
    """

    def __init__(
        self, counts: npt.NDArray[np.int64] | None = None, sums: npt.NDArray[np.float64] | None = None
    ) -> None:
        self.counts = np.zeros(_CELLS, dtype=np.int64) if counts is None else counts
        self.sums = np.zeros(_CELLS, dtype=np.float64) if sums is None else sums

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count more values, finite float32."""
        cells = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16
        self.counts += np.bincount(cells, minlength=_CELLS)
        self.sums += np.bincount(cells, weights=values, minlength=_CELLS)

    def __add__(self, other: ValueCounts) -> ValueCounts:
        return ValueCounts(self.counts + other.counts, self.sums + other.sums)

    def magnitude(self, percent: float) -> float:
        """The magnitude that `percent` of the values do not exceed, to within 1 %."""
        there = np.flatnonzero(self.counts)
        heights = np.abs(self.sums[there] / self.counts[there])
        order = np.argsort(heights, kind="stable")
        below = np.cumsum(self.counts[there][order])
        return float(heights[order][np.searchsorted(below, percent / 100 * below[-1], side="left")])

    def mean(self, function: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> float:
        """The mean of `function` of the values, each taken for the mean of its cell."""
        return self.mean_and_spread(function)[0]

    def mean_and_spread(
        self, function: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    ) -> tuple[float, float]:
        """The mean and the standard deviation likewise; NaN where there is no value."""
        if not self.counts.any():
            return math.nan, math.nan
        there = np.flatnonzero(self.counts)
        centres = (self.sums[there] / self.counts[there]).astype(np.float32)
        weights = self.counts[there] / self.counts.sum()
        results = function(centres).astype(np.float64)
        mean = float((results * weights).sum())
        return mean, math.sqrt(float((np.square(results - mean) * weights).sum()))


def fit_scaling(config: ScaleConfig, values: ValueCounts, *, track: str) -> Scaling:
    """The scaling that `config` asks for, given the values of the training bins.

    Raises:
        DataError: a percentile or a mean is asked for and there is no value to take it from, or only 0.
    """
    percent = config.percentile()
    if (percent is not None or config.mean is not None) and not values.counts.sum():
        raise DataError(
            f"the scale of track {track} needs training bins, and all are masked: give `clip` as a number and "
            "no `mean`, or remove the track"
        )
    clip = config.clip if not isinstance(config.clip, str) else values.magnitude(percent or 0.0)
    if clip == 0:
        raise DataError(
            f"the clip {config.clip} of track {track} is 0: so many of its training bins are; give a higher "
            "percentile, or a number"
        )
    plain = Scaling(clip, config.squash)
    if config.mean is None:
        return plain
    mean = values.mean(plain.forward)
    if mean <= 0:
        raise DataError(
            f"the mean of track {track} is {mean:g} on the training bins, which no factor brings to "
            f"{config.mean:g}: leave `mean` out of its scale"
        )
    return Scaling(clip, config.squash, config.mean / mean)


def _squashed(values: npt.NDArray[Float], squash: Squash) -> npt.NDArray[Float]:
    if squash == "sqrt":
        return np.sign(values) * np.sqrt(np.abs(values))
    return np.sign(values) * np.log1p(np.abs(values)) if squash == "log1p" else values
