"""How long a training's device has nothing to do between one step and the next: mostly the wait for data."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class IdleTime:
    """Time between the work of steps, as the device sees it: by events on CUDA, where the host runs ahead, else by the clock.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: list[tuple[Any, Any]] = []
        self._begin: Any = None

    def begin_step(self) -> None:
        """Before anything of a step is given to the device, its batch being there."""
        self._begin = self._now()

    def end_step(self) -> None:
        """After all of the step was given to the device."""
        if self._begin is not None:
            self._steps.append((self._begin, self._now()))
            self._begin = None

    def share(self) -> float | None:
        """Between the steps since this was asked last, over all of the time from the first to the last; None below two."""
        steps, self._steps = self._steps, []
        if len(steps) < 2:
            return None
        if self._cuda:
            steps[-1][1].synchronize()
        idle = sum(self._seconds(end, begin) for (_, end), (begin, _) in pairwise(steps))
        return idle / max(1e-9, self._seconds(steps[0][0], steps[-1][1]))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if self._cuda else float(end - begin)
