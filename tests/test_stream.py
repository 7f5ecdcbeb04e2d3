"""Streaming against one pass: every mixer, stem and decoder, any chunk; what it reads, holds and refuses."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from genossm.models.decoder import DecoderConfig
from genossm.models.encoder import Encoder, EncoderConfig, Layer, MixerName
from genossm.models.mixers.mixer import State, mix_by_chunks
from genossm.models.stem import StemConfig
from genossm.models.stream import ChunkStore, stream

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
STEM = StemConfig(channels=(5, 6), pool=(2, 4), first_kernel=7, kernel=3)
SIZES: dict[str, Any] = {
    "width": 8,
    "stem": STEM,
    "state": 4,
    "head_dim": 4,
    "window": 5,
    "dilations": (1, 3),
    "filter_bins": 6,
    "dropout": 0.1,
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"pattern": (name, name)} for name in get_args(MixerName)},
    "mamba, tied": {"pattern": ("mamba", "mamba"), "bidirectional": "tied"},
    "mamba2, tied": {"pattern": ("mamba2", "mamba2"), "bidirectional": "tied"},
    "mamba2, even convolution, groups": {"pattern": ("mamba2",), "conv_width": 4, "groups": 2},
    "mamba3, ranks and convolution": {"pattern": ("mamba3",), "rank": 2, "conv_width": 3},
    "s4d, lin, bilinear": {"pattern": ("s4d",), "initialisation": "lin", "discretisation": "bilinear"},
    "hybrid": {"pattern": ("mamba2", "attention", "hydra", "conv"), "mlp_ratio": 1.5},
    "hybrid, experts": {"pattern": ("s4d", "hyena", "lstm"), "mlp_ratio": 1.0, "experts": 3},
    "base": {"pattern": ("mamba", "attention"), "stem": StemConfig(kind="base")},
    "no bins": {"pattern": ("h3", "conv"), "stem": StemConfig((5, 6), (1, 1), 5, 3, "rms")},
    "decoder": {"pattern": ("mamba3", "attention"), "decoder": DecoderConfig(2, kernel=7)},
    "decoder to a base": {"pattern": ("hydra", "s4"), "decoder": DecoderConfig(1, kernel=3)},
    "decoder, convolutions": {"pattern": ("conv", "conv"), "decoder": DecoderConfig(1, kernel=9)},
}


def build(dtype: torch.dtype = torch.float64, **options: Any) -> Encoder:
    """In evaluation mode, with batch statistics and mixer weights that are not those of the start."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**{**SIZES, **options}))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.to(dtype).eval()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 5, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def joined(parts: list[tuple[int, Tensor]]) -> Tensor:
    """All features; asserts that the first bins are those where the chunks before end."""
    at = 0
    for first, features in parts:
        assert first == at
        at += features.shape[1]
    return torch.cat([features for _, features in parts], 1)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_streaming_gives_what_one_pass_gives(case: str, dtype: torch.dtype) -> None:
    encoder, tolerance = build(dtype, **CASES[case]), TOLERANCES[dtype]
    bins = 37
    tokens = random_tokens(2, bins * encoder.trunk_bp)
    with torch.no_grad():
        expected = encoder(tokens)
    assert expected.shape == (2, tokens.shape[1] // encoder.bin_bp, 8)
    for chunk in (1, 7, 36, 64):
        parts = list(encoder.stream(tokens, chunk_bp=chunk * encoder.trunk_bp))
        assert len(parts) == -(-bins // chunk)
        torch.testing.assert_close(joined(parts), expected, rtol=tolerance, atol=tolerance)


HYBRID = {"pattern": ("mamba2", "attention", "conv", "mamba"), "decoder": DecoderConfig(2)}


@settings(max_examples=25)
@given(bins=st.integers(1, 60), chunk=st.integers(1, 70), keep=st.sampled_from(["cpu", "device"]))
def test_any_length_in_any_chunks(bins: int, chunk: int, keep: str) -> None:
    encoder = build(**HYBRID)
    tokens = random_tokens(1, bins * 8, seed=bins)
    parts = list(encoder.stream(tokens, chunk_bp=8 * chunk, keep=keep))  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(joined(parts), encoder(tokens), rtol=1e-10, atol=1e-10)


def test_tokens_may_come_from_a_function_that_is_asked_for_a_chunk_and_its_halo() -> None:
    encoder = build(**HYBRID)
    tokens = random_tokens(2, 50 * 8)
    asked: list[tuple[int, int]] = []

    def read(start: int, end: int) -> Tensor:
        asked.append((start, end))
        return tokens[:, start:end]

    got = joined(list(encoder.stream(read, length=400, chunk_bp=56)))
    assert torch.equal(got, joined(list(encoder.stream(tokens, chunk_bp=56))))
    assert encoder.decoder is not None
    most = 56 + 2 * (encoder.stem.halo_bp + 8 * encoder.decoder.halo)
    assert all(0 <= start < end <= 400 and end - start <= most for start, end in asked)


@pytest.mark.parametrize("case", ["hybrid", "hyena", "mamba2, tied"])
def test_a_mixer_sees_no_more_than_a_chunk_and_its_halo(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build(**CASES[case])
    tokens = random_tokens(1, 64 * 8)
    seen: set[str] = set()
    for mixer in encoder.mixers():

        def checked(
            x_BLD: Tensor,
            left: int,
            right: int,
            *states: State | None,
            mixer: Any = mixer,
            mix: Any = mixer.mix,
        ) -> Any:
            seen.add(type(mixer).__name__)
            assert left <= mixer.halo[0] and right <= mixer.halo[1] and x_BLD.shape[1] <= 7 + left + right
            return mix(x_BLD, left, right, *states)

        monkeypatch.setattr(mixer, "mix", checked)
    joined(list(encoder.stream(tokens, chunk_bp=56)))
    assert seen == {type(mixer).__name__ for mixer in encoder.mixers()}


@pytest.mark.parametrize("case", CASES)
def test_the_watch_is_told_the_states_that_chunks_carry(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that `mix_by_chunks` carries over the same chunks, of every layer; nothing of mixers that have none."""
    encoder = build(**CASES[case])
    tokens, bounds = random_tokens(1, 37 * encoder.trunk_bp), [(0, 10), (10, 20), (20, 30), (30, 37)]
    told: list[tuple[int, int, int, State]] = []

    def watch(layer: int, first: int, stop: int, state: State) -> None:
        told.append((layer, first, stop, tuple(part.clone() for part in state)))

    chunks = stream(encoder, tokens, chunk_bp=10 * encoder.trunk_bp, watch=watch)
    unwatched = joined(list(encoder.stream(tokens, chunk_bp=10 * encoder.trunk_bp)))
    assert torch.equal(joined(list(chunks)), unwatched)
    carried: list[tuple[int, int, int, State]] = []
    with torch.no_grad():
        x_BLD = encoder.stem(tokens)
        for number, layer in enumerate(encoder.layers):
            assert isinstance(layer, Layer)
            mixer, entering = layer.mixer, [0, 3]
            mix, leftward = mixer.mix, mixer.leftward

            def mixed(*arguments: Any, mix: Any = mix, number: int = number, at: Any = entering) -> Any:
                y, state = mix(*arguments)
                if state is not None:
                    carried.append((number, *bounds[at[0]], state))
                at[0] += 1
                return y, state

            def swept(
                *arguments: Any, leftward: Any = leftward, number: int = number, at: Any = entering
            ) -> Any:
                state = leftward(*arguments)
                carried.append((number, *bounds[at[1]], state))
                at[1] -= 1
                return state

            with monkeypatch.context() as patched:
                patched.setattr(mixer, "mix", mixed)
                patched.setattr(mixer, "leftward", swept)
                normed_BLD = layer.mixer_norm(x_BLD)
                parts = mix_by_chunks(mixer, [normed_BLD[:, first:stop] for first, stop in bounds])
            x_BLD = layer.joined(x_BLD, torch.cat(parts, 1))
    recurrent = sum(mixer.recurrent for mixer in encoder.mixers())
    assert len(told) == 7 * recurrent
    assert [place for *place, _ in told] == [place for *place, _ in carried]
    for (*_, states), (*_, expected) in zip(told, carried, strict=True):
        torch.testing.assert_close(states, expected, rtol=1e-10, atol=1e-10)


def test_chunks_come_without_gradient_and_leave_the_callers_mode_alone() -> None:
    encoder = build(pattern=("mamba2",))
    for _, features in encoder.stream(random_tokens(1, 80), chunk_bp=40):
        assert not features.requires_grad
        assert torch.is_grad_enabled()


def test_streaming_in_autocast_is_near_one_pass_in_it() -> None:
    encoder = build(torch.float32, pattern=("mamba2", "attention", "s4d", "hydra"), mlp_ratio=1.5)
    tokens = random_tokens(1, 400)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = encoder(tokens)
        got = joined(list(encoder.stream(tokens, chunk_bp=64)))
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_store_hands_out_what_was_put_in_whatever_the_chunks() -> None:
    cpu = torch.device("cpu")
    x = torch.randn(2, 23, 3)
    store = ChunkStore(23, 5, kept_on=cpu, used_on=cpu)
    assert len(store) == 5 and [store.bounds(index) for index in (0, 4)] == [(0, 5), (20, 23)]
    for index in range(5):
        store.put(index, x[:, slice(*store.bounds(index))])
    for start in range(23):
        for stop in range(start + 1, 24):
            assert torch.equal(store.read(start, stop), x[:, start:stop])
    assert torch.equal(store.get(4), x[:, 20:]) and torch.equal(store.get(1, 2, 4), x[:, 7:9])
    store.put(1, -x[:, 5:10])
    assert torch.equal(store.read(9, 11), torch.cat([-x[:, 9:10], x[:, 10:11]], 1))


@pytest.mark.parametrize(
    ("options", "given", "words"),
    [
        ({"pattern": ("attention",), "window": None}, {}, "window None looks at the whole sequence"),
        ({}, {"chunk_bp": 12}, "chunk_bp is 12; it must be a multiple of the trunk's bin of 8 bp"),
        ({}, {"chunk_bp": 0}, "chunk_bp is 0"),
        ({}, {"keep": "disk"}, "keep is 'disk'; allowed are 'cpu' and 'device'"),
        ({}, {"tokens": random_tokens(1, 33)}, "the length 33 is no multiple of the bin of 8 bp"),
        ({}, {"tokens": random_tokens(1, 0)}, "the length 0 is no multiple"),
        ({}, {"length": 64}, "give `length` with a function"),
        ({}, {"tokens": lambda start, end: random_tokens(1, end - start)}, "give `length` with a function"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(
    options: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    encoder = build(**{"pattern": ("conv",), **options})
    with pytest.raises(ValueError, match=words):
        encoder.stream(**{"tokens": random_tokens(1, 64), "chunk_bp": 16, **given})


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="the encoder is in training mode"):
        build(pattern=("conv",)).train().stream(random_tokens(1, 64), chunk_bp=16)


def test_tokens_of_another_length_than_asked_for_are_refused() -> None:
    stream = build(pattern=("conv",)).stream(lambda start, end: random_tokens(1, 3), length=64, chunk_bp=16)
    with pytest.raises(ValueError, match=r"came in the shape \(1, 3\); \(batch, 32\) is needed"):
        next(stream)
