"""Linear time-invariant state-space models, one per channel, that run both ways, and the block around them.

Letters: B batch, L length, D channels (the block's inner width).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.models.mixers.long_conv import fft_convolve
from genossm.models.mixers.mixer import Mixer, State, core
from genossm.models.mixers.step_sizes import initial_log_dt


class LinearSSM(nn.Module):
    """Per channel, with the same A, B and dt in both directions and an own C for each:

        rightward  h[t] = A_bar h[t-1] + B_bar u[t]
        leftward   g[t] = A_bar g[t+1] + B_bar u[t]
                   y[t] = C[0] h[t] + C[1] g[t] + D u[t]

    Sharing A, B and dt (as S4's authors do) gives both directions the same time scales, and their kernels the same
    powers of A_bar. Position t itself is in both h[t] and g[t].

    A whole sequence is one convolution with the two-sided kernel k[m] = C[0] A_bar^m B_bar for lags m > 0,
    C[1] A_bar^-m B_bar for m < 0, and (C[0] + C[1]) B_bar + D for m = 0. A chunk of it is the same convolution within
    the chunk plus what the entering states give.

    Kernels and states are computed in float64 up to the large products, and those in float32 at least, autocast or not.
    A subclass has the parameters log_dt (D,), log-uniform in [0.001, 0.1] at first, and D (D,), at first normal.
    """

    def __init__(self, width: int, dt_min: float) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(initial_log_dt(torch.empty(width), dt_min))
        self.D = nn.Parameter(torch.randn(width))

    def kernels(self, length: int) -> Tensor:
        """C[direction] A_bar^j B_bar for j < length: (2, D, length)."""
        raise NotImplementedError

    def read(self, state: Tensor, direction: int, length: int) -> Tensor:
        """C[direction] A_bar^(j+1) state for j < length: (B, D, length)."""
        raise NotImplementedError

    def absorb(self, u_BDL: Tensor, state: Tensor | None) -> Tensor:
        """A_bar^L state + sum over j of A_bar^j B_bar u[j]: the state that leaves where u begins."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """In which the convolution is computed and the states are kept: float32, or float64 if the module is."""
        return torch.promote_types(self.log_dt.dtype, torch.float32)

    def forward(self, u_BLD: Tensor) -> Tensor:
        with torch.autocast(u_BLD.device.type, enabled=False):
            return self._convolve(u_BLD.to(self.dtype)).to(u_BLD.dtype)

    def mix(self, u_BLD: Tensor, from_left: State | None, from_right: State | None) -> tuple[Tensor, State]:
        """The chunk's outputs (B, L, D) and the rightward state at its end."""
        length = u_BLD.shape[1]
        with torch.autocast(u_BLD.device.type, enabled=False):
            exact_BLD = u_BLD.to(self.dtype)
            y_BLD = self._convolve(exact_BLD)
            if from_left is not None:
                y_BLD = y_BLD + self.read(from_left[0], 0, length).transpose(1, 2)
            if from_right is not None:
                y_BLD = y_BLD + self.read(from_right[0], 1, length).flip(2).transpose(1, 2)
            last_first_BDL = exact_BLD.transpose(1, 2).flip(2)
            state = self.absorb(last_first_BDL, None if from_left is None else from_left[0])
        return y_BLD.to(u_BLD.dtype), (state,)

    def leftward(self, u_BLD: Tensor, from_right: State | None) -> State:
        """The leftward state at the chunk's first position."""
        with torch.autocast(u_BLD.device.type, enabled=False):
            u_BDL = u_BLD.to(self.dtype).transpose(1, 2)
            return (self.absorb(u_BDL, None if from_right is None else from_right[0]),)

    def _convolve(self, u_BLD: Tensor) -> Tensor:
        length = u_BLD.shape[1]
        rightward_DL, leftward_DL = self.kernels(length).unbind()
        centre_D1 = rightward_DL[:, :1] + leftward_DL[:, :1] + self.D[:, None].to(self.dtype)
        kernel_DK = torch.cat([leftward_DL[:, 1:].flip(1), centre_D1, rightward_DL[:, 1:]], 1)
        return fft_convolve(u_BLD, kernel_DK, length - 1)


class LinearSSMBlock(Mixer):
    """The block of S4 and S4D: the state-space model per channel, GELU, a linear layer to twice the width, GLU.

    With `expand` > 1 a linear layer first leads to that many times the width; with 1 the model reads the input itself.
    """

    recurrent = True

    def __init__(self, width: int, expand: int, ssm: LinearSSM) -> None:
        super().__init__()
        self.in_projection = nn.Linear(width, expand * width) if expand > 1 else nn.Identity()
        self.ssm = ssm
        self.out_projection = nn.Linear(expand * width, 2 * width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self._out(self.ssm(self.in_projection(x_BLD)))

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        u_BLD = self.in_projection(core(x_BLD, left, right))
        y_BLD, state = self.ssm.mix(u_BLD, from_left, from_right)
        return self._out(y_BLD), state

    def leftward(
        self, x_BLD: Tensor, left: int = 0, right: int = 0, from_right: State | None = None
    ) -> State | None:
        return self.ssm.leftward(self.in_projection(core(x_BLD, left, right)), from_right)

    def _out(self, y_BLD: Tensor) -> Tensor:
        return F.glu(self.out_projection(F.gelu(y_BLD)))


def checked_sizes(width: int, state: int, expand: int = 1) -> None:
    """Refuses what no state-space model of conjugate pairs can have."""
    if width < 1 or expand < 1:
        raise ValueError(f"width {width} and expand {expand}: both must be at least 1")
    if state < 2 or state % 2:
        raise ValueError(
            f"state is {state}; choose an even number from 2 up: it counts both of each conjugate pair"
        )


def block_length(length: int) -> int:
    """A power of two near the square root: `length` powers of A_bar are products of that many with as many."""
    return 1 << (length.bit_length() // 2)
