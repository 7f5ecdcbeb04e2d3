"""The diagonal state-space model: initialisation, discretisation, convolution kernel and recurrence of S4D.

Letters: B batch, L length, D channels, N state, M = N / 2 conjugate pairs; L is cut in K blocks of I positions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.models.mixers.hippo import legs_normal_low_rank
from genossm.models.mixers.linear_ssm import LinearSSM, block_length, checked_sizes
from genossm.models.mixers.step_sizes import DT_MIN

Initialisation = Literal["legs", "lin"]
Discretisation = Literal["zoh", "bilinear"]


def initial_poles(initialisation: Initialisation, state: int) -> Tensor:
    """The diagonal of A (M,), complex128: Gu, Gupta, Goel & Re 2022 (S4D), section 4.

    legs: S4D-LegS, the eigenvalues of the normal part of HiPPO-LegS; lin: S4D-Lin, -1/2 + i pi n.
    """
    if initialisation == "legs":
        return legs_normal_low_rank(state)[0]
    if initialisation == "lin":
        n = torch.arange(state // 2, dtype=torch.float64)
        return torch.complex(torch.full_like(n, -0.5), math.pi * n)
    raise ValueError(f"initialisation is {initialisation!r}; choose 'legs' (S4D-LegS) or 'lin' (S4D-Lin)")


def discretise(A_DM: Tensor, dt_D1: Tensor, rule: Discretisation) -> tuple[Tensor, Tensor]:
    """A_bar and B_bar (D, M) for h' = A h + u (B = 1) sampled every dt: S4D, section 3.1.

    zoh holds u over a step; bilinear integrates by the trapezoidal rule.
    """
    dtA = dt_D1 * A_DM
    if rule == "zoh":
        return torch.exp(dtA), (torch.exp(dtA) - 1) / A_DM
    if rule == "bilinear":
        return (1 + dtA / 2) / (1 - dtA / 2), dt_D1 / (1 - dtA / 2)
    raise ValueError(f"discretisation is {rule!r}; choose 'zoh' (zero-order hold) or 'bilinear'")


class DiagonalSSM(LinearSSM):
    """S4D's state-space model (`LinearSSM`) with A = diag(-exp(log_A_real) + i A_imag), B = 1 and complex C.

    Of each conjugate pair one is kept: C h stands for 2 Re(sum over the M pairs of C h). C is complex normal with
    variance 1 at first. States are complex, (B, D, M).
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        dt_min: float = DT_MIN,
        initialisation: Initialisation = "legs",
        discretisation: Discretisation = "zoh",
    ) -> None:
        checked_sizes(width, state)
        super().__init__(width, dt_min)
        self.discretisation = discretisation
        A = initial_poles(initialisation, state).expand(width, -1)
        self.log_A_real = nn.Parameter(torch.log(-A.real).to(self.log_dt.dtype))
        self.A_imag = nn.Parameter(A.imag.to(self.log_dt.dtype, copy=True))
        self.C = nn.Parameter(math.sqrt(0.5) * torch.randn(2, width, state // 2, 2))
        self.discrete()  # refuses an unknown rule

    def discrete(self) -> tuple[Tensor, Tensor]:
        """A_bar and B_bar (D, M), complex128."""
        A = torch.complex(-torch.exp(self.log_A_real.double()), self.A_imag.double())
        return discretise(A, torch.exp(self.log_dt.double())[:, None], self.discretisation)

    def kernels(self, length: int) -> Tensor:
        A_bar, B_bar = self.discrete()
        return self._response(self._output() * B_bar, A_bar, length)

    def read(self, state: Tensor, direction: int, length: int) -> Tensor:
        A_bar, _ = self.discrete()
        return self._response(self._output()[direction] * A_bar * state, A_bar, length)

    def absorb(self, u_BDL: Tensor, state: Tensor | None) -> Tensor:
        A_bar, B_bar = self.discrete()
        length = u_BDL.shape[2]
        within_DIM, starts_DKM = _factored_powers(A_bar, length)
        blocks, block = starts_DKM.shape[1], within_DIM.shape[1]
        u_BDKI = F.pad(u_BDL, (0, blocks * block - length)).reshape(*u_BDL.shape[:2], blocks, block)
        within = torch.view_as_real(within_DIM).flatten(2).to(self.dtype)
        sums = torch.einsum("bdki,dim->bdkm", u_BDKI, within)
        sums_BDKM = torch.view_as_complex(sums.reshape(*sums.shape[:3], -1, 2))
        absorbed = (sums_BDKM * starts_DKM).sum(2) * B_bar
        if state is not None:
            absorbed = absorbed + A_bar**length * state
        return absorbed.to(self.dtype.to_complex())

    def recurrence(self, u_BLD: Tensor, direction: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One direction (0 rightward, 1 leftward) position after position: C h (B, L, D), and the last state.

        The memory beside input and output does not grow with the length.
        """
        A_bar, B_bar = self.discrete()
        C = self._output()[direction]
        length = u_BLD.shape[1]
        h_BDM = torch.zeros_like(A_bar).expand(u_BLD.shape[0], -1, -1) if state is None else state
        y_BLD = torch.empty_like(u_BLD)
        for t in range(length) if direction == 0 else reversed(range(length)):
            h_BDM = A_bar * h_BDM + B_bar * u_BLD[:, t, :, None]
            y_BLD[:, t] = (C * h_BDM).real.sum(2)
        return y_BLD, h_BDM.to(self.dtype.to_complex())

    def _output(self) -> Tensor:
        """2 C, complex128 (2, D, M): the real part of its product with the kept states is that with all states."""
        return 2 * torch.view_as_complex(self.C.double())

    def _response(self, c_XDM: Tensor, A_bar: Tensor, length: int) -> Tensor:
        """Re(sum over m of c A_bar^j) for j < length: (X, D, length), without a tensor of D, N and L.

        j = k I + i factors A_bar^j in A_bar^(k I) A_bar^i, so that the Vandermonde product of S4D (section 3.2) is a
        batch of small matrix products; Re(x y) = (Re x, -Im x) . (Re y, Im y) makes them real.
        """
        within_DIM, starts_DKM = _factored_powers(A_bar, length)
        blocks = torch.view_as_real((c_XDM[:, :, None] * starts_DKM).conj().resolve_conj()).flatten(3)
        within = torch.view_as_real(within_DIM).flatten(2)
        product = torch.einsum("xdkm,dim->xdki", blocks.to(self.dtype), within.to(self.dtype))
        return product.flatten(2)[..., :length]


def _factored_powers(A_bar: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A_bar^i for i < I (D, I, M) and A_bar^(k I) for k < K (D, K, M); K I is at least the length."""
    block = block_length(length)
    return powers(A_bar, block), powers(A_bar**block, -(-length // block))


def powers(base: Tensor, count: int) -> Tensor:
    """base^0 ... base^(count - 1) for (..., M): (..., count, M)."""
    result = torch.ones_like(base)[..., None, :]
    factor = base
    while result.shape[-2] < count:
        result = torch.cat([result, result * factor[..., None, :]], -2)
        factor = factor * factor
    return result[..., :count, :]
