"""Predictions in processes of their own, for tests that run several at once or kill them.

Imported by its bare name, with this folder on the path: some installed package may be called `tests`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from test_predict import CountingModel, tiny_model
from torch import Tensor

from genossm.pipelines import plan as plan_module
from genossm.pipelines.parts import PredictionStopped
from genossm.pipelines.predict import predict
from genossm.pipelines.stop import STOPPED_STATUS


class SlowModel(CountingModel):
    """`CountingModel` that takes `seconds` for a batch."""

    seconds = 0.0

    def predict(self, tokens: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().predict(tokens)


def processes() -> ForkServerContext:
    """Processes that start in milliseconds: torch is imported once, in the server that they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prediction_jobs"])
    return context


def job(genome: Path, out: Path, *, windows_per_part: int, seconds: float | None, **options: Any) -> None:
    """One `predict` in small parts: of a slow model, or of a real one where `seconds` is None."""
    torch.set_num_threads(1)
    plan_module.SMALLEST_PART_WINDOWS["cpu"] = windows_per_part
    sys.stderr = open(os.devnull, "w")
    if seconds is None:
        model: Any = tiny_model()
    else:
        model = SlowModel()
        model.seconds = seconds
    out.with_name(f"{out.name}.begun").touch()
    try:
        predict(model, genome, out, device="cpu", batch_size=2, **options)
    except PredictionStopped:
        sys.exit(STOPPED_STATUS)
