"""Which implementation of a kernel runs: Triton on a CUDA device, PyTorch elsewhere, or the step-by-step reference."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch", "reference"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of the CPU ($TRITON_INTERPRET=1, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose_backend(
    backend: str, x: Tensor, unfit: str | None, *, reference: bool = True
) -> Literal["triton", "torch", "reference"]:
    """The implementation that runs: `auto` takes Triton for a CUDA tensor that it can compute, else PyTorch.

    Args:
        backend: what the caller asked for.
        x: the input whose device and dtype decide.
        unfit: a sentence on why Triton cannot compute this call, or None where it can.
        reference: whether there is a step-by-step reference.

    Raises:
        ValueError: no such backend, or `triton` where it cannot run.
    """
    if backend in ("torch", "reference") and (reference or backend != "reference"):
        return "torch" if backend == "torch" else "reference"
    if backend not in ("auto", "triton"):
        names = "'auto', 'triton', 'torch' and 'reference'" if reference else "'auto', 'triton' and 'torch'"
        raise ValueError(f"backend is {backend!r}; allowed are {names}")
    if unfit is None and x.dtype not in TRITON_DTYPES:
        unfit = f"x has dtype {x.dtype}; backend='triton' takes float32, bfloat16 and float16, backend='torch' all"
    if backend == "auto":
        usable = x.is_cuda and unfit is None and HAS_TRITON
        return "triton" if usable else "torch"
    if not HAS_TRITON:
        raise ValueError(
            "backend is 'triton', which is not installed; pip install triton, or take backend='torch'"
        )
    if not x.is_cuda and not interpreting():
        raise ValueError(
            f"backend is 'triton' and x is on {x.device}; move x to a CUDA device, or take backend='torch'"
        )
    if unfit is not None:
        raise ValueError(unfit)
    return "triton"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on this device (an H100's in Triton's interpreter)."""
    if device not in _shared_memory:
        _shared_memory[device] = 232448
        if device.type == "cuda":
            from triton.runtime import driver

            index = torch.cuda.current_device() if device.index is None else device.index
            _shared_memory[device] = int(driver.active.utils.get_device_properties(index)["max_shared_mem"])
    return _shared_memory[device]


_shared_memory: dict[torch.device, int] = {}
