"""S4 mixer: a bidirectional state-space model per channel whose matrix is diagonal plus low rank.

Letters: B batch, L length, D channels, N state, M = N / 2 conjugate pairs, R rows, F frequencies; L is cut in K blocks
of I positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genossm.models.mixers.hippo import legs_normal_low_rank
from genossm.models.mixers.linear_ssm import LinearSSM, LinearSSMBlock, block_length, checked_sizes
from genossm.models.mixers.step_sizes import DT_MIN

CAUCHY_ELEMENTS = 1 << 21
"""Terms of the Cauchy sums that are in memory at a time, of 8 bytes and a few times over."""


class LowRankSSM(LinearSSM):
    """S4's state-space model (`LinearSSM`): A = Lambda - P P*, Lambda diagonal, one row P; trainable Lambda, P, B, C.

    At first that is HiPPO-LegS in the basis that makes its normal part diagonal (S4, theorem 1); C is complex normal.
    Lambda has negative real parts and S4's Q is P, so that A + A* is negative definite and no A_bar grows, trained or not
    (the form of Goel et al. 2022, SaShiMi, section 4.1).

    Discretisation is bilinear (S4, equation 3): A_bar = (1 - dt/2 A)^-1 (1 + dt/2 A), B_bar = (1 - dt/2 A)^-1 dt B.

    Kernels are in float64 until they are done: the Cauchy sums' poles lie close to their arguments. States are real,
    (B, D, N): sqrt(2) (Re z, Im z) of the conjugate pairs z, coordinates in which A is real and unitarily the same.
    """

    def __init__(self, width: int, *, state: int = 64, dt_min: float = DT_MIN) -> None:
        checked_sizes(width, state)
        super().__init__(width, dt_min)
        Lambda, P, B = (vector.expand(width, -1) for vector in legs_normal_low_rank(state))
        dtype = self.log_dt.dtype
        self.log_A_real = nn.Parameter(torch.log(-Lambda.real).to(dtype))
        self.A_imag = nn.Parameter(Lambda.imag.to(dtype, copy=True))
        self.P = nn.Parameter(torch.view_as_real(P).to(dtype, copy=True))
        self.B = nn.Parameter(torch.view_as_real(B).to(dtype, copy=True))
        self.C = nn.Parameter(math.sqrt(0.5) * torch.randn(2, width, state // 2, 2))

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """A_bar (D, N, N), B_bar (D, N) and C (2, D, N), float64, in the real coordinates."""
        Lambda = self._Lambda()
        real, imaginary = torch.diag_embed(Lambda.real), torch.diag_embed(Lambda.imag)
        P, B = _real(self.P), _real(self.B)
        normal = torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
        A = normal - P[:, :, None] * P[:, None]
        half_dt = torch.exp(self.log_dt.double())[:, None, None] / 2
        identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        right = torch.cat([identity + half_dt * A, 2 * half_dt * B[:, :, None]], 2)
        solved = self._solved(right)
        C_real, C_imag = self.C.double().unbind(-1)  # C z + conj = 2 (Re C Re z - Im C Im z)
        return solved[..., :-1], solved[..., -1], math.sqrt(2) * torch.cat([C_real, -C_imag], -1)

    def _Lambda(self) -> Tensor:
        """The diagonal, one of each conjugate pair: complex128 (D, M)."""
        return torch.complex(-torch.exp(self.log_A_real.double()), self.A_imag.double())

    def _solved(self, right_DNK: Tensor) -> Tensor:
        """(1 - dt/2 A)^-1 right, by Woodbury's identity for A = Lambda - P P*: no solver, which a CUDA graph may not hold."""
        half_dt = torch.exp(self.log_dt.double())[:, None] / 2
        P = _real(self.P)
        inverse_DM = 1 / (1 - half_dt * self._Lambda())
        real, imag = inverse_DM.real[:, :, None], inverse_DM.imag[:, :, None]

        def of_diagonal(x_DNK: Tensor) -> Tensor:
            above, below = x_DNK.chunk(2, 1)
            return torch.cat([real * above - imag * below, imag * above + real * below], 1)

        solved, column = of_diagonal(right_DNK), of_diagonal(P[:, :, None])
        share = half_dt / (1 + half_dt * (P * column[..., 0]).sum(1, keepdim=True))
        return solved - column * (share * torch.einsum("dn,dnk->dk", P, solved))[:, None]

    def kernels(self, length: int) -> Tensor:
        """The inverse FFT of the truncated generating function at the roots of unity (S4, algorithm 1).

        sum over j < L of C A_bar^j B_bar z^j = C~ (1 - A_bar z)^-1 B_bar with C~ = C (1 - A_bar^L) where z^L = 1.
        """
        A_bar, _, C = self.discrete()
        C = C - _apply_power(A_bar.mT, length, C)
        M = C.shape[2] // 2
        C_tilde = torch.complex(C[..., :M], -C[..., M:]) / math.sqrt(2)
        P, B = torch.view_as_complex(self.P.double()), torch.view_as_complex(self.B.double())
        rows_RDM = torch.stack([*(C_tilde * B), *(C_tilde * P), P.conj() * B, P.conj() * P])
        Lambda = self._Lambda()
        dt = torch.exp(self.log_dt.double())
        angles = torch.arange(length // 2 + 1, dtype=dt.dtype, device=dt.device) * (math.pi / length)
        spectrum = [
            checkpoint(
                _generating_function,
                angle_F,
                rows_RDM,
                Lambda,
                dt,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for angle_F in torch.split(angles, max(1, CAUCHY_ELEMENTS // Lambda.numel()))
        ]
        kernels: Tensor = torch.fft.irfft(torch.cat(spectrum, 2), n=length)
        return kernels.to(self.dtype)

    def read(self, state: Tensor, direction: int, length: int) -> Tensor:
        A_bar, _, C = self.discrete()
        block = block_length(length)
        # C A_bar^(k I + 1) and A_bar^i state: their products are all that is asked for
        C_DN = torch.einsum("dn,dnm->dm", C[direction], A_bar)
        rows_DKN = _krylov(torch.linalg.matrix_power(A_bar, block).mT, C_DN, -(-length // block))
        columns_BDIN = _krylov(A_bar, state.double(), block)
        product = torch.einsum("dkn,bdin->bdki", rows_DKN.to(self.dtype), columns_BDIN.to(self.dtype))
        return product.flatten(2)[..., :length]

    def absorb(self, u_BDL: Tensor, state: Tensor | None) -> Tensor:
        A_bar, B_bar, _ = self.discrete()
        length = u_BDL.shape[2]
        block = block_length(length)
        blocks = 1 << (-(-length // block) - 1).bit_length()
        u_BDKI = F.pad(u_BDL, (0, blocks * block - length)).reshape(*u_BDL.shape[:2], blocks, block)
        columns_DIN = _krylov(A_bar, B_bar, block).to(self.dtype)
        sums = torch.einsum("bdki,din->bdkn", u_BDKI, columns_DIN).double()
        step = torch.linalg.matrix_power(A_bar, block)
        while sums.shape[2] > 1:  # neighbours two by two
            sums = sums[:, :, 0::2] + torch.einsum("dnm,bdkm->bdkn", step, sums[:, :, 1::2])
            step = step @ step
        absorbed = sums[:, :, 0]
        if state is not None:
            absorbed = absorbed + _apply_power(A_bar, length, state.double())
        return absorbed.to(self.dtype)


class S4(LinearSSMBlock):
    """S4 (Gu, Goel & Re 2022, "Efficiently Modeling Long Sequences with Structured State Spaces").

    Each channel has a HiPPO-LegS state-space model, diagonal plus low rank (`LowRankSSM`), with A, B and dt shared by the
    directions and a C for each; then GELU, a linear layer and GLU (`LinearSSMBlock`). A whole sequence is one FFT
    convolution with a two-sided kernel, for any length; chunks carry the states.

    Args:
        width: D.
        state: N, real size of the state of each channel.
        expand: channels of the state-space model / D.
        dt_min: the shortest of the first step sizes.
    """

    state_parameters: tuple[str, ...] = (
        "ssm.log_dt",
        "ssm.log_A_real",
        "ssm.A_imag",
        "ssm.P",
        "ssm.B",
        "ssm.D",
    )
    ssm: LowRankSSM

    def __init__(self, width: int, *, state: int = 64, expand: int = 1, dt_min: float = DT_MIN) -> None:
        checked_sizes(width, state, expand)
        super().__init__(width, expand, LowRankSSM(expand * width, state=state, dt_min=dt_min))


def _generating_function(angle_F: Tensor, rows_RDM: Tensor, Lambda_DM: Tensor, dt_D: Tensor) -> Tensor:
    """C~ (1 - A_bar z)^-1 B_bar at z = exp(-2i angle), (2, D, F), by Cauchy sums (S4, appendix C.3).

    With the bilinear A_bar and B_bar it is exp(i angle) C~ (i s - c A)^-1 B, where c = cos(angle) and
    s = 2 / dt sin(angle). By Woodbury's identity for A = Lambda - P P*, and with [x, y] for the Cauchy sum
    over n of x*[n] y[n] / (i s - c Lambda[n]), that is exp(i angle) ([C~*, B] - c [C~*, P] [P, B] / (1 + c [P, P])).

    A conjugate pair's two terms, w over i s - c Lambda and the same with w* and Lambda*, have the sum
    2 (i s Re w - c Re(w Lambda*)) / (c^2 |Lambda|^2 - s^2 - 2i c s Re Lambda), which needs real products only.

    Args:
        rows_RDM: the w: C~ B of both directions, C~ P of both, P* B, P* P.
    """
    c_F = torch.cos(angle_F)
    s_DF = 2 / dt_D[:, None] * torch.sin(angle_F)
    real_DMF = (Lambda_DM.abs() ** 2)[:, :, None] * c_F**2 - (s_DF**2)[:, None]
    imag_DMF = -2 * Lambda_DM.real[:, :, None] * (c_F * s_DF)[:, None]
    norm_DMF = real_DMF**2 + imag_DMF**2
    weights_RDM = torch.stack([rows_RDM.real, (rows_RDM * Lambda_DM.conj()).real], 1)
    sums = [torch.einsum("rpdm,dmf->rpdf", weights_RDM, part / norm_DMF) for part in (real_DMF, -imag_DMF)]
    with_s, with_c = torch.complex(*sums).unbind(1)
    cauchy_RDF = 2 * (1j * s_DF * with_s - c_F * with_c)
    CB, CP, (PB, PP) = cauchy_RDF[:2], cauchy_RDF[2:4], cauchy_RDF[4:]
    spectrum_RDF: Tensor = CB - c_F * CP * PB / (1 + c_F * PP)
    return spectrum_RDF * torch.polar(torch.ones_like(angle_F), angle_F)


def _real(vector: Tensor) -> Tensor:
    """A vector of conjugate pairs (..., M, 2) in the real coordinates: (..., N)."""
    return math.sqrt(2) * torch.cat(vector.double().unbind(-1), -1)


def _apply_power(A_DNN: Tensor, exponent: int, v: Tensor) -> Tensor:
    """A^exponent v for v (..., D, N)."""
    while exponent:
        if exponent & 1:
            v = torch.einsum("dnm,...dm->...dn", A_DNN, v)
        exponent >>= 1
        if exponent:
            A_DNN = A_DNN @ A_DNN
    return v


def _krylov(A_DNN: Tensor, v: Tensor, count: int) -> Tensor:
    """A^0 v ... A^(count - 1) v for v (..., D, N): (..., D, count, N)."""
    vectors = v[..., None, :]
    while vectors.shape[-2] < count:
        vectors = torch.cat([vectors, torch.einsum("dnm,...dkm->...dkn", A_DNN, vectors)], -2)
        A_DNN = A_DNN @ A_DNN
    return vectors[..., :count, :]
