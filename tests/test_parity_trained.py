"""Tied weights module by module: each mirrors features of its own to 1e-10, with random weights and after training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genossm.models.accessibility import AccessibilityModel, reverse_complement
from genossm.models.encoder import EncoderConfig, Layer
from genossm.models.mlp import GatedMLP, MixtureOfExperts
from genossm.models.norm import GatedRMSNorm, RMSNorm
from genossm.models.parity import TIED, PairedBatchNorm
from genossm.models.stem import BaseStem, ConvStem, NormGeluConv, RMSNormGelu
from tests.strand_models import MINUS, PLUS, random_tokens, randomised, train_a_little
from tests.test_parity import ENCODERS, PLAIN_STEM, SMALL, close, made
from tests.test_parity import mirrored as mirrored_outputs

CASES: dict[str, EncoderConfig] = {
    **ENCODERS,
    "decoder, rms": replace(ENCODERS["decoder"], stem=PLAIN_STEM),
    "two experts": replace(SMALL, mlp_ratio=1.5, experts=3, experts_per_token=2, stem=PLAIN_STEM),
}
"""Dropout is left out, which draws for each position by itself."""
NAMES = ("mixer", "mlp", "mixer_norm", "mlp_norm", "norm")
"""What stands between features, all of whose channels are turned round as a whole; within mixers, blocks of them are."""


def mirrored(value: Any) -> Any:
    """Tokens, features (batch, length, channels) or what holds them, as they are on the other strand."""
    if isinstance(value, Tensor):
        return value.flip(1, 2) if value.is_floating_point() else reverse_complement(value)
    if isinstance(value, dict):
        return {key: mirrored(part) for key, part in value.items()}
    return tuple(mirrored(part) for part in value)


def random_like(value: Any) -> Any:
    """Other features of the same shapes; tokens stay."""
    if isinstance(value, Tensor):
        return torch.randn_like(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: random_like(part) for key, part in value.items()}
    return tuple(random_like(part) for part in value)


def called_modules(model: AccessibilityModel, tokens: Tensor) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """The encoder's modules from features to features by their paths, each with the inputs that it has for the tokens."""
    found: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {"stem": (model.encoder.stem, (tokens,))}

    def note(module: nn.Module, inputs: tuple[Any, ...], *, path: str) -> None:
        found[path] = module, inputs

    hooks = []
    for path, module in model.encoder.named_modules():
        if "parametrizations" in path.split("."):
            continue  # from halves of weights to the whole ones
        inside = path.startswith(("stem.", "decoder"))
        if inside or path.split(".")[-1] in NAMES or isinstance(module, Layer):
            hooks.append(module.register_forward_pre_hook(partial(note, path=path)))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def assert_mirrors(path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    outputs = []
    for given in (inputs, mirrored(inputs)):
        output = module(*given)
        outputs.append(output if isinstance(output, tuple) else (output,))
    for here, there in zip(*outputs, strict=True):
        assert here.dtype == torch.float64
        close(there, here.flip(1, 2), msg=lambda text: f"{path}: {text}")
        # what would be equivariant for nothing
        assert (here - here.flip(1, 2)).abs().max() > 1e-4, path


@torch.no_grad()
def assert_experts_are_used_alike(experts: MixtureOfExperts, inputs: tuple[Any, ...]) -> None:
    losses = []
    for given in (inputs, mirrored(inputs)):
        experts(*given)
        losses.append(experts.balance_loss)
    assert losses[0] > 0
    close(losses[0], losses[1])


@torch.no_grad()
def assert_heads_swap_strands(model: AccessibilityModel) -> None:
    """The heads' own reading of both strands of features, and what is made of it."""
    x = torch.randn(2, 13, model.config.encoder.width, dtype=torch.float64)

    def read(x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        own, other = model.heads(torch.cat([x_BLD, mirrored(x_BLD)])).tensor_split(2)
        return own, (own + model.heads.other_strand(other)) / 2

    (own, here), (of_mirrored, there) = read(x), read(mirrored(x))
    close(there, mirrored_outputs(here))
    close(model.heads.values(there), mirrored_outputs(model.heads.values(here)))
    assert (
        of_mirrored - mirrored_outputs(own)
    ).abs().max() > 1e-4  # by reading both strands, not by their weights
    assert (here[..., PLUS] - here[..., MINUS]).abs().max() > 1e-4


def assert_every_module_mirrors(model: AccessibilityModel) -> None:
    """In both modes."""
    tokens = random_tokens(2, 52)
    for training in (False, True):
        model.train(training)
        for path, (module, inputs) in called_modules(model, tokens).items():
            torch.manual_seed(len(path))
            given = random_like(inputs)
            assert_mirrors(path, module, given)
            if training and isinstance(module, MixtureOfExperts):
                assert_experts_are_used_alike(module, given)
        assert_heads_swap_strands(model)


@pytest.mark.parametrize("name", CASES)
def test_every_module_mirrors_its_features_with_random_weights_and_after_training(name: str) -> None:
    model = randomised(made(replace(CASES[name], dropout=0.0)))
    assert_every_module_mirrors(model)
    before = [parameter.clone() for parameter in model.parameters()]
    average = train_a_little(model)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    for trained in (model, average):
        assert_every_module_mirrors(trained)


def test_the_cases_have_every_module_that_can_be_tied() -> None:
    assert {mixer for case in CASES.values() for mixer in case.pattern} == {*TIED}
    kinds: set[type] = set()
    for case in CASES.values():
        for module, _ in called_modules(made(case), random_tokens(2, 52)).values():
            kinds |= {*type(module).__mro__}  # a module of tied weights is of a class of its own
    stems = {ConvStem, BaseStem, NormGeluConv, PairedBatchNorm, RMSNormGelu}
    assert kinds >= stems | {RMSNorm, GatedRMSNorm, GatedMLP, MixtureOfExperts, Layer}
