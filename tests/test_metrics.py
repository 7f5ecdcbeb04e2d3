"""genossm.metrics against counts made by hand and slow definitions written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genossm import metrics
from genossm.errors import DataError


def slow_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, a tie counting one half."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = sum(float(p > n) + 0.5 * float(p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def slow_auprc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision from its definition, one threshold after the other."""
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        precision = labels[called].sum() / called.sum()
        recall = labels[called].sum() / labels.sum()
        area += (recall - recall_before) * precision
        recall_before = recall
    return area


bins = st.lists(st.tuples(st.booleans(), st.integers(-3, 4)), min_size=2, max_size=40)


@given(bins)
@settings(max_examples=60, deadline=None)
def test_ranking_metrics_equal_their_definitions_with_many_ties(rows: list[tuple[bool, int]]) -> None:
    labels = np.array([label for label, _ in rows], dtype=np.int64)
    scores = np.array([score for _, score in rows], dtype=np.float32) / 4
    if labels.any():
        assert metrics.auprc(labels, scores) == pytest.approx(slow_auprc(labels, scores), abs=1e-6)
    else:
        assert math.isnan(metrics.auprc(labels, scores))
    if labels.any() and not labels.all():
        assert metrics.auroc(labels, scores) == pytest.approx(slow_auroc(labels, scores), abs=1e-6)
    else:
        assert math.isnan(metrics.auroc(labels, scores))


def test_hand_counted_example_with_ties() -> None:
    labels = np.array([1, 0, 1, 0, 0, 1])
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.1, 0.1])
    # 0.9: 1 of 2 right, recall 1/3; 0.5: 2 of 4, recall 2/3; 0.1: 3 of 6, recall 1: every step has precision
    # 1/2
    assert metrics.auprc(labels, scores) == pytest.approx(0.5)
    # pairs: 0.9 beats 2, ties 1; 0.5 beats 1, ties 1; 0.1 ties 1 -> (2.5 + 1.5 + 0.5) / 9
    assert metrics.auroc(labels, scores) == pytest.approx(4.5 / 9)
    assert metrics.positive_rate(labels) == 0.5


def test_order_of_tied_bins_and_scale_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    labels = rng.random(2000) < 0.1
    scores = np.round(rng.random(2000) + 0.3 * labels, 2)
    order = rng.permutation(2000)
    for metric in (metrics.auroc, metrics.auprc):
        assert metric(labels, scores) == pytest.approx(metric(labels[order], scores[order]), abs=1e-12)
        assert metric(labels, scores) == pytest.approx(metric(labels, scores * 1000 - 500), abs=1e-6)


def test_large_scores_keep_their_order() -> None:
    labels = np.array([0, 0, 1, 1])
    scores = np.array([100.0, 200.0, 300.0, 400.0])
    assert metrics.auroc(labels, scores) == 1.0
    assert metrics.auprc(labels, scores) == 1.0


def test_auprc_of_a_large_array_equals_the_curve() -> None:
    rng = np.random.default_rng(2)
    labels = rng.random(200_000) < 0.03
    scores = np.clip(0.2 * rng.random(200_000) + 0.3 * labels * rng.random(200_000), 0, 1).astype(np.float32)
    curve = metrics.precision_recall(labels, scores)
    by_curve = float((np.diff(curve.recall, prepend=0.0) * curve.precision).sum())
    assert metrics.auprc(labels, scores) == pytest.approx(by_curve, abs=1e-6)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_correlations_equal_their_definitions(rows: list[tuple[int, int]]) -> None:
    x = np.array([row[0] for row in rows], dtype=np.float64)
    y = np.array([row[1] for row in rows], dtype=np.float64)

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    for metric, a, b in ((metrics.pearson, x, y), (metrics.spearman, ranks(x), ranks(y))):
        if len(set(a)) < 2 or len(set(b)) < 2:
            assert math.isnan(metric(x, y))
        else:
            covariance = np.mean((a - a.mean()) * (b - b.mean()))
            assert metric(x, y) == pytest.approx(covariance / (a.std() * b.std()), abs=1e-9)


def test_pearson_holds_for_tiny_and_huge_spread() -> None:
    x = np.linspace(0, 1, 50)
    assert metrics.pearson(x, 0.5 + 1e-9 * x) == pytest.approx(1.0, abs=1e-6)
    assert metrics.pearson(x * 1e200, -x) == pytest.approx(-1.0)


def test_precision_recall_points_and_best_threshold() -> None:
    labels = np.array([1, 1, 0, 1, 0, 0])
    scores = np.array([0.9, 0.8, 0.8, 0.6, 0.3, 0.1])
    curve = metrics.precision_recall(labels, scores)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.6, 0.3, 0.1]
    assert curve.precision == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5, 3 / 6])
    assert curve.recall == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    assert metrics.best_f1_threshold(labels, scores) == 0.6
    assert curve.f1.max() == pytest.approx(6 / 7)


def test_thinned_curve_keeps_its_ends_and_lies_on_the_whole_one() -> None:
    rng = np.random.default_rng(3)
    labels = rng.random(5000) < 0.2
    scores = rng.random(5000) + 0.4 * labels
    whole = metrics.precision_recall(labels, scores)
    thin = metrics.precision_recall(labels, scores, max_points=100)
    assert 50 < thin.recall.size <= 100
    assert thin.recall[-1] == 1.0 and thin.thresholds[0] == whole.thresholds[0]
    points = set(zip(whole.recall.tolist(), whole.precision.tolist(), strict=True))
    assert set(zip(thin.recall.tolist(), thin.precision.tolist(), strict=True)) <= points


def test_calibration_groups() -> None:
    probabilities = np.array([0.0, 0.04, 0.12, 0.18, 1.0])
    labels = np.array([0, 0, 1, 0, 1])
    result = metrics.calibration(labels, probabilities, groups=10)
    assert result.count.tolist() == [2, 2, 1]
    assert result.predicted == pytest.approx([0.02, 0.15, 1.0])
    assert result.observed == pytest.approx([0.0, 0.5, 1.0])
    assert result.error == pytest.approx((2 * 0.02 + 2 * 0.35) / 5)


def test_undefined_figures_are_nan() -> None:
    none, scores = np.zeros(4), np.arange(4.0)
    assert math.isnan(metrics.auroc(none, scores)) and math.isnan(metrics.auprc(none, scores))
    assert math.isnan(metrics.auroc(np.ones(4), scores)) and metrics.auprc(np.ones(4), scores) == 1.0
    assert math.isnan(metrics.best_f1_threshold(none, scores))
    assert math.isnan(metrics.pearson(np.ones(4), scores)) and math.isnan(
        metrics.spearman(scores, np.ones(4))
    )
    empty = np.empty(0)
    for metric in (metrics.auroc, metrics.auprc, metrics.pearson, metrics.spearman):
        assert math.isnan(metric(empty, empty))
    assert math.isnan(metrics.positive_rate(empty)) and math.isnan(metrics.calibration(empty, empty).error)


def test_impossible_input_is_refused_with_the_reason() -> None:
    with pytest.raises(DataError, match="truth comes first"):
        metrics.auprc(np.array([0.2, 0.7]), np.array([0.0, 1.0]))
    with pytest.raises(DataError, match="1 of 2 predictions are NaN"):
        metrics.auroc(np.array([0, 1]), np.array([0.1, np.nan]))
    with pytest.raises(DataError, match="same bins"):
        metrics.pearson(np.zeros(3), np.zeros(4))
    with pytest.raises(DataError, match="one track at a time"):
        metrics.auprc(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(DataError, match="probabilities from 0 to 1"):
        metrics.calibration(np.array([0, 1]), np.array([-2.0, 3.0]))
