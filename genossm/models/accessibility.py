"""The accessibility model: an encoder with a head per track."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genossm.models.encoder import Encoder, EncoderConfig
from genossm.models.heads import TrackHead, TrackHeads
from genossm.models.mixers.mixer import State
from genossm.models.parity import check_parity, mirrored, tie
from genossm.models.stream import Advance, Keep, Read, Watch, stream


@dataclass(frozen=True)
class ModelConfig:
    """Shape of an accessibility model.

    Attributes:
        encoder: stem and layers.
        head_hidden: hidden width of the heads.
        reverse_complement: how predictions come to agree on both strands. `none`: not at all, one strand is read.
            `augment`: training flips half of the windows, and `predict` averages both strands. `shared`: exactly, by
            one network that reads both strands whenever it runs, at twice the compute of `none`. `parity`: exactly, by
            an encoder of tied weights (`genossm.models.parity`) that reads one strand, at about the compute of `none`.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head_hidden: int = 256
    reverse_complement: Literal["none", "augment", "shared", "parity"] = "augment"

    def __post_init__(self) -> None:
        if self.head_hidden < 1:
            raise ValueError(f"head_hidden is {self.head_hidden}; it must be at least 1")
        if self.reverse_complement not in ("none", "augment", "shared", "parity"):
            raise ValueError(
                f"reverse_complement is {self.reverse_complement!r}; allowed are 'none', 'augment', 'shared' and 'parity'"
            )
        if self.reverse_complement == "parity":
            check_parity(self.encoder)


class AccessibilityModel(nn.Module):
    """DNA to one number per bin and track.

    With `reverse_complement: shared`, the encoder and the heads h read the tokens x and their reverse complement Rx,
    stacked along the batch, and the raw outputs (logits, log rates, standard scores) are

        y(x) = (h(x) + S h(Rx)) / 2

    where S turns the bins round and swaps stranded partners: y(Rx) = S y(x) whatever the weights. An output of a pair
    reads its own strand with its own row of the heads and the other strand with its partner's, of which the pair
    y+ = g(x), y- = S g(Rx) of Caduceus-PS (Schiff et al. 2024, section 4) is a special case.

    With `parity` the same holds where only the heads run twice: h(Rx) reads the mirror image of the features of x, which
    are those of Rx.

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
        if config.reverse_complement == "parity":
            tie(self.encoder)
        self.heads = TrackHeads(
            tracks, config.encoder.width, hidden=config.head_hidden, dropout=config.encoder.dropout
        )
        self.tracks = tuple(tracks)
        self.bin_bp = self.encoder.bin_bp
        self.window_bp, self.margin_bp, self.assembly = window_bp, margin_bp, assembly
        self.equivariant = config.reverse_complement in ("shared", "parity")
        self.threshold = dict(threshold or {})
        self.provenance = dict(provenance or {})

    @property
    def strands(self) -> Literal["forward", "averaged", "equivariant"]:
        """What `predict` gives: the strand as it is read, the mean over both, or what is the same on both."""
        if self.equivariant:
            return "equivariant"
        return "forward" if self.config.reverse_complement == "none" else "averaged"

    def forward(self, tokens: Tensor) -> Tensor:
        """Raw outputs (batch, length / bin, tracks) of tokens (batch, length) in {0..3 = ACGT, 4 = none}.

        float32, or float64 in a float64 model.
        """
        if self.config.reverse_complement == "shared":
            tokens = torch.cat([tokens, reverse_complement(tokens)])
        x_BLD: Tensor = self.encoder(tokens)
        if self.config.reverse_complement == "parity":
            x_BLD = torch.cat([x_BLD, mirrored(x_BLD)])
        raw: Tensor = self.heads(x_BLD)
        if not self.equivariant:
            return raw
        own, other = raw.tensor_split(2)
        return (own + self.heads.other_strand(other)) / 2

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Probabilities (peaks) or expected values per bin (signal): (batch, length / bin, tracks), as `forward`.

        With `augment` the mean over both strands. `length` is a multiple of the bin; margins are not cropped.
        """
        values = self.heads.values(self(tokens))
        if self.strands != "averaged":
            return values
        other = self.heads.values(self(reverse_complement(tokens)))
        return (values + self.heads.other_strand(other)) / 2

    def stream(
        self,
        tokens: Tensor | Read,
        *,
        chunk_bp: int,
        length: int | None = None,
        keep: Keep = "cpu",
        advance: Advance | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """What `predict` gives of a whole sequence, chunk after chunk, whatever the chunks (`Encoder.stream`).

        With `augment` and `shared` the other strand is streamed first, and its outputs wait on the host: a number per
        bin and track.

        Args:
            tokens: (batch, length), on any device; or a function of (start, end) that gives (batch, end - start).
            chunk_bp: base pairs of a chunk, a multiple of the trunk's bin; the last chunk may be shorter.
            length: base pairs of the sequence, a multiple of the trunk's bin; only where tokens are a function.
            keep: where features between layers wait: `cpu`, `device`, or a folder, in a temporary file without a name.
            advance: told each share of the work when it is done; all shares make 1.
            watch: told (layer from 0, first trunk bin of a chunk, the one after its last, state) for each state of a
                recurrent mixer that leaves a chunk, to either side. Those of the other strand's chunks come in the bins
                where these lie on the strand itself.

        Yields:
            the first bin of a chunk, and its values (batch, bins, tracks), from left to right.

        Raises:
            ValueError: the model is in training mode, or has a mixer that cannot stream, or lengths do not fit.
        """
        both = self.strands == "averaged" or self.config.reverse_complement == "shared"

        def told(share: float) -> None:
            if advance is not None:
                advance(share / 2 if both else share)

        own = stream(
            self.encoder, tokens, chunk_bp=chunk_bp, length=length, keep=keep, advance=told, watch=watch
        )
        total = tokens.shape[1] if isinstance(tokens, Tensor) else length
        assert total is not None  # stream has seen to it
        if not both:
            return self._streamed(own, None, total)

        def read_other(start: int, end: int) -> Tensor:
            low, high = total - end, total - start
            part = tokens[:, low:high] if isinstance(tokens, Tensor) else tokens(low, high)
            return reverse_complement(part.to(self.encoder.norm.weight.device))

        other = stream(
            self.encoder,
            read_other,
            chunk_bp=chunk_bp,
            length=total,
            keep=keep,
            advance=told,
            watch=None if watch is None else _from_the_end(watch, total // self.encoder.trunk_bp),
        )
        return self._streamed(own, other, total)

    @torch.no_grad()
    def _streamed(
        self, own: Iterator[tuple[int, Tensor]], other: Iterator[tuple[int, Tensor]] | None, length: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Values from the features of one strand, or of both: the mean of raw outputs where equivariant, else of values."""
        on_other = None if other is None else self._on_other_strand(other, length // self.bin_bp)
        for first, x_BLD in own:
            outputs = self._outputs(x_BLD)
            if on_other is not None:
                there = on_other[:, first : first + outputs.shape[1]].to(outputs.device)
                outputs = (outputs + there) / 2
            elif self.config.reverse_complement == "parity":
                outputs = (outputs + self.heads.other_strand(self._outputs(mirrored(x_BLD)))) / 2
            yield first, self.heads.values(outputs) if self.equivariant else outputs

    def _on_other_strand(self, other: Iterator[tuple[int, Tensor]], bins: int) -> Tensor:
        """The outputs of the other strand (batch, bins, tracks) as those of the strand itself, on the host."""
        collected: Tensor | None = None
        for first, x_BLD in other:
            outputs = self.heads.other_strand(self._outputs(x_BLD)).cpu()
            if collected is None:
                collected = outputs.new_empty(len(outputs), bins, len(self.tracks))
            collected[:, bins - first - outputs.shape[1] : bins - first] = outputs
        assert collected is not None  # a sequence has a chunk
        return collected

    def _outputs(self, x_BLD: Tensor) -> Tensor:
        raw: Tensor = self.heads(x_BLD)
        return raw if self.equivariant else self.heads.values(raw)


def _from_the_end(watch: Watch, bins: int) -> Watch:
    """A watch that is told chunks of the other strand, and tells where they lie on the strand itself."""

    def told(layer: int, first: int, stop: int, state: State) -> None:
        watch(layer, bins - stop, bins - first, state)

    return told


def reverse_complement(tokens: Tensor) -> Tensor:
    """Tokens (..., length) of the other strand, read 5' to 3'; "no base" stays."""
    return torch.where(tokens < 4, 3 - tokens, tokens).flip(-1)
