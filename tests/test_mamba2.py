"""Mamba-2 mixer: step-by-step reference, streaming, initialisation, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genossm.kernels.ssd import ssd
from genossm.models.mixers import mamba2
from genossm.models.mixers.mamba2 import Mamba2
from genossm.models.mixers.mixer import mix_by_chunks

CASES = {
    "fused": {"bidirectional": "fused", "groups": 1, "conv_width": 5},
    "fused, even": {"bidirectional": "fused", "groups": 2, "conv_width": 4},
    "fused, no convolution": {"bidirectional": "fused", "groups": 2, "conv_width": 1},
    "tied": {"bidirectional": "tied", "groups": 2, "conv_width": 4},
    "tied, wide": {"bidirectional": "tied", "groups": 1, "conv_width": 9},
}


def random_mixer(seed: int = 0, **options: object) -> Mamba2:
    """A small one in float64 in which no parameter is left at 0 or 1."""
    torch.manual_seed(seed)
    mixer = Mamba2(6, state=3, head_dim=3, **options).double()  # type: ignore[arg-type]
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
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t; y_t = h_t . C_t, from left to right."""
    h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(row.unbind(1) for row in (x, dt, B, C)), strict=True):
        h = torch.exp(dt_t * A)[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt_t, x_t, B_t)
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C_t))
    return torch.stack(outputs, 1)


def reference(mixer: Mamba2, u: Tensor, *, conv_width: int, bidirectional: str, groups: int) -> Tensor:
    heads, inner = 4, 12
    batch, length, _ = u.shape
    projected = u @ mixer.in_projection.weight.T
    gate, mixed, dt = projected.tensor_split([inner, 2 * inner + 2 * groups * 3], -1)
    dt = dt.reshape(batch, length, heads, -1)
    tied = bidirectional == "tied"
    total: Tensor | float = 0.0
    for way in (0, 1):

        def turned(row: Tensor, way: int = way) -> Tensor:
            return row.flip(1) if way else row

        if tied:
            mine = convolved(turned(mixed), mixer.conv_weight[way], mixer.conv_bias[way], conv_width - 1, 0)
        else:
            before = (conv_width - 1) // 2
            mine = turned(
                convolved(mixed, mixer.conv_weight, mixer.conv_bias, before, conv_width - 1 - before)
            )
        x = mine[..., :inner].reshape(batch, length, heads, 3)
        B, C = mine[..., inner:].reshape(batch, length, 2, groups, 3).unbind(2)
        B, C = (row.repeat_interleave(heads // groups, 2) for row in (B, C))
        step = torch.log1p(torch.exp(turned(dt[..., 0 if tied else way]) + mixer.dt_bias[:, way]))
        y = scanned(x, step, -torch.exp(mixer.A_log[:, way]), B, C)
        if tied or way == 0:
            y = y + (mixer.D[:, way] if tied else mixer.D)[:, None] * x
        total = total + turned(y)
    assert isinstance(total, Tensor)
    gated = total.reshape(batch, length, inner) * gate / (1 + torch.exp(-gate))
    normed = gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight
    return normed @ mixer.out_projection.weight.T


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


@pytest.mark.parametrize(
    ("options", "halo"),
    [
        ({"conv_width": 5}, (2, 2)),
        ({"conv_width": 4}, (1, 2)),
        ({"conv_width": 1}, (0, 0)),
        ({"conv_width": 4, "bidirectional": "tied"}, (3, 3)),
    ],
)
def test_the_halo_is_what_the_convolutions_reach(options: dict[str, object], halo: tuple[int, int]) -> None:
    mixer = random_mixer(**options)
    assert mixer.halo == halo and mixer.recurrent


def test_parameters_of_the_fused_form_keep_their_names_and_shapes() -> None:
    shapes = {
        name: tuple(value.shape) for name, value in Mamba2(16, state=8, head_dim=8).state_dict().items()
    }
    assert shapes == {
        "conv_weight": (48, 5),
        "conv_bias": (48,),
        "A_log": (4, 2),
        "dt_bias": (4, 2),
        "D": (4,),
        "in_projection.weight": (32 + 48 + 8, 16),
        "norm.weight": (32,),
        "out_projection.weight": (16, 32),
    }
    assert list(shapes)[:5] == ["conv_weight", "conv_bias", "A_log", "dt_bias", "D"]


def test_the_tied_form_shares_the_projections_alone() -> None:
    mixer = Mamba2(16, state=8, head_dim=8, bidirectional="tied")
    shapes = {name: tuple(value.shape) for name, value in mixer.named_parameters()}
    assert shapes["in_projection.weight"] == (32 + 48 + 4, 16) and shapes["conv_weight"] == (2, 48, 5)
    assert shapes["conv_bias"] == (2, 48)
    assert {shapes[name] for name in mixer.state_parameters} == {(4, 2)}


@pytest.mark.parametrize("bidirectional", ["fused", "tied"])
def test_it_starts_as_the_paper_says(bidirectional: str) -> None:
    torch.manual_seed(0)
    mixer = Mamba2(256, state=16, head_dim=4, bidirectional=bidirectional)  # type: ignore[arg-type]
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() and A.max() <= 16 and abs(A.mean() - 8.5) < 1
    assert 0.9e-3 < dt.min() and dt.max() < 0.101
    assert abs((dt.log() < math.log(1e-2)).float().mean() - 0.5) < 0.12
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert not torch.equal(mixer.A_log[:, 0], mixer.A_log[:, 1])


@pytest.mark.parametrize("bidirectional", ["fused", "tied"])
def test_autocast_to_bfloat16_stays_near_float32(bidirectional: str) -> None:
    torch.manual_seed(0)
    mixer = Mamba2(32, state=16, head_dim=16, bidirectional=bidirectional)  # type: ignore[arg-type]
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
        return ssd(x, dt, A, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(mamba2, "ssd", watched)
    assert random_mixer().to(dtype)(random_input(9).to(dtype)).dtype == dtype
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 5}, "head_dim 5 and groups 1 do not divide the inner width 32"),
        ({"head_dim": 8, "groups": 3}, "groups 3 do not divide"),
        ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ({"conv_width": 0}, "conv_width is 0; it must be at least 1"),
        ({"state": -1}, "state is -1; it must be at least 1"),
        ({"bidirectional": "both"}, "bidirectional is 'both'; allowed are 'fused' and 'tied'"),
    ],
)
def test_an_impossible_one_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mamba2(16, **options)  # type: ignore[arg-type]
