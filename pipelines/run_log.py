"""What a training leaves behind while it runs: progress, metrics.csv, the best model and the state to resume from."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from genossm import checkpoint
from genossm.atomic import atomic_path, atomic_write_text
from genossm.pipelines.idle_time import IdleTime
from genossm.pipelines.training_module import TrainingModule
from genossm.progress import move, progress

METRICS_FILE = "metrics.csv"
RESUME_FILE = "last.ckpt"
Row = dict[str, float]


class RunLog(lightning.Callback):
    """Shows progress, and after each epoch writes metrics, the best model so far and a state to resume from.

    Args:
        folder: the run folder.
        window_bp: base pairs of a training window, for the rate.
        provenance: stored in the model.
        write_csv: keep `metrics.csv`.
        save_minutes: within an epoch the state is written after so many minutes, too; 0 for never.
    """

    def __init__(
        self,
        folder: Path,
        *,
        window_bp: int,
        provenance: dict[str, Any],
        write_csv: bool,
        save_minutes: float = 0.0,
    ) -> None:
        self.folder, self.window_bp, self.provenance = folder, window_bp, provenance
        self.write_csv, self.save_minutes = write_csv, save_minutes
        self.rows: list[Row] = []
        self.best = -math.inf
        self.best_epoch = 0
        self._bar: Any = None
        self._epoch_start = self._saved = 0.0
        self._seconds_before = 0.0  # of this epoch, by the training that it goes on from
        self._windows = 0
        self._note = ""
        self._idle: IdleTime | None = None

    def state_dict(self) -> dict[str, Any]:
        seconds = self._seconds_before + time.monotonic() - self._epoch_start
        return {"rows": self.rows, "best": self.best, "best_epoch": self.best_epoch, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best, self.best_epoch = (
            state_dict["rows"],
            state_dict["best"],
            state_dict["best_epoch"],
        )
        self._seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._bar = progress(total=pl_module.total_steps, unit="step", description="train")
        move(self._bar, trainer.global_step)
        self._epoch_start = self._saved = time.monotonic()  # an epoch that is gone on with is not started
        self._idle = IdleTime(pl_module.device)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._epoch_start, self._windows, self._seconds_before = time.monotonic(), 0, 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._idle is not None
        self._idle.begin_step()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._idle is not None
        self._idle.end_step()
        self._windows += len(batch[0])
        rate = self._windows / max(1e-9, time.monotonic() - self._epoch_start)
        self._bar.set_postfix_str(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, {rate:.1f} windows/s, "
            f"{rate * self.window_bp / 1e6:.2f} Mbp/s{self._note}",
            refresh=False,
        )
        self._bar.update(1)
        due = self.save_minutes and time.monotonic() - self._saved >= 60 * self.save_minutes
        if due and not trainer.is_last_batch:  # that state would be resumed without the validation
            assert isinstance(pl_module, TrainingModule)
            pl_module.check_gradient()
            self.save_state(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.check_gradient()  # before anything of this epoch is written
        idle = self._idle.share() if self._idle is not None else None
        row: Row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/loss": float(torch.stack(pl_module.epoch_losses).mean()),
            "seconds": round(self._seconds_before + time.monotonic() - self._epoch_start, 3),
            **({} if idle is None else {"train/idle": idle}),
            **pl_module.validation,
        }
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics(
                {key: value for key, value in row.items() if "/" in key}, step=trainer.global_step
            )
        if self.write_csv:
            atomic_write_text(self.folder / METRICS_FILE, _as_csv(self.rows))
        self._note = "" if idle is None else f", device idle {idle:.1%}"
        score = selection_score(pl_module.validation)
        if score is not None:
            self._note += f", valid {score[0]} {score[1]:.4f}"
            if score[1] > self.best:
                self.best, self.best_epoch = score[1], trainer.current_epoch + 1
                self._save_model(pl_module)
        pl_module.validation = {}
        self.save_state(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._bar.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def save_state(self, trainer: lightning.Trainer) -> None:
        """Write the state to resume from."""
        with atomic_path(self.folder / RESUME_FILE) as temporary:
            trainer.save_checkpoint(temporary)
        self._saved = time.monotonic()

    def _save_model(self, module: TrainingModule) -> None:
        model = module.validated
        model.threshold = dict(module.thresholds)
        model.provenance = {**self.provenance, "epoch": self.best_epoch, "validation": module.validation}
        checkpoint.save(model, self.folder / checkpoint.MODEL_FILE)


def selection_score(validation: dict[str, float]) -> tuple[str, float] | None:
    """The validation figure that chooses the best model: mean AUPRC, or mean Pearson where no track has peaks."""
    for name in ("auprc", "pearson"):
        value = validation.get(f"valid/{name}")
        if value is not None and math.isfinite(value):
            return name, value
    return None


def _as_csv(rows: list[Row]) -> str:
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{row[column]:.8g}" if column in row else "" for column in columns])
    return text.getvalue()
