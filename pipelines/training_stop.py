"""SIGTERM and SIGINT in a training: the step in hand is finished and saved first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning

from genossm.pipelines.run_log import RunLog
from genossm.pipelines.training_module import TrainingModule


class StopAfterStep(lightning.Callback):
    """Ends the training, once that is asked for, where a state to go on from has just been written.

    That is after the step in hand; after the last one of an epoch, in the first batch of the validation, for a state of
    any other place between would be resumed with the next epoch. So a stop within a validation does it again.
    """

    def __init__(self, log: RunLog, asked: Callable[[], bool]) -> None:
        self._log, self._asked = log, asked

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.before_validation = lambda: self._log.save_state(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if self._asked() and not trainer.is_last_batch:
            pl_module.check_gradient()
            self._log.save_state(trainer)
            raise SystemExit(1)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        if self._asked():
            raise SystemExit(1)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._asked() and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise SystemExit(1)
