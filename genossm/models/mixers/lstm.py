"""LSTM mixer, bidirectional: the recurrence that state-space models are to be compared with.

Letters: B batch, L length, D width, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genossm.models.mixers.mixer import Mixer, State, core


class LSTM(Mixer):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gates: Gers et al. 2000), run in both directions
    (Graves & Schmidhuber 2005) by `nn.LSTM`, and a projection of the two. In each direction

        i, f, o = sigmoid(W x_t + U h_{t-1} + b),   g = tanh(W' x_t + U' h_{t-1} + b'),
        c_t = f c_{t-1} + i g,   h_t = o tanh(c_t),   h and c zero before the first position.

    Computed in the dtype of its weights, not in autocast's: c sums over the whole sequence. The states (h, c), each
    (batch, hidden), cross a chunk's edges: those of the forward direction to the right, of the reverse one to the left.

    Weights start uniform in +-1/sqrt(H) as torch's do, the biases at 0 but for the forget gates, at 1 (Jozefowicz et
    al. 2015).

    Args:
        width: D.
        hidden: H of each direction; None for half the width, rounded up (then about 7 D^2 parameters).
        layers: of the stack. From the second on each layer reads both directions of the one before, which no single
            sweep each way can do chunk by chunk: only one layer streams. For a deep one that does, stack mixers.
    """

    recurrent = True

    def __init__(self, width: int, *, hidden: int | None = None, layers: int = 1) -> None:
        super().__init__()
        hidden = (width + 1) // 2 if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden of lstm is {hidden}; it must be at least 1, or None for half the width")
        if layers < 1:
            raise ValueError(f"layers of lstm is {layers}; it must be at least 1")
        self.hidden, self.layers = hidden, layers
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True, bidirectional=True)
        self.out_projection = nn.Linear(2 * hidden, width, bias=False)
        self._initialise()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.lstm.flatten_parameters()  # cuDNN wants a copy's weights side by side

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
            if name.startswith("bias_ih"):
                parameter[self.hidden : 2 * self.hidden] = 1.0  # torch's order of gates: i, f, g, o

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        x_BLD = core(x_BLD, left, right)
        h_BLH, states = self._run(x_BLD, from_left, from_right)
        y_BLD: Tensor = self.out_projection(h_BLH.to(x_BLD.dtype))
        return y_BLD, states[0]

    def leftward(
        self, x_BLD: Tensor, left: int = 0, right: int = 0, from_right: State | None = None
    ) -> State | None:
        if self.layers > 1:
            raise ValueError(
                f"an lstm of {self.layers} layers cannot run chunk by chunk, because its second layer needs both "
                "directions of the first; use layers=1, and one mixer for each layer"
            )
        return self._run(core(x_BLD, left, right), None, from_right)[1][1]

    def _run(
        self, x_BLD: Tensor, from_left: State | None, from_right: State | None
    ) -> tuple[Tensor, tuple[State | None, State | None]]:
        """Both directions' h (batch, length, 2 hidden), and the states that leave to the right and to the left."""
        dtype = next(self.lstm.parameters()).dtype
        with torch.autocast(x_BLD.device.type, enabled=False):
            if self.layers > 1:
                if from_left is not None or from_right is not None:
                    raise ValueError(f"an lstm of {self.layers} layers takes no states; use layers=1")
                return self.lstm(x_BLD.to(dtype))[0], (None, None)
            zeros = x_BLD.new_zeros(x_BLD.shape[0], self.hidden, dtype=dtype)
            entering = [(zeros, zeros) if state is None else state for state in (from_left, from_right)]
            h_0, c_0 = (torch.stack(pair).to(dtype) for pair in zip(*entering, strict=True))
            h_BLH, (h_n, c_n) = self.lstm(x_BLD.to(dtype), (h_0, c_0))
        return h_BLH, ((h_n[0], c_n[0]), (h_n[1], c_n[1]))
