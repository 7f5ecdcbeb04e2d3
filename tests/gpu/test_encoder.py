"""The encoder on a CUDA device: against the CPU, on both strands, checkpointed, compiled, and chunk after chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from genossm.models.accessibility import AccessibilityModel, ModelConfig, reverse_complement
from genossm.models.decoder import DecoderConfig
from genossm.models.encoder import Encoder, EncoderConfig, MixerName
from genossm.models.heads import TrackHead
from genossm.models.parity import TIED
from genossm.models.stem import StemConfig

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STEM = StemConfig(channels=(16, 32), pool=(2, 4), first_kernel=7, kernel=3, norm="rms")
"""8 bp to a bin; without batch statistics, to which most of the stem's biases would be all the same."""
SIZES: dict[str, Any] = {
    "width": 64,
    "pattern": ("mamba2", "mamba2"),
    "stem": STEM,
    "state": 16,
    "head_dim": 32,
    "window": 100,
    "filter_bins": 100,
    "dropout": 0.0,
}
MIXERS: dict[str, dict[str, Any]] = {
    **{name: {"pattern": (name,)} for name in get_args(MixerName)},
    "mamba, tied": {"pattern": ("mamba",), "bidirectional": "tied"},
    "mamba2, tied": {"pattern": ("mamba2",), "bidirectional": "tied"},
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "hybrid": {"pattern": ("mamba2", "attention", "hydra", "conv"), "mlp_ratio": 2.0},
    "experts": {"pattern": ("lstm", "hyena"), "mlp_ratio": 1.0, "experts": 4},
    "decoder": {"pattern": ("mamba3", "h3"), "decoder": DecoderConfig(1, kernel=3)},
    "base": {"pattern": ("mamba", "s4d"), "stem": StemConfig(kind="base")},
}
STREAMED: dict[str, dict[str, Any]] = {
    "scans": {"pattern": ("mamba", "mamba2", "mamba3", "hydra")},
    "long convolutions": {"pattern": ("s4", "s4d", "h3", "hyena")},
    "others": {
        "pattern": ("attention", "conv", "lstm"),
        "mlp_ratio": 1.0,
        "experts": 3,
        "decoder": DecoderConfig(2),
    },
}
SMOOTH = dataclasses.replace(STEM, pool=(1, 1))
"""Without pooling, where rounding to bfloat16 would move gradients between nearly equal values."""
BINS = 331
SMALL = 1e-3
"""Gradients of less than this part of the largest one's norm are measured against that part."""


def small(**options: Any) -> Encoder:
    """On the CPU in float32; the same weights for the same options, and not those of the start."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return encoder


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """On the CPU."""
    return torch.randint(0, 5, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def run(encoder: Encoder, *, through: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The features of random tokens, by the encoder or `through` what is made of it, and every parameter's gradient."""
    torch.manual_seed(1)  # the same dropout
    tokens = random_tokens(2, BINS * encoder.trunk_bp).to(encoder.norm.weight.device)
    features = (through or encoder)(tokens)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    loss = (features * weights.to(features)).sum() + encoder.auxiliary_loss()
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return {"features": features.detach(), **dict(zip(names, gradients, strict=True))}


def in_bfloat16(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function under autocast."""

    def features(tokens: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(tokens)

    return features


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], *, features: float, gradients: float
) -> None:
    """Within these tolerances, which are relative to a tensor's norm."""
    assert got.keys() == expected.keys()
    norms = {name: float(right.double().norm()) for name, right in expected.items()}
    least = SMALL * max(norm for name, norm in norms.items() if name != "features")
    errors = {}
    for name, right in expected.items():
        assert torch.isfinite(got[name]).all(), name
        error = float((got[name].to(right.device, torch.float64) - right).norm())
        error /= norms[name] if name == "features" else max(norms[name], least)
        if not error < (features if name == "features" else gradients):
            errors[name] = error
    assert not errors


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("case", [*MIXERS, *HYBRIDS])
def test_float32_gives_what_the_cpu_gives_in_float64(case: str) -> None:
    options = {**MIXERS, **HYBRIDS}[case]
    got, expected = run(small(**options).to(DEVICE)), run(small(**options).double())
    assert_close(got, expected, features=1e-4, gradients=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("case", MIXERS)
def test_bfloat16_is_near_float64(case: str) -> None:
    encoder = small(stem=SMOOTH, **MIXERS[case]).to(DEVICE)
    expected = run(small(stem=SMOOTH, **MIXERS[case]).double())
    assert_close(run(encoder, through=in_bfloat16(encoder)), expected, features=2e-2, gradients=5e-2)


STRANDED = [
    TrackHead("plus", "signal", "poisson", "sum", mean=2.0, strand="+", partner="minus"),
    TrackHead("peaks", "peaks", "bce"),
    TrackHead("minus", "signal", "poisson", "sum", mean=2.0, strand="-", partner="plus"),
]


def assert_equivariant(model: AccessibilityModel) -> None:
    """Outputs of the reverse complement are those of the sequence, turned round and with partners exchanged."""
    with torch.no_grad():
        model.heads.output.weight.mul_(20)
    model.to(DEVICE).eval()
    tokens = random_tokens(2, BINS * 8).to(DEVICE)
    for outputs in (model, model.predict):
        with torch.no_grad():
            here, there = outputs(tokens), outputs(reverse_complement(tokens))
        assert here.std() > 0.01 and (here[..., 0] - here[..., 2]).std() > 0.01
        torch.testing.assert_close(model.heads.other_strand(there), here, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_outputs_of_shared_strands_are_those_of_the_reverse_complement(norm: str) -> None:
    encoder = small(pattern=get_args(MixerName), stem=dataclasses.replace(STEM, norm=norm))
    config = ModelConfig(encoder.config, head_hidden=32, reverse_complement="shared")
    model = AccessibilityModel(config, STRANDED, window_bp=BINS * 8, margin_bp=0)
    model.encoder = encoder
    assert_equivariant(model)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("norm", ["batch", "rms"])
@pytest.mark.parametrize("trained", [False, True])
def test_outputs_of_tied_weights_are_those_of_the_reverse_complement(norm: str, trained: bool) -> None:
    torch.manual_seed(0)
    encoder = EncoderConfig(**{**SIZES, "pattern": TIED, "stem": dataclasses.replace(STEM, norm=norm)})
    config = ModelConfig(encoder, head_hidden=32, reverse_complement="parity")
    model = AccessibilityModel(config, STRANDED, window_bp=BINS * 8, margin_bp=0).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3 if trained else 0):
        optimizer.zero_grad()
        model(random_tokens(2, BINS * 8, seed=seed).to(DEVICE)).square().mean().backward()
        optimizer.step()
    assert_equivariant(model)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("case", HYBRIDS)
def test_checkpointing_changes_nothing(case: str) -> None:
    results = [
        run(small(**HYBRIDS[case], dropout=0.2, checkpoint=checkpoint).to(DEVICE))
        for checkpoint in (True, False)
    ]
    assert_close(*results, features=1e-6, gradients=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
def test_the_default_pattern_compiles_to_one_graph() -> None:
    encoder = small(stem=SMOOTH).to(DEVICE)
    assert set(encoder.config.pattern) == set(EncoderConfig().pattern)
    compiled = torch.compile(encoder, fullgraph=True)
    got, expected = (run(encoder, through=in_bfloat16(function)) for function in (compiled, encoder))
    assert_close(got, expected, features=2e-2, gradients=1e-1)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", STREAMED)
@torch.no_grad()
def test_streaming_gives_what_one_pass_gives(case: str, dtype: torch.dtype) -> None:
    stem = dataclasses.replace(STEM, norm="batch")
    encoder = small(stem=stem, **STREAMED[case]).to(DEVICE, dtype).eval()
    tokens = random_tokens(2, 1000 * 8)
    expected = encoder(tokens.to(DEVICE))
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    ways: list[dict[str, Any]] = [
        {"tokens": tokens, "chunk_bp": 150 * 8},
        {"tokens": lambda a, b: tokens[:, a:b], "length": 1000 * 8, "chunk_bp": 301 * 8, "keep": "device"},
    ]
    for way in ways:
        parts = list(encoder.stream(**way))
        bins = way["chunk_bp"] // encoder.bin_bp
        assert [first for first, _ in parts] == list(range(0, expected.shape[1], bins))
        assert all(features.device == expected.device for _, features in parts)
        got = torch.cat([features for _, features in parts], 1)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def peak(function: Callable[[], object]) -> int:
    """Bytes of the device's memory that the function needs at most, beside what is held already."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.xdist_group("memory")
@pytest.mark.usefixtures("exact")
@torch.no_grad()
def test_the_memory_of_streaming_is_that_of_a_chunk() -> None:
    encoder = small(pattern=("mamba2", "attention"), stem=StemConfig()).to(DEVICE).eval()
    tokens = random_tokens(1, 2**22 + 5 * 32)
    found: dict[int, list[Tensor]] = {}

    def streamed(length: int) -> None:
        parts = encoder.stream(tokens[:, :length], chunk_bp=2**17 + 3 * 32)
        found[length] = [features.cpu() for _, features in parts]

    def in_one_pass() -> None:
        found[0] = [encoder(tokens.to(DEVICE)).cpu()]

    streamed(2**18)  # for what libraries keep
    half, whole = (peak(lambda length=length: streamed(length)) for length in (2**21, tokens.shape[1]))
    assert whole < 1.1 * half
    assert whole < peak(in_one_pass) / 8
    torch.testing.assert_close(torch.cat(found[tokens.shape[1]], 1), found[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("copied_on", ["cpu", DEVICE])
def test_a_copy_of_an_lstm_has_its_weights_side_by_side(copied_on: str) -> None:
    """Where they are not, cuDNN gathers them at every call, and warns, which is an error here."""
    encoder = small(pattern=("lstm",)).to(copied_on)
    average = AveragedModel(encoder)
    if copied_on == "cpu":  # as in training
        encoder, average = encoder.to(DEVICE), average.to(DEVICE)
    tokens = random_tokens(2, BINS * 8).to(DEVICE)
    for _ in range(2):
        torch.testing.assert_close(average(tokens), encoder(tokens))
        average.update_parameters(encoder)
