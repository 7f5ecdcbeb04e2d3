"""Every mixer on a CUDA device: against float64 on the CPU, in bfloat16, chunk after chunk, and again bit by bit.

Compiling takes most of the time, so all have the sizes of tests/gpu/test_encoder.py: many of the kernels are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from genossm.models.mixers.attention import Attention
from genossm.models.mixers.conv import DilatedConv
from genossm.models.mixers.h3 import H3
from genossm.models.mixers.hydra import Hydra
from genossm.models.mixers.hyena import Hyena
from genossm.models.mixers.lstm import LSTM
from genossm.models.mixers.mamba import Mamba
from genossm.models.mixers.mamba2 import Mamba2
from genossm.models.mixers.mamba3 import Mamba3
from genossm.models.mixers.mixer import Mixer, mix_by_chunks
from genossm.models.mixers.s4 import S4
from genossm.models.mixers.s4d import S4D

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact")]

DEVICE = "cuda"
BATCH, WIDTH, STATE, HEAD_DIM = 2, 64, 16, 32
MIXERS: dict[str, Callable[[], Mixer]] = {
    "s4": partial(S4, WIDTH, state=STATE),
    "s4d": partial(S4D, WIDTH, state=STATE),
    "h3": partial(H3, WIDTH, state=STATE),
    "hyena": partial(Hyena, WIDTH, filter_bins=100),
    "mamba": partial(Mamba, WIDTH, state=STATE),
    "mamba, tied": partial(Mamba, WIDTH, state=STATE, bidirectional="tied"),
    "mamba2": partial(Mamba2, WIDTH, state=STATE, head_dim=HEAD_DIM),
    "mamba2, tied": partial(Mamba2, WIDTH, state=STATE, head_dim=HEAD_DIM, bidirectional="tied"),
    "mamba3": partial(Mamba3, WIDTH, state=STATE, head_dim=HEAD_DIM),
    "mamba3, rank 2": partial(Mamba3, WIDTH, state=STATE, head_dim=HEAD_DIM, rank=2),
    "hydra": partial(Hydra, WIDTH, state=STATE, head_dim=HEAD_DIM),
    "attention": partial(Attention, WIDTH, window=100, head_dim=HEAD_DIM),
    "attention, full": partial(Attention, WIDTH, window=None, head_dim=HEAD_DIM),
    "conv": partial(DilatedConv, WIDTH),
    "lstm": partial(LSTM, WIDTH),
}
STREAMING = [name for name in MIXERS if name != "attention, full"]
TRITON = [name for name in MIXERS if name.startswith(("hyena", "mamba", "hydra"))]
LENGTHS = {"1": (1,), "257 to 4099": (257, 1000, 4099)}
"""By kernels: a single position has its own."""
ENDS = (150, 151, 2000)
"""Where sequences are cut: short chunks whose halo reaches beyond their neighbours, and one of a single position."""
SMALL = 1e-3
"""Gradients of less than this part of the largest one's norm are measured against that part: some should be zero."""


def make(name: str, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Mixer:
    """The same mixer in every dtype and on every device; its weights are not those of the start, of which some are 0."""
    torch.manual_seed(0)
    mixer = MIXERS[name]()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer.to(device, dtype)


def normal(length: int, seed: int) -> Tensor:
    return torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(mixer: Mixer, length: int, *, autocast: bool = False) -> dict[str, Tensor]:
    """The output for random features, and every gradient of a random function of it."""
    x = normal(length, seed=1).to(next(mixer.parameters())).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = mixer(x)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], normal(length, seed=2).to(y))
    return {"output": y.detach(), **dict(zip(("input", *names), gradients, strict=True))}


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], *, output: float, gradients: float
) -> None:
    """Within these tolerances, which are relative to a tensor's norm."""
    assert got.keys() == expected.keys()
    norms = {name: float(right.double().norm()) for name, right in expected.items()}
    least = SMALL * max(norm for name, norm in norms.items() if name != "output")
    errors = {}
    for name, right in expected.items():
        assert torch.isfinite(got[name]).all(), name
        error = float((got[name].to(right.device, torch.float64) - right).norm())
        error /= norms[name] if name == "output" else max(norms[name], least)
        if not error < (output if name == "output" else gradients):
            errors[name] = error
    assert not errors


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("name", MIXERS)
def test_float32_gives_what_the_cpu_gives_in_float64(name: str, lengths: tuple[int, ...]) -> None:
    mixer, on_cpu = make(name), make(name, torch.float64, "cpu")
    for length in lengths:
        assert_close(run(mixer, length), run(on_cpu, length), output=1e-4, gradients=1e-4)


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_is_near_float64(name: str) -> None:
    mixer, on_cpu = make(name), make(name, torch.float64, "cpu")
    for length in (257, 4099):
        assert_close(run(mixer, length, autocast=True), run(on_cpu, length), output=2e-2, gradients=5e-2)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("name", STREAMING)
@torch.no_grad()
def test_chunks_give_what_one_pass_gives(name: str, lengths: tuple[int, ...]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        mixer = make(name, dtype)
        for length in lengths:
            x = normal(length, seed=1).to(DEVICE, dtype)
            chunks = x.tensor_split([end for end in ENDS if end < length], 1)
            got = mix_by_chunks(mixer, chunks)
            assert [y.shape for y in got] == [chunk.shape for chunk in chunks]
            torch.testing.assert_close(torch.cat(got, 1), mixer(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRITON)
def test_outputs_and_gradients_repeat_bit_by_bit(name: str, autocast: bool) -> None:
    mixer = make(name)
    first = run(mixer, 4099, autocast=autocast)
    for _ in range(3):
        again = run(mixer, 4099, autocast=autocast)
        assert [tensor for tensor in first if not torch.equal(again[tensor], first[tensor])] == []
