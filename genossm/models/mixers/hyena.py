"""Hyena mixer: gates between long convolutions whose filters a small network writes, two-sided.

Letters: B batch, L length, D width, N order, F filter_bins, K lags on a side that are needed, H hidden, M inner layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import accumulation
from genossm.kernels.short_conv import short_conv
from genossm.models.mixers.long_conv import fft_convolve
from genossm.models.mixers.mixer import Mixer, State, core

INNER_LAYERS = 2
WINDOW_AT_END = 1e-2
FASTEST, SLOWEST = 0.3, 1.5
"""The window of the first channel is WINDOW_AT_END at SLOWEST * F, that of the last at FASTEST * F."""


class Hyena(Mixer):
    """Hyena operator of order N (Poli et al. 2023, definition 3.1; for DNA: Nguyen et al. 2023, HyenaDNA).

    One projection of the input and a short depthwise convolution, here centred, give v and the gates x^1 .. x^N; then

        z^1 = v,   z^{n+1}_t = x^n_t * (sum_s h^n_{t-s} z^n_s + skip^n z^n_t),   n = 1 .. N,   y = W z^{N+1}.

    The filters are implicit (section 3.3): h^n_l = window(l) * MLP(features(l)) with sine activations, computed in
    float32 (float64 in float64) for every call. Two-sided for DNA: the lag l runs over -(F-1) .. F-1, signed, so that
    either side of a filter has its own form, and a filter is zero beyond. Hence a finite halo, N (F-1) and the short
    convolution's, within which any length may be cut; of a sequence shorter than F only the lags that occur are made.

        t = l / F,   features = (t, cos(pi k t), sin(pi k t) for k = 1 .. bands),   window_d = exp(-a_d |t|) / c_d,

    a_d evenly spaced from log(100) / 1.5 (first channel) to log(100) / 0.3 (last), fixed. c_d = sqrt(sum_l
    exp(-2 a_d |t|)) is not in the paper: it keeps the variance of what a filter returns the same for every F.

    The authors' code leaves out h^1 (two gates around one convolution at order 2); this is the paper's form, with N long
    convolutions, of which H3 is an instance at N = 2.

    Initialisation as in the authors' code: linear layers uniform in +-1/sqrt(inputs), sine frequencies 10, skip normal.

    Args:
        width: D.
        order: N, gates and long convolutions.
        filter_bins: F; a position reaches N (F-1) positions on either side.
        hidden: H, width of the filters' MLP.
        bands: pairs of cosine and sine among the MLP's features.
        sine_frequency: what the sine activations start with; each of the H has its own, learned.
        conv_width: width of the short convolution.
    """

    state_parameters: tuple[str, ...] = (
        "filter_in",
        "filter_in_bias",
        "filter_inner",
        "filter_inner_bias",
        "filter_out",
        "filter_frequency",
        "skip",
    )

    def __init__(
        self,
        width: int,
        *,
        order: int = 2,
        filter_bins: int = 4096,
        hidden: int = 64,
        bands: int = 2,
        sine_frequency: float = 10.0,
        conv_width: int = 3,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "order": order, "filter_bins": filter_bins, "hidden": hidden, "bands": bands}
        for name, size in {**sizes, "conv_width": conv_width}.items():
            if size < 1:
                raise ValueError(f"{name} of hyena is {size}; it must be at least 1")
        if sine_frequency <= 0:
            raise ValueError(f"sine_frequency of hyena is {sine_frequency}; it must be above 0")
        self.width, self.order, self.filter_bins, self.bands = width, order, filter_bins, bands
        reach = order * (filter_bins - 1)
        self.halo = (reach + (conv_width - 1) // 2, reach + conv_width // 2)
        self.in_projection = nn.Linear(width, (order + 1) * width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty((order + 1) * width, conv_width))
        self.conv_bias = nn.Parameter(torch.zeros((order + 1) * width))
        self.filter_in = nn.Parameter(torch.empty(hidden, 1 + 2 * bands))
        self.filter_in_bias = nn.Parameter(torch.empty(hidden))
        self.filter_inner = nn.Parameter(torch.empty(INNER_LAYERS, hidden, hidden))
        self.filter_inner_bias = nn.Parameter(torch.empty(INNER_LAYERS, hidden))
        self.filter_out = nn.Parameter(torch.empty(order * width, hidden))
        self.filter_frequency = nn.Parameter(torch.full((hidden,), float(sine_frequency)))
        self.skip = nn.Parameter(torch.randn(order, width))
        self.out_projection = nn.Linear(width, width)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for weight, bias in (
            (self.conv_weight, None),
            (self.filter_in, self.filter_in_bias),
            (self.filter_inner, self.filter_inner_bias),
            (self.filter_out, None),
        ):
            bound = 1 / math.sqrt(weight.shape[-1])
            weight.uniform_(-bound, bound)
            if bias is not None:
                bias.uniform_(-bound, bound)

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        mixed = short_conv(self.in_projection(x_BLD), self.conv_weight, self.conv_bias, padding="centered")
        z_BLD, *gates = mixed.chunk(self.order + 1, dim=-1)
        with torch.autocast(x_BLD.device.type, enabled=False):
            filters = self.filters(min(self.filter_bins, x_BLD.shape[1]))
            for gate_BLD, filter_KD, skip_D in zip(gates, filters, self.skip, strict=True):
                wide = z_BLD.to(filter_KD.dtype)
                wide = fft_convolve(wide, filter_KD.T, len(filter_KD) // 2) + skip_D.to(wide.dtype) * wide
                z_BLD = gate_BLD * wide.to(z_BLD.dtype)
        y_BLD: Tensor = self.out_projection(core(z_BLD, left, right))
        return y_BLD, None

    def filters(self, lags: int) -> Tensor:
        """The filters (order, 2 lags - 1, width) at the lags -(lags - 1) .. lags - 1, in float32 or float64."""
        dtype, device = accumulation(self.filter_out.dtype), self.filter_out.device
        t_K = torch.arange(1 - lags, lags, device=device, dtype=dtype) / self.filter_bins
        angles = math.pi * t_K[:, None] * torch.arange(1, self.bands + 1, device=device, dtype=dtype)
        h = torch.cat([t_K[:, None], angles.cos(), angles.sin()], 1)
        frequency = self.filter_frequency.to(dtype)
        h = torch.sin(frequency * F.linear(h, self.filter_in.to(dtype), self.filter_in_bias.to(dtype)))
        for weight, bias in zip(self.filter_inner.to(dtype), self.filter_inner_bias.to(dtype), strict=True):
            h = torch.sin(frequency * F.linear(h, weight, bias))
        h = F.linear(h, self.filter_out.to(dtype)).view(-1, self.order, self.width)
        return (h * self._window(t_K)[:, None]).transpose(0, 1)

    def _window(self, t_K: Tensor) -> Tensor:
        """exp(-a |t|) / c, (lags, width); the sum in c is a geometric series."""
        slow, fast = (-math.log(WINDOW_AT_END) / part for part in (SLOWEST, FASTEST))
        a_D = torch.linspace(slow, fast, self.width, device=t_K.device, dtype=t_K.dtype)
        step_D = -2 * a_D / self.filter_bins
        one_side = step_D.exp() * torch.expm1((self.filter_bins - 1) * step_D) / torch.expm1(step_D)
        window_KD: Tensor = torch.exp(-a_D * t_K.abs()[:, None]) / (1 + 2 * one_side).sqrt()
        return window_KD
