"""Train an accessibility model on a prepared dataset."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from genossm import checkpoint
from genossm.atomic import atomic_write_text
from genossm.config import apply_overrides, build, dump_yaml, load_yaml, to_mapping
from genossm.data_module import WindowDataModule
from genossm.dataset import PreparedDataset
from genossm.dataset_config import TrackConfig
from genossm.errors import CheckpointError, ConfigError, DataError, TrainingError
from genossm.loaders import WindowDataset
from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import TrackHead
from genossm.pipelines.device import describe, pick_device
from genossm.pipelines.run_log import RESUME_FILE, RunLog
from genossm.pipelines.stop import stop_asked
from genossm.pipelines.training_module import TrainingModule
from genossm.pipelines.training_stop import StopAfterStep
from genossm.progress import say
from genossm.run_config import RunConfig, load_run_config
from genossm.scaling import UNSCALED
from genossm.verified import verify_once
from genossm.version import versions

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        path: the run folder.
        best_epoch: the epoch, counted from 1, whose model was kept.
        best_score: its validation AUPRC (mean over peak tracks), or Pearson where there is none.
        seconds: wall time of this call.
    """

    path: Path
    best_epoch: int
    best_score: float
    seconds: float

    def load(self) -> AccessibilityModel:
        """The best model, on the CPU and in evaluation mode."""
        return checkpoint.load(self.path)


def train(
    config: str | os.PathLike[str] | RunConfig,
    dataset: str | os.PathLike[str] | PreparedDataset,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    seed: int | None = None,
    resume: bool = False,
    overrides: Iterable[str] = (),
) -> Run:
    """Train a model; keep the weights of the epoch with the best validation AUPRC.

    The run folder holds `model.safetensors` (the best model), `config.yaml` (resolved), `provenance.json`,
    `metrics.csv` (a row per epoch), `tensorboard/`, and `last.ckpt`, from which `resume` goes on: the state after each
    epoch, before its validation, every `train.save_minutes` in between, and after the step in hand where SIGTERM or
    SIGINT stops the training (a second SIGINT stops it at once).

    Args:
        config: a YAML file, the name of a shipped configuration, or a `RunConfig`.
        dataset: a prepared dataset or its folder.
        out: the run folder; must not hold another run unless `resume`.
        device: `auto` (CUDA, or an error where there is none), `cuda`, `cuda:N` or `cpu`.
        seed: instead of the configuration's.
        resume: go on with the run in `out` from its last saved step, with the configuration stored there; starts
            from the beginning where nothing was saved.
        overrides: `a.b=value` settings on top of the configuration.

    Raises:
        ConfigError: the configuration or an override is wrong, or does not fit the dataset.
        DataError: a file of the dataset is damaged, a track has no signal in the training bins, or one has a `scale`
            and an earlier genossm prepared it.
        CheckpointError: `out` holds a run and `resume` is False, or `resume` is True and the run there is another.
        DeviceError: the device is not there.
        TrainingError: it diverged, ran out of memory, or was stopped by a signal.
    """
    began = datetime.now(UTC)
    folder = Path(out)
    resolved = _resolve(config, overrides, seed)
    data = dataset if isinstance(dataset, PreparedDataset) else PreparedDataset(dataset)
    chosen = pick_device(device)
    verify_once(data)
    training, validation = _windows(data, resolved)
    provenance = _provenance(data, resolved, device=describe(chosen), began=began)  # opens the genome
    resumed = _prepare_folder(folder, resolved, data, resume=resume)
    precision = _precision(resolved, chosen)
    say(f"device: {describe(chosen)}, {precision}; run folder: {folder}; seed {resolved.train.seed}")
    torch.manual_seed(resolved.train.seed)
    model = AccessibilityModel(
        resolved.model,
        track_heads(data),
        window_bp=data.window_bp,
        margin_bp=data.margin_bp,
        assembly=data.assembly,
    )
    if model.bin_bp != data.bin_bp:
        raise ConfigError(
            f"the model's bins are {model.bin_bp} bp and the dataset's {data.bin_bp} bp; change model.encoder.stem.pool "
            "(with a decoder: model.encoder.decoder.bin_bp), or prepare the dataset with another window.bin"
        )
    for length in (training.window_bp, data.window_bp):
        if length % model.encoder.trunk_bp:
            raise ConfigError(
                f"windows of {length} bp are no multiple of the {model.encoder.trunk_bp} bp that the encoder's stem makes "
                "one position of; change train.window_bp or the dataset's window.length, or model.encoder.stem.pool"
            )
    if len(training) < resolved.train.batch_size:
        raise ConfigError(
            f"batch_size is {resolved.train.batch_size} and an epoch has {len(training)} windows; "
            "lower train.batch_size or set train.windows_per_epoch"
        )
    loaders = WindowDataModule(
        training,
        validation,
        batch_size=resolved.train.batch_size,
        workers=resolved.train.workers,
        loader=resolved.train.loader,
        prefetch=resolved.train.prefetch,
        data_on=resolved.train.data_on,
    )
    total_steps = loaders.steps_per_epoch() * resolved.train.epochs
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"model: {parameters:,} parameters, {len(model.tracks)} tracks; {len(training)} windows of "
        f"{training.window_bp:,} bp an epoch, {resolved.train.epochs} epochs, {total_steps} steps"
    )
    atomic_write_text(folder / CONFIG_FILE, dump_yaml(to_mapping(resolved)))
    atomic_write_text(folder / "provenance.json", json.dumps(provenance, indent=2) + "\n")
    try:
        module = TrainingModule(model, resolved.train, total_steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    log = RunLog(
        folder,
        window_bp=training.window_bp,
        provenance=provenance,
        write_csv="csv" in resolved.train.loggers,
        save_minutes=resolved.train.save_minutes,
    )
    signals = (signal.SIGINT, signal.SIGTERM)
    with _quiet_lightning(), stop_asked("the step in hand", signals) as asked:
        trainer = _trainer(resolved, folder, chosen, precision, [log, StopAfterStep(log, asked)])
        try:
            trainer.fit(
                module,
                datamodule=loaders,
                ckpt_path=folder / RESUME_FILE if resumed else None,
                weights_only=True,
            )
        except SystemExit as stop:  # of `StopAfterStep`, or of Lightning after SIGTERM or a second SIGINT
            raise TrainingError(
                f"training was stopped by a signal after {len(log.rows)} whole epochs; "
                f"the same command with --resume goes on from the last saved step ({folder})"
            ) from stop
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{describe(chosen)} has not enough memory for batches of {resolved.train.batch_size} windows of "
                f"{training.window_bp:,} bp; lower train.batch_size or train.window_bp"
            ) from error
    if log.best_epoch == 0:
        raise DataError(
            "no epoch gave a validation figure, so no model was saved: the validation split has no bin of both classes; "
            "choose other validation chromosomes"
        )
    seconds = (datetime.now(UTC) - began).total_seconds()
    say(
        f"trained in {seconds:.0f} s, peak memory {_peak_memory(chosen)}; best epoch {log.best_epoch} with a "
        f"validation score of {log.best:.4f}; saved in {folder}"
    )
    return Run(folder, log.best_epoch, log.best, seconds)


def track_heads(dataset: PreparedDataset) -> list[TrackHead]:
    """A head for each track of `dataset`, with the mean and spread of its scaled training bins, partners' together.

    Raises:
        DataError: there is no signal in them, or an earlier genossm prepared a track with a scale.
    """
    heads = []
    for track in dataset.tracks:
        mean, std = _mean_and_spread(dataset, track)
        scaling = dataset.scaling.get(track.name, UNSCALED)
        loss: Literal["bce", "poisson", "mse"] = "bce" if track.kind == "peaks" else track.loss or "poisson"
        try:
            heads.append(
                TrackHead(
                    track.name,
                    track.kind,
                    loss,
                    track.aggregate,
                    mean,
                    std,
                    track.strand,
                    track.partner,
                    scaling,
                )
            )
        except ValueError as error:
            raise DataError(
                f"{error}; the training chromosomes hold no such signal: check the track's file"
            ) from error
    return heads


def _mean_and_spread(dataset: PreparedDataset, track: TrackConfig) -> tuple[float, float]:
    """Mean and standard deviation of a track's scaled training bins, with those of its partner where it has one."""
    if dataset.scaling.get(track.name, UNSCALED) != UNSCALED:
        if track.name not in dataset.scaled_statistics:
            raise DataError(
                f"{dataset.folder} scales the targets of {track.name} and lacks their mean: an earlier genossm prepared it; "
                "run prepare again"
            )
        scaled = dataset.scaled_statistics[track.name]
        return scaled["mean"], scaled["std"]
    own = dataset.statistics[track.name]["train"]
    if track.partner is None:
        return own["mean"], own["std"]
    both = [own, dataset.statistics[track.partner]["train"]]
    bins = sum(part["unmasked"] for part in both) or math.nan
    mean = sum(part["unmasked"] * part["mean"] for part in both) / bins
    square = sum(part["unmasked"] * (part["std"] ** 2 + part["mean"] ** 2) for part in both) / bins
    return mean, math.sqrt(max(0.0, square - mean**2))


def _resolve(
    config: str | os.PathLike[str] | RunConfig, overrides: Iterable[str], seed: int | None
) -> RunConfig:
    settings = list(overrides) + ([] if seed is None else [f"train.seed={seed}"])
    if isinstance(config, RunConfig):
        return build(RunConfig, apply_overrides(to_mapping(config), settings), where="config")
    return load_run_config(config, settings)


def _prepare_folder(folder: Path, config: RunConfig, data: PreparedDataset, *, resume: bool) -> bool:
    """Make or check the run folder; True when there is a state to go on from."""
    stored = folder / CONFIG_FILE
    if not stored.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return False
    if not resume:
        raise CheckpointError(
            f"{folder} holds a run already; go on with it by --resume, or choose another folder"
        )
    if build(RunConfig, load_yaml(stored), where=str(stored)) != config:
        raise CheckpointError(
            f"the run in {folder} was started with another configuration (see {stored}); "
            "resume it with the same one, or choose another folder"
        )
    before = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["dataset"]["fingerprint"]
    if before != fingerprint(data):
        raise CheckpointError(
            f"the run in {folder} was started on another dataset; resume it on the same one"
        )
    return (folder / RESUME_FILE).exists()


def _precision(config: RunConfig, device: torch.device) -> Literal["bf16-mixed", "32-true"]:
    if config.train.precision == "float32" or (config.train.precision == "auto" and device.type == "cpu"):
        return "32-true"
    return "bf16-mixed"


def _windows(data: PreparedDataset, config: RunConfig) -> tuple[WindowDataset, WindowDataset]:
    settings = config.train
    try:
        training = WindowDataset(
            data,
            "train",
            window_bp=settings.window_bp,
            margin_bp=settings.margin_bp,
            windows_per_epoch=settings.windows_per_epoch,
            augment=True,
            reverse_complement=settings.reverse_complement and config.model.reverse_complement == "augment",
            jitter_bp=settings.jitter_bp,
            seed=settings.seed,
            sampling=settings.sampling,
            signal_fraction=settings.signal_fraction,
        )
        return training, WindowDataset(data, "valid")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _trainer(
    config: RunConfig,
    folder: Path,
    device: torch.device,
    precision: Literal["bf16-mixed", "32-true"],
    callbacks: list[lightning.Callback],
) -> lightning.Trainer:
    loggers: list[Logger] = []
    if "tensorboard" in config.train.loggers:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    return lightning.Trainer(
        accelerator="cpu" if device.type == "cpu" else "cuda",
        devices=1 if device.type == "cpu" else [device.index or 0],
        precision=precision,
        max_epochs=config.train.epochs,
        check_val_every_n_epoch=config.train.valid_every,
        logger=loggers or False,
        callbacks=callbacks,
        plugins=[LightningEnvironment()],  # one process, also inside a queue's job
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning without its notes on hardware, products and workers: `RunLog` says what a user needs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*srun.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _peak_memory(device: torch.device) -> str:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    text = f"{kilobytes / 2**20:.1f} GiB"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the GPU"
    return text


def fingerprint(data: PreparedDataset) -> str:
    """A hash of what is trained on: sequence, targets, windows, splits and tracks; not of where and when they were prepared."""
    parts = {
        "content": data.content_hash,
        "bp": [data.window_bp, data.margin_bp, data.bin_bp],
        "splits": data.splits,
        "tracks": [
            {
                key: value
                for key, value in to_mapping(track).items()
                if key not in ("file", "files", "barcodes")
            }
            for track in data.tracks
        ],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _provenance(data: PreparedDataset, config: RunConfig, *, device: str, began: datetime) -> dict[str, Any]:
    return {
        "versions": versions(),
        "device": device,
        "started": began.isoformat(timespec="seconds"),
        "seed": config.train.seed,
        "assembly": data.assembly,
        "genome": {"path": str(data.genome.path), "sha256": data.genome.sha256},
        "splits": {split: list(chroms) for split, chroms in data.splits.items()},
        "dataset": {"folder": str(data.folder), "fingerprint": fingerprint(data), **data.provenance},
        "train": to_mapping(config.train),
    }
