"""The accessibility model: an encoder with a head per track."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genossm.models.encoder import Encoder, EncoderConfig
from genossm.models.heads import TrackHead, TrackHeads


@dataclass(frozen=True)
class ModelConfig:
    """Shape of an accessibility model.

    Attributes:
        encoder: stem and layers.
        head_hidden: hidden width of the heads.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head_hidden: int = 256


class AccessibilityModel(nn.Module):
    """DNA to one number per bin and track.

    Attributes:
        tracks: what each output is, in order.
        bin_bp: base pairs of an output bin.
        window_bp, margin_bp: the input length it was trained on, and what is cropped from each side of a prediction.
        assembly: the genome assembly it was trained on.
        equivariant: whether predictions are reverse-complement symmetric by construction (then one strand is enough).
        threshold: per peaks track, the probability that gave the best F1 on the validation split.
        provenance: versions, input hashes and splits of the training.
    """

    def __init__(
        self,
        config: ModelConfig,
        tracks: Sequence[TrackHead],
        *,
        window_bp: int,
        margin_bp: int,
        assembly: str = "",
        threshold: Mapping[str, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.heads = TrackHeads(
            tracks, config.encoder.width, hidden=config.head_hidden, dropout=config.encoder.dropout
        )
        self.tracks = tuple(tracks)
        self.bin_bp = self.encoder.bin_bp
        self.window_bp, self.margin_bp, self.assembly = window_bp, margin_bp, assembly
        self.equivariant = False
        self.threshold = dict(threshold or {})
        self.provenance = dict(provenance or {})

    def forward(self, tokens: Tensor) -> Tensor:
        """Raw outputs (batch, length / bin, tracks), float32, of tokens (batch, length) in {0..3 = ACGT, 4 = none}."""
        raw: Tensor = self.heads(self.encoder(tokens))
        return raw

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Probabilities (peaks) or expected values per bin (signal): (batch, length / bin, tracks), float32.

        The mean over both strands, unless the model is equivariant. `length` is a multiple of the bin; margins are
        not cropped.
        """
        values = self.heads.values(self(tokens))
        if self.equivariant:
            return values
        other = self.heads.values(self(reverse_complement(tokens)))
        return (values + other.flip(1)) / 2


def reverse_complement(tokens: Tensor) -> Tensor:
    """Tokens (..., length) of the other strand, read 5' to 3'; "no base" stays."""
    return torch.where(tokens < 4, 3 - tokens, tokens).flip(-1)
