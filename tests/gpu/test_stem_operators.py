"""The operators of stem and decoder on a CUDA device: half precision against float64, long inputs, repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from genossm.kernels.batch_norm_gelu import batch_norm_gelu
from genossm.kernels.motif_conv import motif_conv
from genossm.kernels.sum_pool import sum_pool

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative to a tensor's norm."""
DTYPES = list(TOLERANCE)
Run = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def results(run: Run, leaves: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and the gradients of the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def compare(found: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> None:
    for index, (one, other) in enumerate(zip(found, truth, strict=True)):
        assert torch.isfinite(one).all(), index
        error = (one.double() - other).norm() / other.norm()
        assert error < tolerance, f"{index}: {error}"


def run_motif(tokens: Tensor, pool: int, dtype: torch.dtype, backend: str) -> Run:
    def run(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return motif_conv(tokens, weight, bias, pool=pool, dtype=dtype, backend=backend)  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width", "pool"),
    [(2, 4100, 96, 17, 1), (1, 8192, 512, 17, 1), (3, 130, 20, 35, 1), (1, 70_000, 64, 9, 1)],
)
def test_motif_conv(
    batch: int, length: int, channels: int, width: int, pool: int, dtype: torch.dtype
) -> None:
    tokens = torch.randint(0, 5, (batch, length), dtype=torch.int8, device="cuda")
    leaves = [normal(channels, 4, width, seed=1), normal(channels, seed=2)]
    leaves = [leaf.to(dtype).float() for leaf in leaves]  # what is rounded is the input of both
    dy = normal(batch, length // pool, channels, seed=3).to(dtype)
    found = results(run_motif(tokens, pool, dtype, "triton"), leaves, dy)
    doubles = [leaf.double() for leaf in leaves]
    truth = results(run_motif(tokens, pool, torch.float64, "torch"), doubles, dy.double())
    compare(found, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("pool", [2, 4, 5])
def test_motif_conv_pools(pool: int) -> None:
    """float32: rounding to less would move gradients between nearly equal values."""
    tokens = torch.randint(0, 5, (2, 1000 * pool), dtype=torch.int8, device="cuda")
    leaves, dy = [normal(96, 4, 17, seed=1)], normal(2, 1000, 96, seed=3)
    found = results(run_motif(tokens, pool, torch.float32, "triton"), leaves, dy)
    truth = results(run_motif(tokens, pool, torch.float64, "torch"), [leaves[0].double()], dy.double())
    compare(found, truth, 1e-5)
    again = results(run_motif(tokens, pool, torch.float32, "triton"), leaves, dy)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.xdist_group("memory")
def test_motif_conv_past_two_to_the_31() -> None:
    tokens = torch.randint(0, 5, (2, 2**22), dtype=torch.int8, device="cuda")
    weight = normal(512, 4, 5).bfloat16()
    with torch.no_grad():
        y = motif_conv(tokens, weight)
        part = motif_conv(tokens[1:, -1000:].contiguous(), weight)
    assert y.numel() > 2**31 and torch.equal(y[1:, -900:], part[:, -900:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["given", "batch", "paired"])
@pytest.mark.parametrize(
    ("rows", "channels"), [((2, 4099), 96), ((8, 1024), 512), ((3,), 1000), ((50_000,), 6)]
)
def test_batch_norm_gelu(rows: tuple[int, ...], channels: int, way: str, dtype: torch.dtype) -> None:
    leaves = [normal(*rows, channels).to(dtype) * 2 + 1, normal(channels, seed=1), normal(channels, seed=2)]
    known = (normal(channels, seed=3), normal(channels, seed=4).abs() + 0.5) if way == "given" else None
    dy = normal(*rows, channels, seed=5).to(dtype)

    def run(backend: str, wide: bool) -> Run:
        statistics = (known[0].double(), known[1].double()) if wide and known else known
        return lambda *leaves: batch_norm_gelu(*leaves, statistics, paired=way == "paired", backend=backend)[
            0
        ]  # type: ignore[arg-type]

    found = results(run("triton", False), leaves, dy)
    truth = results(run("torch", True), [leaf.double() for leaf in leaves], dy.double())
    compare(found, truth, TOLERANCE[dtype])
    again = results(run("triton", False), leaves, dy)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two", [True, False])
def test_sum_pool(two: bool, dtype: torch.dtype) -> None:
    for batch, length, channels, pool in ((2, 4100, 96, 2), (1, 600, 700, 5), (3, 128, 256, 4)):
        leaves = [normal(batch, length, channels, seed=seed).to(dtype) for seed in range(1 + two)]
        dy = normal(batch, length // pool, channels, seed=3).to(dtype)

        def run(backend: str, pool: int = pool) -> Run:
            return lambda x, other=None: sum_pool(x, other, pool, backend=backend)  # type: ignore[arg-type]

        found = results(run("triton"), leaves, dy)
        truth = results(run("torch"), leaves, dy)  # the same rounding of the sum
        assert torch.equal(found[0], truth[0])
        summed = [tensor.float().unflatten(1, (-1, pool)).sum(2) for tensor in (found[1], truth[1])]
        assert torch.equal(*summed)  # of equal neighbours each may choose another


@pytest.mark.xdist_group("memory")
def test_norm_and_pool_past_two_to_the_31() -> None:
    x = normal(2**15, 512).bfloat16().repeat(2**7 + 1, 1)
    weight, bias = normal(512, seed=1), normal(512, seed=2)
    with torch.no_grad():
        known = normal(512, seed=3), normal(512, seed=4).abs() + 0.5
        assert x.numel() > 2**31
        y = batch_norm_gelu(x, weight, bias, known)[0]
        assert torch.equal(y[-(2**15) :], batch_norm_gelu(x[-(2**15) :], weight, bias, known)[0])
        _, mean, variance = batch_norm_gelu(x, weight, bias)
        torch.testing.assert_close(mean, x[: 2**15].float().mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(variance, x[: 2**15].float().var(0, correction=0), rtol=1e-4, atol=1e-4)
        del y
        pooled = sum_pool(x[None], x[None], 4)
        assert torch.equal(pooled[0, -100:], (x[-400:] * 2).unflatten(0, (-1, 4)).amax(1))
