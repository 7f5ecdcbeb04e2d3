"""Mamba mixer: step-by-step reference, streaming, initialisation, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genossm.kernels.selective_scan import selective_scan
from genossm.models.mixers import mamba
from genossm.models.mixers.mamba import Mamba
from genossm.models.mixers.mixer import mix_by_chunks

CASES = {
    "fused": {"bidirectional": "fused", "conv_width": 5, "dt_rank": 2},
    "fused, even": {"bidirectional": "fused", "conv_width": 4, "dt_rank": 1},
    "fused, no convolution": {"bidirectional": "fused", "conv_width": 1, "dt_rank": 3},
    "tied": {"bidirectional": "tied", "conv_width": 4, "dt_rank": 2},
    "tied, wide": {"bidirectional": "tied", "conv_width": 9, "dt_rank": 1},
}


def random_mixer(seed: int = 0, **options: object) -> Mamba:
    """A small one in float64 in which no parameter is left at 0 or 1."""
    torch.manual_seed(seed)
    mixer = Mamba(6, state=3, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.uniform_(-1, 1)
    return mixer


def random_input(length: int, width: int = 6) -> Tensor:
    return torch.randn(2, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def convolved(x: Tensor, weight: Tensor, bias: Tensor, before: int, after: int) -> Tensor:
    rows = F.pad(x, (0, 0, before, after))
    taps = weight.unbind(1)
    return F.silu(bias + sum(tap * rows[:, k : k + x.shape[1]] for k, tap in enumerate(taps)))


def scanned(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t; y_t = C_t . h_t, from left to right."""
    h = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(row.unbind(1) for row in (x, dt, B, C)), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + torch.einsum("be,be,bn->ben", dt_t, x_t, B_t)
        outputs.append(torch.einsum("ben,bn->be", h, C_t))
    return torch.stack(outputs, 1)


def reference(mixer: Mamba, u: Tensor, *, conv_width: int, bidirectional: str, dt_rank: int) -> Tensor:
    """Fused: both directions read the same rows. Tied: two Mambas, one of them on the flipped input."""
    x, z = (u @ mixer.in_projection.weight.T).chunk(2, -1)
    tied = bidirectional == "tied"
    total: Tensor | float = 0.0
    for way in (0, 1):

        def turned(row: Tensor, way: int = way) -> Tensor:
            return row.flip(1) if way else row

        if tied:
            mine = convolved(turned(x), mixer.conv_weight[way], mixer.conv_bias[way], conv_width - 1, 0)
        else:
            before = (conv_width - 1) // 2
            mine = turned(convolved(x, mixer.conv_weight, mixer.conv_bias, before, conv_width - 1 - before))
        own = way if tied else 0
        rows = mine @ mixer.get_parameter(f"x_projection.{own}.weight").T
        low_rank, B, C = rows.tensor_split([dt_rank, dt_rank + 3], -1)
        widened = low_rank @ mixer.get_parameter(f"dt_projection.{own}.weight").T
        step = torch.log1p(torch.exp(widened + mixer.dt_bias[:, way]))
        y = scanned(mine, step, -torch.exp(mixer.A_log[..., way]), B, C)
        if tied or way == 0:
            y = y + (mixer.D[:, way] if tied else mixer.D) * mine
        total = total + turned(y)
    return (total * z / (1 + torch.exp(-z))) @ mixer.out_projection.weight.T


@pytest.mark.parametrize("length", [1, 2, 17, 64, 65, 131])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_recurrence_step_by_step_with_its_gradients(case: str, length: int) -> None:
    options = CASES[case]
    mixer, u = random_mixer(**options), random_input(length).requires_grad_()
    got, expected = mixer(u), reference(mixer, u, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    towards = torch.randn_like(got)
    inputs = [u, *mixer.parameters()]
    for name, mine, theirs in zip(
        ["input", *(name for name, _ in mixer.named_parameters())],
        torch.autograd.grad(got, inputs, towards),
        torch.autograd.grad(expected, inputs, towards),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_chunk_by_chunk_equals_the_whole(case: str, lengths: list[int]) -> None:
    mixer, u = random_mixer(**CASES[case]), random_input(sum(lengths))
    with torch.no_grad():
        pieces = mix_by_chunks(mixer, u.split(lengths, 1))
        assert [piece.shape[1] for piece in pieces] == lengths
        torch.testing.assert_close(torch.cat(pieces, 1), mixer(u), rtol=1e-10, atol=1e-10)


def test_widths_that_are_not_given() -> None:
    fused, tied = Mamba(40), Mamba(40, bidirectional="tied")
    assert fused.conv_weight.shape == (80, 5) and fused.halo == (2, 2)
    assert tied.conv_weight.shape == (2, 80, 4) and tied.halo == (3, 3)
    assert fused.dt_projection[0].weight.shape == (80, 3)


def test_the_tied_form_shares_the_projections_in_and_out_alone() -> None:
    fused, tied = Mamba(32), Mamba(32, conv_width=5, bidirectional="tied")
    alone = {name: value.numel() for name, value in fused.named_parameters()}
    shared = ["in_projection.weight", "out_projection.weight", "A_log", "dt_bias"]
    twice = sum(2 * count for name, count in alone.items() if name not in shared)
    assert sum(value.numel() for value in tied.parameters()) == twice + sum(alone[name] for name in shared)
    assert {name for name, _ in tied.named_parameters()} >= {*tied.state_parameters}


@pytest.mark.parametrize("bidirectional", ["fused", "tied"])
def test_it_starts_as_the_paper_says(bidirectional: str) -> None:
    torch.manual_seed(0)
    mixer = Mamba(128, bidirectional=bidirectional)  # type: ignore[arg-type]
    assert mixer.A_log.shape == (256, 16, 2)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17)[:, None].expand(256, 16, 2))
    dt = F.softplus(mixer.dt_bias)
    assert dt.shape == (256, 2) and 0.9e-3 < dt.min() and dt.max() < 0.101
    assert abs((dt.log() < math.log(1e-2)).float().mean() - 0.5) < 0.12
    for projection in mixer.dt_projection:
        largest = projection.weight.abs().max()  # type: ignore[operator, union-attr]
        assert 0.95 * 8**-0.5 < largest <= 8**-0.5
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))


@pytest.mark.parametrize("bidirectional", ["fused", "tied"])
def test_autocast_to_bfloat16_stays_near_float32(bidirectional: str) -> None:
    torch.manual_seed(0)
    mixer = Mamba(32, bidirectional=bidirectional)  # type: ignore[arg-type]
    u = torch.randn(2, 300, 32)
    expected = mixer(u)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(u)
        state = mixer.leftward(u)
    assert got.dtype == torch.bfloat16 and state is not None and state[0].dtype == torch.float32
    assert (got.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_the_decay_is_computed_in_float32_or_better(
    dtype: torch.dtype, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def watched(x: Tensor, dt: Tensor, A: Tensor, *others: Tensor, **options: object) -> object:
        seen.append(A.dtype)
        return selective_scan(x, dt, A, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(mamba, "selective_scan", watched)
    assert random_mixer().to(dtype)(random_input(9).to(dtype)).dtype == dtype
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dt_rank": 0}, "dt_rank is 0; it must be at least 1"),
        ({"conv_width": 0}, "conv_width is 0; it must be at least 1"),
        ({"state": 0}, "state is 0; it must be at least 1"),
        ({"expand": 0}, "expand is 0; it must be at least 1"),
        ({"bidirectional": "none"}, "bidirectional is 'none'; allowed are 'fused' and 'tied'"),
    ],
)
def test_an_impossible_one_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mamba(16, **options)  # type: ignore[arg-type]
