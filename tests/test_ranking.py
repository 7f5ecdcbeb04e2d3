"""Metrics batch by batch: close to the exact ones in bounded memory, and the exact ones themselves while data are few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genossm import metrics
from genossm.ranking import BatchedMetrics, Measure, Moments, Ranking, ScoreCounts


def realistic(
    seed: int, bins: int, *, rate: float, skill: float, centre: float, spread: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, and probabilities whose logits are normal, higher by `skill` spreads where the label is 1."""
    random = np.random.default_rng(seed)
    labels = random.random(bins) < rate
    logits = centre + spread * (random.standard_normal(bins) + skill * labels)
    return torch.from_numpy(labels).float(), torch.sigmoid(torch.from_numpy(logits).float())


def rank(labels: torch.Tensor, scores: torch.Tensor, *, batches: int = 7) -> Ranking:
    counts = ScoreCounts(1, "cpu")
    for truth, score in zip(labels.tensor_split(batches), scores.tensor_split(batches), strict=True):
        counts.add(score[:, None], truth[:, None], torch.ones(len(truth), 1, dtype=torch.bool))
    return counts.rankings()[0]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.sampled_from([0.005, 0.03, 0.3]),
    skill=st.sampled_from([0.0, 1.0, 3.0]),
    centre=st.sampled_from([-6.0, -3.0, 0.0, 2.0]),
    spread=st.sampled_from([1e-3, 0.05, 1.0, 4.0]),
    coarse=st.booleans(),
)
def test_areas_and_thresholds_are_close_to_the_exact_ones(
    seed: int, rate: float, skill: float, centre: float, spread: float, coarse: bool
) -> None:
    """Logits of any place and spread, also those of bfloat16, of which many are ties."""
    labels, scores = realistic(seed, 150_000, rate=rate, skill=skill, centre=centre, spread=spread)
    if coarse:
        scores = torch.sigmoid(torch.logit(scores, eps=1e-7).bfloat16().float())
    found = rank(labels, scores)
    truth, score = labels.numpy(), scores.numpy()
    assert found.auroc == pytest.approx(metrics.auroc(truth, score), abs=1e-4)
    assert found.auprc == pytest.approx(metrics.auprc(truth, score), abs=1e-4)
    curve = metrics.precision_recall(truth, score)
    assert found.threshold in score
    at = int(np.flatnonzero(curve.thresholds == found.threshold)[0])
    assert curve.f1[at] == pytest.approx(curve.f1.max(), abs=2e-3)


def test_a_first_batch_of_one_score_does_no_harm() -> None:
    """A chromosome begins with N, where a model says the same everywhere: the scores to come are spread otherwise."""
    labels, scores = realistic(3, 50_000, rate=0.02, skill=2.0, centre=-4.0, spread=1.0)
    labels = torch.cat([torch.zeros(5_000), labels])
    scores = torch.cat([torch.full((5_000,), 0.01), scores])
    found = rank(labels, scores, batches=11)
    assert found.auprc == pytest.approx(metrics.auprc(labels.numpy(), scores.numpy()), abs=1e-4)
    assert found.auroc == pytest.approx(metrics.auroc(labels.numpy(), scores.numpy()), abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0.0, 0.0], [0.1, 0.2], (np.nan, np.nan, np.nan)),
        ([1.0, 1.0], [0.1, 0.2], (np.nan, 1.0, 0.1)),
        ([0.0, 1.0], [0.0, 1.0], (1.0, 1.0, 1.0)),
        ([1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], (0.5, 0.25, 0.5)),
    ],
)
def test_rankings_of_few_bins(labels: list[float], scores: list[float], expected: tuple[float, ...]) -> None:
    found = rank(torch.tensor(labels), torch.tensor(scores), batches=1)
    assert (found.auroc, found.auprc, found.threshold) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), offset=st.sampled_from([0.0, 1e4]), batches=st.integers(1, 9))
def test_correlations_are_the_exact_ones(seed: int, offset: float, batches: int) -> None:
    random = np.random.default_rng(seed)
    observed = (offset + random.gamma(0.5, 3.0, (500, 3))).astype(np.float32)
    predicted = (observed * [1, -0.2, 0] + random.standard_normal((500, 3)) * [1, 5, 0]).astype(np.float32)
    mask = random.random((500, 3)) < 0.7
    mask[:100] = False  # batches without any bin
    moments = Moments(3, "cpu")
    parts = (torch.from_numpy(array).tensor_split(batches) for array in (observed, predicted, mask))
    for part in zip(*parts, strict=True):
        moments.add(*part)
    expected = [metrics.pearson(observed[mask[:, i], i], predicted[mask[:, i], i]) for i in range(3)]
    assert moments.correlations() == pytest.approx(expected, rel=1e-9, nan_ok=True)


def batches(count: int, tracks: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(values, targets, mask) of 2 windows of 300 bins, ranked tracks and counts in turn."""
    random = torch.Generator().manual_seed(4)
    made = []
    for _ in range(count):
        values = torch.rand(2, 300, tracks, generator=random)
        targets = (torch.rand(2, 300, tracks, generator=random) < values).float()
        made.append((values, targets, torch.rand(2, 300, tracks, generator=random) < 0.9))
    return made


def test_few_predictions_are_measured_exactly_and_many_alike() -> None:
    measures: list[Measure] = ["rank", "log_pearson", "rank", "pearson"]
    exact, counted = BatchedMetrics(measures), BatchedMetrics(measures, exact_bytes=5 * 2 * 300 * 4 * 4)
    made = batches(12, 4)
    for batch in made:
        exact.add(*batch)
        counted.add(*batch)
    values, targets, mask = (torch.cat([batch[i].flatten(0, 1) for batch in made]).numpy() for i in range(3))
    for index, (one, other) in enumerate(zip(exact.results(), counted.results(), strict=True)):
        truth, score = targets[mask[:, index], index], values[mask[:, index], index]
        if isinstance(one, Ranking):
            assert isinstance(other, Ranking)
            assert one.auprc == metrics.auprc(truth, score) and one.auroc == metrics.auroc(truth, score)
            assert one.threshold == metrics.best_f1_threshold(truth, score)
            assert (other.auprc, other.auroc) == pytest.approx((one.auprc, one.auroc), abs=1e-4)
        else:
            logarithm = np.log1p if measures[index] == "log_pearson" else np.asarray
            assert one == metrics.pearson(logarithm(truth), logarithm(score))
            assert other == pytest.approx(one, abs=1e-6)


def test_memory_does_not_grow_with_the_bins() -> None:
    """As many tracks as a human atlas has: what is kept stays below the exact limit and the counts' own size."""
    tracks, most = 161, 0
    collected = BatchedMetrics(["rank"] * 160 + ["pearson"], exact_bytes=1 << 21)
    for batch in batches(3, tracks) * 10:
        collected.add(*batch)
        most = max(most, collected.nbytes)
    counts = 160 * 32_768 * 16
    assert collected.nbytes == counts and most <= counts
    assert len(collected.results()) == tracks


def test_a_prediction_that_is_no_number_is_found() -> None:
    for exact_bytes in (1 << 26, 1):
        collected = BatchedMetrics(["rank", "pearson"], exact_bytes=exact_bytes)
        values, targets, mask = batches(1, 2)[0]
        collected.add(values, targets, mask)
        assert collected.finite()
        collected.add(torch.full_like(values, torch.nan), targets, mask)
        assert not collected.finite()
