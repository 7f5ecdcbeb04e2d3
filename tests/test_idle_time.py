"""The time between steps, by a clock that the test turns."""

from __future__ import annotations

import time

import pytest
import torch

from genossm.pipelines.idle_time import IdleTime


def test_the_share_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    idle = IdleTime(torch.device("cpu"))
    assert idle.share() is None
    now = 100.0  # what is before the first step and after the last does not count
    for wait, work in ((5.0, 3.0), (1.0, 3.0), (0.0, 3.0)):
        now += wait
        idle.begin_step()
        now += work
        idle.end_step()
    now += 50.0
    assert idle.share() == pytest.approx(1 / 10)
    assert idle.share() is None  # those steps are told


def test_one_step_has_no_step_beside_it() -> None:
    idle = IdleTime(torch.device("cpu"))
    idle.end_step()  # a resumed epoch may end a step that was begun before
    idle.begin_step()
    idle.end_step()
    assert idle.share() is None
