"""S4D against its recurrence position by position, chunks against the whole, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from genossm.models.mixers.mixer import mix_by_chunks
from genossm.models.mixers.s4d import S4D

LENGTHS = [1, 2, 17, 64, 65, 97]


def small(width: int = 3, seed: int = 0, **options: object) -> S4D:
    torch.manual_seed(seed)
    return S4D(width, **{"state": 8, **options}).double()  # type: ignore[arg-type]


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def slow_s4d(mixer: S4D, x: torch.Tensor, discretisation: str) -> torch.Tensor:
    """All N states of every channel with dense matrices, step by step, both ways."""
    if isinstance(mixer.in_projection, torch.nn.Linear):
        x = x @ mixer.in_projection.weight.T + mixer.in_projection.bias
    batch, length, width = x.shape
    ssm = mixer.ssm
    channels = []
    for d in range(width):
        half = torch.complex(-ssm.log_A_real[d].exp(), ssm.A_imag[d])
        A = torch.diag(torch.cat([half, half.conj()]))
        dt, identity = ssm.log_dt[d].exp(), torch.eye(A.shape[0], dtype=A.dtype)
        if discretisation == "zoh":
            A_bar = torch.diag(torch.exp(dt * A.diagonal()))  # torch.matrix_exp is off by up to 2e-10
            B_bar = torch.linalg.inv(A) @ (A_bar - identity) @ torch.ones(A.shape[0], dtype=A.dtype)
        else:
            inverse = torch.linalg.inv(identity - dt / 2 * A)
            A_bar = inverse @ (identity + dt / 2 * A)
            B_bar = dt * inverse @ torch.ones(A.shape[0], dtype=A.dtype)
        outputs = [ssm.D[d] * x[:, t, d] for t in range(length)]
        for direction, order in ((0, range(length)), (1, reversed(range(length)))):
            C = torch.complex(ssm.C[direction, d, :, 0], ssm.C[direction, d, :, 1])
            C = torch.cat([C, C.conj()])
            h = torch.zeros(batch, A.shape[0], dtype=A.dtype)
            for t in order:
                h = h @ A_bar.T + x[:, t, d, None] * B_bar
                outputs[t] = outputs[t] + (h @ C).real
        channels.append(torch.stack(outputs, 1))
    y = torch.stack(channels, 2)
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    value, gate = (y @ mixer.out_projection.weight.T + mixer.out_projection.bias).chunk(2, -1)
    return value * torch.sigmoid(gate)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("initialisation", ["legs", "lin"])
def test_it_and_its_gradients_are_those_of_the_recurrence(initialisation: str, discretisation: str) -> None:
    mixer = small(initialisation=initialisation, discretisation=discretisation)
    x, weights = random_input(2, 23, 3), random_input(2, 23, 3, seed=2).detach()
    got, expected = mixer(x), slow_s4d(mixer, x, discretisation)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    wanted = [x, *mixer.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_convolution_recurrence_and_slow_recurrence_agree_for_any_length(length: int) -> None:
    mixer, x = small(width=2, expand=2), random_input(2, length, 2)
    with torch.no_grad():
        y = mixer(x)
        torch.testing.assert_close(mixer.recurrence(x), y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(slow_s4d(mixer, x, "zoh"), y, rtol=1e-10, atol=1e-10)


@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    initialisation=st.sampled_from(["legs", "lin"]),
    discretisation=st.sampled_from(["zoh", "bilinear"]),
)
def test_chunks_give_what_the_whole_gives(
    chunks: list[int], initialisation: str, discretisation: str
) -> None:
    mixer = small(initialisation=initialisation, discretisation=discretisation)
    with torch.no_grad():
        x = random_input(2, sum(chunks), 3)
        got = mix_by_chunks(mixer, x.split(chunks, 1))
        assert [y.shape[1] for y in got] == chunks
        torch.testing.assert_close(torch.cat(got, 1), mixer(x), rtol=1e-10, atol=1e-10)


def test_long_chunks_and_single_positions_give_what_the_whole_gives() -> None:
    mixer = small(state=64)
    with torch.no_grad():
        x = random_input(1, 4130, 3)
        got = torch.cat(mix_by_chunks(mixer, x.split([1, 1, 3001, 1, 1126], 1)), 1)
        torch.testing.assert_close(got, mixer(x), rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_the_states() -> None:
    mixer, x = small(), random_input(1, 12, 3)
    whole = torch.autograd.grad(mixer(x)[:, 2].sum(), x)
    parts = torch.cat(mix_by_chunks(mixer, x.split([5, 3, 4], 1)), 1)
    torch.testing.assert_close(torch.autograd.grad(parts[:, 2].sum(), x), whole, rtol=1e-10, atol=1e-10)


def test_exchanged_directions_read_the_flipped_sequence() -> None:
    mixer, x = small(), random_input(2, 40, 3)
    y = mixer(x)
    flipped = mixer(x.flip(1)).flip(1)
    assert (y - flipped).abs().max() > 0.01
    with torch.no_grad():
        mixer.ssm.C.copy_(mixer.ssm.C.flip(0))
    torch.testing.assert_close(mixer(x.flip(1)).flip(1), y, rtol=1e-10, atol=1e-10)


def test_bfloat16_is_near_float32_and_the_state_space_model_stays_in_float32() -> None:
    torch.manual_seed(0)
    mixer, x = S4D(16, expand=2), torch.randn(2, 97, 16)
    u = mixer.in_projection(x)
    expected, exact = mixer(x), mixer.ssm(u)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x)
        _, state = mixer.mix(x)
        assert torch.equal(mixer.ssm(u), exact)
    assert got.dtype == torch.bfloat16
    assert state is not None and state[0].dtype == torch.complex64 and state[0].shape == (2, 32, 32)
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())
    assert mixer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_it_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    mixer = S4D(256, state=64)
    ssm = mixer.ssm
    dt = ssm.log_dt.exp()
    assert 0.9e-3 < dt.min() and dt.max() < 0.101
    assert abs((dt < 1e-2).float().mean() - 0.5) < 0.12  # log-uniform
    torch.testing.assert_close(ssm.log_A_real.exp(), torch.full((256, 32), 0.5))
    # S4D-LegS: the largest eigenvalue is near N^2 / pi, S4D-Lin ends at pi (N/2 - 1)
    assert 0.9 < ssm.A_imag.max() * math.pi / 64**2 < 1.1
    torch.testing.assert_close(S4D(1, initialisation="lin").ssm.A_imag[0], math.pi * torch.arange(32.0))
    assert abs(ssm.C.square().sum(-1).mean() - 1) < 0.05 and abs(ssm.D.std() - 1) < 0.2
    assert ssm.C.shape == (2, 256, 32, 2)
    assert set(S4D.state_parameters) <= {name for name, _ in mixer.named_parameters()}
    # D is the direct way from a position to itself
    x = torch.randn(1, 9, 256)
    with_D, D = ssm(x), ssm.D.clone()
    with torch.no_grad():
        ssm.D.zero_()
    torch.testing.assert_close(with_D - ssm(x), D * x)


def test_parameters_are_not_views_of_each_other() -> None:
    """Rows that share memory would train together."""
    for parameter in S4D(4, state=8).parameters():
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == 4 * parameter.numel()


def test_it_needs_nothing_beyond_the_block_of_the_papers() -> None:
    mixer, x = small(width=4), random_input(1, 8, 4)
    y = F.glu(F.linear(F.gelu(mixer.ssm(x)), mixer.out_projection.weight, mixer.out_projection.bias))
    torch.testing.assert_close(mixer(x), y)
    assert mixer.halo == (0, 0) and mixer.recurrent


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state": 5}, "state is 5; choose an even number from 2 up"),
        ({"expand": 0}, "width 4 and expand 0: both must be at least 1"),
        ({"initialisation": "inv"}, r"initialisation is 'inv'; choose 'legs' \(S4D-LegS\) or 'lin'"),
        ({"discretisation": "dirac"}, r"discretisation is 'dirac'; choose 'zoh' \(zero-order hold\)"),
    ],
)
def test_an_impossible_s4d_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        S4D(4, **options)  # type: ignore[arg-type]
