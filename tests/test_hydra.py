"""Hydra mixer: shifted and flipped scans, the quasiseparable matrix, streaming, initialisation, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genossm.models.mixers.hydra import Hydra
from genossm.models.mixers.mixer import mix_by_chunks

CASES = {
    "seven wide": {"groups": 1, "conv_width": 7},
    "even": {"groups": 2, "conv_width": 4},
    "no convolution": {"groups": 2, "conv_width": 1},
}
Rows = tuple[Tensor, Tensor, Tensor]
"""dt, B and C of one direction, (batch, length, heads, ...), in the order of the sequence."""


def random_mixer(seed: int = 0, **options: object) -> Hydra:
    """A small one in float64 in which no parameter is left at 0 or 1."""
    torch.manual_seed(seed)
    mixer = Hydra(6, state=3, head_dim=3, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.uniform_(-1, 1)
    return mixer


def random_input(length: int, width: int = 6) -> Tensor:
    return torch.randn(2, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def by_shifted_scans(x: Tensor, A: Tensor, forward: Rows, reverse: Rows, d: Tensor) -> Tensor:
    """Proposition 3.7: shift(SS(x)) + flip(shift(SS(flip(x)))) + d x, SS step by step."""

    def shifted_scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
        outputs = [torch.zeros_like(x[:, 0])]
        for x_t, dt_t, B_t, C_t in zip(*(row.unbind(1) for row in (x, dt, B, C)), strict=True):
            h = torch.exp(dt_t * A)[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt_t, x_t, B_t)
            outputs.append(torch.einsum("bhpn,bhn->bhp", h, C_t))
        return torch.stack(outputs[:-1], 1)

    flipped = shifted_scan(x.flip(1), *(row.flip(1) for row in reverse)).flip(1)
    return shifted_scan(x, *forward) + flipped + d[..., None] * x


def by_matrix(x: Tensor, A: Tensor, forward: Rows, reverse: Rows, d: Tensor) -> Tensor:
    """Equation 3: a lower triangle from the one direction, an upper one from the other, and a free diagonal."""
    length = x.shape[1]

    def entry(i: int, j: int) -> Tensor:
        if i == j:
            return d[:, i]
        (dt, B, C), step = (forward, 1) if i > j else (reverse, -1)
        decay = torch.ones_like(d[:, 0])
        for k in range(j + step, i, step):
            decay = decay * torch.exp(dt[:, k] * A)
        return (C[:, i - step] * B[:, j]).sum(-1) * decay * dt[:, j]

    matrix = [[entry(i, j) for j in range(length)] for i in range(length)]
    return torch.einsum("ijbh,bjhp->bihp", torch.stack([torch.stack(row) for row in matrix]), x)


def reference(
    mixer: Hydra, u: Tensor, mixed_by: Callable[..., Tensor], *, conv_width: int, groups: int
) -> Tensor:
    heads, inner = 4, 12
    batch, length, _ = u.shape
    projected = u @ mixer.in_projection.weight.T
    gate, mixed, dt = projected.tensor_split([inner, 2 * inner + 4 * groups * 3], -1)
    dt = torch.log1p(torch.exp(dt.reshape(batch, length, heads, 2) + mixer.dt_bias[:, None]))
    before = (conv_width - 1) // 2
    rows = F.pad(mixed, (0, 0, before, conv_width - 1 - before))
    taps = mixer.conv_weight.unbind(1)
    mixed = F.silu(mixer.conv_bias + sum(tap * rows[:, k : k + length] for k, tap in enumerate(taps)))
    flat = mixed[..., :inner]
    states = mixed[..., inner:].reshape(batch, length, 4, groups, 3).repeat_interleave(heads // groups, 3)
    B_forward, C_forward, B_reverse, C_reverse = states.unbind(2)
    y = mixed_by(
        flat.reshape(batch, length, heads, 3),
        -torch.exp(mixer.A_log),
        (dt[..., 0], B_forward, C_forward),
        (dt[..., 1], B_reverse, C_reverse),
        flat @ mixer.diagonal.weight.T + mixer.D,
    ).reshape(batch, length, inner)
    normed = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm_weight
    return (normed * gate / (1 + torch.exp(-gate))) @ mixer.out_projection.weight.T


@pytest.mark.parametrize("length", [1, 2, 17, 64, 65, 131])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_two_shifted_scans_and_a_diagonal_with_its_gradients(case: str, length: int) -> None:
    options = CASES[case]
    mixer, u = random_mixer(**options), random_input(length).requires_grad_()
    got, expected = mixer(u), reference(mixer, u, by_shifted_scans, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    towards = torch.randn_like(got)
    # A single position is mixed with nothing: what makes dt, B and C has no gradient in the reference.
    inputs = [u, *mixer.parameters()]
    for name, mine, theirs in zip(
        ["input", *(name for name, _ in mixer.named_parameters())],
        torch.autograd.grad(got, inputs, towards, materialize_grads=True),
        torch.autograd.grad(expected, inputs, towards, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("length", [1, 2, 17])
def test_it_is_a_quasiseparable_matrix(length: int) -> None:
    options = CASES["seven wide"]
    mixer, u = random_mixer(**options), random_input(length)
    expected = reference(mixer, u, by_matrix, **options)
    torch.testing.assert_close(mixer(u), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_chunk_by_chunk_equals_the_whole(case: str, lengths: list[int]) -> None:
    mixer, u = random_mixer(**CASES[case]), random_input(sum(lengths))
    with torch.no_grad():
        pieces = mix_by_chunks(mixer, u.split(lengths, 1))
        assert [piece.shape[1] for piece in pieces] == lengths
        torch.testing.assert_close(torch.cat(pieces, 1), mixer(u), rtol=1e-10, atol=1e-10)


def test_it_starts_as_the_authors_do() -> None:
    torch.manual_seed(0)
    mixer = Hydra(256, state=16, head_dim=4)
    assert mixer.conv_weight.shape == (512 + 4 * 16, 7) and mixer.halo == (3, 3)
    assert torch.equal(mixer.A_log.exp(), torch.ones(128)) and torch.equal(mixer.D, torch.ones(128))
    dt = F.softplus(mixer.dt_bias)
    assert dt.shape == (128,) and 0.9e-3 < dt.min() and dt.max() < 0.101
    assert abs((dt.log() < math.log(1e-2)).float().mean() - 0.5) < 0.12
    assert {name for name, _ in mixer.named_parameters()} >= {*mixer.state_parameters}


def test_autocast_to_bfloat16_stays_near_float32() -> None:
    torch.manual_seed(0)
    mixer = Hydra(32, state=16, head_dim=16)
    u = torch.randn(2, 300, 32)
    expected = mixer(u)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(u)
        state = mixer.leftward(u)
    assert got.dtype == torch.bfloat16 and state is not None and state[0].dtype == torch.float32
    assert (got.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 5}, "head_dim 5 and groups 1 do not divide the inner width 32"),
        ({"head_dim": 8, "groups": 3}, "groups 3 do not divide"),
        ({"conv_width": 0}, "conv_width is 0; it must be at least 1"),
        ({"state": 0}, "state is 0; it must be at least 1"),
    ],
)
def test_an_impossible_one_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Hydra(16, **options)  # type: ignore[arg-type]
