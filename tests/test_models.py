"""Norms against their formulas, and the mamba2 mixer: how it starts, that it reads both ways, and its scan."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from genossm.kernels.ssd import ssd
from genossm.models.mixers.mamba2 import Mamba2
from genossm.models.norm import GatedRMSNorm, RMSNorm


def test_norms_equal_their_formulas() -> None:
    x, gate = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    gated = x * gate * torch.sigmoid(gate)
    expected = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(GatedRMSNorm(6)(x, gate), expected)
    torch.testing.assert_close(RMSNorm(6)(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())


def test_norms_keep_the_dtype_and_the_precision_of_their_input() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    norm = RMSNorm(6)
    torch.nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.detach().double()
    got = copy.deepcopy(norm).double()(x)
    torch.testing.assert_close(got.detach(), expected, rtol=1e-12, atol=1e-12)
    narrow = norm(x.bfloat16())  # the weight is float32, as in autocast
    assert narrow.dtype == torch.bfloat16
    assert (narrow - expected).abs().max() < 0.02 * expected.abs().max()


def test_mamba2_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(256, state=16, head_dim=4)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert A.shape == (128, 2) and 1 <= A.min() and A.max() <= 16
    assert 0.9e-3 < dt.min() and dt.max() < 0.101
    # log-uniform: as many steps below the geometric mean as above it
    assert abs((dt.log() < math.log(1e-2)).float().mean() - 0.5) < 0.12
    assert torch.equal(mixer.D, torch.ones(128))
    with pytest.raises(ValueError, match="do not divide"):
        Mamba2(16, head_dim=12)


def test_mamba2_reads_both_directions_over_the_whole_length() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(16, state=8, head_dim=8).double()
    x = torch.randn(1, 300, 16, dtype=torch.float64)
    y = mixer(x)
    moved = x.clone()
    moved[:, 150] += 1
    reached = (mixer(moved) - y).abs().amax((0, 2))
    assert reached[0] > 0 and reached[-1] > 0


def test_the_mixer_uses_the_scan_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = Mamba2(16, state=8, head_dim=8, groups=2).double()
    x = torch.randn(1, 41, 16, dtype=torch.float64)
    got = mixer(x)
    monkeypatch.setattr(
        "genossm.models.mixers.mamba2.ssd",
        lambda *args, **options: ssd(*args, **{**options, "backend": "reference"}),
    )
    torch.testing.assert_close(mixer(x), got, rtol=1e-10, atol=1e-12)
