"""Track heads: from features to one number per bin and track, what it means, and the loss it is trained with.

Letters: B batch, L bins, D width, T tracks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import accumulation
from genossm.strands import Strand, check_strand, partner_columns

MAX_LOG_RATE = 15.0
"""Log rates above this are cut: e^15 times a track's mean is beyond any signal, and stays finite in float32."""


@dataclass(frozen=True)
class TrackHead:
    """One output track of a model.

    Attributes:
        name: the track's name in the dataset.
        kind: `peaks` (probability that a bin is in a peak) or `signal` (expected value of a bin).
        loss: `bce` for peaks; `poisson` (Poisson-multinomial) or `mse` for signal.
        aggregate: how a bin's value is made from its bases (`sum`, `mean`, `max`): the unit of predictions.
        mean, std: of the track's training bins; outputs are relative to them. Not used for peaks.
        strand, partner: of a stranded pair, "+" or "-" and the name of the track of the other strand.
    """

    name: str
    kind: Literal["peaks", "signal"]
    loss: Literal["bce", "poisson", "mse"]
    aggregate: str = "mean"
    mean: float = 1.0
    std: float = 1.0
    strand: Strand = "."
    partner: str | None = None

    def __post_init__(self) -> None:
        check_strand(self)
        if (self.kind == "peaks") != (self.loss == "bce"):
            raise ValueError(
                f"track {self.name!r} of kind {self.kind} has loss {self.loss!r}; peaks take bce, signal poisson or mse"
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
        """Raw outputs as what they mean: probabilities (peaks), expected values in the track's unit (signal)."""
        columns = []
        for index, track in enumerate(self.tracks):
            raw = raw_BLT[..., index]
            if track.loss == "bce":
                columns.append(torch.sigmoid(raw))
            elif track.loss == "poisson":
                columns.append(torch.exp(raw.clamp(max=MAX_LOG_RATE)) * track.mean)
            else:
                columns.append(raw * track.std + track.mean)
        return torch.stack(columns, dim=-1)

    def losses(
        self, raw_BLT: Tensor, targets_BLT: Tensor, mask_BLT: Tensor, *, total_weight: float
    ) -> Tensor:
        """Loss of each track, averaged over its unmasked bins: (tracks,).

        Peaks: binary cross-entropy. Poisson signal: per window and track the multinomial negative log-likelihood of
        where the counts fall plus `total_weight` times the Poisson one of how many there are (Linder et al. 2025,
        Borzoi, Methods), targets in units of the track's mean. mse: of standard scores.
        """
        mask = mask_BLT.to(raw_BLT.dtype)
        bins = mask.sum((0, 1)).clamp(min=1)
        losses = []
        for index, track in enumerate(self.tracks):
            raw, target, keep = raw_BLT[..., index], targets_BLT[..., index].float(), mask[..., index]
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


def _check_alike(track: TrackHead, other: TrackHead) -> None:
    for name in ("kind", "loss", "aggregate", "mean", "std"):
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
