"""The HiPPO-LegS state-space model and its form as a normal matrix less one of rank one.

Letters: N state, M = N / 2 conjugate pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def legs(state: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,) in float64: Gu et al. 2020 (HiPPO), theorem 2; Gu, Goel & Re 2022 (S4), equation 2.

    h' = A h + B u keeps the coefficients of u's past in Legendre polynomials scaled to that past:
    A[n, k] = -sqrt((2n + 1) (2k + 1)) below the diagonal, -(n + 1) on it, 0 above; B[n] = sqrt(2n + 1).
    """
    n = torch.arange(state, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    A = -torch.tril(torch.outer(B, B), -1) - torch.diag(n + 1)
    return A, B


def legs_normal_low_rank(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lambda, P and B (M,), complex128, of A = Lambda - P P*: S4's theorem 1 and appendix C.1.

    With P[n] = sqrt(n + 1/2), the real A + P P^T is -1/2 plus a skew-symmetric matrix, thus normal: V Lambda V* with a
    unitary V. P and B are returned in the basis V. Eigenvalues come in conjugate pairs, of which one with a positive
    imaginary part is kept, in ascending order; the phases of V's columns are those that make P real and positive.
    """
    A, B = legs(state)
    P = torch.sqrt(torch.arange(state, dtype=torch.float64) + 0.5)
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(state, dtype=torch.float64)
    imaginary, V = torch.linalg.eigh(-1j * skew)
    V = V[:, state // 2 :]
    P, B = V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype)
    phase = P / P.abs()
    Lambda = torch.complex(torch.full((state // 2,), -0.5, dtype=torch.float64), imaginary[state // 2 :])
    return Lambda, P * phase.conj(), B * phase.conj()
