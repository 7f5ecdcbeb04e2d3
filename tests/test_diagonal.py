"""HiPPO matrices, discretisation, and the diagonal state-space model's kernels and states, each from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genossm.models.mixers.diagonal import DiagonalSSM, Discretisation, discretise, initial_poles, powers
from genossm.models.mixers.hippo import legs, legs_normal_low_rank

RULES: list[Discretisation] = ["zoh", "bilinear"]


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def small(state: int = 6, seed: int = 0, **options: str) -> DiagonalSSM:
    torch.manual_seed(seed)
    ssm = DiagonalSSM(2, state=state, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():  # as after training
        for name in ("log_A_real", "A_imag", "log_dt"):
            getattr(ssm, name).add_(0.3 * torch.randn_like(getattr(ssm, name)))
    return ssm


def test_legs_is_the_matrix_of_the_paper() -> None:
    A, B = legs(3)
    s3, s5, s15 = math.sqrt(3), math.sqrt(5), math.sqrt(15)
    torch.testing.assert_close(A, -torch.tensor([[1, 0, 0], [s3, 2, 0], [s5, s15, 3]], dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, s3, s5], dtype=torch.float64))


def test_legs_keeps_legendre_coefficients() -> None:
    """The coefficients of u(s) = s^2 on [0, t] in normalised Legendre polynomials solve h' = (A h + B u) / t."""
    A, B = legs(5)
    # s^2 on [0, 1] is (1/3) P0 + (1/2) P1 + (1/6) P2 in Legendre polynomials of 2s - 1, whose norms are 1 / sqrt(2n + 1)
    c = torch.tensor([1 / 3, 1 / 2 / math.sqrt(3), 1 / 6 / math.sqrt(5), 0, 0], dtype=torch.float64)
    # h(t) = t^2 c, u(t) = t^2: h' = 2 t c
    torch.testing.assert_close(A @ c + B, 2 * c)


@pytest.mark.parametrize("state", [2, 8, 64])
def test_legs_is_normal_less_rank_one(state: int) -> None:
    Lambda, P, B = legs_normal_low_rank(state)
    assert Lambda.shape == P.shape == B.shape == (state // 2,)
    assert torch.equal(Lambda.real, torch.full_like(Lambda.real, -0.5))
    assert (Lambda.imag > 0).all() and (Lambda.imag.diff() > 0).all()
    assert (P.real > 0).all() and P.imag.abs().max() < 1e-12
    # Both halves of the pairs: C A^k B of the two forms, which no change of basis alters, also for C = P*
    whole = [torch.cat([v, v.conj()]) for v in (Lambda, P, B)]
    A_whole = torch.diag(whole[0]) - torch.outer(whole[1], whole[1].conj())
    A, B_legs = legs(state)
    P_legs = torch.sqrt(torch.arange(state, dtype=torch.float64) + 0.5)
    for row, row_legs in ((whole[2], B_legs), (whole[1], P_legs)):
        v, v_legs = whole[2], B_legs
        for _ in range(4):
            torch.testing.assert_close(
                torch.vdot(row, v), torch.dot(row_legs, v_legs) + 0j, rtol=1e-9, atol=1e-9
            )
            v, v_legs = A_whole @ v / state**2, A @ v_legs / state**2


def test_initial_poles() -> None:
    lin = initial_poles("lin", 6)
    torch.testing.assert_close(lin.real, torch.full((3,), -0.5, dtype=torch.float64))
    torch.testing.assert_close(lin.imag, math.pi * torch.arange(3, dtype=torch.float64))
    A, _ = legs(8)
    root = torch.sqrt(torch.arange(8, dtype=torch.float64) + 0.5)
    eigenvalues = torch.linalg.eigvals(A + torch.outer(root, root))
    expected = eigenvalues[eigenvalues.imag > 0]
    torch.testing.assert_close(initial_poles("legs", 8), expected[expected.imag.argsort()])


def test_discretisations_solve_the_equation_over_a_step() -> None:
    A = torch.tensor([[-0.5 + 3j, -1.2 + 0j]], dtype=torch.complex128)
    dt = torch.tensor([[0.07]], dtype=torch.float64)
    h, u = torch.tensor([[0.3 - 0.2j, 1j]], dtype=torch.complex128), 0.8
    A_bar, B_bar = discretise(A, dt, "zoh")
    for pole, start, end in zip(A[0], h[0], (A_bar * h + B_bar * u)[0], strict=True):
        augmented = torch.stack([torch.stack([pole, pole**0]), torch.zeros(2, dtype=A.dtype)])
        exact = torch.linalg.matrix_exp(0.07 * augmented) @ torch.stack([start, u * pole**0])
        torch.testing.assert_close(end, exact[0], rtol=1e-12, atol=1e-12)
    A_bar, B_bar = discretise(A, dt, "bilinear")
    after = A_bar * h + B_bar * u
    torch.testing.assert_close(after, h + dt * (A * (h + after) / 2 + u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 255, 257])
def test_kernels_and_states_are_powers_one_by_one(rule: Discretisation, length: int) -> None:
    ssm = small(discretisation=rule)
    A_bar, B_bar = ssm.discrete()
    C = torch.view_as_complex(ssm.C)
    terms, states = [], [torch.randn(3, 2, 3, dtype=torch.complex128)]
    power = torch.ones_like(A_bar)
    for _ in range(length):
        terms.append(2 * (C * power * B_bar).real.sum(-1))
        states.append(A_bar * states[-1])
        power = power * A_bar
    torch.testing.assert_close(ssm.kernels(length), torch.stack(terms, -1), rtol=1e-10, atol=1e-12)
    for direction in (0, 1):
        expected = torch.stack([2 * (C[direction] * state).real.sum(-1) for state in states[1:]], -1)
        got = ssm.read(states[0], direction, length)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    u = torch.randn(3, 2, length, dtype=torch.float64)
    state = states[0]
    for t in reversed(range(length)):
        state = A_bar * state + B_bar * u[..., t, None]
    torch.testing.assert_close(ssm.absorb(u, states[0]), state, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ssm.absorb(u, None), state - power * states[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("direction", [0, 1])
def test_the_recurrence_goes_on_from_its_state(direction: int) -> None:
    ssm = small()
    u = torch.randn(2, 30, 2, dtype=torch.float64)
    whole, last = ssm.recurrence(u, direction)
    first, second = (u[:, :11], u[:, 11:]) if direction == 0 else (u[:, 11:], u[:, :11])
    y_first, state = ssm.recurrence(first, direction)
    y_second, state = ssm.recurrence(second, direction, state)
    parts = [y_first, y_second] if direction == 0 else [y_second, y_first]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


def test_long_kernels_are_exact_in_float32() -> None:
    torch.manual_seed(0)
    ssm = DiagonalSSM(4, state=64)
    kernels = ssm.kernels(20_000)
    assert kernels.dtype == torch.float32
    exact = ssm.double().kernels(20_000)
    assert (kernels - exact).abs().max() < 1e-6 * exact.abs().max()


def test_no_tensor_has_channels_times_states_times_length() -> None:
    ssm, length = DiagonalSSM(4, state=64), 30_000
    u = torch.randn(1, length, 4, requires_grad=True)
    state = (torch.zeros(1, 4, 32, dtype=torch.complex64),)
    with Largest() as largest:
        y, (after,) = ssm.mix(u, state, state)
        (y.sum() + after.abs().sum()).backward()
    assert largest.elements < 4 * 32 * length / 4


def test_powers() -> None:
    base = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    expected = torch.stack([base**k for k in range(7)])
    torch.testing.assert_close(powers(base, 7), expected)
    assert powers(base, 1).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state": 7}, "state is 7; choose an even number"),
        ({"state": 0}, "state is 0"),
        ({"initialisation": "hippo"}, "initialisation is 'hippo'; choose 'legs'"),
        ({"discretisation": "euler"}, "discretisation is 'euler'; choose 'zoh'"),
    ],
)
def test_an_impossible_model_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DiagonalSSM(4, **options)  # type: ignore[arg-type]
