"""The accessibility model: what it predicts, and that `shared` is exactly equivariant, whatever the mixer and weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genossm import checkpoint
from genossm.models.accessibility import AccessibilityModel, ModelConfig, reverse_complement
from genossm.models.decoder import DecoderConfig
from genossm.models.encoder import EncoderConfig, MixerName
from genossm.models.stem import StemConfig
from tests.strand_models import MINUS, PLUS, TRACKS, mirrored, random_tokens, randomised, train_a_little

SMALL = EncoderConfig(
    width=8,
    pattern=("mamba2",),
    stem=StemConfig(channels=(6, 6), pool=(2, 2), first_kernel=7, kernel=3),
    state=4,
    head_dim=4,
    window=3,
    dilations=(1, 2),
    filter_bins=6,
    dropout=0.1,
)
ENCODERS = {
    **{name: replace(SMALL, pattern=(name,)) for name in get_args(MixerName)},
    "tied": replace(SMALL, pattern=("mamba", "mamba2"), bidirectional="tied"),
    "hybrid with experts": replace(
        SMALL, pattern=("mamba2", "attention"), window=None, mlp_ratio=1.5, experts=3, checkpoint=True
    ),
    "decoder": replace(SMALL, decoder=DecoderConfig(bin_bp=1, kernel=3), mlp_ratio=1.0),
    "base": replace(SMALL, stem=StemConfig(kind="base"), conv_width=4),
    "rms": replace(SMALL, stem=replace(SMALL.stem, norm="rms")),
}
LENGTHS = (52, 4)
Sharing = Literal["none", "augment", "shared"]


def made(encoder: EncoderConfig, sharing: Sharing = "shared", seed: int = 0) -> AccessibilityModel:
    """A float64 model in evaluation mode; every weight and running statistic is random, none is 0 or 1."""
    torch.manual_seed(seed)
    config = ModelConfig(encoder, head_hidden=6, reverse_complement=sharing)
    return randomised(AccessibilityModel(config, TRACKS, window_bp=64, margin_bp=16).double().eval())


def assert_equivariant(model: AccessibilityModel) -> None:
    for length in LENGTHS:
        tokens = random_tokens(2, length)
        other = reverse_complement(tokens)
        raw = model(tokens).detach()
        assert raw.dtype == torch.float64
        torch.testing.assert_close(model(other), mirrored(raw), rtol=1e-10, atol=1e-10)
        values = model.predict(tokens)
        torch.testing.assert_close(model.predict(other), mirrored(values), rtol=1e-10, atol=1e-10)
        if raw.shape[1] > 1:  # what would be equivariant for nothing
            assert (raw[..., PLUS] - raw[..., MINUS]).abs().max() > 1e-3
            assert (raw - raw.flip(1)).abs().amax((0, 1)).min() > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
def test_shared_is_equivariant_with_random_weights_and_after_training(name: str) -> None:
    model = made(ENCODERS[name])
    assert_equivariant(model)
    before = [parameter.clone() for parameter in model.parameters()]
    average = train_a_little(model)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert_equivariant(model)
    assert_equivariant(average)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_module_keeps_the_strands_apart(name: str) -> None:
    """Each module of the encoder gives, on the other strand, what it gave with the halves of the batch swapped."""
    model = made(ENCODERS[name])
    tokens = random_tokens(2, 52)
    seen: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any, *, of: str) -> None:
        if isinstance(output, Tensor):
            seen[-1][of] = output.detach()

    for path, module in model.encoder.named_modules():
        # experts route positions one by one, without a batch axis
        if "router" not in path:
            module.register_forward_hook(partial(keep, of=path))
    for strand in (tokens, reverse_complement(tokens)):
        seen.append({})
        model(strand)
    first, second = seen
    assert first.keys() == second.keys() and {"", "layers.0.mixer"} <= first.keys()
    for path, output in first.items():
        own, other = output.chunk(2)
        torch.testing.assert_close(second[path], torch.cat([other, own]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mamba2", "hybrid with experts", "decoder"])
def test_shared_is_the_mean_of_two_passes_of_the_plain_network(name: str) -> None:
    """Equivariance alone would not tell if the strands' halves or the partners were taken for one another."""
    plain, shared = made(ENCODERS[name], "none"), made(ENCODERS[name])
    tokens = random_tokens(3, 52)
    with torch.no_grad():
        expected = (plain(tokens) + mirrored(plain(reverse_complement(tokens)))) / 2
    torch.testing.assert_close(shared(tokens), expected, rtol=1e-10, atol=1e-10)
    assert (plain(reverse_complement(tokens)) - mirrored(plain(tokens))).abs().max() > 1e-2


def test_the_weights_hold_any_pair_of_one_strand_each() -> None:
    """y+ = g(x) and y- = S g(Rx): twice g in the row of plus, nothing in that of minus."""
    shared, plain = made(SMALL), made(SMALL, "none")
    with torch.no_grad():
        for part in (shared.heads.output.weight, shared.heads.output.bias):
            part[MINUS], part[PLUS] = 0, 2 * part[PLUS]
    tokens = random_tokens(2, 52)
    outputs = shared(tokens)
    torch.testing.assert_close(outputs[..., PLUS], plain(tokens)[..., PLUS], rtol=1e-10, atol=1e-10)
    of_other = plain(reverse_complement(tokens))[..., PLUS].flip(1)
    torch.testing.assert_close(outputs[..., MINUS], of_other, rtol=1e-10, atol=1e-10)


def test_windows_of_a_batch_do_not_touch_and_the_graph_is_whole() -> None:
    model = made(ENCODERS["conv"])
    tokens = random_tokens(3, 52)
    together = model(tokens)
    torch.testing.assert_close(model(tokens[1:2]), together[1:2], rtol=1e-10, atol=1e-10)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), together, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sharing", "batches", "strands"),
    [("none", [2], "forward"), ("augment", [2, 2], "averaged"), ("shared", [4], "equivariant")],
)
def test_predictions_read_the_strands_that_they_need_once(
    sharing: Sharing, batches: list[int], strands: str
) -> None:
    model = made(SMALL, sharing).float()
    tokens = random_tokens(2, 52)
    seen: list[int] = []
    handle = model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    values = model.predict(tokens)
    handle.remove()
    assert (seen, model.strands, model.equivariant) == (batches, strands, sharing == "shared")
    assert values.shape == (2, 13, 4) and values.dtype == torch.float32
    assert ((values[..., 0] > 0) & (values[..., 0] < 1)).all() and (values[..., 1] > 0).all()
    with torch.no_grad():
        expected = model.heads.values(model(tokens))
        if sharing == "augment":
            other = mirrored(model.heads.values(model(reverse_complement(tokens))))
            assert not torch.allclose(expected, other)
            expected = (expected + other) / 2
    torch.testing.assert_close(values, expected)


def test_averaged_predictions_of_the_other_strand_are_mirrored() -> None:
    model = made(SMALL, "augment")
    tokens = random_tokens(1, 52)
    values = model.predict(tokens)
    torch.testing.assert_close(
        model.predict(reverse_complement(tokens)), mirrored(values), rtol=1e-10, atol=1e-10
    )


def test_reverse_complement_of_tokens() -> None:
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0]], dtype=torch.int8)
    assert reverse_complement(tokens).tolist() == [[3, 4, 0, 1, 2, 3]]


def test_a_shared_model_comes_back_from_disk_and_one_of_before_it_existed_is_augmented(
    tmp_path: Path,
) -> None:
    file = tmp_path / checkpoint.MODEL_FILE
    model = made(SMALL)
    tokens = random_tokens(1, 64)
    checkpoint.save(model, file)
    loaded = checkpoint.load(file)
    assert loaded.equivariant and loaded.tracks == TRACKS
    torch.testing.assert_close(loaded.double()(tokens), model(tokens), rtol=1e-5, atol=1e-5)

    with safe_open(file, framework="pt") as stored:
        description = json.loads(stored.metadata()["genossm"])
        weights = {name: stored.get_tensor(name) for name in stored.keys()}
    del description["model"]["reverse_complement"]
    for track in description["tracks"]:
        del track["strand"], track["partner"]
    save_file(weights, file, {"format": checkpoint.FORMAT, "genossm": json.dumps(description)})
    old = checkpoint.load(file)
    assert not old.equivariant and old.config.reverse_complement == "augment"
    assert all((track.strand, track.partner) == (".", None) for track in old.tracks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"reverse_complement": "both"},
            "reverse_complement is 'both'; allowed are 'none', 'augment', 'shared' and",
        ),
        ({"head_hidden": 0}, "head_hidden is 0; it must be at least 1"),
    ],
)
def test_an_impossible_model_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(SMALL, **options)
