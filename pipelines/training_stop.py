"""SIGTERM and SIGINT in a training: the step in hand is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import lightning

from genossm.pipelines.run_log import RunLog
from genossm.pipelines.training_module import TrainingModule
from genossm.progress import say


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


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM and a first SIGINT are noted and no more; yields whether one came.

    Only the main thread of a process can see to signals; elsewhere they do what they did before.
    """
    asked, owner = threading.Event(), os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked reader: it is told to end when the training does
            return
        if asked.is_set() and number == signal.SIGINT:  # whoever presses Ctrl+C twice does not want to wait
            raise KeyboardInterrupt
        if not asked.is_set():
            asked.set()
            with suppress(RuntimeError):  # it came while something was being printed
                say(f"{signal.Signals(number).name}: finishing the step in hand, then stopping")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
