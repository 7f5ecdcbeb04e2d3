"""Convolution along a sequence with a kernel as long as the sequence, by FFT.

Letters: B batch, L length, D channels, K taps of the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fft_convolve(x_BLD: Tensor, kernel_DK: Tensor, origin: int) -> Tensor:
    """y[t] = sum over j of kernel[j] x[t - (j - origin)], zeros beyond the ends; shape and dtype of x (float32 or float64).

    Taps before `origin` look right (negative lags), those after it left: one transform pair serves both directions.
    Lags that no pair of positions has are cut off; the transform is long enough that nothing wraps into the outputs.
    """
    length = x_BLD.shape[1]
    first = max(0, origin - (length - 1))
    kernel_DK = kernel_DK[:, first : origin + length]
    origin -= first
    # Wrapped-around products fall on positions before `origin` or after `origin + length - 1`.
    size = fast_length(length + max(origin, kernel_DK.shape[1] - 1 - origin))
    spectrum = torch.fft.rfft(x_BLD.transpose(1, 2), n=size) * torch.fft.rfft(kernel_DK, n=size)
    y_BDL: Tensor = torch.fft.irfft(spectrum, n=size)[..., origin : origin + length]
    return y_BDL.transpose(1, 2)


def fast_length(at_least: int) -> int:
    """The smallest 1, 3, 5, 9 or 15 times a power of two that is not below `at_least` >= 1."""
    return min(odd << (-(-at_least // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))
