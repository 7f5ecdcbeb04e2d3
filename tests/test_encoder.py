"""The encoder: its forms agree with each other, every pattern trains, its numbers are true, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from genossm.config import build as build_config
from genossm.config import to_mapping
from genossm.models.decoder import DecoderConfig
from genossm.models.encoder import Encoder, EncoderConfig, MixerName
from genossm.models.mixers.build import FIELDS, MIXERS, OWN_DEFAULT, build_mixer
from genossm.models.mixers.s4d import S4D
from genossm.models.mlp import GatedMLP, MixtureOfExperts
from genossm.models.stem import StemConfig

MIXER_NAMES: tuple[MixerName, ...] = get_args(MixerName)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
SIZES: dict[str, Any] = {
    "width": 8,
    "pattern": ("mamba2", "mamba2"),
    "stem": StemConfig(channels=(5, 6), pool=(2, 4), first_kernel=7, kernel=3),
    "state": 4,
    "head_dim": 4,
    "window": 3,
    "dilations": (1, 3),
    "filter_bins": 5,
    "dropout": 0.0,
}


def small(**options: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**{**SIZES, **options}))


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 5, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


# Two ways to the same numbers. Each way gives the features of tokens.


def in_one_pass(encoder: Encoder, tokens: Tensor) -> Tensor:
    encoder.config = dataclasses.replace(encoder.config, checkpoint=False)
    torch.manual_seed(1)  # the same dropout
    features: Tensor = encoder(tokens)
    return features


def checkpointed(encoder: Encoder, tokens: Tensor) -> Tensor:
    encoder.config = dataclasses.replace(encoder.config, checkpoint=True)
    torch.manual_seed(1)
    features: Tensor = encoder(tokens)
    return features


def compiled(encoder: Encoder, tokens: Tensor) -> Tensor:
    torch._dynamo.reset()
    torch.manual_seed(1)
    features: Tensor = torch.compile(encoder, backend="eager", fullgraph=True)(tokens)
    return features


def streamed(encoder: Encoder, tokens: Tensor) -> Tensor:
    return torch.cat([part for _, part in encoder.stream(tokens, chunk_bp=7 * encoder.trunk_bp)], 1)


def bin_by_bin(encoder: Encoder, tokens: Tensor) -> Tensor:
    """A convolution's and a scan's recurrence: each chunk is one position."""
    return torch.cat([part for _, part in encoder.stream(tokens, chunk_bp=encoder.trunk_bp)], 1)


def each_sequence_alone(encoder: Encoder, tokens: Tensor) -> Tensor:
    return torch.cat([encoder(row) for row in tokens.split(1)])


PATTERNS: dict[str, dict[str, Any]] = {
    "mamba2": {"pattern": ("mamba2", "mamba2")},
    "mamba2, tied": {"pattern": ("mamba2",), "bidirectional": "tied"},
    "hybrid": {"pattern": ("s4d", "attention", "hydra", "conv"), "mlp_ratio": 2.0},
    "experts": {"pattern": ("lstm", "hyena"), "mlp_ratio": 1.0, "experts": 4},
    "decoder": {"pattern": ("mamba3", "h3"), "decoder": DecoderConfig(1, kernel=3)},
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("way", [streamed, bin_by_bin, each_sequence_alone])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_other_ways_to_run_it_give_the_same(
    pattern: str, way: Callable[[Encoder, Tensor], Tensor], dtype: torch.dtype
) -> None:
    encoder = small(**PATTERNS[pattern]).to(dtype).eval()
    tokens = random_tokens(2, 31 * 8)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        way(encoder, tokens), in_one_pass(encoder, tokens), rtol=tolerance, atol=tolerance
    )


# torch 2.13's compiler instantiates an autograd function, of which it warns itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "way"),
    [*((pattern, checkpointed) for pattern in PATTERNS), ("mamba2", compiled), ("hybrid", compiled)],
)
def test_other_ways_to_train_it_give_the_same(
    pattern: str, way: Callable[[Encoder, Tensor], Tensor], dtype: torch.dtype
) -> None:
    dropout = 0.0 if way is compiled else 0.2  # the random numbers of a graph are its own
    encoder = small(dropout=dropout, **PATTERNS[pattern]).to(dtype)
    tokens = random_tokens(2, 150 * 8)
    results = []
    for run in (in_one_pass, way):
        features = run(encoder, tokens)
        loss = features.square().mean() + encoder.auxiliary_loss()
        results.append([features, *torch.autograd.grad(loss, list(encoder.parameters()))])
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def test_checkpointing_computes_layers_again_and_keeps_only_what_enters_them() -> None:
    saved: dict[bool, int] = {}
    for checkpoint in (False, True):
        encoder = small(checkpoint=checkpoint, stem=StemConfig(kind="base"))
        runs = [0]
        for mixer in encoder.mixers():
            mixer.register_forward_pre_hook(lambda *_, runs=runs: runs.__setitem__(0, runs[0] + 1))
        kept = [0]

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = encoder(random_tokens(1, 64))
        saved[checkpoint] = kept[0]
        features.sum().backward()
        assert runs[0] == 2 * (1 + checkpoint)
    assert saved[True] < saved[False] / 4


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_every_mixer_trains_all_its_parameters_in_float32_and_in_bfloat16(name: MixerName) -> None:
    # one dilation: the norms between several, of which torch warns in bfloat16, are the mixer's own affair
    encoder = small(pattern=(name, name), mlp_ratio=1.0)
    tokens = random_tokens(3, 256)
    expected = encoder(tokens)
    assert expected.shape == (3, 32, 8) and expected.dtype == torch.float32
    expected.square().mean().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(tokens)
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()
    got.float().square().mean().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_it_is_stem_layers_and_norm_as_written_out() -> None:
    encoder = small(pattern=("conv", "attention"), mlp_ratio=1.5).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def normed(x: Tensor, name: str) -> Tensor:
        weight = encoder.get_parameter(f"{name}.weight")
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    tokens = random_tokens(2, 72)
    x = encoder.stem(tokens)
    for index, mixer in enumerate(encoder.mixers()):
        x = x + mixer(normed(x, f"layers.{index}.mixer_norm"))
        x = x + encoder.get_submodule(f"layers.{index}.mlp")(normed(x, f"layers.{index}.mlp_norm"))
    torch.testing.assert_close(encoder(tokens), normed(x, "norm"), rtol=1e-10, atol=1e-10)


def seen_by(encoder: Encoder, bin_index: int, length: int) -> tuple[int, int]:
    """The first and last token that the output bin depends on, by changing one at a time."""
    seen = torch.zeros(length, dtype=torch.bool)
    with torch.no_grad():
        for seed in range(3):
            tokens = random_tokens(1, length, seed=seed)
            moved = tokens.repeat(length, 1)
            moved[range(length), range(length)] = (moved[range(length), range(length)] + 1) % 4
            change = encoder(moved)[:, bin_index] - encoder(tokens)[:, bin_index]
            seen |= change.abs().amax(1) > 1e-14
    positions = seen.nonzero().flatten()
    return int(positions.min()), int(positions.max())


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": ("conv",)},
        {"pattern": ("conv", "attention"), "dilations": (1, 2)},
        {"pattern": ("hyena",), "filter_bins": 3, "conv_width": 2},
        {"pattern": ("attention",), "stem": StemConfig(kind="base")},
    ],
)
def test_the_receptive_field_is_what_a_bin_depends_on(options: dict[str, Any]) -> None:
    encoder = small(**{"kernel": 3, **options}).double().eval()
    field = encoder.receptive_field_bp
    assert field is not None
    bins = -(-field // encoder.bin_bp) + 4
    first, last = seen_by(encoder, bins // 2, bins * encoder.bin_bp)
    assert last + 1 - first == field


@pytest.mark.parametrize("bin_bp", [1, 2])
def test_with_a_decoder_no_bin_depends_on_more_than_the_receptive_field(bin_bp: int) -> None:
    encoder = small(pattern=("attention",), decoder=DecoderConfig(bin_bp, kernel=3)).double().eval()
    field = encoder.receptive_field_bp
    assert field is not None
    middle = 12 * 8 // bin_bp
    sizes = []
    for output in range(middle, middle + 8 // bin_bp):
        first, last = seen_by(encoder, output, 25 * 8)
        sizes.append(last + 1 - first)
    assert field - 16 <= max(sizes) <= field


def test_recurrences_and_full_attention_have_no_receptive_field() -> None:
    for name in set(MIXER_NAMES) - {"conv", "hyena", "attention"}:
        assert small(pattern=("conv", name)).receptive_field_bp is None, name
    assert small(pattern=("conv", "attention"), window=None).receptive_field_bp is None


def test_a_decoder_gives_finer_bins_of_the_same_width() -> None:
    encoder = small(decoder=DecoderConfig(2))
    assert (encoder.trunk_bp, encoder.bin_bp) == (8, 2)
    assert encoder(random_tokens(2, 64)).shape == (2, 32, 8)
    encoder(random_tokens(2, 64)).square().mean().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_auxiliary_loss_is_the_weighted_balance_of_the_last_training_forward() -> None:
    encoder = small(mlp_ratio=1.0, experts=3, balance_weight=0.5)
    encoder(random_tokens(2, 64))
    mixtures = [module for module in encoder.modules() if isinstance(module, MixtureOfExperts)]
    assert len(mixtures) == 2 and all(mixture.balance_loss > 0 for mixture in mixtures)
    expected = 0.5 * (mixtures[0].balance_loss + mixtures[1].balance_loss)
    torch.testing.assert_close(encoder.auxiliary_loss(), expected)
    assert copy.deepcopy(encoder).auxiliary_loss() == 0
    encoder.eval()(random_tokens(2, 64))
    assert encoder.auxiliary_loss() == 0
    plain = small(mlp_ratio=1.0)
    plain(random_tokens(1, 64))
    assert plain.auxiliary_loss() == 0 and plain.auxiliary_loss().shape == ()
    assert isinstance(plain.get_submodule("layers.0.mlp"), GatedMLP)


def test_state_parameters_are_named_in_full() -> None:
    encoder = small(pattern=MIXER_NAMES)
    names = encoder.state_parameter_names()
    assert names <= {name for name, _ in encoder.named_parameters()}
    index = MIXER_NAMES.index("mamba2")
    own = {name for name in names if name.startswith(f"layers.{index}.")}
    assert own == {f"layers.{index}.mixer.{name}" for name in ("A_log", "dt_bias", "D")}
    assert f"layers.{MIXER_NAMES.index('s4d')}.mixer.ssm.log_dt" in names
    assert {name.split(".")[1] for name in names} == {
        str(index) for index, name in enumerate(MIXER_NAMES) if name not in ("conv", "lstm")
    }


def test_stored_weights_keep_their_names() -> None:
    described = {  # what a run of the format genossm-model/2 holds
        "width": 8,
        "pattern": ["mamba2"],
        "stem": {"channels": [5], "pool": [4], "first_kernel": 3, "kernel": 3, "norm": "batch"},
        "state": 4,
        "head_dim": 4,
        "expand": 2,
        "groups": 1,
        "conv_width": 5,
        "mlp_ratio": 1.0,
        "dropout": 0.1,
    }
    encoder = Encoder(build_config(EncoderConfig, described, where="run"))
    assert set(encoder.state_dict()) == {
        "stem.first.weight",
        *(
            f"stem.stages.0.{block}.{name}"
            for block in ("conv", "pointwise")
            for name in (
                *(
                    f"norm.{n}"
                    for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
                ),
                "conv.weight",
            )
        ),
        "layers.0.mixer_norm.weight",
        *(f"layers.0.mixer.{n}" for n in ("in_projection.weight", "conv_weight", "conv_bias", "norm.weight")),
        *(f"layers.0.mixer.{n}" for n in ("A_log", "dt_bias", "D", "out_projection.weight")),
        "layers.0.mlp.up.weight",
        "layers.0.mlp.down.weight",
        "layers.0.mlp_norm.weight",
        "norm.weight",
    }


def test_a_configuration_survives_yaml() -> None:
    config = EncoderConfig(
        pattern=("s4d", "attention"), window=None, decoder=DecoderConfig(4), stem=StemConfig(norm="rms")
    )
    assert build_config(EncoderConfig, to_mapping(config), where="test") == config


# What the builder hands to the mixers.


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_a_mixer_takes_the_fields_that_are_said(name: MixerName) -> None:
    parameters = inspect.signature(MIXERS[name]).parameters
    fields = {field.name: field.default for field in dataclasses.fields(EncoderConfig)}
    assert set(FIELDS[name]) == set(parameters) & set(fields) - {"width"}
    assert all(parameters[field].default is not None for field in FIELDS[name] if field not in OWN_DEFAULT)


def test_the_documentation_of_a_field_names_the_mixers_that_take_it() -> None:
    documented: dict[str, set[str]] = {}
    for entry in re.split(
        r"\n        (?=\w+: )", inspect.getdoc(EncoderConfig).replace("\n    ", "\n        ")
    ):  # type: ignore[union-attr]
        listed = {
            name for group in re.findall(r"\[([a-z0-9, \n]+)\]", entry) for name in re.split(r"[,\s]+", group)
        }
        if listed and ": " in entry:
            documented[entry.split(":")[0].strip()] = listed
    taken = {
        field.name: {name for name in MIXER_NAMES if field.name in FIELDS[name]}
        for field in dataclasses.fields(EncoderConfig)
    }
    assert documented == {field: names for field, names in taken.items() if names}


def test_fields_reach_the_mixers_and_null_leaves_the_mixers_own() -> None:
    config = EncoderConfig(**SIZES)
    assert isinstance(build_mixer("s4d", config, 0), S4D)
    widths = {"hyena": 3, "mamba": 5, "mamba2": 5, "hydra": 7}
    for name, width in widths.items():
        mixer = build_mixer(name, config, 0)  # type: ignore[arg-type]
        assert dict(mixer.named_parameters())["conv_weight"].shape[-1] == width, name
        wider = build_mixer(name, dataclasses.replace(config, conv_width=6), 0)  # type: ignore[arg-type]
        assert dict(wider.named_parameters())["conv_weight"].shape[-1] == 6, name
    assert small(pattern=("attention",), window=2).mixers()[0].halo == (2, 2)
    tied = small(pattern=("mamba", "mamba2"), bidirectional="tied").mixers()
    assert all(getattr(mixer, "tied") for mixer in tied)  # noqa: B009


def test_a_mixer_that_cannot_be_built_is_named_with_its_layer() -> None:
    config = EncoderConfig(**{**SIZES, "pattern": ("conv",), "head_dim": 5})
    with pytest.raises(ValueError, match=r"layer 3 \(attention\): head_dim of attention is 5 at width 8"):
        build_mixer("attention", config, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": ()}, "pattern is empty"),
        ({"pattern": ("mamba4",)}, "pattern names the mixer 'mamba4'; allowed are s4, s4d"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0"),
        ({"mlp_ratio": 0.001}, "mlp_ratio 0.001 leaves an MLP of width 256 no inner width"),
        ({"width": 33}, r"head_dim 64 and groups 1 do not divide expand \* width = 66"),
        ({"groups": 3}, "head_dim 64 and groups 3 do not divide"),
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"state": 0}, "state is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"filter_bins": 0}, "filter_bins is 0"),
        ({"pattern": ("s4d",), "state": 3}, "state is 3; s4d needs an even one"),
        ({"pattern": ("attention",), "width": 96}, "head_dim 64 does not suit attention at width 96"),
        ({"window": 0}, "window is 0; it must be at least 1, or null"),
        ({"conv_width": 0}, "conv_width is 0; it must be at least 1"),
        ({"pattern": ("mamba3",), "conv_width": -1}, "conv_width is -1"),
        ({"kernel": 4}, "kernel is 4; it must be odd"),
        ({"dilations": ()}, r"dilations are \[\]; at least one is needed"),
        ({"dilations": (1, 0)}, r"dilations are \[1, 0\]"),
        ({"bidirectional": "both"}, "bidirectional is 'both'; allowed are 'fused' and 'tied'"),
        ({"bidirectional": "tied", "pattern": ("hydra", "conv")}, "no mamba or mamba2 but conv, hydra"),
        ({"experts": 1, "mlp_ratio": 1.0}, "experts is 1; a mixture has at least 2"),
        ({"experts": 4, "mlp_ratio": 1.0, "experts_per_token": 5}, "experts_per_token is 5"),
        ({"experts": 4}, "experts is 4 and mlp_ratio 0"),
        ({"balance_weight": -0.1}, "balance_weight is -0.1"),
        ({"decoder": DecoderConfig(32)}, "bin_bp of the decoder is 32; the stem, which ends at 32 bp"),
        ({"initialisation": "hippo", "pattern": ("h3",)}, "initialisation is 'hippo'; allowed are"),
        ({"discretisation": "euler", "pattern": ("s4d",)}, "discretisation is 'euler'; allowed are"),
    ],
)
def test_an_impossible_encoder_is_refused(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EncoderConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": ("conv", "lstm"), "width": 33},
        {"pattern": ("hyena",), "state": 3},
        {"pattern": ("mamba3",), "conv_width": 0},
        {"pattern": ("mamba",), "state": 3, "width": 33, "head_dim": 7},
    ],
)
def test_fields_that_no_mixer_of_the_pattern_takes_may_be_anything(options: Mapping[str, Any]) -> None:
    config = EncoderConfig(**options)
    for index, name in enumerate(config.pattern):
        build_mixer(name, config, index)


def test_a_positionwise_norm_makes_training_and_evaluation_agree() -> None:
    stem = dataclasses.replace(SIZES["stem"], norm="rms")
    encoder = small(stem=stem, decoder=DecoderConfig(2))
    assert not any(isinstance(module, nn.BatchNorm1d) for module in encoder.modules())
    tokens = random_tokens(2, 64)
    assert torch.equal(encoder(tokens), encoder.eval()(tokens))


@pytest.mark.parametrize("name", ["s4", "s4d", "h3", "mamba", "mamba2", "mamba3", "hydra"])
def test_first_steps_are_as_short_as_asked(name: str) -> None:
    torch.manual_seed(0)
    shortest = {}
    for dt_min in (1e-4, 1e-2):
        mixer = small(pattern=(name,) * 8, dt_min=dt_min)
        found = {key: value for key, value in mixer.named_parameters() if key.endswith(("dt_bias", "log_dt"))}
        assert len(found) == 8
        steps = torch.cat(
            [
                (value.exp() if key.endswith("log_dt") else torch.nn.functional.softplus(value)).flatten()
                for key, value in found.items()
            ]
        )
        assert steps.min() >= dt_min * 0.999 and steps.max() <= 0.1001
        shortest[dt_min] = steps.min()
    assert shortest[1e-4] < 1e-2
    with pytest.raises(ValueError, match=r"dt_min is 0; it must be above 0 and at most 0\.1"):
        small(pattern=(name,), dt_min=0)
