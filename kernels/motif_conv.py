"""The first layer of a network on DNA: motif-wide filters over one-hot bases, and the maximum of neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.arguments import check_devices, check_real
from genossm.kernels.backend import Backend, choose_backend
from genossm.kernels.sum_pool import sum_pool


def motif_conv(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pool: int = 1,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """A centred convolution of one-hot bases, of which the maximum over each `pool` positions is kept.

    v_lc = bias_c + sum_k weight[c, base_(l + k - width // 2), k], where positions without a base, and those beyond the
    ends, add nothing; y_jc = max of v_lc over j pool <= l < (j + 1) pool. Neither the one-hot bases nor v are in memory with
    Triton: a token is a byte. Sums are in float32 (float64 for float64).

    Args:
        tokens: (batch, length), int8 (or wider) in {0..3 = ACGT, 4 = none}; not differentiable.
        weight: (channels, 4, width), width odd.
        bias: (channels,) or None.
        pool: positions of which the maximum is taken; divides length.
        dtype: of the products and of y; None for the weight's.
        backend: `triton` (CUDA), `torch`, or `auto`.

    Returns:
        (batch, length / pool, channels).

    Raises:
        ValueError: a shape, dtype or backend that does not fit.
    """
    check_real("weight", weight)
    check_devices(weight, tokens=tokens, bias=bias)
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}; whole numbers (batch, length) are needed"
        )
    if weight.dim() != 3 or weight.shape[1] != 4 or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; (channels, 4, width) with an odd width is needed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed is {tuple(weight.shape[:1])}")
    if pool < 1 or tokens.shape[1] % pool:
        raise ValueError(
            f"pool is {pool}, which does not divide the length {tokens.shape[1]}; give a divisor"
        )
    dtype = dtype or weight.dtype
    unfit = f"tokens have shape {tuple(tokens.shape)}; take backend='torch'" if tokens.numel() == 0 else None
    if choose_backend(backend, weight.new_empty(0, dtype=dtype), unfit, reference=False) == "triton":
        from genossm.kernels.motif_conv_triton import motif_conv_triton

        return motif_conv_triton(tokens, weight, bias, pool, dtype)

    channels, _, width = weight.shape
    with torch.autocast(weight.device.type, enabled=False):
        bases = torch.eye(5, 4, dtype=dtype, device=weight.device)
        one_hot_BLA = F.pad(F.embedding(tokens.int(), bases), (0, 0, width // 2, width // 2))
        seen = one_hot_BLA.unfold(1, width, 1).transpose(2, 3).flatten(2)
        filters = weight.to(dtype).permute(2, 1, 0).reshape(4 * width, channels)
        y_BLC = F.linear(seen, filters.T, None if bias is None else bias.to(dtype))
    return sum_pool(y_BLC, None, pool, backend="torch")
