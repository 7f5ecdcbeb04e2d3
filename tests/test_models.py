"""Stem, mixer, encoder and accessibility model: shapes, initialisation, symmetry, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from genossm.kernels.ssd import ssd
from genossm.models.accessibility import AccessibilityModel, ModelConfig, reverse_complement
from genossm.models.encoder import Encoder, EncoderConfig
from genossm.models.heads import TrackHead
from genossm.models.mixers.mamba2 import Mamba2
from genossm.models.norm import ChannelNorm, GatedRMSNorm
from genossm.models.stem import ConvStem, StemConfig

SMALL = EncoderConfig(
    width=16,
    pattern=("mamba2", "mamba2"),
    stem=StemConfig(channels=(8, 8), pool=(4, 4), first_kernel=7, kernel=3),
    state=8,
    head_dim=16,
    dropout=0.0,
    mlp_ratio=2.0,
)
TRACKS = (
    TrackHead("peaks", "peaks", "bce"),
    TrackHead("cuts", "signal", "poisson", "sum", mean=2.0),
    TrackHead("occupancy", "signal", "mse", mean=1.0, std=0.5),
)


def small_model(seed: int = 0) -> AccessibilityModel:
    torch.manual_seed(seed)
    model = AccessibilityModel(ModelConfig(SMALL, 12), TRACKS, window_bp=512, margin_bp=64)
    return model.eval()


def random_tokens(*shape: int, high: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_the_stem_gives_a_position_per_bin_and_sees_only_nearby_bases(norm: str) -> None:
    torch.manual_seed(0)
    config = StemConfig(channels=(8, 12), pool=(4, 4), first_kernel=7, kernel=3, norm=norm)  # type: ignore[arg-type]
    stem = ConvStem(config, 16).eval()
    tokens = random_tokens(2, 320)
    features = stem(tokens)
    assert features.shape == (2, 20, 16)
    changed = tokens.clone()
    changed[:, 160] = (changed[:, 160] + 1) % 4
    touched = (stem(changed) - features).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert 10 in touched and set(touched) <= {8, 9, 10, 11, 12}
    with pytest.raises(ValueError, match="no multiple of the bin of 16 bp"):
        stem(random_tokens(1, 33))


def test_no_base_is_the_zero_vector() -> None:
    torch.manual_seed(0)
    stem = ConvStem(SMALL.stem, 16)
    with torch.no_grad():
        first = stem.first(F.embedding(torch.full((1, 40), 4), stem.bases).transpose(1, 2))
        assert stem.first.bias is not None
        torch.testing.assert_close(first, stem.first.bias[None, :, None].expand_as(first))


def test_norms_equal_their_formulas() -> None:
    x, gate = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    gated = x * gate * torch.sigmoid(gate)
    expected = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(GatedRMSNorm(6)(x, gate), expected)
    channels_first = x.transpose(1, 2)
    scaled = channels_first / (channels_first.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(ChannelNorm(6)(channels_first), scaled)


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


def test_the_encoder_keeps_the_batch_apart_and_trains_every_parameter() -> None:
    torch.manual_seed(0)
    encoder = Encoder(SMALL)
    tokens = random_tokens(3, 256)
    encoder.eval()
    alone = encoder(tokens[1:2])
    torch.testing.assert_close(encoder(tokens)[1:2], alone, rtol=1e-4, atol=1e-5)
    encoder.train()
    encoder(tokens).square().mean().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": ()}, "pattern is empty"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0"),
        ({"width": 33}, "head_dim 64 and groups 1 do not divide expand \\* width = 66"),
    ],
)
def test_an_impossible_encoder_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EncoderConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": (8,), "pool": (4, 4)}, "differ in length"),
        ({"channels": (0,), "pool": (4,)}, "at least 1"),
        ({"channels": (8,), "pool": (4,), "kernel": 4}, "must be odd"),
    ],
)
def test_an_impossible_stem_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StemConfig(**options)  # type: ignore[arg-type]


def test_predictions_are_probabilities_and_expected_values_of_both_strands() -> None:
    model = small_model()
    tokens = random_tokens(2, 512)
    values = model.predict(tokens)
    assert values.shape == (2, 32, 3) and values.dtype == torch.float32
    assert ((values[..., 0] > 0) & (values[..., 0] < 1)).all() and (values[..., 1] > 0).all()
    with torch.no_grad():
        forward = model.heads.values(model(tokens))
        other = model.heads.values(model(reverse_complement(tokens))).flip(1)
    torch.testing.assert_close(values, (forward + other) / 2)
    torch.testing.assert_close(forward[..., 0], torch.sigmoid(model(tokens)[..., 0]).detach())
    assert not torch.allclose(forward, other)


def test_predictions_of_the_other_strand_are_mirrored() -> None:
    model = small_model().double()
    tokens = random_tokens(1, 512)
    mirrored = model.predict(reverse_complement(tokens)).flip(1)
    torch.testing.assert_close(mirrored, model.predict(tokens), rtol=1e-6, atol=1e-7)


def test_reverse_complement_of_tokens() -> None:
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0]], dtype=torch.int8)
    assert reverse_complement(tokens).tolist() == [[3, 4, 0, 1, 2, 3]]
