"""The launches that are remembered from call to call: each sees tensors of one dtype and one alignment only, and fits the device.

Nothing is launched here: what every launch would be given is written down.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from genossm.kernels import ssd_triton
from genossm.kernels.backend import interpreting
from genossm.kernels.ssd_tiles import tiles_for
from genossm.kernels.triton_launch import KernelLaunch

Inputs = dict[str, Tensor | None]
LENGTH, HEADS, HEAD_DIM, STATE = 20, 2, 16, 16
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial", "spans", "firsts")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[KernelLaunch, set[Hashable]]]:
    """For every launch, the kinds of tensors that it was given."""
    kinds: dict[KernelLaunch, set[Hashable]] = {}

    def note(launch: KernelLaunch, *tensors: Tensor | None) -> None:
        kind = tuple(None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors)
        kinds.setdefault(launch, set()).add(kind)

    monkeypatch.setattr(KernelLaunch, "__call__", note)
    monkeypatch.setattr(ssd_triton, "_plans", {})
    yield kinds


def inputs() -> Inputs:
    return {
        "x": torch.zeros(1, LENGTH, HEADS, HEAD_DIM, dtype=torch.bfloat16),
        "dt": torch.ones(1, LENGTH, HEADS),
        "A": -torch.ones(HEADS),
        "B": torch.zeros(1, LENGTH, 1, STATE, dtype=torch.bfloat16),
        "C": torch.zeros(1, LENGTH, 1, STATE, dtype=torch.bfloat16),
        "D": torch.ones(HEADS),
        "z": torch.zeros(1, LENGTH, HEADS, HEAD_DIM, dtype=torch.bfloat16),
        "dt_bias": torch.ones(HEADS),
        "initial": torch.zeros(1, 1, HEADS, HEAD_DIM, STATE),
        "spans": None,
        "firsts": None,
    }


def unaligned(tensor: Tensor) -> Tensor:
    """The same values, one element after a boundary of 16 bytes."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def changes(given: Inputs) -> Iterator[Inputs]:
    """The inputs, and the same with each tensor missing, of another dtype, unaligned, or with other strides."""
    yield given
    for name, tensor in given.items():
        if tensor is None:
            continue
        if name in ("D", "z", "dt_bias", "initial"):
            yield {**given, name: None}
        if name not in ("x", "B", "C"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                yield {**given, name: tensor.to(dtype)}
        yield {**given, name: unaligned(tensor)}
        if name in ("z", "initial"):
            yield {**given, name: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]}
    yield {**given, "D": torch.ones(HEADS, HEAD_DIM)}


def test_a_remembered_launch_sees_tensors_of_one_kind(seen: dict[KernelLaunch, set[Hashable]]) -> None:
    calls = 0
    for given in changes(inputs()):
        arguments: list[Any] = [*(given[name] for name in NAMES), 0, True, 64]
        for _ in range(2):
            x = given["x"]
            assert x is not None
            torch.ops.genossm.ssd_scan(*arguments)
            final = torch.zeros(1, 1, HEADS, HEAD_DIM, STATE)
            for dy in (x, unaligned(x), None):
                for dfinal in (final, unaligned(final), None):
                    torch.ops.genossm.ssd_scan_backward(dy, dfinal, *arguments)
            calls += 1
    assert calls > 50 and len(seen) > calls
    assert [launch for launch, kinds in seen.items() if len(kinds) > 1] == []


BUDGETS = {80: 166_912, 86: 101_376, 90: 232_448}
"""Shared memory of a program in bytes, by compute capability."""


def shared(launch: KernelLaunch, tensors: tuple[Tensor | None, ...], capability: int) -> int:
    """Bytes of shared memory of a launch, compiled for a device that need not be there."""
    kernel: Any = launch._kernel
    names = kernel.arg_names
    constexpr = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    kinds: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    hints: dict[tuple[int], list[list[object]]] = {}
    dtypes = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    for index, tensor in enumerate(tensors):
        kinds[names[index]] = "constexpr" if tensor is None else dtypes[tensor.dtype]
        if tensor is None:
            constants[index,] = None
        else:
            hints[index,] = [["tt.divisibility", 16]]
    for index, value in enumerate(launch._scalars, len(tensors)):
        assert isinstance(value, int)
        if names[index] in constexpr or value == 1:
            kinds[names[index]], constants[index,] = "constexpr", value
        else:
            kinds[names[index]] = "i32"
            if value % 16 == 0:
                hints[index,] = [["tt.divisibility", 16]]
    for name, value in launch._constants.items():
        kinds[name], constants[names.index(name),] = "constexpr", value
    source = triton.compiler.ASTSource(kernel, kinds, constants, hints)
    compiled = triton.compile(
        source,
        target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        options=dict(launch._options),
    )
    return int(compiled.metadata.shared)


def test_three_sizes_that_an_estimate_refused_are_taken() -> None:
    for dtype, head_dim, state, budget in (
        (torch.float32, 64, 128, BUDGETS[86]),
        (torch.bfloat16, 128, 128, BUDGETS[86]),
        (torch.float32, 128, 128, BUDGETS[80]),
    ):
        assert tiles_for(dtype, head_dim, state, budget, None) is not None
        assert tiles_for(dtype, head_dim, state, budget, 256) is None
    assert tiles_for(torch.float32, 128, 128, BUDGETS[86], None) is None


@pytest.mark.parametrize(("capability", "head_dim", "state"), [(86, 128, 128), (86, 64, 256)])
def test_the_chosen_tiles_fit(
    capability: int, head_dim: int, state: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if interpreting():  # compiles nothing: another process does
        case = f"{__file__}::test_the_chosen_tiles_fit[{capability}-{head_dim}-{state}]"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", case]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:]
        return
    tiles = tiles_for(torch.bfloat16, head_dim, state, BUDGETS[capability], None)
    assert tiles is not None
    needed: list[tuple[str, int]] = []

    def note(launch: KernelLaunch, *tensors: Tensor | None) -> None:
        kernel: Any = launch._kernel
        name = kernel.fn.__name__
        if name in ("ssd_states", "ssd_output", "ssd_pairs", "ssd_keys"):
            needed.append((name, shared(launch, tensors, capability)))

    monkeypatch.setattr(KernelLaunch, "__call__", note)
    monkeypatch.setattr(ssd_triton, "_plans", {})
    monkeypatch.setattr(ssd_triton, "tiles_for", lambda *_: tiles)
    x = torch.zeros(1, 1024, 4, head_dim, dtype=torch.bfloat16)
    B = torch.zeros(1, 1024, 1, state, dtype=torch.bfloat16)
    arguments = (x, torch.ones(1, 1024, 4), -torch.ones(4), B, B.clone(), *[None] * 6, 2, True, tiles.chunk)
    torch.ops.genossm.ssd_scan(*arguments)
    torch.ops.genossm.ssd_scan_backward(x.clone(), None, *arguments)
    assert len(needed) > 6
    assert [(name, size) for name, size in needed if size > BUDGETS[capability]] == []
