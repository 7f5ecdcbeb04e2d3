"""S4 against a dense HiPPO-LegS recurrence, chunks against the whole, and how it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import genossm.models.mixers.s4 as s4_module
from genossm.models.mixers.mixer import mix_by_chunks
from genossm.models.mixers.s4 import S4

LENGTHS = [1, 2, 17, 64, 65, 97]


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def small(width: int = 2, seed: int = 0, trained: bool = True, **options: int) -> S4:
    torch.manual_seed(seed)
    mixer = S4(width, **{"state": 8, **options}).double()
    if trained:
        with torch.no_grad():
            for name in ("log_A_real", "A_imag", "P", "B", "log_dt"):
                parameter = getattr(mixer.ssm, name)
                parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def pairs(vector: torch.Tensor) -> torch.Tensor:
    half = torch.complex(vector[..., 0], vector[..., 1])
    return torch.cat([half, half.conj()], -1)


def both_ways(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: list[torch.Tensor], dt: torch.Tensor
) -> torch.Tensor:
    """One channel (batch, length) through the bilinear discretisation of (A, B, C), step by step."""
    identity = torch.eye(A.shape[0], dtype=A.dtype)
    inverse = torch.linalg.inv(identity - dt / 2 * A)
    A_bar, B_bar = inverse @ (identity + dt / 2 * A), dt * (inverse @ B)
    length = x.shape[1]
    outputs = [torch.zeros(x.shape[0], dtype=x.dtype) for _ in range(length)]
    for row, order in zip(C, (range(length), reversed(range(length))), strict=True):
        h = torch.zeros(x.shape[0], A.shape[0], dtype=A.dtype)
        for t in order:
            h = h @ A_bar.T + x[:, t, None] * B_bar
            outputs[t] = outputs[t] + (h @ row).real
    return torch.stack(outputs, 1)


def slow_s4(mixer: S4, x: torch.Tensor) -> torch.Tensor:
    """Lambda - P P* as a dense complex matrix over all N states."""
    ssm = mixer.ssm
    if isinstance(mixer.in_projection, torch.nn.Linear):
        x = F.linear(x, mixer.in_projection.weight, mixer.in_projection.bias)
    channels = []
    for d in range(x.shape[2]):
        Lambda = pairs(torch.stack([-ssm.log_A_real[d].exp(), ssm.A_imag[d]], -1))
        P, B = pairs(ssm.P[d]), pairs(ssm.B[d])
        A = torch.diag(Lambda) - torch.outer(P, P.conj())
        y = both_ways(x[:, :, d], A, B, [pairs(ssm.C[0, d]), pairs(ssm.C[1, d])], ssm.log_dt[d].exp())
        channels.append(y + ssm.D[d] * x[:, :, d])
    y = torch.stack(channels, 2)
    return F.glu(F.linear(F.gelu(y), mixer.out_projection.weight, mixer.out_projection.bias))


@pytest.fixture
def born_in_float64() -> Iterator[None]:
    """Modules whose first parameters are not rounded to float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("born_in_float64")
def test_it_starts_as_the_dense_hippo_legs_recurrence() -> None:
    mixer, x = small(state=64, trained=False), random_input(2, 150, 2).detach()
    n = torch.arange(64, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    A = torch.where(n[:, None] > n, -root[:, None] * root, -torch.diag(n + 1))
    # the basis: eigenvectors of the normal part, in the phase that makes P positive
    P = torch.sqrt(n + 0.5)
    eigenvalues, V = torch.linalg.eig(A + torch.outer(P, P))
    kept = eigenvalues.imag.argsort()[32:]
    V = V[:, kept]
    V = V * (V.mH @ P.to(V.dtype)).sgn()
    y = torch.empty_like(x)
    with torch.no_grad():
        for d in range(2):
            # C z + conj = 2 Re(C V* h)
            C = [2 * (torch.view_as_complex(mixer.ssm.C[i, d]) @ V.mH).real for i in (0, 1)]
            y[:, :, d] = both_ways(x[:, :, d], A, root, C, mixer.ssm.log_dt[d].exp())
        got = mixer.ssm(x)
        torch.testing.assert_close(got, y + mixer.ssm.D * x, rtol=1e-10, atol=1e-10)


def test_it_and_its_gradients_are_those_of_the_recurrence() -> None:
    mixer, x = small(), random_input(2, 23, 2)
    weights = random_input(2, 23, 2, seed=2).detach()
    got, expected = mixer(x), slow_s4(mixer, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    wanted = [x, *mixer.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_recurrence_for_any_length(length: int) -> None:
    mixer, x = small(expand=2), random_input(2, length, 2)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), slow_s4(mixer, x), rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(chunks=st.lists(st.integers(1, 40), min_size=1, max_size=5), state=st.sampled_from([2, 8, 64]))
def test_chunks_give_what_the_whole_gives(chunks: list[int], state: int) -> None:
    mixer = small(state=state)
    with torch.no_grad():
        x = random_input(2, sum(chunks), 2)
        got = mix_by_chunks(mixer, x.split(chunks, 1))
        assert [y.shape[1] for y in got] == chunks
        torch.testing.assert_close(torch.cat(got, 1), mixer(x), rtol=1e-10, atol=1e-10)


def test_long_chunks_and_single_positions_give_what_the_whole_gives() -> None:
    mixer = small(state=64)
    with torch.no_grad():
        x = random_input(1, 4130, 2)
        got = torch.cat(mix_by_chunks(mixer, x.split([1, 1, 3001, 1, 1126], 1)), 1)
        torch.testing.assert_close(got, mixer(x), rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_the_states() -> None:
    mixer, x = small(), random_input(1, 12, 2)
    whole = torch.autograd.grad(mixer(x)[:, 2].sum(), x)
    parts = torch.cat(mix_by_chunks(mixer, x.split([5, 3, 4], 1)), 1)
    torch.testing.assert_close(torch.autograd.grad(parts[:, 2].sum(), x), whole, rtol=1e-10, atol=1e-10)


def test_kernel_and_gradients_do_not_depend_on_how_the_frequencies_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ssm = small().ssm
    inputs = [parameter for name, parameter in ssm.named_parameters() if name != "D"]
    results = []
    for elements in (1 << 20, 24, 1):
        monkeypatch.setattr(s4_module, "CAUCHY_ELEMENTS", elements)
        kernels = ssm.kernels(50)
        weights = torch.linspace(-1, 1, kernels.numel(), dtype=torch.float64).view_as(kernels)
        results.append((kernels, *torch.autograd.grad((kernels * weights).sum(), inputs)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def test_no_tensor_has_channels_times_states_times_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s4_module, "CAUCHY_ELEMENTS", 1 << 15)
    ssm, length = S4(4, state=64).ssm, 10_000
    u = torch.randn(1, length, 4, requires_grad=True)
    state = (torch.zeros(1, 4, 64),)
    with Largest() as largest:
        y, (after,) = ssm.mix(u, state, state)
        (y.sum() + after.abs().sum()).backward()
    assert largest.elements < 4 * 32 * length / 4


def test_a_longer_kernel_begins_with_the_shorter() -> None:
    ssm = small(state=64).ssm
    with torch.no_grad():
        long = ssm.kernels(1000)
        for length in (1, 2, 3, 500, 999):
            torch.testing.assert_close(ssm.kernels(length), long[..., :length], rtol=1e-10, atol=1e-11)


def test_no_state_grows_whatever_the_parameters() -> None:
    for seed in range(5):
        mixer = small(seed=seed, state=16)
        with torch.no_grad():
            mixer.ssm.P.mul_(5)
            A_bar, _, _ = mixer.ssm.discrete()
        assert torch.linalg.matrix_norm(A_bar, 2).max() < 1


def test_long_kernels_are_exact_in_float32() -> None:
    mixer = S4(2)
    kernels = mixer.ssm.kernels(5000)
    assert kernels.dtype == torch.float32
    exact = mixer.double().ssm.kernels(5000)
    assert (kernels - exact).abs().max() < 1e-6 * exact.abs().max()


def test_bfloat16_is_near_float32_and_the_state_space_model_stays_in_float32() -> None:
    torch.manual_seed(0)
    mixer, x = S4(16, expand=2, state=16), torch.randn(2, 97, 16)
    u = mixer.in_projection(x)
    expected, exact = mixer(x), mixer.ssm(u)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x)
        _, state = mixer.mix(x)
        assert torch.equal(mixer.ssm(u), exact)
    assert got.dtype == torch.bfloat16
    assert state is not None and state[0].dtype == torch.float32 and state[0].shape == (2, 32, 16)
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())
    assert mixer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_it_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    mixer = S4(256, state=64)
    ssm = mixer.ssm
    dt = ssm.log_dt.exp()
    assert 0.9e-3 < dt.min() and dt.max() < 0.101
    assert abs((dt < 1e-2).float().mean() - 0.5) < 0.12  # log-uniform
    torch.testing.assert_close(ssm.log_A_real.exp(), torch.full((256, 32), 0.5))
    # |P|^2 and |B|^2 over all states: sums of n + 1/2 and of 2 n + 1
    torch.testing.assert_close(2 * ssm.P[0].square().sum(), torch.tensor(64.0**2 / 2))
    torch.testing.assert_close(2 * ssm.B[0].square().sum(), torch.tensor(64.0**2))
    assert abs(ssm.C.square().sum(-1).mean() - 1) < 0.05 and abs(ssm.D.std() - 1) < 0.2
    assert set(S4.state_parameters) <= {name for name, _ in mixer.named_parameters()}
    assert mixer.halo == (0, 0) and mixer.recurrent


def test_parameters_are_not_views_of_each_other() -> None:
    """Rows that share memory would train together."""
    for parameter in S4(4, state=8).parameters():
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == 4 * parameter.numel()


@pytest.mark.parametrize(
    ("width", "options", "words"),
    [
        (4, {"state": 5}, "state is 5; choose an even number from 2 up"),
        (4, {"expand": 0}, "width 4 and expand 0: both must be at least 1"),
        (0, {}, "width 0 and expand 1: both must be at least 1"),
    ],
)
def test_an_impossible_s4_is_refused(width: int, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        S4(width, **options)


def test_the_generating_function_is_the_sum_of_powers() -> None:
    """At every root of unity, -1 (where the bilinear map has its pole) included."""
    ssm = small(width=1).ssm
    with torch.no_grad():
        A_bar, B_bar, C = ssm.discrete()
        z = torch.exp(-2j * math.pi * torch.arange(6, dtype=torch.float64) / 6)
        spectrum = torch.fft.fft(ssm.kernels(6))[:, 0]
        v, expected = B_bar[0], torch.zeros(2, 6, dtype=torch.complex128)
        for j in range(6):
            expected += (C[:, 0] @ v)[:, None] * z**j
            v = A_bar[0] @ v
        torch.testing.assert_close(spectrum, expected, rtol=1e-10, atol=1e-10)
