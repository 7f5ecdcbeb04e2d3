"""The configuration of a training run: the model's shape and how it is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from genossm.config import apply_overrides, build, load_yaml
from genossm.errors import ConfigError
from genossm.models.accessibility import ModelConfig

Logger = Literal["csv", "tensorboard"]


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the training windows.
        windows_per_epoch: windows drawn in an epoch; null tiles the training split once.
        batch_size: windows of a step.
        window_bp, margin_bp: length of training windows, where it is not the dataset's.
        learning_rate: peak rate, after a linear warm-up, then cosine decay to `final_fraction` of it.
        ssm_rate: factor on the rate of the mixers' state parameters (A, dt bias, D and the like).
        weight_decay: AdamW's; not on state parameters, norms and biases.
        beta1, beta2: AdamW's.
        warmup_fraction: part of all steps that is warm-up.
        final_fraction: the last learning rate over the peak.
        clip_norm: gradients are scaled down to this norm.
        ema_decay: decay of the running average of the weights that is validated and saved, less at first; 0 for none.
        reverse_complement: flip half of the windows, where model.reverse_complement is `augment`.
        jitter_bp: move the sequence by up to this against its bins.
        total_weight: weight of the total against the shape in the loss of count tracks.
        track_weights: weight of a track in the loss, by name; 1 where not named.
        precision: `auto` (bf16 on CUDA, else float32), `bf16` or `float32`.
        compile: run the model through torch.compile.
        cuda_graphs: on CUDA, where the model is not compiled, launch forward and backward pass as a whole.
        workers: threads or processes that read; 0 reads when a batch is asked for.
        loader: `threads` or `processes`; the second is of use for compressed targets and many cores alone.
        prefetch: batches that are read ahead.
        data_on: what lies on the device for the whole training: `host` (nothing), `genome`, `device` (genome and
            targets), or `auto` (on CUDA what takes little room and time).
        sampling: `all` takes the windows in turn, `signal` draws a share of them in proportion to the signal in them.
        signal_fraction: that share, above 0 and at most 1.
        save_minutes: within an epoch the state to resume from is saved every so many minutes, too; 0 for after epochs only.
        valid_every: epochs between validations (the last is always validated).
        seed: of weights, augmentation, order and dropout.
        loggers: `csv` (metrics.csv) and `tensorboard`.
    """

    epochs: int = 60
    windows_per_epoch: int | None = None
    batch_size: int = 4
    window_bp: int | None = None
    margin_bp: int | None = None
    learning_rate: float = 1e-3
    ssm_rate: float = 0.5
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_fraction: float = 0.1
    final_fraction: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    reverse_complement: bool = True
    jitter_bp: int = 16
    total_weight: float = 0.2
    track_weights: dict[str, float] = field(default_factory=dict)
    precision: Literal["auto", "bf16", "float32"] = "auto"
    compile: bool = False
    cuda_graphs: bool = True
    workers: int = 2
    loader: Literal["threads", "processes"] = "threads"
    prefetch: int = 4
    data_on: Literal["auto", "host", "genome", "device"] = "auto"
    sampling: Literal["all", "signal"] = "all"
    signal_fraction: float = 0.5
    save_minutes: float = 10.0
    valid_every: int = 1
    seed: int = 1
    loggers: tuple[Logger, ...] = ("csv", "tensorboard")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "prefetch", "valid_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup_fraction", "final_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 < self.signal_fraction <= 1:
            raise ValueError(f"signal_fraction is {self.signal_fraction}; it must be above 0 and at most 1")
        if self.windows_per_epoch is not None and self.windows_per_epoch < self.batch_size:
            raise ValueError(
                f"windows_per_epoch is {self.windows_per_epoch}, less than one batch of {self.batch_size}"
            )
        if not 0 <= self.save_minutes < math.inf:
            raise ValueError(f"save_minutes is {self.save_minutes}; it must be at least 0")
        if self.workers < 0 or self.jitter_bp < 0 or self.seed < 0:
            raise ValueError("workers, jitter_bp and seed must be at least 0")
        if any(weight < 0 for weight in self.track_weights.values()):
            raise ValueError(f"track_weights are {self.track_weights}; each must be at least 0")


@dataclass(frozen=True)
class RunConfig:
    """Model and training of a run, as `configs/*.yaml` hold them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def shipped_configs() -> list[str]:
    """Names of the training configurations that come with the package."""
    folder = resources.files("genossm.configs")
    return sorted(
        item.name.removesuffix(".yaml")
        for item in folder.iterdir()
        if item.name.endswith(".yaml") and not item.name.endswith("-dataset.yaml")
    )


def load_run_config(config: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run configuration: a YAML file, or the name of a shipped one such as `yeast-100kb`.

    Raises:
        ConfigError: no such configuration, an unknown key, or a value out of range.
    """
    name = os.fspath(config)
    if not name.endswith((".yaml", ".yml")):
        if name not in shipped_configs():
            raise ConfigError(
                f"there is no shipped configuration {name!r}; choose one of {', '.join(shipped_configs())}, "
                "or give the path of a .yaml file"
            )
        with resources.as_file(resources.files("genossm.configs") / f"{name}.yaml") as path:
            mapping = load_yaml(path)
    else:
        mapping = load_yaml(Path(name))
    return build(RunConfig, apply_overrides(mapping, overrides), where=name)
