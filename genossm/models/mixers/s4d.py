"""S4D mixer: a bidirectional diagonal state-space model per channel.

Letters: B batch, L length, D width.
"""

from __future__ import annotations

from torch import Tensor

from genossm.models.mixers.diagonal import DiagonalSSM, Discretisation, Initialisation
from genossm.models.mixers.linear_ssm import LinearSSMBlock, checked_sizes
from genossm.models.mixers.step_sizes import DT_MIN


class S4D(LinearSSMBlock):
    """S4D (Gu, Gupta, Goel & Re 2022, "On the Parameterization and Initialization of Diagonal State Space Models").

    Each channel has a diagonal state-space model (`DiagonalSSM`), with A and dt shared by the directions and a C for
    each; then GELU, a linear layer and GLU (`LinearSSMBlock`). A whole sequence is one FFT convolution with a
    two-sided kernel; chunks carry the states; `recurrence` goes position by position.

    Args:
        width: D.
        state: N, real size of the state of each channel; N / 2 conjugate pairs are kept.
        expand: channels of the state-space model / D.
        dt_min: the shortest of the first step sizes.
        initialisation: of A: "legs" (S4D-LegS) or "lin" (S4D-Lin).
        discretisation: "zoh" (zero-order hold) or "bilinear".
    """

    state_parameters: tuple[str, ...] = ("ssm.log_dt", "ssm.log_A_real", "ssm.A_imag", "ssm.D")
    ssm: DiagonalSSM

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        expand: int = 1,
        dt_min: float = DT_MIN,
        initialisation: Initialisation = "legs",
        discretisation: Discretisation = "zoh",
    ) -> None:
        checked_sizes(width, state, expand)
        ssm = DiagonalSSM(
            expand * width,
            state=state,
            dt_min=dt_min,
            initialisation=initialisation,
            discretisation=discretisation,
        )
        super().__init__(width, expand, ssm)

    def recurrence(self, x_BLD: Tensor) -> Tensor:
        """What `forward` gives, by the recurrence: slow, and its memory beside input and output does not grow."""
        u_BLD = self.in_projection(x_BLD)
        rightward, _ = self.ssm.recurrence(u_BLD, 0)
        leftward, _ = self.ssm.recurrence(u_BLD, 1)
        return self._out(rightward + leftward + self.ssm.D * u_BLD)
