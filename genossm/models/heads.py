"""Track heads: from features to one number per bin and track, what it means, and the loss it is trained with.

Letters: B batch, L bins, D width, T tracks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import accumulation
from genossm.scaling import UNSCALED, Scaling
from genossm.strands import Strand, check_strand, partner_columns

MAX_LOG_RATE = 15.0
"""Log rates above this are cut: e^15 times a track's mean is beyond any signal, and stays finite in float32."""
MAX_LOG_VALUE = 60.0
"""Likewise for values that are logarithms themselves (`log1p`)."""


@dataclass(frozen=True)
class TrackHead:
    """One output track of a model.

    Attributes:
        name: the track's name in the dataset.
        kind: `peaks` (probability that a bin is in a peak) or `signal` (expected value of a bin).
        loss: `bce` for peaks; `poisson` (Poisson-multinomial) or `mse` for signal.
        aggregate: how a bin's value is made from its bases (`sum`, `mean`, `max`): the unit of predictions.
        mean, std: of the track's training bins, scaled; outputs are relative to them. Not used for peaks.
        strand, partner: of a stranded pair, "+" or "-" and the name of the track of the other strand.
        scaling: of signal, what targets go through before the loss, and values back; the default changes nothing.
    """

    name: str
    kind: Literal["peaks", "signal"]
    loss: Literal["bce", "poisson", "mse"]
    aggregate: str = "mean"
    mean: float = 1.0
    std: float = 1.0
    strand: Strand = "."
    partner: str | None = None
    scaling: Scaling = UNSCALED

    def __post_init__(self) -> None:
        check_strand(self)
        if (self.kind == "peaks") != (self.loss == "bce"):
            raise ValueError(
                f"track {self.name!r} of kind {self.kind} has loss {self.loss!r}; peaks take bce, signal poisson or mse"
            )
        if self.kind == "peaks" and self.scaling != UNSCALED:
            raise ValueError(
                f"track {self.name!r} of kind peaks has a scaling ({self.scaling}); only signal is scaled"
            )
        if self.loss == "poisson" and not self.mean > 0:
            raise ValueError(
                f"track {self.name!r} has mean {self.mean}; a poisson track needs a mean above 0"
            )
        if self.loss == "mse" and not self.std > 0:
            raise ValueError(
                f"track {self.name!r} has standard deviation {self.std}; an mse track needs one above 0"
            )


class TrackHeads(nn.Module):
    """Features (batch, bins, width) to raw outputs (batch, bins, tracks): logits, log rates or standard scores.

    Raises:
        ValueError: partners do not name each other, or are not alike in what they mean.
    """

    def __init__(self, tracks: Sequence[TrackHead], width: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        self.tracks = tuple(tracks)
        self.partners = partner_columns(self.tracks)
        self._scales: dict[
            tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]
        ] = {}  # made when first needed
        for track, column in zip(self.tracks, self.partners, strict=True):
            _check_alike(track, self.tracks[column])
        self.hidden = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, len(self.tracks))
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        raw: Tensor = self.output(self.dropout(F.gelu(self.hidden(x_BLD))))
        return raw.to(accumulation(raw.dtype))

    def other_strand(self, outputs_BLT: Tensor) -> Tensor:
        """Outputs or values of the reverse complement as those of the strand itself: bins back, partners swapped."""
        flipped = outputs_BLT.flip(1)
        if all(column == index for index, column in enumerate(self.partners)):
            return flipped
        columns = flipped.unbind(-1)  # an index tensor would be a buffer, which an average of weights spoils
        return torch.stack([columns[column] for column in self.partners], -1)

    def values(self, raw_BLT: Tensor) -> Tensor:
        """Raw outputs as what they mean: probabilities (peaks), expected values in the track's unit (signal).

        Of a track with a scaling: the value whose scaled value is the expected one (see `unscaled`).
        """
        columns = []
        for index, track in enumerate(self.tracks):
            raw = raw_BLT[..., index]
            if track.loss == "bce":
                columns.append(torch.sigmoid(raw))
            elif track.loss == "poisson":
                rate = torch.exp(raw.clamp(max=MAX_LOG_RATE)) * track.mean
                columns.append(unscaled(rate, track.scaling))
            else:
                columns.append(unscaled(raw * track.std + track.mean, track.scaling))
        return torch.stack(columns, dim=-1)

    def scaled(self, targets_BLT: Tensor) -> Tensor:
        """Targets in the tracks' units as each track's `Scaling.forward` scales them; themselves where no track has one.

        All tracks at once: a few operations, however many there are.
        """
        if all(track.scaling == UNSCALED for track in self.tracks):
            return targets_BLT
        where = targets_BLT.device, targets_BLT.dtype
        if where not in self._scales:
            scalings = [track.scaling for track in self.tracks]
            limits = [math.inf if scaling.clip is None else scaling.clip for scaling in scalings]
            factors = [scaling.factor for scaling in scalings]
            self._scales[where] = (
                torch.tensor([limits, factors], device=where[0], dtype=where[1]),
                torch.tensor(
                    [[scaling.squash == squash for scaling in scalings] for squash in ("sqrt", "log1p")],
                    device=where[0],
                ),
            )
        (limit, factor), (root, log) = self._scales[where]
        size = torch.minimum(targets_BLT.abs(), limit)
        size = torch.where(root, size.sqrt(), torch.where(log, size.log1p(), size))
        return torch.copysign(size * factor, targets_BLT)

    def losses(
        self, raw_BLT: Tensor, targets_BLT: Tensor, mask_BLT: Tensor, *, total_weight: float
    ) -> Tensor:
        """Loss of each track, averaged over its unmasked bins: (tracks,). Targets are in the tracks' units.

        Peaks: binary cross-entropy. Poisson signal: per window and track the multinomial negative log-likelihood of
        where the counts fall plus `total_weight` times the Poisson one of how many there are (Linder et al. 2025,
        Borzoi, Methods), targets in units of the track's mean. mse: of standard scores. Both of scaled targets.
        """
        targets_BLT = self.scaled(targets_BLT.float())
        mask = mask_BLT.to(raw_BLT.dtype)
        bins = mask.sum((0, 1)).clamp(min=1)
        losses = []
        for index, track in enumerate(self.tracks):
            raw, target, keep = raw_BLT[..., index], targets_BLT[..., index], mask[..., index]
            target = torch.where(keep > 0, target, torch.zeros_like(target))  # a masked target may be NaN
            if track.loss == "bce":
                loss = (F.binary_cross_entropy_with_logits(raw, target, reduction="none") * keep).sum()
            elif track.loss == "mse":
                loss = ((raw - (target - track.mean) / track.std).square() * keep).sum()
            else:
                loss = _poisson_multinomial(
                    raw.clamp(max=MAX_LOG_RATE), target / track.mean, keep, total_weight
                )
            losses.append(loss / bins[index])
        return torch.stack(losses)


def unscaled(values: Tensor, scaling: Scaling) -> Tensor:
    """Scaled values of a track back in its unit, up to rounding; the tensor itself where nothing is to be done.

    Values that `scaling.clip` cut off come back as that limit. A model's outputs may lie above what a target can be,
    and are not cut there, so that they stay in order; those of `log1p` are cut at e^60 - 1, to stay finite.
    """
    if scaling.factor != 1:
        values = values / scaling.factor
    if scaling.squash == "sqrt":
        return values * values.abs()
    if scaling.squash == "log1p":
        return torch.copysign(values.abs().clamp(max=MAX_LOG_VALUE).expm1(), values)
    return values


def _check_alike(track: TrackHead, other: TrackHead) -> None:
    for name in ("kind", "loss", "aggregate", "scaling", "mean", "std"):
        mine, its = getattr(track, name), getattr(other, name)
        if mine != its:
            raise ValueError(
                f"tracks {track.name!r} and {other.name!r} are partners and differ in {name} ({mine} and {its}); "
                "partners swap places on the other strand, so give both the same"
            )


def _poisson_multinomial(
    log_rate_BL: Tensor, target_BL: Tensor, keep_BL: Tensor, total_weight: float
) -> Tensor:
    observed = (target_BL * keep_BL).sum(1)
    log_total = torch.logsumexp(log_rate_BL.masked_fill(keep_BL == 0, -torch.inf), dim=1)
    log_total = torch.where(keep_BL.any(1), log_total, torch.zeros_like(log_total))
    where = observed * log_total - (target_BL * keep_BL * log_rate_BL).sum(1)
    how_many = (log_rate_BL.exp() * keep_BL).sum(1) - observed * log_total
    return (where + total_weight * how_many).sum()
