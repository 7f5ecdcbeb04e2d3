"""Metrics of predictions that come batch by batch: exact while they are few, in bounded memory when they are many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genossm import metrics

Measure = Literal["rank", "pearson", "log_pearson"]

EXACT_BYTES = 1 << 26
"""Up to so many bytes of predictions of all tracks, metrics are computed from the predictions themselves."""

_CELLS = 1 << 15
_LEAST_SPREAD = 1e-3
_REACH = 1e5  # spreads: the logits of all float32 probabilities lie within 100 of each other
_LEAST_SCORE = 1e-30
_CHUNK = 1 << 21


@dataclass(frozen=True, slots=True)
class Ranking:
    """How well scores rank: areas, and the score from which on calling positives has the best F1; NaN where undefined."""

    auroc: float
    auprc: float
    threshold: float


class ScoreCounts:
    """How many positive and negative bins have scores in each of 32,768 cells, for each of some tracks.

    Cells are narrow where scores are dense: evenly wide in the asinh of the logit's distance from the mean of the first
    scores in units of their spread, so about 0.075 % of that spread, or of the distance where it is larger. Each also has
    its least and greatest score: where both are one, its bins are ties, else they are taken to be mixed evenly. A cell
    takes 16 bytes; it can count 2 billion bins.

    Args:
        tracks: how many.
        device: of the scores, and of the counts: nothing waits for the device before `rankings`.
    """

    def __init__(self, tracks: int, device: torch.device | str) -> None:
        self._counts = torch.zeros(tracks * 2 * _CELLS, dtype=torch.int32, device=device)
        self._least = torch.full((tracks * _CELLS,), torch.inf, device=device)
        self._most = torch.full((tracks * _CELLS,), -torch.inf, device=device)
        self._first = _CELLS * torch.arange(tracks, device=device)
        self._centre: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._counts.nbytes + self._least.nbytes + self._most.nbytes

    def add(self, scores: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Count more bins.

        Args:
            scores: float32 (bins, tracks), probabilities from 0 to 1; NaN is counted somewhere.
            labels: (bins, tracks), 0 or 1.
            mask: bool (bins, tracks), False for bins that do not count.
        """
        logits = _logits(scores)
        if self._centre is None:
            self._centre = logits.mean(0), logits.std(0, correction=0).clamp(min=_LEAST_SPREAD)
        mean, spread = self._centre
        half = _CELLS // 2
        place = torch.asinh((logits - mean) / spread).mul_(half / float(np.arcsinh(_REACH)))
        cell = place.nan_to_num_(0.0).floor_().long().add_(half).clamp_(0, _CELLS - 1).add_(self._first)
        by_label = cell + (labels > 0.5) * len(self._least)
        self._counts.scatter_add_(0, by_label.flatten(), mask.int().flatten())
        flat = cell.flatten()
        self._least.scatter_reduce_(0, flat, torch.where(mask, scores, torch.inf).flatten(), "amin")
        self._most.scatter_reduce_(0, flat, torch.where(mask, scores, -torch.inf).flatten(), "amax")

    def rankings(self) -> list[Ranking]:
        """One per track."""
        tracks = len(self._first)
        negatives, positives = self._counts.cpu().numpy().reshape(2, tracks, _CELLS)
        least, most = (part.cpu().numpy().reshape(tracks, _CELLS) for part in (self._least, self._most))
        return [
            _ranking(positives[track], negatives[track], least[track], most[track]) for track in range(tracks)
        ]


class Moments:
    """What Pearson correlations of some tracks need: means and centred sums in float64, merged batch by batch.

    Args:
        tracks: how many.
        device: of the values; nothing waits for it before `correlations`.
    """

    def __init__(self, tracks: int, device: torch.device | str) -> None:
        self._count = torch.zeros(tracks, dtype=torch.float64, device=device)
        self._means = torch.zeros((2, tracks), dtype=torch.float64, device=device)
        self._sums = torch.zeros((3, tracks), dtype=torch.float64, device=device)  # xx, yy, xy
        self._least = torch.full((2, tracks), torch.inf, device=device)
        self._most = torch.full((2, tracks), -torch.inf, device=device)

    def add(self, observed: Tensor, predicted: Tensor, mask: Tensor) -> None:
        """Take in more bins: float32 (bins, tracks) twice, and bool (bins, tracks), False for bins that do not count."""
        both = torch.stack([observed, predicted])
        self._least = torch.minimum(self._least, both.masked_fill(~mask, torch.inf).amin(1))
        self._most = torch.maximum(self._most, both.masked_fill(~mask, -torch.inf).amax(1))
        count = mask.sum(0).double()
        values = both.double().masked_fill(~mask, 0.0)
        means = values.sum(1) / count.clamp(min=1)
        x, y = (values - means[:, None]).masked_fill(~mask, 0.0)
        # The merging of Chan, Golub and LeVeque (1979): no digits are lost, however large the means.
        total = self._count + count
        apart = means - self._means
        weight = self._count * count / total.clamp(min=1)
        own = torch.stack([(x * x).sum(0), (y * y).sum(0), (x * y).sum(0)])
        between = torch.stack([apart[0] * apart[0], apart[1] * apart[1], apart[0] * apart[1]])
        self._sums += own + between * weight
        self._means += apart * (count / total.clamp(min=1))
        self._count = total

    def correlations(self) -> list[float]:
        """One per track, NaN for fewer than two bins or a constant side."""
        xx, yy, xy = self._sums.cpu().numpy()
        constant = (self._least >= self._most).any(0).cpu().numpy()
        found = []
        for track, count in enumerate(self._count.cpu().numpy()):
            if count < 2 or constant[track]:
                found.append(float("nan"))
            else:
                found.append(float(np.clip(xy[track] / (xx[track] ** 0.5 * yy[track] ** 0.5), -1.0, 1.0)))
        return found


class BatchedMetrics:
    """Metrics of each track over all batches of a validation.

    While all predictions together take less than `exact_bytes`, they are kept, on the host, and metrics are those of
    `genossm.metrics`. From then on they are counted: memory no longer grows, no batch waits for the device, and areas
    differ from the exact ones by less than 1e-4.

    Args:
        measures: what each track is measured by: `rank` (peaks), `pearson`, or `log_pearson`, of log1p values.
        exact_bytes: see above; None takes `EXACT_BYTES`.
    """

    def __init__(self, measures: Sequence[Measure], *, exact_bytes: int | None = None) -> None:
        self._measures = tuple(measures)
        self._exact_bytes = EXACT_BYTES if exact_bytes is None else exact_bytes
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._kept_bytes = 0
        self._finite: Tensor | None = None
        self._counted: tuple[ScoreCounts, Moments] | None = None
        self._columns: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, on the host and on the device."""
        kept = sum(part.nbytes for parts in self._kept for part in parts)
        return kept + (self._counted[0].nbytes if self._counted is not None else 0)

    def add(self, values: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Take in a batch: float32 values and targets, bool mask, all (..., tracks) on one device."""
        batch = (values.flatten(0, -2), targets.flatten(0, -2), mask.flatten(0, -2))
        finite = torch.isfinite(batch[0]).all()
        self._finite = finite if self._finite is None else self._finite & finite
        if self._counted is None:
            self._kept.append((batch[0].cpu(), batch[1].cpu(), batch[2].cpu()))
            self._kept_bytes += values.nbytes
            if self._kept_bytes < self._exact_bytes:
                return
            self._start_counting(values.device)
            kept, self._kept = self._kept, []
            while kept:
                parts = kept.pop(0)
                self._count(*(part.to(values.device) for part in parts))
            return
        self._count(*batch)

    def finite(self) -> bool:
        """Whether all predictions were numbers, those of masked bins too."""
        return self._finite is None or bool(self._finite)

    def results(self) -> list[Ranking | float]:
        """For each track what it is measured by; all predictions must be finite."""
        if self._counted is not None:
            rankings, correlations = (
                iter(self._counted[0].rankings()),
                iter(self._counted[1].correlations()),
            )
            return [next(rankings) if measure == "rank" else next(correlations) for measure in self._measures]
        values, targets, mask = (
            torch.cat([parts[index] for parts in self._kept]).numpy() for index in range(3)
        )
        found: list[Ranking | float] = []
        for index, measure in enumerate(self._measures):
            keep = mask[:, index]
            truth, score = targets[keep, index], values[keep, index]
            if measure == "rank":
                found.append(
                    Ranking(
                        metrics.auroc(truth, score),
                        metrics.auprc(truth, score),
                        metrics.best_f1_threshold(truth, score),
                    )
                )
            elif measure == "log_pearson":
                found.append(metrics.pearson(np.log1p(truth), np.log1p(score)))
            else:
                found.append(metrics.pearson(truth, score))
        return found

    def _start_counting(self, device: torch.device) -> None:
        places: dict[str, list[int]] = {"rank": [], "other": [], "log": []}
        for index, measure in enumerate(self._measures):
            if measure == "log_pearson":
                places["log"].append(len(places["other"]))
            places["rank" if measure == "rank" else "other"].append(index)
        self._columns = {
            name: torch.tensor(indices, device=device, dtype=torch.long) for name, indices in places.items()
        }
        self._counted = (
            ScoreCounts(len(places["rank"]), device),
            Moments(len(places["other"]), device),
        )

    def _count(self, values: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Count bins (bins, tracks), some at a time: what is made of them on the way takes several times their memory."""
        assert self._counted is not None
        counts, moments = self._counted
        ranked, other, logarithmic = (self._columns[name] for name in ("rank", "other", "log"))
        step = max(1, _CHUNK // values.shape[1])
        for start in range(0, len(values), step):
            parts = [whole[start : start + step] for whole in (values, targets, mask)]
            if len(ranked):
                counts.add(*(part[:, ranked] for part in parts))
            if len(other):
                predicted, observed, there = (part[:, other] for part in parts)
                if len(logarithmic):
                    predicted[:, logarithmic] = predicted[:, logarithmic].log1p()
                    observed[:, logarithmic] = observed[:, logarithmic].log1p()
                moments.add(observed, predicted, there)


def _logits(scores: Tensor) -> Tensor:
    """float64, finite where the scores are: close to 0 float32 is fine enough, close to 1 scores are ties anyway."""
    values = scores.double()
    return values.clamp(min=_LEAST_SCORE).log_().sub_((1 - values).clamp_(min=1e-9).log_())


def _ranking(
    positives: npt.NDArray[np.int32],
    negatives: npt.NDArray[np.int32],
    least: npt.NDArray[np.float32],
    most: npt.NDArray[np.float32],
) -> Ranking:
    """From the bins of each cell, cells from the lowest score up."""
    there = np.flatnonzero(positives + negatives)[::-1]  # from the highest score down
    hits, misses = positives[there].astype(np.float64), negatives[there].astype(np.float64)
    hits_so_far, called_so_far = np.cumsum(hits), np.cumsum(hits + misses)
    all_hits, all_misses = float(hits.sum()), float(misses.sum())
    if not all_hits:
        return Ranking(float("nan"), float("nan"), float("nan"))
    lowest = least[there]
    tied = lowest == most[there]
    # Ties are called together; of a cell of several scores the positives stand, on average, in its middle.
    hits_at = np.where(tied, hits_so_far, hits_so_far - (hits - 1) / 2)
    called_at = np.where(tied, called_so_far, called_so_far - (hits + misses - 1) / 2)
    auprc = float((hits * hits_at / called_at)[hits > 0].sum() / all_hits)
    f1 = 2 * hits_so_far / (called_so_far + all_hits)
    threshold = float(lowest[int(np.argmax(f1))])
    if not all_misses:
        return Ranking(float("nan"), auprc, threshold)
    below = all_misses - np.cumsum(misses)
    auroc = float((hits * (below + misses / 2)).sum() / (all_hits * all_misses))
    return Ranking(auroc, auprc, threshold)
