"""H3 mixer, bidirectional: a shift and a diagonal state-space model between multiplicative gates.

Letters: B batch, L length, D width, S taps of the shift filter on each side, the position itself included.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.models.mixers.diagonal import DiagonalSSM, Discretisation, Initialisation
from genossm.models.mixers.linear_ssm import checked_sizes
from genossm.models.mixers.long_conv import fft_convolve
from genossm.models.mixers.mixer import Mixer, State, core
from genossm.models.mixers.step_sizes import DT_MIN


class H3(Mixer):
    """H3 (Fu et al. 2023, "Hungry Hungry Hippos", section 3.1 and algorithm 1), heads of one channel:

        q, k, v = x W_q, x W_k, x W_v
        y = (q * SSM_diag(SSM_shift(k) * v)) W_o

    Both state-space models are two-sided. SSM_shift has the shift matrix for A and the first unit vector for B: its state
    is the last S inputs, so that it is a filter with the taps C. Run both ways it is one filter of 2 S - 1 taps, lag 0
    once, beside its skip D. SSM_diag is `DiagonalSSM`: a C per direction.

    Initialisation as by the authors: the filter as a convolution's, each D normal, SSM_diag as S4D-Lin.

    A chunk needs S - 1 positions of halo on both sides for the filter of k (what v and q need none of), and the states of
    SSM_diag.

    Args:
        width: D.
        state: N, real size of the state of SSM_diag for each channel.
        shift: S.
        dt_min: the shortest of the first step sizes of SSM_diag.
        initialisation, discretisation: of SSM_diag, as for `S4D`.
    """

    recurrent = True
    state_parameters: tuple[str, ...] = (
        "shift_D",
        "ssm.log_dt",
        "ssm.log_A_real",
        "ssm.A_imag",
        "ssm.D",
    )

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        shift: int = 64,
        dt_min: float = DT_MIN,
        initialisation: Initialisation = "lin",
        discretisation: Discretisation = "zoh",
    ) -> None:
        super().__init__()
        checked_sizes(width, state)
        if shift < 1:
            raise ValueError(
                f"shift is {shift}; choose at least 1, the taps on each side with the position itself"
            )
        self.halo = (shift - 1, shift - 1)
        self.qkv_projection = nn.Linear(width, 3 * width)
        taps = 2 * shift - 1
        self.shift_filter = nn.Parameter(torch.empty(width, taps).uniform_(-1, 1) / math.sqrt(taps))
        self.shift_D = nn.Parameter(torch.randn(width))
        self.ssm = DiagonalSSM(
            width, state=state, dt_min=dt_min, initialisation=initialisation, discretisation=discretisation
        )
        self.out_projection = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q_BLD, kv_BLD = self._gated(x_BLD, 0, 0)
        return self._out(q_BLD, self.ssm(kv_BLD))

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        q_BLD, kv_BLD = self._gated(x_BLD, left, right)
        y_BLD, state = self.ssm.mix(kv_BLD, from_left, from_right)
        return self._out(q_BLD, y_BLD), state

    def leftward(
        self, x_BLD: Tensor, left: int = 0, right: int = 0, from_right: State | None = None
    ) -> State | None:
        return self.ssm.leftward(self._gated(x_BLD, left, right)[1], from_right)

    def _gated(self, x_BLD: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
        """q and SSM_shift(k) * v (B, L, D) without the halo."""
        q_BLD, k_BLD, v_BLD = self.qkv_projection(x_BLD).chunk(3, 2)
        with torch.autocast(x_BLD.device.type, enabled=False):
            dtype = self.ssm.dtype
            skip = F.pad(self.shift_D[:, None], self.halo)  # D at lag 0
            filter_DK = (self.shift_filter + skip).to(dtype)
            k_BLD = fft_convolve(k_BLD.to(dtype), filter_DK, self.halo[0]).to(v_BLD.dtype)
        return core(q_BLD, left, right), core(k_BLD, left, right) * core(v_BLD, left, right)

    def _out(self, q_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        mixed_BLD: Tensor = self.out_projection(q_BLD * y_BLD)
        return mixed_BLD
