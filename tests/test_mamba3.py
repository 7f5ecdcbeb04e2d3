"""Mamba-3 against the paper's recurrence in complex numbers, step by step; streaming, special cases, long angles."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genossm.kernels.ssd import ssd
from genossm.models.mixers.mamba3 import Mamba3
from genossm.models.mixers.mixer import mix_by_chunks
from genossm.models.mixers.trapezoid import phases

FORMS = {
    "one group": {"state": 6, "head_dim": 4},
    "a group for each head": {"state": 4, "head_dim": 4, "groups": 4},
    "three ranks": {"state": 4, "head_dim": 8, "rank": 3},
    "two ranks, two groups": {"state": 4, "head_dim": 4, "groups": 2, "rank": 2},
    "convolution": {"state": 4, "head_dim": 8, "conv_width": 4},
}


def small_mixer(seed: int = 0, steps: float = 1.0, **options: int) -> Mamba3:
    """A float64 mixer of width 8 whose every parameter is off its initial value and whose steps are about `steps`."""
    torch.manual_seed(seed)
    mixer = Mamba3(8, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        mixer.in_projection.weight.mul_(2)
        mixer.dt_bias.copy_(torch.randn_like(mixer.dt_bias) + math.log(math.expm1(steps)))
    return mixer


def random_input(length: int, batch: int = 2, seed: int = 1, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, dtype=torch.float64, generator=generator)


def one_direction(
    x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, lam: Tensor, angle: Tensor
) -> Tensor:
    """The paper's recurrence from left to right, heads and ranks written out, complex states.

    x: (batch, length, rank, heads, head_dim); B, C: (batch, length, rank, heads, pairs), complex; dt, A, lam: (batch,
    length, heads); angle: (batch, length, heads, pairs).
    """
    batch, length, rank, heads, head_dim = x.shape
    h = torch.zeros(batch, heads, head_dim, B.shape[-1], dtype=torch.complex128)
    previous = torch.zeros_like(h)
    outputs = []
    for t in range(length):
        alpha = torch.exp(torch.complex((dt[:, t] * A[:, t])[..., None].expand_as(angle[:, t]), angle[:, t]))
        alpha = alpha[:, :, None]
        beta = ((1 - lam[:, t]) * dt[:, t])[..., None, None] * alpha
        gamma = (lam[:, t] * dt[:, t])[..., None, None]
        added = torch.zeros_like(h)
        for r in range(rank):
            added = added + x[:, t, r, :, :, None] * B[:, t, r, :, None, :]
        h = alpha * h + beta * previous + gamma * added
        previous = added
        y = [(C[:, t, r, :, None].conj() * h).sum(-1).real for r in range(rank)]
        outputs.append(torch.stack(y, 1))
    return torch.stack(outputs, 1)


def slow(mixer: Mamba3, inputs: Tensor) -> Tensor:
    """The mixer, from its parameters and the recurrence of each direction."""
    heads, head_dim, groups, state, rank = (
        mixer.heads, mixer.head_dim, mixer.groups, mixer.state, mixer.rank,
    )  # fmt: skip
    batch, length, _ = inputs.shape
    inner, vectors = heads * head_dim, rank * groups * state
    ends = [inner, inner, vectors, vectors, 2 * heads, 2 * heads, 2 * heads, groups * state // 2]
    projected = inputs @ mixer.in_projection.weight.T
    assert projected.shape[-1] == sum(ends)
    if mixer.conv_width:
        mixed = projected[..., inner : 2 * inner + 2 * vectors]
        before = (mixer.conv_width - 1) // 2
        padded = F.pad(mixed, (0, 0, before, mixer.conv_width - 1 - before))
        taps = [padded[:, k : k + length] * mixer.conv_weight[:, k] for k in range(mixer.conv_width)]
        mixed = sum(taps, mixer.conv_bias)
        mixed = mixed * torch.sigmoid(mixed)
        projected = torch.cat([projected[..., :inner], mixed, projected[..., 2 * inner + 2 * vectors :]], -1)
    gate, x, B, C, dt, A, lam, theta = torch.split(projected, ends, -1)
    gate, x = (part.reshape(batch, length, 1, heads, head_dim) for part in (gate, x))
    if rank > 1:
        x, gate = x * mixer.rank_x, gate * mixer.rank_gate
    complex_vectors = []
    for values, weight, bias in ((B, mixer.B_norm, mixer.B_bias), (C, mixer.C_norm, mixer.C_bias)):
        values = values.reshape(batch, length, rank, groups, state)
        values = values / (values.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        values = values + bias.reshape(rank, groups, state)
        values = torch.complex(values[..., : state // 2], values[..., state // 2 :])
        complex_vectors.append(values.repeat_interleave(heads // groups, 3))
    theta = math.pi * torch.tanh(theta.reshape(batch, length, groups, state // 2))
    y = mixer.D[:, None] * x
    for direction in (0, 1):
        steps = [part.reshape(batch, length, heads, 2)[..., direction] for part in (dt, A, lam)]
        own_dt = torch.log1p(torch.exp(steps[0] + mixer.dt_bias[:, direction]))
        mean_dt = own_dt.reshape(batch, length, groups, -1).mean(-1)
        angle = (mean_dt[..., None] * theta).repeat_interleave(heads // groups, 2)
        decay = -torch.log1p(torch.exp(steps[1])).clamp(min=1e-4)  # A's floor
        sequences = [x, *complex_vectors, own_dt, decay, torch.sigmoid(steps[2]), angle]
        if direction:
            y = y + one_direction(*(sequence.flip(1) for sequence in sequences)).flip(1)
        else:
            y = y + one_direction(*sequences)
    y = y * gate * torch.sigmoid(gate)
    y = (y * mixer.rank_out).sum(2) if rank > 1 else y[:, :, 0]
    return y.flatten(2) @ mixer.out_projection.weight.T


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(scale, 1e-30))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_equals_the_recurrence_in_complex_numbers_and_its_gradients(form: str, length: int) -> None:
    mixer = small_mixer(**FORMS[form])
    inputs = random_input(length).requires_grad_()
    expected, got = slow(mixer, inputs), mixer(inputs)
    assert got.dtype == torch.float64
    close(got, expected)
    weights = torch.randn_like(got)
    wanted = [inputs, *mixer.parameters()]
    of_slow = torch.autograd.grad((expected * weights).sum(), wanted, materialize_grads=True)
    of_mixer = torch.autograd.grad((got * weights).sum(), wanted, materialize_grads=True)
    for slow_gradient, gradient in zip(of_slow, of_mixer, strict=True):
        close(gradient, slow_gradient)


@pytest.mark.parametrize("length", [64, 65, 131])
@pytest.mark.parametrize("steps", [0.02, 1.0, 30.0])
def test_equals_the_recurrence_at_longer_lengths_and_at_small_and_large_steps(
    length: int, steps: float
) -> None:
    for options in (FORMS["one group"], FORMS["three ranks"]):
        mixer = small_mixer(seed=2, steps=steps, **options)
        inputs = random_input(length, batch=1, seed=3)
        close(mixer(inputs), slow(mixer, inputs))


@settings(max_examples=12)
@given(
    form=st.sampled_from(list(FORMS)),
    cuts=st.lists(st.integers(1, 39), max_size=8, unique=True).map(sorted),
)
def test_chunk_by_chunk_equals_the_whole(form: str, cuts: list[int]) -> None:
    mixer = small_mixer(seed=4, steps=0.2, **FORMS[form])
    inputs = random_input(40, seed=5)
    chunks = [inputs[:, start:end] for start, end in pairwise([0, *cuts, 40])]
    with torch.no_grad():
        close(torch.cat(mix_by_chunks(mixer, chunks), 1), mixer(inputs))


@pytest.mark.parametrize("form", FORMS)
def test_position_by_position_equals_the_whole_and_so_do_gradients(form: str) -> None:
    mixer = small_mixer(seed=6, steps=0.2, **FORMS[form])
    inputs = random_input(9, seed=7).requires_grad_()
    whole = mixer(inputs)
    streamed = torch.cat(mix_by_chunks(mixer, list(inputs.split(1, 1))), 1)
    close(streamed, whole)
    weights = torch.randn_like(whole)
    wanted = [inputs, *mixer.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (whole, streamed)]
    for expected, got in zip(*gradients, strict=True):
        close(got, expected)


def with_fixed(mixer: Mamba3, name: str, value: float) -> None:
    """Make a projected number (before its softplus, sigmoid or tanh) the value, for inputs whose channel 0 is 1."""
    vectors = mixer.rank * mixer.groups * mixer.state
    first = 2 * mixer.inner + 2 * vectors
    rows = {"dt": (0, 2), "A": (2, 4), "lambda": (4, 6)}
    start, end = (first + mixer.heads * at for at in rows.get(name, (6, 6)))
    weight = mixer.in_projection.weight
    with torch.no_grad():
        part = weight[start:end] if name in rows else weight[start:]
        part.zero_()
        part[:, 0] = value


def scan_inputs(mixer: Mamba3, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gate, x, B, C and dt + bias of a mixer of rank 1 without a convolution."""
    vectors = mixer.groups * mixer.state
    sizes = [mixer.inner, mixer.inner, vectors, vectors, 2 * mixer.heads]
    projected = inputs @ mixer.in_projection.weight.T
    gate, x, B, C, dt = torch.split(projected[..., : sum(sizes)], sizes, -1)
    shape = (*inputs.shape[:2], mixer.groups, mixer.state)
    B = F.rms_norm(B.reshape(shape), shape[-1:], mixer.B_norm, 1e-5) + mixer.B_bias.view(shape[2:])
    C = F.rms_norm(C.reshape(shape), shape[-1:], mixer.C_norm, 1e-5) + mixer.C_bias.view(shape[2:])
    x = x.reshape(*inputs.shape[:2], mixer.heads, mixer.head_dim)
    return gate, x, B, C, dt.reshape(*inputs.shape[:2], mixer.heads, 2) + mixer.dt_bias


def test_lambda_1_without_rotation_is_mamba_2() -> None:
    mixer = small_mixer(seed=8, steps=0.3, state=6, head_dim=4, groups=2)
    with_fixed(mixer, "lambda", 60.0)
    with_fixed(mixer, "theta", 0.0)
    with_fixed(mixer, "A", math.log(math.expm1(0.7)))
    inputs = random_input(37, seed=9)
    inputs[..., 0] = 1
    gate, x, B, C, dt = scan_inputs(mixer, inputs)
    A = torch.full((mixer.heads,), -0.7, dtype=torch.float64)
    y = ssd(x, F.softplus(dt, threshold=40), A, B, C, mixer.D, direction="both")
    assert isinstance(y, Tensor)
    close(mixer(inputs), (y.flatten(2) * F.silu(gate)) @ mixer.out_projection.weight.T)


def test_without_rotation_it_is_the_matrix_of_the_real_trapezoidal_rule() -> None:
    mixer = small_mixer(seed=10, steps=0.3, state=4, head_dim=4)
    with_fixed(mixer, "lambda", 0.0)  # sigmoid(0) = 1 / 2: the trapezoidal rule
    with_fixed(mixer, "theta", 0.0)
    with_fixed(mixer, "A", math.log(math.expm1(0.7)))
    length = 11
    inputs = random_input(length, batch=1, seed=11)
    inputs[..., 0] = 1
    gate, x, B, C, dt = (part[0] for part in scan_inputs(mixer, inputs))
    dt = F.softplus(dt, threshold=40)
    y = mixer.D[:, None] * x
    for head in range(mixer.heads):
        for direction in (0, 1):
            step = dt[:, head, direction].flip(0) if direction else dt[:, head, direction]
            matrix = torch.zeros(length, length, dtype=torch.float64)
            for t in range(length):
                for s in range(t + 1):
                    decay = torch.exp(-0.7 * step[s + 1 : t + 1].sum())
                    following = step[s + 1] / 2 if s < t else 0
                    matrix[t, s] = decay * (step[s] / 2 + following)
            matrix = matrix.flip(0, 1) if direction else matrix
            y[:, head] += (matrix * (C[:, 0] @ B[:, 0].T)) @ x[:, head]
    close(mixer(inputs)[0], (y.flatten(1) * F.silu(gate)) @ mixer.out_projection.weight.T)


def test_a_turn_of_pi_at_each_step_tells_odd_from_even_distances() -> None:
    """What real decays cannot do, and why the state is complex: the impulse response changes its sign."""
    mixer = small_mixer(seed=12, state=2, head_dim=8, expand=1)
    with_fixed(mixer, "A", -40.0)  # hardly any decay: -A is at its floor
    with_fixed(mixer, "dt", 0.0)
    with_fixed(mixer, "lambda", 60.0)
    with_fixed(mixer, "theta", 60.0)  # tanh = 1
    with torch.no_grad():
        mixer.dt_bias.fill_(math.log(math.expm1(1.0)))  # so that a step is pi
        mixer.in_projection.weight[8:12].zero_()
        mixer.in_projection.weight[8, 1] = 1
        mixer.in_projection.weight[16:20].zero_()  # B and C are their biases
        mixer.D.zero_()
    inputs = torch.zeros(1, 12, 8, dtype=torch.float64)
    inputs[..., 0] = 1
    inputs[0, 3, 1] = 1
    gateless = mixer(inputs)[0] - mixer(inputs * (torch.arange(8) != 1))[0]
    signs = torch.sign((gateless[4:] * gateless[4]).sum(-1)).tolist()
    assert signs == [1.0, -1.0] * 4


def test_angles_of_a_million_positions_are_exact() -> None:
    generator = torch.Generator().manual_seed(13)
    angles = torch.rand(1, 1_000_003, 1, 2, generator=generator) * torch.tensor([0.3, 3.0])
    exact = angles.double().cumsum(1)
    for reverse in (False, True):
        if reverse:
            exact = exact[:, -1:] - exact + angles.double()
        off = (phases(angles, reverse=reverse).double() - exact + math.pi).remainder(2 * math.pi) - math.pi
        assert off.abs().max() < 1e-5
    assert phases(angles, reverse=False).abs().max() < 2 * math.pi + 16 * 3.1


def test_float32_is_near_float64_over_many_turns() -> None:
    mixer = small_mixer(seed=14, steps=0.5, state=4, head_dim=8)
    inputs = random_input(3001, batch=1, seed=15)
    with torch.no_grad():
        expected = mixer(inputs)
        mixer, inputs = mixer.float(), inputs.float()
        close(mixer(inputs).double(), expected, 1e-4)
        streamed = torch.cat(mix_by_chunks(mixer, list(inputs.split([1000, 1, 2000], 1))), 1)
        close(streamed.double(), expected, 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_autocast_is_near_float32(form: str) -> None:
    torch.manual_seed(16)
    mixer = Mamba3(8, **FORMS[form])
    inputs = random_input(70, seed=17).float()
    expected = mixer(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mixer(inputs)
        got.float().square().sum().backward()
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.02 * expected.norm()
    gradients = [parameter.grad for parameter in mixer.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_vanishing_and_huge_steps_stay_finite(bias: float) -> None:
    for form in ("one group", "three ranks"):
        torch.manual_seed(18)
        mixer = Mamba3(8, **FORMS[form])
        with torch.no_grad():
            mixer.dt_bias.fill_(bias)
        inputs = random_input(40).float()
        y = mixer(inputs)
        y.sum().backward()
        gradients = [parameter.grad for parameter in mixer.parameters()]
        assert y.isfinite().all()
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_starts_as_the_authors_code_does() -> None:
    torch.manual_seed(19)
    mixer = Mamba3(256, state=16, head_dim=4, rank=4)
    dt = F.softplus(mixer.dt_bias)
    assert dt.shape == (128, 2) and 0.9e-3 < dt.min() and dt.max() < 0.101
    # log-uniform: as many steps below the geometric mean as above it
    assert abs((dt.log() < math.log(1e-2)).float().mean() - 0.5) < 0.12
    for ones in (mixer.D, mixer.B_norm, mixer.C_norm, mixer.B_bias, mixer.C_bias, mixer.rank_gate):
        assert torch.equal(ones, torch.ones_like(ones))
    assert mixer.B_bias.shape == (4 * 16,) and mixer.rank_x.shape == (4, 128, 4)
    assert torch.equal(mixer.rank_x, torch.full_like(mixer.rank_x, 0.25))
    assert set(Mamba3.state_parameters) <= {name for name, _ in mixer.named_parameters()}
    assert mixer.recurrent and mixer.halo == (1, 1)
    assert Mamba3(8, head_dim=8, conv_width=8).halo == (3, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state": 7}, "state is 7; it must be even"),
        ({"head_dim": 12}, "head_dim 12 and groups 1 do not divide"),
        ({"head_dim": 4, "groups": 3}, "head_dim 4 and groups 3 do not divide"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"conv_width": -1}, "conv_width is -1; it must be at least 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mamba3(8, **options)
