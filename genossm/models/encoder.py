"""The encoder: stem, residual layers of sequence mixers and MLPs, and a decoder to finer bins where one is asked for.

Letters: B batch, L length in bins, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genossm.models.decoder import Decoder, DecoderConfig
from genossm.models.mixers.build import build_mixer
from genossm.models.mixers.diagonal import Discretisation, Initialisation
from genossm.models.mixers.mamba2 import Bidirectional, check_bidirectional, check_sizes
from genossm.models.mixers.mixer import Mixer
from genossm.models.mlp import GatedMLP, MixtureOfExperts, check_experts, inner_width
from genossm.models.norm import RMSNorm
from genossm.models.stem import StemConfig, build_stem
from genossm.models.stream import Keep, stream

MixerName = Literal[
    "s4", "s4d", "h3", "hyena", "mamba", "mamba2", "mamba3", "hydra", "attention", "conv", "lstm"
]


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder. A field that no mixer of the pattern takes (they are in brackets) does nothing.

    Attributes:
        width: features of a bin.
        pattern: the mixer of each layer, first to last.
        stem: base pairs to the trunk's bins.
        decoder: the trunk's bins to finer output bins; None for the trunk's.
        bidirectional: `fused` (directions share the convolution, x, B and C) or `tied` (they share the projections, as
            BiMamba) [mamba, mamba2].
        state: state size of a channel [s4, s4d, h3, mamba, mamba2, mamba3, hydra]; even for s4, s4d, h3 and mamba3.
        dt_min: the shortest of the first step sizes [s4, s4d, h3, mamba, mamba2, mamba3, hydra]: the less, the farther a layer
            looks from the start. 1 / dt_min should be about the bins that matter on each side.
        head_dim: channels that share one decay [mamba2, mamba3, hydra] or one softmax [attention].
        expand: inner width of a mixer over `width` [s4, s4d, mamba, mamba2, mamba3, hydra].
        groups: heads share B and C within a group [mamba2, mamba3, hydra].
        conv_width: width of the short convolution, in bins [hyena, mamba, mamba2, mamba3, hydra]; None for the mixer's
            own: 3, 5 (tied: 4), 5, 0 (none), 7.
        initialisation: of A, `legs` or `lin` [s4d, h3]; None for the mixer's own: legs, lin.
        discretisation: zero-order hold or bilinear [s4d, h3].
        rank: inputs and outputs that share a state (MIMO) [mamba3].
        window: bins seen on each side [attention]; None for all, which costs the length squared and cannot stream.
        kernel: width of the filters [conv].
        dilations: of the convolutions of one layer, one after another [conv].
        filter_bins: bins of a filter on each side [hyena].
        mlp_ratio: inner width of the gated MLP after each mixer over `width`; 0 leaves the MLPs out.
        experts: gated MLPs of that width to choose from after each mixer; 0 for a single one that all positions take.
        experts_per_token: how many of them a position goes through.
        balance_weight: weight of the loss that has the experts used alike.
        dropout: on each residual branch.
        checkpoint: keep only what enters a layer for the backward pass, and compute the rest again: less memory, slower.
    """

    width: int = 256
    pattern: tuple[MixerName, ...] = ("mamba2",) * 6
    stem: StemConfig = field(default_factory=StemConfig)
    decoder: DecoderConfig | None = None
    bidirectional: Bidirectional = "fused"
    state: int = 64
    dt_min: float = 1e-3
    head_dim: int = 64
    expand: int = 2
    groups: int = 1
    conv_width: int | None = None
    initialisation: Initialisation | None = None
    discretisation: Discretisation = "zoh"
    rank: int = 1
    window: int | None = 256
    kernel: int = 5
    dilations: tuple[int, ...] = (1, 4, 16)
    filter_bins: int = 4096
    mlp_ratio: float = 0.0
    experts: int = 0
    experts_per_token: int = 2
    balance_weight: float = 0.01
    dropout: float = 0.1
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ValueError("pattern is empty; name a mixer per layer, for example [mamba2, mamba2]")
        for name in self.pattern:
            if name not in get_args(MixerName):
                raise ValueError(
                    f"pattern names the mixer {name!r}; allowed are {', '.join(get_args(MixerName))}"
                )
        check_sizes(
            width=self.width,
            state=self.state,
            head_dim=self.head_dim,
            expand=self.expand,
            groups=self.groups,
            rank=self.rank,
            filter_bins=self.filter_bins,
        )
        self._check_mixers()
        if self.mlp_ratio < 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; it must be at least 0")
        if self.mlp_ratio:
            inner_width(self.width, self.mlp_ratio)
        if self.experts:
            check_experts(self.experts, self.experts_per_token)
            if not self.mlp_ratio:
                raise ValueError(
                    f"experts is {self.experts} and mlp_ratio 0; experts need an mlp_ratio above 0, for example 2"
                )
        if self.balance_weight < 0:
            raise ValueError(f"balance_weight is {self.balance_weight}; it must be at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.decoder is not None:
            self.decoder.check(self.stem)

    def _check_mixers(self) -> None:
        """A ValueError for what a mixer of the pattern cannot have."""
        used = set(self.pattern)
        inner = self.expand * self.width
        if used & {"mamba2", "mamba3", "hydra"} and (
            inner % self.head_dim or (inner // self.head_dim) % self.groups
        ):
            raise ValueError(
                f"head_dim {self.head_dim} and groups {self.groups} do not divide expand * width = {inner}; "
                "choose a head_dim that divides it, and groups that divide the heads"
            )
        if "attention" in used and (self.head_dim % 2 or self.width % self.head_dim):
            raise ValueError(
                f"head_dim {self.head_dim} does not suit attention at width {self.width}; "
                "it must be even and divide the width"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1, or null for no window")
        if self.state % 2 and (paired := sorted(used & {"s4", "s4d", "h3", "mamba3"})):
            raise ValueError(f"state is {self.state}; {paired[0]} needs an even one: it counts pairs")
        if self.conv_width is not None and self.conv_width < (0 if used <= {"mamba3"} else 1):
            raise ValueError(
                f"conv_width is {self.conv_width}; it must be at least 1 (mamba3 alone takes 0, no convolution), "
                "or null for the mixer's own"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; it must be odd and at least 1")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations are {list(self.dilations)}; at least one is needed, each at least 1")
        for name, value, allowed in (
            ("initialisation", self.initialisation, (None, *get_args(Initialisation))),
            ("discretisation", self.discretisation, get_args(Discretisation)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}")
        check_bidirectional(self.bidirectional)
        if self.bidirectional == "tied" and not used & {"mamba", "mamba2"}:
            raise ValueError(
                f"bidirectional is 'tied', and the pattern has no mamba or mamba2 but {', '.join(sorted(used))}; "
                "leave bidirectional out: other mixers have one form"
            )


class Encoder(nn.Module):
    """Tokens (batch, length) int8 in {0, 1, 2, 3 = ACGT, 4 = none} to features (batch, length / bin, width).

    The length is a multiple of the trunk's bin. `torch.compile` takes the whole forward as one graph, without experts.

    Attributes:
        bin_bp: base pairs of an output bin.
        trunk_bp: base pairs of a bin of the layers; the same without a decoder.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk_bp = config.stem.bin_bp
        self.bin_bp = config.decoder.bin_bp if config.decoder else self.trunk_bp
        self.stem = build_stem(config.stem, config.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(len(config.pattern)))
        self.norm = RMSNorm(config.width)
        self.decoder = Decoder(config.decoder, config.stem, config.width) if config.decoder else None

    def forward(self, tokens: Tensor) -> Tensor:
        x_BLD, finer = self.stem.with_finer(tokens, self.decoder.finer if self.decoder else ())
        for layer in self.layers:
            if self.config.checkpoint and torch.is_grad_enabled():
                x_BLD = checkpoint(layer, x_BLD, use_reentrant=False)
            else:
                x_BLD = layer(x_BLD)
        y_BLD: Tensor = self.norm(x_BLD)
        return y_BLD if self.decoder is None else self.decoder(y_BLD, finer)

    def stream(
        self,
        tokens: Tensor | Callable[[int, int], Tensor],
        *,
        chunk_bp: int,
        length: int | None = None,
        keep: Keep = "cpu",
    ) -> Iterator[tuple[int, Tensor]]:
        """What `forward` gives in evaluation mode, chunk after chunk; memory on the device grows with a chunk only.

        Every layer runs over the whole length before the next one, see `genossm.models.stream`.

        Args:
            tokens: (batch, length), on any device; or a function of (start, end) that gives (batch, end - start).
            chunk_bp: base pairs of a chunk, a multiple of the trunk's bin; the last chunk may be shorter.
            length: base pairs of the sequence, a multiple of the trunk's bin; only where tokens are a function.
            keep: where features between layers wait: `cpu`; `device`, which is faster and holds them all; or a folder (Path),
                in an unnamed file.

        Yields:
            the first bin of a chunk, and its features (batch, bins, width), from left to right.

        Raises:
            ValueError: the encoder is in training mode, or has a mixer that cannot stream, or lengths do not fit.
        """
        return stream(self, tokens, chunk_bp=chunk_bp, length=length, keep=keep)

    def mixers(self) -> list[Mixer]:
        """The mixer of each layer."""
        return [layer.mixer for layer in self.layers if isinstance(layer, Layer)]

    def auxiliary_loss(self) -> Tensor:
        """What the last forward in training adds to the loss, weighted: the experts' balance; zero without experts."""
        total = self.norm.weight.new_zeros(
            (), dtype=torch.promote_types(self.norm.weight.dtype, torch.float32)
        )
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                total = total + self.config.balance_weight * module.balance_loss
        return total

    def state_parameter_names(self) -> set[str]:
        """The mixers' parameters (A, D, dt bias, filters ...) that want no weight decay, and may want a lower rate."""
        return {
            f"layers.{index}.mixer.{name}"
            for index, mixer in enumerate(self.mixers())
            for name in mixer.state_parameters
        }

    @property
    def receptive_field_bp(self) -> int | None:
        """Base pairs that an output bin may depend on, at most; None where that is the whole sequence."""
        bins = 1 + 2 * (self.decoder.halo if self.decoder else 0)
        for mixer in self.mixers():
            if mixer.recurrent:
                return None
            try:
                bins += sum(mixer.halo)
            except ValueError:  # attention without a window
                return None
        return bins * self.trunk_bp + 2 * self.stem.reach_bp


class Layer(nn.Module):
    """x + mixer(norm(x)), then the same with the MLP where there is one (pre-norm: Xiong et al. 2020)."""

    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.width)
        self.mixer = build_mixer(config.pattern[index], config, index)
        self.mlp = _mlp(config)
        self.mlp_norm = RMSNorm(config.width) if self.mlp is not None else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.joined(x_BLD, self.mixer(self.mixer_norm(x_BLD)))

    def joined(self, x_BLD: Tensor, mixed_BLD: Tensor) -> Tensor:
        """The layer's output from its input and what the mixer gave: each position on its own."""
        x_BLD = x_BLD + self.dropout(mixed_BLD)
        if self.mlp is not None and self.mlp_norm is not None:
            x_BLD = x_BLD + self.dropout(self.mlp(self.mlp_norm(x_BLD)))
        return x_BLD


def _mlp(config: EncoderConfig) -> nn.Module | None:
    if not config.mlp_ratio:
        return None
    if not config.experts:
        return GatedMLP(config.width, config.mlp_ratio)
    return MixtureOfExperts(config.width, config.mlp_ratio, config.experts, config.experts_per_token)
