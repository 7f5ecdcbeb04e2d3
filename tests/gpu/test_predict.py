"""On a CUDA device: whole-chromosome prediction against the CPU, whatever the batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genossm.genome import Genome
from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.heads import TrackHead
from genossm.pipelines.windowed import predict_chromosome

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> AccessibilityModel:
    """Random weights, with outputs spread widely enough for rounding to show."""
    torch.manual_seed(3)
    tracks = [
        TrackHead("peaks", "peaks", "bce"),
        TrackHead("cuts", "signal", "poisson", "sum", mean=2.0),
    ]
    encoder = EncoderConfig(width=64, pattern=("mamba2", "mamba2"), state=16, head_dim=32)
    model = AccessibilityModel(ModelConfig(encoder, head_hidden=32), tracks, window_bp=8192, margin_bp=1024)
    with torch.no_grad():
        model.heads.output.weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    bases = np.random.default_rng(2).choice(np.frombuffer(b"ACGT", "S1"), 200_005)
    bases[50_000:70_000] = b"N"
    path.write_text(f">chr1\n{bases.tobytes().decode()}\n")
    return Genome(path)


def test_cuda_equals_the_cpu_whatever_the_batch_size(model: AccessibilityModel, genome: Genome) -> None:
    exact = predict_chromosome(model, genome, "chr1", device="cpu")
    assert np.nanstd(exact[:, 0]) > 0.005
    for batch_size in (1, 3, 64):
        found = predict_chromosome(model, genome, "chr1", batch_size=batch_size, device="cuda")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
        np.testing.assert_allclose(found[:, 0], exact[:, 0], rtol=0, atol=0.02)  # convolutions in TF32
