"""What a model is and costs: parameters, receptive field, FLOPs, and memory for training and prediction."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genossm import checkpoint
from genossm.config import build, load_yaml
from genossm.errors import ConfigError, DeviceError
from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import TrackHead
from genossm.pipelines.cuda_behaviour import CUBLAS_WORKSPACE
from genossm.pipelines.cuda_graphs import why_no_training_graph
from genossm.pipelines.device import describe
from genossm.pipelines.model_costs import Measured, ModelInfo, PredictionMemory, TrainingMemory
from genossm.pipelines.rehearsal import Rehearsal, allocation
from genossm.pipelines.training_module import TrainingModule
from genossm.run_config import RunConfig, TrainConfig, load_run_config, shipped_configs

LENGTH_BP = 131_072
CPU = torch.device("cpu")
GRAPHS_SHARE, GRAPHS_BYTES = 0.1, 160 << 20
"""What CUDA graphs of a training step hold beyond its peak, as a share of that and in bytes: memory that is never given back
between steps, in blocks that do not fit each other, and workspaces of libraries for each recording. Fitted to the 33 rows of
`genossm bench encoders` on an H200, of which all but the LSTM at 32 bp (0.80) come within 9 %."""
Mode = Literal["train", "predict", "both"]
PrecisionName = Literal["bf16", "float32"]


def model_info(
    config_or_run: str | os.PathLike[str],
    *,
    length_bp: int = LENGTH_BP,
    batch_size: int = 1,
    mode: Mode = "both",
    tracks: int = 1,
    overrides: Iterable[str] = (),
    predict_in: PrecisionName = "bf16",
    measure: bool = False,
) -> ModelInfo:
    """Parameters, receptive field, FLOPs and memory of a configuration or a trained model; no GPU is needed.

    FLOPs and memory are those of an H100 or H200 and the same on every machine: the model runs without data, see
    `genossm.pipelines.rehearsal`. FLOPs are of matrix products, convolutions, attention, FFTs and scans, two for a
    multiplication and its addition, as they are computed (again, with activation checkpointing). Memory is the peak of
    what PyTorch has allocated in steps kernel by kernel, without its cache and the CUDA context (about 0.5 GiB), and for
    training what CUDA graphs hold beyond that.

    Args:
        config_or_run: a YAML file, the name of a shipped configuration, or a run folder.
        length_bp, batch_size: what to count for.
        mode: `train`, `predict` or `both`.
        tracks: outputs of a configuration's model; a run knows its own.
        overrides: `a.b=value` settings on top of a configuration.
        predict_in: what predictions are computed in, `bf16` (as `predict` does on CUDA unless told otherwise) or `float32`;
            the configuration's train.precision says what training is in.
        measure: also run real steps on the first CUDA device, and compare.

    Raises:
        ConfigError: the configuration is wrong, or the length is no multiple of the model's bin.
        CheckpointError: there is no such run.
        DeviceError: there is no CUDA device to measure on, or its memory is too small.
        GenossmError: Triton is not installed.
    """
    if measure and not torch.cuda.is_available():
        raise DeviceError(
            "memory is measured on a CUDA GPU, and PyTorch sees none; leave the measuring out: estimates need no GPU"
        )
    config, heads = _read(Path(config_or_run), tracks, list(overrides))
    train = replace(
        config.train, batch_size=batch_size, windows_per_epoch=None, track_weights={}, compile=False
    )
    job = _Job(replace(config, train=train), heads, length_bp, predict_in)
    trunk_bp = config.model.encoder.stem.bin_bp
    if length_bp < 1 or length_bp % trunk_bp:
        raise ConfigError(
            f"length_bp is {length_bp}, no multiple of the model's bin of {trunk_bp} bp; round it up"
        )
    with torch.device("meta"):
        model = job.model()
    info = ModelInfo(
        name=os.fspath(config_or_run),
        parameters=_parts(model),
        layers=dict(Counter(config.model.encoder.pattern)),
        bin_bp=model.bin_bp,
        trunk_bp=trunk_bp,
        receptive_field_bp=model.encoder.receptive_field_bp,
        strands=model.strands,
        length_bp=length_bp,
        batch_size=batch_size,
        precision=_precision(train),
        prediction_precision=predict_in,
    )
    if mode != "predict":
        info = replace(info, **_rehearsed_training(job))
    if mode != "train":
        info = replace(info, **_rehearsed_prediction(job))
    return replace(info, measured=_measured(job, info, torch.device("cuda", 0))) if measure else info


@dataclass(frozen=True)
class _Job:
    """What to run: the model's and training's configuration, its outputs, and the length of a window."""

    config: RunConfig
    heads: tuple[TrackHead, ...]
    length_bp: int
    predict_in: PrecisionName

    def model(self) -> AccessibilityModel:
        return AccessibilityModel(self.config.model, self.heads, window_bp=self.length_bp, margin_bp=0)

    def tokens(self, device: torch.device) -> Tensor:
        return torch.zeros(self.config.train.batch_size, self.length_bp, dtype=torch.int8, device=device)

    def batch(self, bin_bp: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.config.train.batch_size, self.length_bp // bin_bp, len(self.heads))
        targets = torch.zeros(shape, device=device)
        return self.tokens(device), targets, torch.ones(shape, dtype=torch.bool, device=device)


def _read(config_or_run: Path, tracks: int, overrides: list[str]) -> tuple[RunConfig, tuple[TrackHead, ...]]:
    """The configuration, and what the model's outputs are."""
    name = os.fspath(config_or_run)
    trained = config_or_run.suffix == ".safetensors" or (config_or_run / checkpoint.MODEL_FILE).is_file()
    if trained or (config_or_run.is_dir() and name not in shipped_configs()):
        if overrides:
            raise ConfigError(
                f"{config_or_run} is a run, whose configuration is settled; give overrides with a configuration"
            )
        model = checkpoint.load(config_or_run)
        stored = config_or_run / "config.yaml"
        config = build(RunConfig, load_yaml(stored), where=str(stored)) if stored.is_file() else RunConfig()
        return replace(config, model=model.config), model.tracks
    heads = tuple(TrackHead(f"track{index}", "peaks", "bce") for index in range(tracks))
    return load_run_config(name, overrides), heads


def _parts(model: AccessibilityModel) -> dict[str, int]:
    """Parameters by part, in the order in which a sequence goes through them."""
    encoder = model.config.encoder
    counts: dict[str, int] = dict.fromkeys(
        ["stem", *encoder.pattern, "experts", "mlp", "norms", "decoder", "heads"], 0
    )
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[0] == "heads":
            part = "heads"
        elif words[1] in ("stem", "decoder"):
            part = words[1]
        elif words[1] == "layers" and words[3] == "mixer":
            part = encoder.pattern[int(words[2])]
        elif words[1] == "layers" and words[3] == "mlp":
            part = "experts" if encoder.experts else "mlp"
        else:
            part = "norms"
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def _precision(config: TrainConfig) -> PrecisionName:
    """What a GPU computes in."""
    return "float32" if config.precision == "float32" else "bf16"


def _forward(module: TrainingModule, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss of a training step, as the trainer computes it."""
    enabled = _precision(module.config) == "bf16"
    with torch.autocast(batch[0].device.type, dtype=torch.bfloat16, enabled=enabled):
        return module.training_step(batch, 0)


def _rehearsed_training(job: _Job) -> dict[str, Any]:
    """FLOPs and memory of a training step that is not the first: there are optimiser states, and old gradients."""
    config = job.config.train
    with Rehearsal() as rehearsal:
        # the running average is a copy of the model, and copies need data
        module = TrainingModule(job.model(), replace(config, ema_decay=0.0, cuda_graphs=False), total_steps=1)
        recorded = config.cuda_graphs and why_no_training_graph(module.model, torch.device("cuda")) is None
        parameters = list(module.model.parameters())
        weights, trained = rehearsal.allocated, _allocated(parameters)
        average = weights if config.ema_decay else 0
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        batch = job.batch(module.model.bin_bp, CPU)
        before = rehearsal.allocated - _allocated(batch)
        rehearsal.forget_peak()
        flops = rehearsal.flops
        loss = _forward(module, batch)
        forward_flops = rehearsal.flops - flops
        kept = rehearsal.allocated - before
        peak, operator = rehearsal.peak - before, rehearsal.operator
        module.zero_grad()
        rehearsal.forget_peak()
        loss.backward()  # type: ignore[no-untyped-call]
        if rehearsal.peak - before > peak:
            peak, operator = rehearsal.peak - before, rehearsal.operator
        training_flops = rehearsal.flops - flops
    if trained > peak:  # it takes a copy of the weights, when nothing else is left of the step
        peak, operator = trained, "AdamW"
    libraries = 2 * CUBLAS_WORKSPACE
    total = weights + 3 * trained + average + peak + libraries
    memory = TrainingMemory(
        weights=weights,
        gradients=trained,
        optimiser=2 * trained,
        average=average,
        kept=kept,
        temporary=peak - kept,
        libraries=libraries,
        peak=total,
        graphs=round(GRAPHS_SHARE * total) + GRAPHS_BYTES if recorded else 0,
        operator=operator,
    )
    return {"forward_flops": forward_flops, "training_flops": training_flops, "training": memory}


def _rehearsed_prediction(job: _Job) -> dict[str, Any]:
    """FLOPs and memory of `AccessibilityModel.predict`."""
    with Rehearsal() as rehearsal:
        model = job.model().eval()
        weights = rehearsal.allocated
        rehearsal.forget_peak()
        _predict(job, model, CPU)
        memory = PredictionMemory(
            weights=weights,
            temporary=rehearsal.peak - weights,
            libraries=CUBLAS_WORKSPACE,
            peak=rehearsal.peak + CUBLAS_WORKSPACE,
            operator=rehearsal.operator,
        )
        return {"prediction_flops": rehearsal.flops, "prediction": memory}


def _allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors with storages of their own, as allocated."""
    return sum(allocation(tensor.untyped_storage().nbytes()) for tensor in tensors)


def _measured(job: _Job, info: ModelInfo, device: torch.device) -> Measured:
    """Real steps on a CUDA device beside the estimates."""
    try:
        prediction = None if info.prediction is None else _peak(device, lambda: _predicted(job, device))
        training = None if info.training is None else _peak(device, lambda: _train(job, device))
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{describe(device)} has not enough memory to measure {info.batch_size} x {info.length_bp:,} bp; "
            "measure a smaller batch or length"
        ) from error
    return Measured(
        device=describe(device),
        training=training,
        training_ratio=info.training.peak / training if info.training and training else None,
        prediction=prediction,
        prediction_ratio=info.prediction.peak / prediction if info.prediction and prediction else None,
    )


def _peak(device: torch.device, run: Callable[[], None]) -> int:
    """The most memory that PyTorch had allocated while `run` ran, beyond what was there before."""
    gc.collect()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _train(job: _Job, device: torch.device) -> None:
    """Three steps as the trainer makes them, but without CUDA graphs, whose memory PyTorch counts otherwise."""
    config = replace(job.config.train, cuda_graphs=False)
    module = TrainingModule(job.model().to(device), config, total_steps=3).to(device)
    optimizer = module.configure_optimizers()["optimizer"]
    _, targets, mask = job.batch(module.model.bin_bp, device)
    for _ in range(3):
        batch = (
            torch.randint(0, 4, (*targets.shape[:1], job.length_bp), dtype=torch.int8, device=device),
            targets,
            mask,
        )
        loss = _forward(module, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        module.update_average()


def _predicted(job: _Job, device: torch.device) -> None:
    model = job.model().to(device).eval()
    for _ in range(2):
        _predict(job, model, device)


def _predict(job: _Job, model: AccessibilityModel, device: torch.device) -> None:
    """A batch as `predict` computes it: casts of weights are not kept, as a CUDA graph could not hold them."""
    narrow = torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=job.predict_in == "bf16", cache_enabled=False
    )
    with torch.inference_mode(), narrow:
        model.predict(job.tokens(device))
