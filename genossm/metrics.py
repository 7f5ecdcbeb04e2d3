"""Metrics of per-bin predictions: ranking of peaks, correlation of signal, curves and calibration.

Every function takes the truth first and the prediction second, as 1-D arrays over the same bins, and gives
NaN where the figure is undefined (no positives, a constant array, no bins). Bins that are masked must be left
out by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.errors import DataError

RealArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """A precision-recall curve: point i calls bins with a score of `thresholds[i]` (descending) or more."""

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]

    @property
    def f1(self) -> npt.NDArray[np.float64]:
        """Harmonic mean of precision and recall at each point (0 where both are 0)."""
        total = self.precision + self.recall
        return np.divide(2 * self.precision * self.recall, total, out=np.zeros_like(total), where=total > 0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Predicted against observed rate of bins grouped by prediction; empty groups are left out."""

    predicted: npt.NDArray[np.float64]
    observed: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]

    @property
    def error(self) -> float:
        """Expected calibration error: mean |predicted - observed|, weighted by the bins of each group."""
        if self.count.sum() == 0:
            return float("nan")
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.count))


def positive_rate(labels: RealArray) -> float:
    """Share of positive bins: the AUPRC that a random ranking reaches. NaN when there are no bins."""
    positive = _labels(labels)
    return float(positive.mean()) if positive.size else float("nan")


def auroc(labels: RealArray, scores: RealArray) -> float:
    """Area under the ROC curve: the chance that a positive bin outranks a negative one, ties half.

    Args:
        labels: (bins,) 0 or 1 (or bool).
        scores: (bins,) finite, any scale; only their order matters.

    Returns:
        The exact area (no thresholds are sampled); NaN unless both classes are there.

    Raises:
        DataError: shapes differ, a label is neither 0 nor 1, or a score is not finite.
    """
    positive, ranked = _labels_and_ranks(labels, scores)
    if not positive.any() or positive.all():
        return float("nan")
    import torch
    from torchmetrics.functional.classification import binary_auroc

    area = binary_auroc(
        torch.from_numpy(ranked), torch.from_numpy(positive.astype(np.int64)), thresholds=None
    )
    return float(area)


def auprc(labels: RealArray, scores: RealArray) -> float:
    """Average precision: the sum over distinct scores of (gain in recall) x precision, without interpolation.

    Bins of equal score are called together, so the order of the bins does not matter. Arguments and errors as
    for `auroc`; NaN when there is no positive bin.
    """
    positive, ranked = _labels_and_ranks(labels, scores)
    if not positive.any():
        return float("nan")
    import torch
    from torchmetrics.functional.classification import binary_average_precision

    area = binary_average_precision(
        torch.from_numpy(ranked), torch.from_numpy(positive.astype(np.int64)), thresholds=None
    )
    return float(area)


def pearson(observed: RealArray, predicted: RealArray) -> float:
    """Pearson correlation in float64; NaN for fewer than two bins or a constant array.

    Computed here and not by torchmetrics, which warns about, and loses digits on, arrays of small variance
    such as the predictions of an untrained model.

    Raises:
        DataError: shapes differ or a value is not finite.
    """
    x, y = _pair(observed, predicted)
    if x.size < 2 or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    x = x - x.mean()
    y = y - y.mean()
    x /= np.abs(x).max()
    y /= np.abs(y).max()
    return float(np.clip(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)), -1.0, 1.0))


def spearman(observed: RealArray, predicted: RealArray) -> float:
    """Spearman correlation: `pearson` (NaN and errors too) of the ranks, ties sharing their mean rank."""
    x, y = _pair(observed, predicted)
    return pearson(_mean_ranks(x), _mean_ranks(y))


def precision_recall(
    labels: RealArray, scores: RealArray, *, max_points: int | None = None
) -> PrecisionRecall:
    """Precision and recall at every distinct score, from the highest down.

    Args:
        labels: (bins,) 0 or 1 (or bool).
        scores: (bins,) finite.
        max_points: thin the curve to about this many points, evenly in recall, for a plot; both ends are
            kept.

    Returns:
        The curve; empty when there is no positive bin.

    Raises:
        DataError: as for `auroc`.
    """
    positive = _labels(labels)
    values = _scores(scores, positive.shape)
    if not positive.any():
        empty = np.empty(0, np.float64)
        return PrecisionRecall(empty, empty, empty)
    order = np.argsort(-values, kind="stable")
    sorted_scores = values[order]
    last_of_tie = np.flatnonzero(np.append(np.diff(sorted_scores) != 0, True))
    hits = np.cumsum(positive[order], dtype=np.int64)[last_of_tie]
    precision = hits / (last_of_tie + 1)
    recall = hits / hits[-1]
    if max_points is not None and recall.size > max_points:
        kept = np.searchsorted(recall, np.linspace(recall[0], 1.0, max_points - 1))
        kept = np.unique(np.append(kept, recall.size - 1))
        precision, recall, last_of_tie = precision[kept], recall[kept], last_of_tie[kept]
    return PrecisionRecall(precision, recall, sorted_scores[last_of_tie])


def best_f1_threshold(labels: RealArray, scores: RealArray) -> float:
    """The (highest) score at which calling `score >= threshold` has the best F1; NaN when undefined."""
    curve = precision_recall(labels, scores)
    if curve.thresholds.size == 0:
        return float("nan")
    return float(curve.thresholds[int(np.argmax(curve.f1))])


def calibration(labels: RealArray, probabilities: RealArray, *, groups: int = 20) -> Calibration:
    """Predicted against observed rate in `groups` equal steps of probability, each [i/groups, (i+1)/groups).

    Raises:
        DataError: as for `auroc`, or a probability lies outside 0 to 1.
    """
    positive = _labels(labels)
    values = _scores(probabilities, positive.shape)
    if values.size and (values.min() < 0 or values.max() > 1):
        raise DataError(
            f"calibration needs probabilities from 0 to 1, got {values.min():.4g} to {values.max():.4g}; "
            "give it the model's predictions, not its raw outputs"
        )
    group = np.minimum((values * groups).astype(np.int64), groups - 1)
    count = np.bincount(group, minlength=groups)
    used = count > 0
    predicted = np.bincount(group, weights=values, minlength=groups)[used] / count[used]
    observed = np.bincount(group, weights=positive, minlength=groups)[used] / count[used]
    return Calibration(predicted, observed, count[used].astype(np.int64))


def _labels(labels: RealArray) -> npt.NDArray[np.bool_]:
    array = np.asarray(labels)
    if array.ndim != 1:
        raise DataError(
            f"labels must be a 1-D array over bins, got the shape {array.shape}; pass one track at a time"
        )
    positive = array.astype(bool)
    if not np.array_equal(positive, array):
        wrong = array[positive != array][0]
        raise DataError(f"labels must be 0 or 1, got {wrong}; truth comes first, scores second")
    return positive


def _scores(scores: RealArray, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != shape:
        raise DataError(
            f"truth has the shape {shape} but the prediction {values.shape}; both need the same bins"
        )
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(
            f"{bad} of {values.size} predictions are NaN or infinite; leave out masked bins before scoring"
        )
    return values


def _labels_and_ranks(
    labels: RealArray, scores: RealArray
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    positive = _labels(labels)
    values = _scores(scores, positive.shape)
    if values.size and (values.min() < 0 or values.max() > 1):
        # torchmetrics squashes scores outside 0 to 1 by a sigmoid, which makes ties of large ones: give it
        # ranks.
        distinct, rank = np.unique(values, return_inverse=True)
        values = rank / distinct.size
    # A copy where it must be: torch warns about arrays that it may not write to.
    return positive, np.require(values, requirements=["C", "W"])


def _pair(
    observed: RealArray, predicted: RealArray
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x = np.asarray(observed, dtype=np.float64)
    if x.ndim != 1:
        raise DataError(
            f"values must be a 1-D array over bins, got the shape {x.shape}; pass one track at a time"
        )
    return _scores(x, x.shape), _scores(predicted, x.shape)


def _mean_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    mean_rank: npt.NDArray[np.float64] = (last - (count - 1) / 2)[group]
    return mean_rank
