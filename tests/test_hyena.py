"""Hyena against the paper's definition written out lag by lag, chunk by chunk against the whole, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genossm.models.mixers.hyena import Hyena
from genossm.models.mixers.mixer import mix_by_chunks

LENGTHS = [1, 2, 17, 64, 65, 97]


def small(width: int = 4, seed: int = 0, **options: int) -> Hyena:
    torch.manual_seed(seed)
    mixer = Hyena(width, **{"filter_bins": 24, "hidden": 8, **options}).double()
    torch.nn.init.normal_(mixer.conv_bias)
    return mixer


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def filter_at(mixer: Hyena, lag: int, channel: int, order: int) -> torch.Tensor:
    """One value of a filter, from the formula."""
    t = lag / mixer.filter_bins
    features = [t]
    features += [math.cos(math.pi * k * t) for k in range(1, mixer.bands + 1)]
    features += [math.sin(math.pi * k * t) for k in range(1, mixer.bands + 1)]
    h = torch.tensor(features, dtype=torch.float64)
    h = torch.sin(mixer.filter_frequency * (mixer.filter_in @ h + mixer.filter_in_bias))
    for weight, bias in zip(mixer.filter_inner, mixer.filter_inner_bias, strict=True):
        h = torch.sin(mixer.filter_frequency * (weight @ h + bias))
    slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
    a = slow + (fast - slow) * channel / (mixer.width - 1)
    lags = range(1 - mixer.filter_bins, mixer.filter_bins)
    c = math.sqrt(sum(math.exp(-2 * a * abs(other) / mixer.filter_bins) for other in lags))
    return mixer.filter_out[order * mixer.width + channel] @ h * (math.exp(-a * abs(t)) / c)


def slow_hyena(mixer: Hyena, x: torch.Tensor) -> torch.Tensor:
    """Definition 3.1, each filter as a Toeplitz matrix."""
    batch, length, width = x.shape
    taps = mixer.conv_weight.shape[1]
    projected = x @ mixer.in_projection.weight.T
    mixed = []
    for t in range(length):
        total = mixer.conv_bias.expand(batch, -1)
        for k in range(taps):
            s = t + k - (taps - 1) // 2
            if 0 <= s < length:
                total = total + mixer.conv_weight[:, k] * projected[:, s]
        mixed.append(total)
    parts = torch.stack(mixed, 1).split(width, dim=-1)
    z = parts[0]
    for n in range(mixer.order):
        channels = []
        for d in range(width):
            values = {
                lag: filter_at(mixer, lag, d, n)
                for lag in range(1 - min(length, mixer.filter_bins), min(length, mixer.filter_bins))
            }
            zero = torch.zeros((), dtype=torch.float64)
            rows = [torch.stack([values.get(t - s, zero) for s in range(length)]) for t in range(length)]
            channels.append(z[:, :, d] @ torch.stack(rows).T)
        z = parts[n + 1] * (torch.stack(channels, -1) + mixer.skip[n] * z)
    return z @ mixer.out_projection.weight.T + mixer.out_projection.bias


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_definition_for_any_length(length: int) -> None:
    mixer, x = small(width=2), random_input(2, length, 2)
    torch.testing.assert_close(mixer(x), slow_hyena(mixer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{"order": 1}, {"order": 3, "bands": 1}, {"filter_bins": 1}, {"conv_width": 4}]
)
def test_it_is_the_definition_for_any_shape(options: dict[str, int]) -> None:
    mixer, x = small(width=3, **options), random_input(1, 20, 3)
    torch.testing.assert_close(mixer(x), slow_hyena(mixer, x), rtol=1e-10, atol=1e-10)


def test_its_gradients_are_those_of_the_definition() -> None:
    mixer, x = small(width=2, filter_bins=9), random_input(1, 13, 2)
    weights = random_input(1, 13, 2, seed=2).detach()
    wanted = [x, *mixer.parameters()]
    got = torch.autograd.grad((mixer(x) * weights).sum(), wanted)
    expected = torch.autograd.grad((slow_hyena(mixer, x) * weights).sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    order=st.integers(1, 3),
    filter_bins=st.sampled_from([1, 2, 7, 24]),
    conv_width=st.sampled_from([1, 3, 4]),
)
def test_chunks_give_what_the_whole_gives(
    chunks: list[int], order: int, filter_bins: int, conv_width: int
) -> None:
    mixer = small(order=order, filter_bins=filter_bins, conv_width=conv_width)
    with torch.no_grad():
        x = random_input(2, sum(chunks), 4)
        got = mix_by_chunks(mixer, x.split(chunks, 1))
        assert [y.shape[1] for y in got] == chunks
        torch.testing.assert_close(torch.cat(got, 1), mixer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("order", "conv_width"), [(1, 3), (2, 4)])
def test_the_halo_is_just_what_an_output_depends_on(order: int, conv_width: int) -> None:
    mixer = small(order=order, filter_bins=6, conv_width=conv_width)
    x = random_input(1, 61, 4)
    (gradient,) = torch.autograd.grad(mixer(x)[:, 30].sum(), x)
    seen = (gradient.abs().amax((0, 2)) > 1e-13).nonzero().flatten()
    assert (30 - int(seen.min()), int(seen.max()) - 30) == mixer.halo


def test_nothing_wraps_around_and_both_sides_differ() -> None:
    mixer = small(filter_bins=64)
    x = torch.zeros(1, 64, 4, dtype=torch.float64)
    h = mixer.filters(64)
    assert h.shape == (2, 127, 4)
    assert not torch.allclose(h, h.flip(1), atol=1e-3)
    assert torch.equal(mixer.filters(10), h[:, 54:73])
    x[0, 0] = 1
    torch.testing.assert_close(mixer(x), slow_hyena(mixer, x), rtol=1e-10, atol=1e-10)


def test_bfloat16_is_near_float32_and_filters_stay_in_float32() -> None:
    torch.manual_seed(0)
    mixer, x = Hyena(16, filter_bins=64), torch.randn(2, 97, 16)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x)
        assert mixer.filters(5).dtype == torch.float32
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_it_starts_with_smooth_filters_of_equal_power_whatever_their_length() -> None:
    torch.manual_seed(0)
    short, long = Hyena(256, filter_bins=128), Hyena(256, filter_bins=2048)
    powers = [mixer.filters(mixer.filter_bins).square().sum(1).mean() for mixer in (short, long)]
    assert 0.5 < powers[0] / powers[1] < 2 and 0.05 < powers[1] < 0.5
    h = long.filters(2048)
    assert (h.diff(dim=1).square().sum() / h.square().sum()) < 0.05  # white noise has 2
    # the last channel has decayed to 0.01 at 0.3 of the filter
    middle, far = h[:, 2047 - 50 : 2048 + 50, -1], h[:, 2047 + 614 :, -1]
    assert far.abs().max() < 0.05 * middle.abs().max()
    assert set(Hyena.state_parameters) <= {name for name, _ in long.named_parameters()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 0}, "order of hyena is 0; it must be at least 1"),
        ({"filter_bins": 0}, "filter_bins of hyena is 0"),
        ({"conv_width": -1}, "conv_width of hyena is -1"),
        ({"sine_frequency": 0.0}, "sine_frequency of hyena is 0.0; it must be above 0"),
    ],
)
def test_an_impossible_hyena_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Hyena(4, **options)
