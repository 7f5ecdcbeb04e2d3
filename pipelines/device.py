"""The compute device: CUDA unless a CPU is asked for, never a silent fallback."""

from __future__ import annotations

import platform

import torch

from genossm.errors import DeviceError


def pick_device(name: str = "auto") -> torch.device:
    """The device that `name` stands for: `auto` (the first CUDA device), `cuda`, `cuda:N` or `cpu`.

    Raises:
        DeviceError: CUDA is wanted and there is none; training on a CPU by accident can take days.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name not in ("auto", "cuda") and not (name.startswith("cuda:") and name[5:].isdigit()):
        raise DeviceError(f"the device {name!r} is unknown; allowed are auto, cuda, cuda:N and cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"the device {name!r} needs a CUDA GPU and PyTorch sees none; to run on the processor all the same, "
            "ask for it: --device cpu (in Python: device='cpu')"
        )
    index = int(name[5:]) if name.startswith("cuda:") else 0
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"the device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA device(s), from 0"
        )
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """A device in words, such as `NVIDIA H100 (cuda:0)` or `CPU, 2 threads (x86_64)`."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"
