"""On a CUDA device: it is what `auto` takes, and a model computes there what it computes on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.heads import TrackHead
from genossm.pipelines.device import describe, pick_device

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """The CUDA device, computing convolutions to float32 accuracy (torch's default there is TF32)."""
    device = pick_device("auto")
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield device
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture
def model() -> AccessibilityModel:
    """A small random model with a track of each kind."""
    torch.manual_seed(3)
    tracks = [
        TrackHead("peaks", "peaks", "bce"),
        TrackHead("cuts", "signal", "poisson", "sum", mean=2.0),
        TrackHead("occupancy", "signal", "mse", mean=1.0, std=0.5),
    ]
    encoder = EncoderConfig(width=64, pattern=("mamba2", "mamba2"), state=16, head_dim=32)
    return AccessibilityModel(
        ModelConfig(encoder, head_hidden=32), tracks, window_bp=8192, margin_bp=1024
    ).eval()


def test_auto_takes_cuda_and_names_it() -> None:
    device = pick_device("auto")
    assert device == torch.device("cuda", 0)
    assert describe(device) == f"{torch.cuda.get_device_name(0)} (cuda:0)"


@pytest.mark.parametrize("length_bp", [32, 4096 + 32, 16384])
def test_predictions_equal_those_of_the_cpu(
    model: AccessibilityModel, cuda: torch.device, length_bp: int
) -> None:
    tokens = torch.randint(0, 5, (2, length_bp), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    expected = model.predict(tokens)
    got = model.to(cuda).predict(tokens.to(cuda)).cpu()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-4)


def test_gradients_reach_every_parameter_and_equal_those_of_the_cpu(
    model: AccessibilityModel, cuda: torch.device
) -> None:
    tokens = torch.randint(0, 4, (1, 8192), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    model(tokens).square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.to(cuda)(tokens.to(cuda)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        scale = expected[name].abs().max().item() + 1e-12
        assert (parameter.grad.cpu() - expected[name]).abs().max().item() / scale < 5e-3, name
