"""LSTM against its recurrence step by step, chunk by chunk against the whole, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genossm.models.mixers.lstm import LSTM
from genossm.models.mixers.mixer import mix_by_chunks

LENGTHS = [1, 2, 17, 64, 65, 97]


def small(hidden: int = 3, layers: int = 1, seed: int = 0) -> LSTM:
    torch.manual_seed(seed)
    mixer = LSTM(4, hidden=hidden, layers=layers).double()
    for name, parameter in mixer.lstm.named_parameters():
        if name.startswith("bias"):
            torch.nn.init.normal_(parameter)
    return mixer


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def sweep(mixer: LSTM, x: torch.Tensor, suffix: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h at each step, and the last h and c, of one direction; x in the direction's order."""
    weights = dict(mixer.lstm.named_parameters())
    W, U = weights[f"weight_ih_{suffix}"], weights[f"weight_hh_{suffix}"]
    b = weights[f"bias_ih_{suffix}"] + weights[f"bias_hh_{suffix}"]
    h = c = x.new_zeros(x.shape[0], mixer.hidden)
    outputs = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ W.T + h @ U.T + b).split(mixer.hidden, 1)
        c = c / (1 + torch.exp(-f)) + torch.tanh(g) / (1 + torch.exp(-i))
        h = torch.tanh(c) / (1 + torch.exp(-o))
        outputs.append(h)
    return torch.stack(outputs, 1), h, c


def slow_lstm(mixer: LSTM, x: torch.Tensor) -> torch.Tensor:
    for layer in range(mixer.layers):
        forward = sweep(mixer, x, f"l{layer}")[0]
        reverse = sweep(mixer, x.flip(1), f"l{layer}_reverse")[0].flip(1)
        x = torch.cat([forward, reverse], -1)
    return x @ mixer.out_projection.weight.T


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_recurrence(length: int) -> None:
    mixer, x = small(), random_input(2, length, 4)
    torch.testing.assert_close(mixer(x), slow_lstm(mixer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 2])
def test_its_gradients_are_those_of_the_recurrence(layers: int) -> None:
    mixer, x = small(layers=layers), random_input(2, 13, 4)
    weights = random_input(2, 13, 4, seed=2).detach()
    wanted = [x, *mixer.parameters()]
    got = torch.autograd.grad((mixer(x) * weights).sum(), wanted)
    expected = torch.autograd.grad((slow_lstm(mixer, x) * weights).sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@given(chunks=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_chunks_give_what_the_whole_gives(chunks: list[int]) -> None:
    mixer = small()
    with torch.no_grad():
        x = random_input(2, sum(chunks), 4)
        got = mix_by_chunks(mixer, x.split(chunks, 1))
        assert [y.shape[1] for y in got] == chunks
        torch.testing.assert_close(torch.cat(got, 1), mixer(x), rtol=1e-10, atol=1e-10)


def test_the_states_are_those_of_the_recurrence_and_a_halo_is_left_out() -> None:
    mixer, x = small(), random_input(2, 20, 4)
    inner = x[:, 3:15]
    y, to_right = mixer.mix(x, 3, 5)
    to_left = mixer.leftward(x, 3, 5)
    assert to_right is not None and to_left is not None
    torch.testing.assert_close(y, mixer(inner), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_right, sweep(mixer, inner, "l0")[1:], rtol=1e-10, atol=1e-10)
    expected = sweep(mixer, inner.flip(1), "l0_reverse")[1:]
    torch.testing.assert_close(to_left, expected, rtol=1e-10, atol=1e-10)


def test_bfloat16_is_near_float32_and_its_states_are_float32() -> None:
    torch.manual_seed(0)
    mixer, x = LSTM(32), torch.randn(2, 97, 32)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = mixer.mix(x.bfloat16())
    assert state is not None and state[1].dtype == torch.float32 and got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_it_starts_with_open_forget_gates() -> None:
    mixer = LSTM(65, layers=2)
    assert mixer.hidden == 33
    for name, parameter in mixer.lstm.named_parameters():
        if name.startswith("bias"):
            expected = torch.zeros(4, 33)
            expected[1] = float(name.startswith("bias_ih"))
            assert torch.equal(parameter, expected.flatten())
        else:
            assert 0.9 / math.sqrt(33) < parameter.abs().max() <= 1 / math.sqrt(33)


def test_a_deep_one_does_not_run_chunk_by_chunk() -> None:
    mixer, x = small(layers=2), random_input(1, 20, 4)
    with pytest.raises(ValueError, match="lstm of 2 layers cannot run chunk by chunk"):
        mix_by_chunks(mixer, x.split(10, 1))
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="lstm of 2 layers takes no states; use layers=1"):
        mixer.mix(x, from_left=(zeros, zeros))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": 0}, "hidden of lstm is 0; it must be at least 1, or None"),
        ({"layers": 0}, "layers of lstm is 0; it must be at least 1"),
    ],
)
def test_an_impossible_lstm_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LSTM(4, **options)
