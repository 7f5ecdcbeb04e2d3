"""The FFT convolution against its sum written out, and its length against all candidates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genossm.models.mixers.long_conv import fast_length, fft_convolve


def slow_convolve(x: torch.Tensor, kernel: torch.Tensor, origin: int) -> torch.Tensor:
    length, taps = x.shape[1], kernel.shape[1]
    toeplitz = torch.zeros(x.shape[2], length, length, dtype=x.dtype)
    for t in range(length):
        for s in range(length):
            if 0 <= (j := t - s + origin) < taps:
                toeplitz[:, t, s] = kernel[:, j]
    return torch.einsum("dts,bsd->btd", toeplitz, x)


@given(length=st.integers(1, 24), before=st.integers(0, 40), after=st.integers(0, 40))
def test_it_is_the_sum_for_kernels_shorter_and_longer_than_the_sequence(
    length: int, before: int, after: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    kernel = torch.randn(3, before + 1 + after, dtype=torch.float64, generator=generator, requires_grad=True)
    got, expected = fft_convolve(x, kernel, before), slow_convolve(x, kernel, before)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(got.shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad((y * weights).sum(), (x, kernel)) for y in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_a_transform_is_no_longer_than_it_must_be() -> None:
    allowed = sorted({odd * 2**k for odd in (1, 3, 5, 9, 15) for k in range(12)})
    for n in range(1, 2050):
        assert fast_length(n) == next(size for size in allowed if size >= n)
    assert fast_length(2 * 4096 - 1) == 8192


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_shape_and_dtype(dtype: torch.dtype) -> None:
    y = fft_convolve(torch.ones(1, 5, 2, dtype=dtype), torch.ones(2, 3, dtype=dtype), 1)
    assert y.shape == (1, 5, 2) and y.dtype == dtype
