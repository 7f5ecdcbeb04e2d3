"""`reverse_complement: parity`: the plain network with tied weights is exactly equivariant, at the plain one's cost."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genossm import checkpoint
from genossm.models.accessibility import AccessibilityModel, ModelConfig, reverse_complement
from genossm.models.decoder import DecoderConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.parity import Block, PairedBatchNorm, Rule, Tied, plain_name
from genossm.models.stem import StemConfig
from genossm.pipelines.training_module import parameter_groups
from genossm.run_config import TrainConfig
from tests.strand_models import MINUS, PLUS, TRACKS, mirrored, random_tokens, randomised, train_a_little

SMALL = EncoderConfig(
    width=8,
    pattern=("mamba2",),
    stem=StemConfig(channels=(6, 4), pool=(2, 2), first_kernel=7, kernel=3),
    state=4,
    head_dim=4,
    window=3,
    dilations=(1, 2),
    dropout=0.1,
)
PLAIN_STEM = StemConfig(channels=(6, 4), pool=(2, 2), first_kernel=7, kernel=3, norm="rms")
ENCODERS = {
    **{
        name: replace(SMALL, pattern=(name,))
        for name in ("s4", "s4d", "mamba", "mamba2", "hydra", "attention", "conv")
    },
    "h3": replace(SMALL, pattern=("h3",), expand=1, initialisation="legs", discretisation="bilinear"),
    "s4 and s4d with expand": replace(SMALL, pattern=("s4", "s4d"), expand=3),
    "mamba2 tied": replace(SMALL, bidirectional="tied", conv_width=4),
    "odd groups": replace(SMALL, pattern=("mamba2", "hydra"), head_dim=4, expand=3, groups=3),
    "mamba3": replace(SMALL, pattern=("mamba3",)),
    "mamba3 with ranks": replace(SMALL, pattern=("mamba3",), rank=2, groups=2, conv_width=3),
    "full attention": replace(SMALL, pattern=("attention",), window=None),
    "hybrid": replace(SMALL, pattern=("mamba2", "attention"), mlp_ratio=1.7, stem=PLAIN_STEM),
    "experts": replace(SMALL, mlp_ratio=1.5, experts=3, experts_per_token=1, checkpoint=True),
    "decoder": replace(SMALL, decoder=DecoderConfig(bin_bp=1, kernel=3), mlp_ratio=1.0),
    "base": replace(SMALL, pattern=("mamba2", "mamba"), stem=StemConfig(kind="base")),
}
Sharing = Literal["none", "augment", "shared", "parity"]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def made(encoder: EncoderConfig, sharing: Sharing = "parity", seed: int = 0) -> AccessibilityModel:
    """A float64 model in evaluation mode as it is at first."""
    torch.manual_seed(seed)
    config = ModelConfig(encoder, head_hidden=6, reverse_complement=sharing)
    return AccessibilityModel(config, TRACKS, window_bp=64, margin_bp=16).double().eval()


@torch.no_grad()
def assert_equivariant(model: AccessibilityModel) -> None:
    with_a_gap = random_tokens(2, 52)
    with_a_gap[:, 8:45] = 4
    for tokens in (random_tokens(2, 52), with_a_gap, random_tokens(1, 4)):
        other = reverse_complement(tokens)
        raw = model(tokens)
        assert raw.dtype == torch.float64
        close(model(other), mirrored(raw))
        close(model.predict(other), mirrored(model.predict(tokens)))
        if raw.shape[1] > 4:  # what would be equivariant for nothing
            assert (raw[..., PLUS] - raw[..., MINUS]).abs().max() > 1e-4
            assert (raw - raw.flip(1)).abs().amax((0, 1)).min() > 1e-4


@torch.no_grad()
def assert_streams(model: AccessibilityModel) -> None:
    tokens = random_tokens(2, 52, seed=5)
    whole = model.encoder(tokens)
    for chunk_bp in (4, 20):
        close(torch.cat([part for _, part in model.encoder.stream(tokens, chunk_bp=chunk_bp)], 1), whole)


@pytest.mark.parametrize("name", ENCODERS)
def test_equivariant_and_streams_with_random_weights_and_after_training(name: str) -> None:
    model = randomised(made(ENCODERS[name]))
    assert model.equivariant and model.strands == "equivariant"
    assert_equivariant(model)
    before = [parameter.clone() for parameter in model.parameters()]
    average = train_a_little(model)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    for trained in (model, average):
        assert_equivariant(trained)
        if name != "full attention":
            assert_streams(trained)


@pytest.mark.parametrize("name", ["hybrid", "decoder", "conv"])
def test_every_module_mirrors_its_features_in_training_mode_too(name: str) -> None:
    model = randomised(made(replace(ENCODERS[name], dropout=0.0))).train()
    seen: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any, *, of: str) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        seen[-1] |= {f"{of} {number}": part.detach() for number, part in enumerate(outputs)}

    for path, module in model.encoder.named_modules():
        parts = path.split(".")
        if parts[0] in ("stem", "decoder") or parts[-1] in ("mixer", "mlp", "mixer_norm", "norm"):
            if path not in ("stem", "decoder") and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                if not isinstance(module, nn.Conv1d):  # which hold weights, and are not called
                    module.register_forward_hook(partial(keep, of=path))
    tokens = random_tokens(2, 52)
    for strand in (tokens, reverse_complement(tokens)):
        seen.append({})
        model(strand)
    first, second = seen
    assert first.keys() == second.keys() and {"stem.stages.0.conv 0", "layers.0.mixer 0"} <= first.keys()
    for path, output in first.items():
        close(second[path], output.flip(1, 2), msg=lambda text, path=path: f"{path}: {text}")
        assert output.shape[1] == 1 or (output - output.flip(1, 2)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ENCODERS)
def test_it_is_the_plain_network_with_the_whole_weights(name: str) -> None:
    """Same features; gradients by Euler's rule, as the whole is linear in the half; and half as many parameters."""
    plain, tied = made(ENCODERS[name], "none", seed=1), randomised(made(ENCODERS[name]))
    wholes = {}
    for path, module in tied.encoder.named_modules():
        if isinstance(module, PairedBatchNorm):
            for key, half in module.state_dict().items():
                wholes[f"{path}.{key}"] = torch.cat([half, half.flip(0)]) if half.dim() else half
        elif hasattr(module, "parametrizations"):
            for key in module.parametrizations:
                wholes[f"{path}.{key}"] = getattr(module, key).detach()
    plain.encoder.load_state_dict(wholes)
    tokens = random_tokens(2, 52)
    features = tied.encoder(tokens)
    close(features, plain.encoder(tokens))
    weights = torch.randn_like(features)
    for model in (plain, tied):
        (model.encoder(tokens) * weights).sum().backward()
    of_plain = dict(plain.encoder.named_parameters())
    for stored_name, half in tied.encoder.named_parameters():
        whole = of_plain.pop(plain_name(stored_name))
        assert 2 * half.numel() == whole.numel() and half.dim() == whole.dim()
        close((half.grad * half).sum(), (whole.grad * whole).sum(), rtol=1e-8, atol=1e-9)
    assert not of_plain


@pytest.mark.parametrize("name", ["hybrid", "mamba2 tied", "mamba", "mamba3 with ranks", "h3", "base"])
def test_it_starts_with_weights_of_the_plain_network(name: str) -> None:
    plain, tied = (made(ENCODERS[name], sharing).encoder for sharing in ("none", "parity"))
    for path, module in tied.named_modules():
        for key in getattr(module, "parametrizations", ()):
            whole, first = getattr(module, key), getattr(plain.get_submodule(path), key)
            assert (whole == first).double().mean() >= 0.5
            matrix = "projection" in path
            assert not matrix or 0.6 < whole.std() / first.std() < 1.5


@pytest.mark.parametrize("name", ["mamba2 tied", "hybrid", "mamba3 with ranks", "experts", "decoder"])
def test_parameters_are_grouped_as_the_plain_networks(name: str) -> None:
    grouped = []
    for sharing in ("none", "parity"):
        model = made(ENCODERS[name], sharing)
        names = {id(parameter): plain_name(path) for path, parameter in model.named_parameters()}
        groups = parameter_groups(model, TrainConfig())
        grouped.append([{names[id(parameter)] for parameter in group["params"]} for group in groups])
    assert grouped[0] == grouped[1] and len(grouped[0]) == 3


def test_a_copy_in_the_middle_of_training_and_a_saved_model_are_the_same(tmp_path: Path) -> None:
    model = randomised(made(ENCODERS["experts"])).train()
    tokens = random_tokens(2, 64)
    model(tokens).sum().backward()
    assert model.encoder.auxiliary_loss() > 0
    copied = copy.deepcopy(model).eval()
    expected = model.eval()(tokens)
    close(copied(tokens), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    close(model(tokens), expected)
    checkpoint.save(model, tmp_path / checkpoint.MODEL_FILE)
    loaded = checkpoint.load(tmp_path)
    assert loaded.strands == "equivariant" and loaded.config == model.config
    torch.testing.assert_close(loaded.double()(tokens), expected, rtol=1e-5, atol=1e-5)


def test_the_graph_is_whole_and_prediction_reads_one_strand_once() -> None:
    model = randomised(made(replace(ENCODERS["hybrid"], stem=SMALL.stem)))
    tokens = random_tokens(2, 52)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(tokens), model(tokens))
    seen: list[int] = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with torch.inference_mode():
        values = model.predict(tokens)
        close(values, model.heads.values(model(tokens)))
    assert seen == [2, 2] and values.shape == (2, 13, 4)


def test_autocast() -> None:
    model = randomised(made(ENCODERS["hybrid"])).float()
    tokens = random_tokens(2, 52)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(tokens)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, model(tokens), rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    "encoder",
    [
        EncoderConfig(width=64, pattern=("mamba2", "mamba2"), head_dim=32, mlp_ratio=2.0),
        EncoderConfig(width=64, pattern=("mamba2", "attention"), head_dim=32, window=32),
        EncoderConfig(width=64, pattern=("mamba2",) * 2, head_dim=32, decoder=DecoderConfig(bin_bp=8)),
    ],
)
def test_it_costs_what_the_plain_network_costs(encoder: EncoderConfig) -> None:
    counted = {}
    for sharing in ("none", "parity", "shared"):
        config = ModelConfig(encoder, head_hidden=64, reverse_complement=sharing)
        model = AccessibilityModel(config, TRACKS, window_bp=64, margin_bp=16).eval()
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.predict(random_tokens(1, 4096))
        counted[sharing] = counter.get_total_flops()
    assert counted["none"] < counted["parity"] < 1.1 * counted["none"]
    assert counted["shared"] == 2 * counted["none"]


def test_paired_batch_norm_takes_a_channel_and_its_mirror_image_together() -> None:
    torch.manual_seed(0)
    norm, x = PairedBatchNorm(4).double(), torch.randn(3, 5, 4, dtype=torch.float64) * 2 + 1
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    expected = torch.empty_like(x)
    for channel, (weight, bias) in enumerate(zip(norm.weight, norm.bias, strict=True)):
        for of_pair in (channel, 3 - channel):
            pair = torch.stack([x[..., channel], x[..., 3 - channel]])
            z = (x[..., of_pair] - pair.mean()) / (pair.var(correction=0) + norm.eps).sqrt()
            expected[..., of_pair] = F.gelu(z * weight + bias)
    close(norm(x), expected)
    pairs = torch.stack([x[..., :2], x[..., 2:].flip(2)])
    close(norm.running_mean, 0.1 * pairs.mean((0, 1, 2)))
    close(norm.running_var, 0.9 + 0.1 * pairs.flatten(0, 2).var(0))
    norm.eval()
    mean, variance = (torch.cat([half, half.flip(0)]) for half in (norm.running_mean, norm.running_var))
    weight, bias = (torch.cat([half, half.flip(0)]) for half in (norm.weight, norm.bias))
    close(norm(x), F.gelu((x - mean) / (variance + norm.eps).sqrt() * weight + bias))


def test_a_tied_parameter_is_its_own_mirror_image() -> None:
    rule = Rule((Block((4,)), Block((2, 3), (0,)), Block((3, 2), (1,))), axis=1, kept=(2,))
    tied = Tied((3, 16, 2), rule)
    whole = tied(tied.right_inverse(torch.randn(3, 16, 2)))
    order = [3, 2, 1, 0, *(4 + i for i in (3, 4, 5, 0, 1, 2)), *(10 + i for i in (1, 0, 3, 2, 5, 4))]
    assert torch.equal(whole, whole.flip(0)[:, order]) and len(whole.unique()) == whole.numel() // 2
    assert torch.equal(tied(tied.right_inverse(whole)), whole)
    with pytest.raises(
        ValueError, match=r"has the shape \(3, 5\), of which no axis that is turned round is even"
    ):
        Tied((3, 5), Rule())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": ("mamba2", "lstm")}, "the pattern has lstm, whose weights cannot be tied; .* 'shared'"),
        (
            {"pattern": ("hyena",)},
            "the pattern has hyena, .*choose from s4, s4d",
        ),
        ({"pattern": ("mamba",), "bidirectional": "tied"}, "mamba with bidirectional 'tied'.*choose 'fused'"),
        ({"conv_width": 4}, "conv_width 4; it must be odd"),
        ({"width": 7, "pattern": ("conv",)}, "width is 7; it must be even"),
        ({"stem": replace(SMALL.stem, channels=(6, 5))}, r"stem's channels \(6, 5\) is 5; it must be even"),
        ({"head_dim": 16}, "number of heads, expand \\* width / head_dim, is 1; it must be even"),
        ({"state": 3}, r"groups \* state is 3; it must be even"),
        ({"pattern": ("mamba3",), "state": 2}, "state / 2 of mamba3 is 1; it must be even"),
    ],
)
def test_what_cannot_be_tied_is_refused(options: dict[str, Any], words: str) -> None:
    encoder = replace(SMALL, **options)
    with pytest.raises(ValueError, match=f"reverse_complement is 'parity', and .*{words}"):
        ModelConfig(encoder, reverse_complement="parity")
    ModelConfig(encoder, reverse_complement="shared")
