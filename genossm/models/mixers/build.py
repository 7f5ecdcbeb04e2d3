"""The mixer of a layer, from an encoder's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from genossm.models.mixers.attention import Attention
from genossm.models.mixers.conv import DilatedConv
from genossm.models.mixers.h3 import H3
from genossm.models.mixers.hydra import Hydra
from genossm.models.mixers.hyena import Hyena
from genossm.models.mixers.lstm import LSTM
from genossm.models.mixers.mamba import Mamba
from genossm.models.mixers.mamba2 import Mamba2
from genossm.models.mixers.mamba3 import Mamba3
from genossm.models.mixers.mixer import Mixer
from genossm.models.mixers.s4 import S4
from genossm.models.mixers.s4d import S4D

if TYPE_CHECKING:
    from genossm.models.encoder import EncoderConfig, MixerName

MIXERS: dict[MixerName, type[Mixer]] = {
    "s4": S4,
    "s4d": S4D,
    "h3": H3,
    "hyena": Hyena,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "hydra": Hydra,
    "attention": Attention,
    "conv": DilatedConv,
    "lstm": LSTM,
}

FIELDS: dict[MixerName, tuple[str, ...]] = {
    "s4": ("state", "dt_min", "expand"),
    "s4d": ("state", "dt_min", "expand", "initialisation", "discretisation"),
    "h3": ("state", "dt_min", "initialisation", "discretisation"),
    "hyena": ("filter_bins", "conv_width"),
    "mamba": ("state", "dt_min", "expand", "conv_width", "bidirectional"),
    "mamba2": ("state", "dt_min", "head_dim", "expand", "groups", "conv_width", "bidirectional"),
    "mamba3": ("state", "dt_min", "head_dim", "expand", "groups", "rank", "conv_width"),
    "hydra": ("state", "dt_min", "head_dim", "expand", "groups", "conv_width"),
    "attention": ("window", "head_dim"),
    "conv": ("kernel", "dilations"),
    "lstm": (),
}
"""The fields of the configuration that each mixer takes, beside the width."""

OWN_DEFAULT = ("conv_width", "initialisation")
"""Fields of which None stands for the mixer's own default."""


def build_mixer(name: MixerName, config: EncoderConfig, layer: int) -> Mixer:
    """The mixer `name` with the configured sizes, for the layer of that index (which messages name).

    Raises:
        ValueError: the mixer cannot have these sizes.
    """
    options: dict[str, Any] = {field: getattr(config, field) for field in FIELDS[name]}
    for field in OWN_DEFAULT:
        if field in options and options[field] is None:
            del options[field]
    try:
        return MIXERS[name](config.width, **options)
    except ValueError as error:
        raise ValueError(f"layer {layer} ({name}): {error}") from error
