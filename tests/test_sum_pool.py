"""The maximum of neighbours of a sum: torch against a loop, Triton (interpreted on a CPU) against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genossm.kernels.sum_pool import sum_pool

SHAPES = [(2, 24, 5, 4), (1, 30, 600, 3), (3, 1, 7, 1), (1, 510, 3, 255)]
"""batch, length, channels, pool."""


def make(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    # many equal neighbours: the gradient is then that of the first
    x, other = (torch.randint(-3, 4, shape, generator=random).double() for _ in range(2))
    return x.requires_grad_(), other.requires_grad_()


@pytest.mark.parametrize(("batch", "length", "channels", "pool"), SHAPES)
@pytest.mark.parametrize("two", [True, False])
def test_both_are_the_loop(batch: int, length: int, channels: int, pool: int, two: bool, device: str) -> None:
    x, other = make(batch, length, channels)
    total = (x + other if two else x).detach()
    expected = torch.stack([total[:, i : i + pool].amax(1) for i in range(0, length, pool)], 1)
    factors = torch.randn_like(expected)
    gradient = torch.zeros_like(total)
    for i in range(length // pool):
        block = total[:, i * pool : (i + 1) * pool]
        first = (block == expected[:, i, None]).long().argmax(1, keepdim=True)
        gradient[:, i * pool : (i + 1) * pool].scatter_(1, first, factors[:, i, None])
    leaves = [x, other] if two else [x]
    y = sum_pool(x, other if two else None, pool, backend="torch")
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for got in torch.autograd.grad((y * factors).sum(), leaves):
        torch.testing.assert_close(got, gradient, rtol=0, atol=0)
    if pool == 1:
        return
    narrow = [leaf.detach().to(device, torch.float32).requires_grad_() for leaf in leaves]
    y = sum_pool(narrow[0], narrow[1] if two else None, pool, backend="triton")
    assert torch.equal(y.cpu().double(), expected)
    for got in torch.autograd.grad((y * factors.float().to(device)).sum(), narrow):
        assert torch.equal(got.cpu(), gradient.float())
    with torch.no_grad():
        assert torch.equal(sum_pool(narrow[0], narrow[1] if two else None, pool, backend="triton"), y)


def test_layouts(device: str) -> None:
    x = torch.randn(2, 6, 12, device=device)
    for backend in ("torch", "triton"):
        expected = sum_pool(x.transpose(1, 2).contiguous(), None, 3, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(sum_pool(x.transpose(1, 2), None, 3, backend=backend), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(1, 8, 2), None, 3), "pool is 3, which does not divide the length 8"),
        ((torch.zeros(8, 2), None, 2), r"x has shape \(8, 2\); \(batch, length, channels\)"),
        ((torch.zeros(1, 8, 2), torch.zeros(1, 8, 3), 2), r"other has shape \(1, 8, 3\)"),
        ((torch.zeros(1, 8, 2), torch.zeros(1, 8, 2).double(), 2), "other has dtype torch.float64 and x"),
        ((torch.zeros(1, 8, 2, dtype=torch.int8), None, 2), "a floating-point dtype is needed"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Tensor, Tensor | None, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sum_pool(*arguments)


def test_more_than_a_byte_counts_is_torchs(device: str) -> None:
    x = torch.randn(1, 512, 2, device=device)
    torch.testing.assert_close(sum_pool(x, None, 256)[0, 1], x[0, 256:].amax(0))
    with pytest.raises(ValueError, match="backend='triton' takes up to 255"):
        sum_pool(x, None, 256, backend="triton")
