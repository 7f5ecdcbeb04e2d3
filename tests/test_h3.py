"""H3 against both of its recurrences position by position, chunks against the whole, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genossm.models.mixers.h3 import H3
from genossm.models.mixers.mixer import mix_by_chunks

LENGTHS = [1, 2, 17, 64, 65, 97]


def small(width: int = 3, seed: int = 0, **options: object) -> H3:
    torch.manual_seed(seed)
    return H3(width, **{"state": 8, "shift": 5, **options}).double()  # type: ignore[arg-type]


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def run(
    u: torch.Tensor, A_bar: torch.Tensor, B_bar: torch.Tensor, C: torch.Tensor, leftward: bool
) -> torch.Tensor:
    """One channel (batch, length) through h = A_bar h + B_bar u, y = C h, one way."""
    h = torch.zeros(u.shape[0], len(B_bar), dtype=A_bar.dtype)
    outputs: dict[int, torch.Tensor] = {}
    order = range(u.shape[1])
    for t in reversed(order) if leftward else order:
        h = h @ A_bar.T + u[:, t, None] * B_bar
        outputs[t] = (h @ C).real
    return torch.stack([outputs[t] for t in order], 1)


def slow_h3(mixer: H3, x: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 with the shift matrix and the zero-order hold of the diagonal one as dense matrices."""
    ssm, taps = mixer.ssm, mixer.halo[0] + 1
    q, k, v = (x @ mixer.qkv_projection.weight.T + mixer.qkv_projection.bias).chunk(3, -1)
    shift = torch.diag(torch.ones(taps - 1, dtype=torch.float64), -1)
    first = torch.zeros(taps, dtype=torch.float64)
    first[0] = 1
    channels = []
    for d in range(x.shape[2]):
        C = mixer.shift_filter[d]
        C_leftward = torch.cat(
            [torch.zeros(1, dtype=C.dtype), C[: taps - 1].flip(0)]
        )  # lag 0 is counted once
        shifted = run(k[:, :, d], shift, first, C[taps - 1 :], False) + mixer.shift_D[d] * k[:, :, d]
        shifted = shifted + run(k[:, :, d], shift, first, C_leftward, True)
        product = shifted * v[:, :, d]
        pole = torch.complex(-ssm.log_A_real[d].exp(), ssm.A_imag[d])
        A_bar = torch.diag(torch.exp(ssm.log_dt[d].exp() * pole))
        B_bar = (torch.diag(A_bar) - 1) / pole
        y = ssm.D[d] * product
        for direction in (0, 1):
            C = 2 * torch.complex(ssm.C[direction, d, :, 0], ssm.C[direction, d, :, 1])
            y = y + run(product, A_bar, B_bar, C, direction == 1)
        channels.append(q[:, :, d] * y)
    return torch.stack(channels, 2) @ mixer.out_projection.weight.T + mixer.out_projection.bias


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_algorithm_1_for_any_length(length: int) -> None:
    mixer, x = small(), random_input(2, length, 3)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), slow_h3(mixer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shift", [1, 2, 40])
def test_its_gradients_are_those_of_algorithm_1(shift: int) -> None:
    mixer, x = small(shift=shift), random_input(2, 23, 3)
    weights = random_input(2, 23, 3, seed=2).detach()
    got, expected = mixer(x), slow_h3(mixer, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    wanted = [x, *mixer.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@given(
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shift=st.sampled_from([1, 2, 5, 64]),
    discretisation=st.sampled_from(["zoh", "bilinear"]),
)
def test_chunks_give_what_the_whole_gives(chunks: list[int], shift: int, discretisation: str) -> None:
    mixer = small(shift=shift, discretisation=discretisation, initialisation="legs")
    with torch.no_grad():
        x = random_input(2, sum(chunks), 3)
        got = mix_by_chunks(mixer, x.split(chunks, 1))
        assert [y.shape[1] for y in got] == chunks
        torch.testing.assert_close(torch.cat(got, 1), mixer(x), rtol=1e-10, atol=1e-10)


def test_single_positions_and_long_chunks_give_what_the_whole_gives() -> None:
    mixer = small(state=64, shift=64)
    with torch.no_grad():
        x = random_input(1, 3130, 3)
        got = torch.cat(mix_by_chunks(mixer, x.split([1, 1, 2001, 1, 1126], 1)), 1)
        torch.testing.assert_close(got, mixer(x), rtol=1e-10, atol=1e-10)


def test_the_halo_is_just_what_the_filter_reads() -> None:
    mixer = small()
    x = random_input(1, 41, 3)
    (gradient,) = torch.autograd.grad(mixer._gated(x, 0, 0)[1][:, 20].sum(), x)
    seen = (gradient.abs().amax((0, 2)) > 1e-12).nonzero().flatten()
    assert (20 - int(seen.min()), int(seen.max()) - 20) == mixer.halo == (4, 4)


def test_every_output_depends_on_every_input() -> None:
    mixer = small()
    x = random_input(1, 200, 3)
    (gradient,) = torch.autograd.grad(mixer(x)[:, 100].sum(), x)
    assert (gradient.abs().amax((0, 2)) > 1e-12).all()


def test_bfloat16_is_near_float32_and_kernels_and_states_stay_in_float32() -> None:
    torch.manual_seed(0)
    mixer, x = H3(16), torch.randn(2, 97, 16)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x)
        _, state = mixer.mix(x)
    assert got.dtype == torch.bfloat16
    assert state is not None and state[0].dtype == torch.complex64 and state[0].shape == (2, 16, 32)
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())
    assert mixer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_it_starts_as_the_authors_do() -> None:
    torch.manual_seed(0)
    mixer = H3(256)
    bound = 1 / math.sqrt(127)
    assert mixer.shift_filter.shape == (256, 127) and mixer.halo == (63, 63)
    assert 0.99 * bound < mixer.shift_filter.abs().max() <= bound
    assert abs(mixer.shift_D.std() - 1) < 0.2 and abs(mixer.ssm.D.std() - 1) < 0.2
    torch.testing.assert_close(mixer.ssm.A_imag[0], math.pi * torch.arange(32.0))
    torch.testing.assert_close(mixer.ssm.log_A_real.exp(), torch.full((256, 32), 0.5))
    assert set(H3.state_parameters) <= {name for name, _ in mixer.named_parameters()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shift": 0}, "shift is 0; choose at least 1"),
        ({"state": 3}, "state is 3; choose an even number from 2 up"),
        ({"initialisation": "inv"}, "initialisation is 'inv'; choose 'legs'"),
        ({"discretisation": "dirac"}, "discretisation is 'dirac'; choose 'zoh'"),
    ],
)
def test_an_impossible_h3_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        H3(4, **options)  # type: ignore[arg-type]
