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
    paired: bool = False,
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
        paired: statistics of the batch are those of a channel and its mirror image, the last for the first, together.
        backend: `triton` (CUDA), `torch`, or `auto`.

    Returns:
        y, shaped as x and of its dtype; the mean, and the variance (divided by the number of positions), float32
        (float64 for float64), without gradients.

    Raises:
        ValueError: a shape, dtype or backend that does not fit, x without a position, or an odd number of channels that
            are paired.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        check_real(name, tensor)
    mean, variance = statistics or (None, None)
    check_devices(x, weight=weight, bias=bias, mean=mean, variance=variance)
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; (..., channels) with at least one position is needed"
        )
    if paired and x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} channels; an even number is needed for pairs")
    for name, other in (("weight", weight), ("bias", bias), ("mean", mean), ("variance", variance)):
        if other is not None:
            check_shape(name, other, [(x.shape[-1],)])
    if choose_backend(backend, x, None, reference=False) == "triton":
        from genossm.kernels.batch_norm_gelu_triton import batch_norm_gelu_triton

        return batch_norm_gelu_triton(x, weight, bias, mean, variance, eps, paired)

    wide = accumulation(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(wide).flatten(0, -2)
        if mean is None or variance is None:
            if paired:
                first, last = rows.chunk(2, 1)
                rows = torch.cat([first, last.flip(1)])
            scale, added = (None, None) if paired else (weight.to(wide), bias.to(wide))
            z, mean, inverse = torch.native_batch_norm(rows, scale, added, None, None, True, 0.0, eps)
            mean, variance = mean.detach(), inverse.detach() ** -2 - eps
            if paired:
                first, last = z.chunk(2)
                z = torch.cat([first, last.flip(1)], 1) * weight.to(wide) + bias.to(wide)
                mean, variance = (torch.cat([half, half.flip(0)]) for half in (mean, variance))
        else:
            mean, variance = mean.to(wide), variance.to(wide)
            z = F.batch_norm(rows, mean, variance, weight.to(wide), bias.to(wide), eps=eps)
        return F.gelu(z).view(x.shape).to(x.dtype), mean, variance
