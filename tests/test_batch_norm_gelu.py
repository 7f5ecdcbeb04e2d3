"""Batch normalisation with GELU: torch against its formula, Triton (interpreted on a CPU) against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genossm.kernels.batch_norm_gelu import batch_norm_gelu
from genossm.models.stem import BatchNormGelu

SHAPES = [((2, 24), 5), ((1, 3000), 70), ((7,), 700), ((1,), 3)]
"""positions, channels."""
WAYS = [
    *((*shape, way) for shape in SHAPES for way in ("given", "batch")),
    *((*shape, "paired") for shape in SHAPES[1:3]),
]
"""Where the statistics come from: odd channels have no pairs."""


def make(positions: tuple[int, ...], channels: int, *, given: bool, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    inputs = {"x": normal(*positions, channels) * 3 + 5, "weight": normal(channels), "bias": normal(channels)}
    if given:
        inputs |= {"mean": normal(channels), "variance": normal(channels).abs() + 0.5}
    return inputs


def run(
    inputs: dict[str, Tensor],
    backend: str,
    device: str,
    dtype: torch.dtype,
    factors: Tensor,
    paired: bool = False,
) -> dict[str, Tensor]:
    """Outputs and gradients by name, in float64 on the CPU."""
    moved = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    leaves = [moved[name].requires_grad_() for name in ("x", "weight", "bias")]
    given = (moved["mean"], moved["variance"]) if "mean" in moved else None
    y, mean, variance = batch_norm_gelu(*leaves, given, paired=paired, backend=backend)  # type: ignore[arg-type]
    assert y.dtype == dtype and not mean.requires_grad and not variance.requires_grad
    gradients = torch.autograd.grad((y * factors.to(device, dtype)).sum(), leaves)
    found = {"y": y, "mean": mean, "variance": variance}
    found |= dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize(("positions", "channels", "way"), WAYS)
def test_torch_is_the_formula(positions: tuple[int, ...], channels: int, way: str) -> None:
    inputs = make(positions, channels, given=way == "given")
    factors = torch.randn_like(inputs["x"])
    x, weight, bias = (inputs[name].clone().requires_grad_() for name in ("x", "weight", "bias"))
    rows = x.reshape(-1, channels)
    if way == "paired":
        rows = torch.cat([rows, rows.flip(1)])
    mean = inputs.get("mean", rows.mean(0))
    variance = inputs.get("variance", (rows - mean).square().mean(0))
    z = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
    y = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    expected = {"y": y, "mean": mean, "variance": variance}
    gradients = torch.autograd.grad((y * factors).sum(), [x, weight, bias])
    expected |= dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))
    got = run(inputs, "torch", "cpu", torch.float64, factors, way == "paired")
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.detach(), rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("positions", "channels", "way"), WAYS)
def test_triton_equals_torch(positions: tuple[int, ...], channels: int, way: str, device: str) -> None:
    inputs = make(positions, channels, given=way == "given", seed=1)
    factors = torch.randn_like(inputs["x"])
    expected = run(inputs, "torch", "cpu", torch.float64, factors, way == "paired")
    got = run(inputs, "triton", device, torch.float32, factors, way == "paired")
    for name, tensor in expected.items():
        size = float(tensor.abs().max())
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5 * max(1.0, size), msg=name)


def test_a_mean_far_from_zero_and_a_constant_channel(device: str) -> None:
    x = torch.randn(4096, 3, dtype=torch.float64)
    x[:, 0] = x[:, 0] * 0.01 + 100
    x[:, 1] = -7
    weight, bias = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    narrow = x.float()  # what is rounded is the input of both
    expected = batch_norm_gelu(narrow.double(), weight, bias)
    got = batch_norm_gelu(
        narrow.to(device), weight.float().to(device), bias.float().to(device), backend="triton"
    )
    for one, other, tolerance in zip(got, expected, (2e-3, 1e-6, 1e-6), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=tolerance)
    assert float(got[2][1]) == 0 and float(got[0][:, 1].abs().max()) < 1e-3


def test_the_module_keeps_torchs_statistics() -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNormGelu(6).double(), nn.BatchNorm1d(6).double()
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = torch.randn(2, 9, 6, dtype=torch.float64) * 2 + 1
        expected = torch.nn.functional.gelu(theirs(x.transpose(1, 2))).transpose(1, 2)
        torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-9, atol=1e-9)
    ours.eval()
    theirs.eval()
    expected = torch.nn.functional.gelu(theirs(x.transpose(1, 2))).transpose(1, 2)
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(0, 3), torch.zeros(3), torch.zeros(3)), "with at least one position is needed"),
        ((torch.zeros(2, 3), torch.zeros(4), torch.zeros(3)), r"weight has shape \(4,\); allowed is \(3,\)"),
        (
            (torch.zeros(2, 3), torch.zeros(3), torch.zeros(3), (torch.zeros(3), torch.zeros(2))),
            r"variance has shape \(2,\)",
        ),
        ((torch.zeros(2, 3).int(), torch.zeros(3), torch.zeros(3)), "x has dtype torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch_norm_gelu(*arguments)  # type: ignore[arg-type]


def test_odd_channels_have_no_pairs() -> None:
    with pytest.raises(ValueError, match="x has 3 channels; an even number is needed"):
        batch_norm_gelu(torch.ones(2, 3), torch.ones(3), torch.ones(3), paired=True)
