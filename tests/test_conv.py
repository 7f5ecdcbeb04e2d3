"""Gated dilated convolutions against sums over taps, chunk by chunk against the whole, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genossm.models.mixers.conv import DilatedConv
from genossm.models.mixers.mixer import mix_by_chunks

LENGTHS = [1, 2, 17, 64, 65, 97]


def small(
    kernel: int = 5, dilations: tuple[int, ...] = (1, 3, 9), depthwise: bool = False, seed: int = 0
) -> DilatedConv:
    torch.manual_seed(seed)
    mixer = DilatedConv(4, kernel=kernel, dilations=dilations, depthwise=depthwise).double()
    for norm in mixer.norms:
        torch.nn.init.normal_(norm.weight)
    return mixer


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def slow_conv(
    mixer: DilatedConv, x: torch.Tensor, dilations: tuple[int, ...], depthwise: bool
) -> torch.Tensor:
    """Position by position, tap by tap."""
    length, width = x.shape[1:]
    y = torch.zeros_like(x)
    for index, (unit, dilation) in enumerate(zip(mixer.convolutions, dilations, strict=True)):
        u = x + y
        if index:
            u = u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norms[index - 1].weight
        if depthwise:
            u = u @ unit.in_projection.weight.T
        weight, rows = unit.conv.weight, []
        for t in range(length):
            total = unit.conv.bias.expand(x.shape[0], -1)
            for k in range(weight.shape[2]):
                s = t + (k - weight.shape[2] // 2) * dilation
                if 0 <= s < length:
                    tap = weight[:, :, k]
                    total = total + (u[:, s] * tap[:, 0] if depthwise else u[:, s] @ tap.T)
            rows.append(total)
        conv = torch.stack(rows, 1)
        value, gate = conv[..., :width], conv[..., width:]
        gelu = value * 0.5 * (1 + torch.erf(value / 2**0.5))
        y = y + (gelu / (1 + torch.exp(-gate))) @ unit.out_projection.weight.T
    return y


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_sum_over_taps(length: int, depthwise: bool) -> None:
    mixer, x = small(depthwise=depthwise), random_input(2, length, 4)
    expected = slow_conv(mixer, x, (1, 3, 9), depthwise)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depthwise", [False, True])
def test_its_gradients_are_those_of_the_sums(depthwise: bool) -> None:
    mixer, x = small(3, (2, 1), depthwise), random_input(1, 19, 4)
    weights = random_input(1, 19, 4, seed=2).detach()
    wanted = [x, *mixer.parameters()]
    got = torch.autograd.grad((mixer(x) * weights).sum(), wanted)
    expected = torch.autograd.grad((slow_conv(mixer, x, (2, 1), depthwise) * weights).sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    kernel=st.sampled_from([1, 3, 5]),
    dilations=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    depthwise=st.booleans(),
)
def test_chunks_give_what_the_whole_gives(
    chunks: list[int], kernel: int, dilations: list[int], depthwise: bool
) -> None:
    mixer = small(kernel, tuple(dilations), depthwise)
    with torch.no_grad():
        x = random_input(2, sum(chunks), 4)
        got = mix_by_chunks(mixer, x.split(chunks, 1))
        assert [y.shape[1] for y in got] == chunks
        torch.testing.assert_close(torch.cat(got, 1), mixer(x), rtol=1e-10, atol=1e-10)


def test_the_halo_is_just_what_an_output_depends_on() -> None:
    mixer, x = small(5, (1, 4)), random_input(1, 61, 4)
    (gradient,) = torch.autograd.grad(mixer(x)[:, 30].sum(), x)
    seen = gradient.abs().amax((0, 2)).nonzero().flatten()
    assert (30 - int(seen.min()), int(seen.max()) - 30) == mixer.halo == (10, 10)


@pytest.mark.parametrize("depthwise", [False, True])
def test_bfloat16_is_near_float32(depthwise: bool) -> None:
    torch.manual_seed(0)
    mixer, x = DilatedConv(32, depthwise=depthwise), torch.randn(2, 97, 32)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x)
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_it_starts_with_gates_half_open_and_as_many_parameters_as_told() -> None:
    torch.manual_seed(0)
    mixer = DilatedConv(64, kernel=9, dilations=(1, 4))
    gates = mixer.convolutions[0].conv(torch.randn(2, 64, 50))[:, 64:].sigmoid()
    assert abs(gates.mean() - 0.5) < 0.05 and 0.02 < gates.std() < 0.2
    count = sum(p.numel() for p in mixer.parameters())
    assert abs(count / (2 * 19 * 64**2) - 1) < 0.01
    thin = DilatedConv(64, kernel=9, dilations=(1, 4), depthwise=True)
    assert abs(sum(p.numel() for p in thin.parameters()) / (2 * 3 * 64**2) - 1) < 0.12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": 4}, "kernel of conv is 4; it must be odd"),
        ({"kernel": -1}, "kernel of conv is -1"),
        ({"dilations": ()}, r"dilations of conv are \[\]; at least one is needed"),
        ({"dilations": (1, 0)}, r"dilations of conv are \[1, 0\]"),
    ],
)
def test_an_impossible_convolution_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DilatedConv(4, **options)
