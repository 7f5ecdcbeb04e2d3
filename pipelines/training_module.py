"""The training step, optimiser and validation of an accessibility model, as Lightning runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from genossm.errors import TrainingError
from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import TrackHead
from genossm.models.parity import plain_name
from genossm.pipelines.cuda_graphs import GraphedTraining
from genossm.pipelines.weight_average import WeightAverage
from genossm.ranking import BatchedMetrics, Measure, Ranking
from genossm.run_config import TrainConfig

Batch = tuple[Tensor, Tensor, Tensor]


class TrainingModule(lightning.LightningModule):
    """A model, the running average of its weights, and how both are trained and validated.

    Args:
        model: trained in place.
        config: see `TrainConfig`.
        total_steps: optimiser steps of the whole training, for warm-up and cosine decay.

    Attributes:
        before_validation: called where a state saved by the trainer is resumed with all of the validation: within its
            first batch (a state of the epoch's last training batch would be resumed with the next epoch).
    """

    track_weights: Tensor

    def __init__(self, model: AccessibilityModel, config: TrainConfig, total_steps: int) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.total_steps = total_steps
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        known = {track.name for track in model.tracks}
        unknown = sorted(set(config.track_weights) - known)
        if unknown:
            raise ValueError(
                f"track_weights names {', '.join(unknown)}; the dataset's tracks are {', '.join(sorted(known))}"
            )
        weights = torch.tensor([config.track_weights.get(track.name, 1.0) for track in model.tracks])
        self.register_buffer("track_weights", weights / weights.sum(), persistent=False)
        self.epoch_losses: list[Tensor] = []
        self._last_gradient: tuple[int, _Later] | None = None
        self.validation: dict[str, float] = {}
        self.thresholds: dict[str, float] = {}
        self._forget_validation()
        self.before_validation: Callable[[], None] = _nothing
        self._forward: Callable[[Tensor], Tensor] = (
            torch.compile(model) if config.compile else GraphedTraining(model, record=config.cuda_graphs)
        )

    def record_again(self) -> None:
        """Give up the CUDA graphs of the batches so far: the next batch decides their shape."""
        if isinstance(self._forward, GraphedTraining):
            self._forward = GraphedTraining(self.model, record=self.config.cuda_graphs)

    @property
    def validated(self) -> AccessibilityModel:
        """The model that is validated and saved: the running average where there is one."""
        if self.average is None:
            return self.model
        averaged = self.average.module
        assert isinstance(averaged, AccessibilityModel)
        return averaged

    def on_train_epoch_start(self) -> None:
        self.epoch_losses = []

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        # dropout depends on (seed, step) alone, so that a resumed training repeats the unbroken one
        torch.manual_seed(self.config.seed * 1_000_003 + self.global_step)
        tokens, targets, mask = batch
        losses = self._losses(self._cropped(self._forward(tokens), targets), targets, mask)
        loss = (losses * self.track_weights).sum()
        self.epoch_losses.append(loss.detach())
        return loss + self.model.encoder.auxiliary_loss()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.check_gradient()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._last_gradient = self.global_step, _Later(norm)

    def check_gradient(self) -> None:
        """Stop where the last step's gradient was not finite. Not asked at once: a device would wait for the host's next launch."""
        if self._last_gradient is None:
            return
        step, norm = self._last_gradient
        self._last_gradient = None
        if not math.isfinite(norm.value()):
            raise TrainingError(
                f"the gradient became {norm.value()} at step {step}; "
                "lower train.learning_rate and start again, or resume from the last saved step"
            )

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.update_average()

    def update_average(self) -> None:
        """Take the weights into their running average: the end of a step, before anything of it is saved."""
        if self.average is not None:
            self.average.update_parameters(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch_losses"] = [float(loss) for loss in self.epoch_losses]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epoch_losses = [torch.tensor(loss) for loss in checkpoint["epoch_losses"]]

    def on_validation_epoch_start(self) -> None:
        self.check_gradient()
        self._forget_validation()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        if batch_index == 0:
            self.before_validation()
        tokens, targets, mask = batch
        model = self.validated
        raw = self._cropped(model(tokens), targets)
        self._validation_losses.append(self._losses(raw, targets, mask))
        self._metrics.add(model.heads.values(raw), targets, mask)

    def on_validation_epoch_end(self) -> None:
        if not self._metrics.finite():
            raise TrainingError(
                f"the model's predictions became NaN or infinite by step {self.global_step}; "
                "lower train.learning_rate and start again"
            )
        losses = torch.stack(self._validation_losses).cpu().mean(0)
        self.validation = {"valid/loss": float((losses * self.track_weights.cpu()).sum())}
        self.thresholds = {}
        by_kind: dict[str, list[float]] = {"auprc": [], "pearson": []}
        for track, found in zip(self.model.tracks, self._metrics.results(), strict=True):
            if isinstance(found, Ranking):
                result = {"auprc": found.auprc, "auroc": found.auroc}
                if math.isfinite(found.threshold):
                    self.thresholds[track.name] = found.threshold
            else:
                result = {"pearson": found}
            for name, value in result.items():
                self.validation[f"valid/{track.name}/{name}"] = value
                if name in by_kind and math.isfinite(value):
                    by_kind[name].append(value)
        for name, collected in by_kind.items():
            if collected:
                self.validation[f"valid/{name}"] = float(np.mean(collected))
        self._forget_validation()

    def _forget_validation(self) -> None:
        self._validation_losses: list[Tensor] = []
        self._metrics = BatchedMetrics([_measure(track) for track in self.model.tracks])

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=next(self.model.parameters()).is_cuda,
        )
        warmup = max(1, round(config.warmup_fraction * self.total_steps))

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
            return config.final_fraction + (1 - config.final_fraction) * (1 + math.cos(math.pi * done)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _losses(self, raw: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return self.model.heads.losses(raw, targets, mask, total_weight=self.config.total_weight)

    @staticmethod
    def _cropped(raw: Tensor, targets: Tensor) -> Tensor:
        margin = (raw.shape[1] - targets.shape[1]) // 2
        return raw[:, margin : margin + targets.shape[1]]


def _nothing() -> None:
    pass


def _measure(track: TrackHead) -> Measure:
    """Peaks by how they are ranked, counts on a logarithmic scale, other signal as it is."""
    if track.kind == "peaks":
        return "rank"
    return "log_pearson" if track.loss == "poisson" else "pearson"


class _Later:
    """A number on its way from the device: asking for it waits for what came before it there, not for what came since."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.detach()
        self._arrival: torch.cuda.Event | None = None
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._number.copy_(number.detach(), non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def value(self) -> float:
        if self._arrival is not None:
            self._arrival.synchronize()
        return float(self._number)


def parameter_groups(model: AccessibilityModel, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices (decayed), norms and biases (not), and state parameters (not, at their own rate)."""
    of_state = {f"encoder.{name}" for name in model.encoder.state_parameter_names()}
    decayed, plain, ssm = [], [], []
    for stored_name, parameter in model.named_parameters():
        name = plain_name(stored_name)
        last = name.rsplit(".", 1)[-1]
        if name in of_state:
            ssm.append(parameter)
        elif parameter.dim() < 2 or "bias" in last or "norm" in last:  # a bias per direction has two axes
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": ssm, "weight_decay": 0.0, "lr": config.learning_rate * config.ssm_rate},
    ]
    return [group for group in groups if group["params"]]
