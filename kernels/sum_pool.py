"""The maximum of neighbouring positions of a sum: what stands between two residual stages at falling resolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.arguments import check_devices, check_real, check_shape
from genossm.kernels.backend import Backend, choose_backend


def sum_pool(x: Tensor, other: Tensor | None, pool: int, *, backend: Backend = "auto") -> Tensor:
    """The maximum over each `pool` positions of x + other: with Triton the sum is never in memory.

    y_jc = max of x_lc + other_lc over j pool <= l < (j + 1) pool; the sum is rounded to x's dtype. The gradient goes to
    the first of equal positions.

    Args:
        x: (batch, length, channels).
        other: shaped as x, of its dtype, or None for x alone.
        pool: divides length.
        backend: `triton` (CUDA), `torch`, or `auto`.

    Returns:
        (batch, length / pool, channels).

    Raises:
        ValueError: a shape, dtype, pool or backend that does not fit.
    """
    check_real("x", x)
    check_devices(x, other=other)
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; (batch, length, channels) is needed")
    if other is not None:
        check_shape("other", other, [tuple(x.shape)])
        if other.dtype != x.dtype:
            raise ValueError(f"other has dtype {other.dtype} and x {x.dtype}; give both the same")
    if pool < 1 or x.shape[1] % pool:
        raise ValueError(f"pool is {pool}, which does not divide the length {x.shape[1]}; give a divisor")
    if pool == 1:
        return x if other is None else x + other
    unfit = None
    if pool > 255:
        unfit = f"pool is {pool}; backend='triton' takes up to 255, backend='torch' any number"
    elif x.numel() == 0:
        unfit = f"x has shape {tuple(x.shape)}, without elements; take backend='torch'"
    if choose_backend(backend, x, unfit, reference=False) == "triton":
        from genossm.kernels.sum_pool_triton import sum_pool_triton

        return sum_pool_triton(x, other, pool)
    total = x if other is None else x + other
    if total.numel() == 0:
        return total[:, ::pool]
    # an image of height 1, for which PyTorch has channels last
    y_BCHL = F.max_pool2d(total.transpose(1, 2).unsqueeze(2), (1, pool))
    return y_BCHL.squeeze(2).transpose(1, 2)
