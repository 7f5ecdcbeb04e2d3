"""Batch normalisation and GELU in one, with the channels last: what stands before a convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.arguments import accumulation, check_devices, check_real, check_shape
from genossm.kernels.backend import Backend, choose_backend


def batch_norm_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor] | None = None,
    *,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(z) of z = (x - mean) / sqrt(variance + eps) * weight + bias, for each channel.

    GELU is z Phi(z), Phi the normal distribution (Hendrycks & Gimpel 2016; not its tanh form). Mean and variance are those
    of all positions (Ioffe & Szegedy 2015), through which gradients flow, or given ones. Arithmetic is in float32
    (float64 for float64 inputs).

    Args:
        x: (..., channels).
        weight, bias: (channels,).
        statistics: mean and variance, (channels,) each, of other batches; None for those of this one.
        eps: added to the variance.
        backend: `triton` (CUDA), `torch`, or `auto`.

    Returns:
        y, shaped as x and of its dtype; the mean, and the variance (divided by the number of positions), float32
        (float64 for float64), without gradients.

    Raises:
        ValueError: a shape, dtype or backend that does not fit, or x without a position.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        check_real(name, tensor)
    mean, variance = statistics or (None, None)
    check_devices(x, weight=weight, bias=bias, mean=mean, variance=variance)
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; (..., channels) with at least one position is needed"
        )
    for name, other in (("weight", weight), ("bias", bias), ("mean", mean), ("variance", variance)):
        if other is not None:
            check_shape(name, other, [(x.shape[-1],)])
    if choose_backend(backend, x, None, reference=False) == "triton":
        from genossm.kernels.batch_norm_gelu_triton import batch_norm_gelu_triton

        return batch_norm_gelu_triton(x, weight, bias, mean, variance, eps)

    wide = accumulation(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(wide).flatten(0, -2)
        if mean is None or variance is None:
            z, mean, inverse = torch.native_batch_norm(
                rows, weight.to(wide), bias.to(wide), None, None, True, 0.0, eps
            )
            mean, variance = mean.detach(), inverse.detach() ** -2 - eps
        else:
            mean, variance = mean.to(wide), variance.to(wide)
            z = F.batch_norm(rows, mean, variance, weight.to(wide), bias.to(wide), eps=eps)
        return F.gelu(z).view(x.shape).to(x.dtype), mean, variance
