"""Attention against a softmax over every pair of positions, chunk by chunk against the whole, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from genossm.models.mixers.attention import Attention
from genossm.models.mixers.mixer import mix_by_chunks

LENGTHS = [1, 2, 17, 64, 65, 97]


def small(window: int | None = 8, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    mixer = Attention(8, window=window, head_dim=4, base=50.0).double()
    torch.nn.init.normal_(mixer.query_scale)
    torch.nn.init.normal_(mixer.key_scale)
    return mixer


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def slow_attention(mixer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Query by query, with pairs of components as complex numbers turned by the position itself."""
    length, width = x.shape[1:]
    size, half = mixer.head_dim, mixer.head_dim // 2
    outputs = []
    weights = mixer.in_projection.weight.view(3, -1, size, width)
    for head in range(mixer.heads):
        q, k, v = (x @ weights[part, head].T for part in range(3))
        turned = []
        for values, scale in ((q, mixer.query_scale), (k, mixer.key_scale)):
            values = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
            pairs = torch.complex(values[..., :half], values[..., half:])
            angles = torch.tensor(
                [[(1000 + i) * mixer.base ** (-2 * p / size) for p in range(half)] for i in range(length)],
                dtype=torch.float64,
            )
            turned.append(pairs * torch.polar(torch.ones_like(angles), angles))
        rows = []
        for i in range(length):
            near = [j for j in range(length) if mixer.window is None or abs(i - j) <= mixer.window]
            scores = (turned[0][:, i, None] * turned[1][:, near].conj()).real.sum(-1) / math.sqrt(size)
            rows.append(torch.einsum("bk,bkp->bp", scores.softmax(-1), v[:, near]))
        outputs.append(torch.stack(rows, 1))
    return torch.cat(outputs, -1) @ mixer.out_projection.weight.T


@pytest.mark.parametrize("window", [1, 8, 200, None])
@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_a_softmax_over_the_window(length: int, window: int | None) -> None:
    mixer, x = small(window), random_input(2, length, 8)
    torch.testing.assert_close(mixer(x), slow_attention(mixer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [5, None])
def test_its_gradients_are_those_of_the_softmax(window: int | None) -> None:
    mixer, x = small(window), random_input(2, 28, 8)
    weights = random_input(2, 28, 8, seed=2).detach()
    wanted = [x, *mixer.parameters()]
    got = torch.autograd.grad((mixer(x) * weights).sum(), wanted)
    expected = torch.autograd.grad((slow_attention(mixer, x) * weights).sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@given(chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6), window=st.sampled_from([1, 3, 8, 50]))
def test_chunks_give_what_the_whole_gives(chunks: list[int], window: int) -> None:
    mixer = small(window)
    with torch.no_grad():
        x = random_input(2, sum(chunks), 8)
        got = mix_by_chunks(mixer, x.split(chunks, 1))
        assert [y.shape[1] for y in got] == chunks
        torch.testing.assert_close(torch.cat(got, 1), mixer(x), rtol=1e-10, atol=1e-10)


def test_more_halo_than_the_window_changes_nothing() -> None:
    mixer, x = small(4), random_input(1, 50, 8)
    y, state = mixer.mix(x, 13, 9)
    assert state is None
    torch.testing.assert_close(y, mixer(x)[:, 13:41], rtol=1e-10, atol=1e-10)


def test_an_output_depends_on_its_window_and_on_nothing_beyond() -> None:
    mixer, x = small(6), random_input(1, 61, 8)
    for position in (0, 5, 30, 55, 60):
        (gradient,) = torch.autograd.grad(mixer(x)[:, position].sum(), x)
        seen = gradient.abs().amax((0, 2)).nonzero().flatten().tolist()
        assert seen == list(range(max(0, position - 6), min(61, position + 7)))
    assert mixer.halo == (6, 6)


def test_no_block_sees_more_than_three_windows_and_masks_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []

    def recorded(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_mask: torch.Tensor
    ) -> torch.Tensor:
        calls.append((q.shape[0], k.shape[2], attn_mask.numel()))
        return attend(q, k, v, attn_mask=attn_mask)

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    mixer = small(8)
    mixer(random_input(2, 1003, 8))
    blocks, keys, mask = zip(*calls, strict=True)
    assert len(calls) == 3 and sum(blocks) == 2 * (1 + 123 + 1)
    assert max(keys) <= 24 and max(mask) <= 2 * 8 * 24


def test_bfloat16_is_near_float32() -> None:
    torch.manual_seed(0)
    mixer, x = Attention(64, window=16, head_dim=16), torch.randn(2, 97, 64)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_it_starts_with_scales_of_one_and_scores_within_bounds() -> None:
    mixer = Attention(32, head_dim=16)
    assert torch.equal(mixer.query_scale, torch.ones(16)) and torch.equal(mixer.key_scale, torch.ones(16))
    assert mixer.window == 256 and mixer.heads == 2 and not mixer.recurrent
    assert set(Attention.state_parameters) <= {name for name, _ in mixer.named_parameters()}
    # without normalised queries and keys an input 1000 times as large would make the softmax a maximum
    x = torch.randn(1, 40, 32)
    torch.testing.assert_close(mixer(1000 * x) / 1000, mixer(x), rtol=1e-3, atol=1e-3)


def test_without_a_window_there_is_no_halo() -> None:
    mixer, x = small(None), random_input(1, 20, 8)
    with pytest.raises(ValueError, match="cannot run chunk by chunk; give it a window"):
        mix_by_chunks(mixer, x.split(10, 1))
    torch.testing.assert_close(mixer.mix(x, 3, 4)[0], mixer(x)[:, 3:16], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window of attention is 0; it must be at least 1, or None"),
        ({"head_dim": 5}, "head_dim of attention is 5 at width 30; it must be even and divide the width"),
        ({"head_dim": 4}, "head_dim of attention is 4 at width 30"),
        ({"head_dim": 10, "base": 1.0}, "base of attention's rotary positions is 1.0; it must be above 1"),
    ],
)
def test_an_impossible_attention_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Attention(30, **options)
