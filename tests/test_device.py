"""Choosing a device: CUDA or a sentence, a CPU only when asked for."""

from __future__ import annotations

import pytest
import torch

from genossm.errors import DeviceError
from genossm.pipelines.device import describe, pick_device


def test_a_cpu_is_taken_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("cpu") == torch.device("cpu")
    assert describe(torch.device("cpu")).startswith("CPU, ")
    for name in ("auto", "cuda", "cuda:1"):
        with pytest.raises(DeviceError, match="--device cpu"):
            pick_device(name)


def test_auto_takes_cuda_and_counts_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match=r"sees 2 CUDA device\(s\)"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu", ""])
def test_an_unknown_device_is_told(name: str) -> None:
    with pytest.raises(DeviceError, match="allowed are auto, cuda, cuda:N and cpu"):
        pick_device(name)
