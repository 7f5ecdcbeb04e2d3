"""Motif filters: torch against the sum written out, Triton (interpreted on a CPU) against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genossm.kernels.motif_conv import motif_conv


def make(
    batch: int, length: int, channels: int, width: int, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (batch, length), dtype=torch.int8, generator=random)
    weight = torch.randn(channels, 4, width, dtype=torch.float64, generator=random)
    return tokens, weight, torch.randn(channels, dtype=torch.float64, generator=random)


def slow(tokens: Tensor, weight: Tensor, bias: Tensor, pool: int) -> Tensor:
    (batch, length), width = tokens.shape, weight.shape[2]
    rows = []
    for b in range(batch):
        columns = []
        for position in range(length):
            total = bias.clone()
            for k in range(width):
                seen = position + k - width // 2
                if 0 <= seen < length and (base := int(tokens[b, seen])) < 4:
                    total = total + weight[:, base, k]
            columns.append(total)
        rows.append(torch.stack([torch.stack(columns[i : i + pool]).amax(0) for i in range(0, length, pool)]))
    return torch.stack(rows)


SHAPES = [(2, 24, 5, 7, 4), (1, 300, 40, 17, 3), (2, 130, 20, 1, 1), (1, 64, 17, 35, 2), (3, 1, 3, 9, 1)]
"""batch, length, channels, width, pool."""


@pytest.mark.parametrize(("batch", "length", "channels", "width", "pool"), SHAPES)
def test_torch_is_the_sum_written_out(batch: int, length: int, channels: int, width: int, pool: int) -> None:
    tokens, weight, bias = make(batch, length, channels, width)
    weight.requires_grad_()
    expected = slow(tokens, weight, bias, pool)
    got = motif_conv(tokens, weight, bias, pool=pool, backend="torch")
    assert got.shape == (batch, length // pool, channels)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    factors = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * factors).sum(), weight)[0] for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    plain = motif_conv(tokens, weight, pool=pool, backend="torch")
    torch.testing.assert_close(plain + bias, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("batch", "length", "channels", "width", "pool"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_triton_equals_torch(
    batch: int, length: int, channels: int, width: int, pool: int, biased: bool, device: str
) -> None:
    tokens, weight, bias = make(batch, length, channels, width, seed=1)
    exact = [weight.requires_grad_(), bias.requires_grad_()]
    narrow = [tensor.detach().to(device, torch.float32).requires_grad_() for tensor in exact]
    if not biased:
        exact, narrow = exact[:1], narrow[:1]
    expected = motif_conv(tokens, *exact, pool=pool, backend="torch")
    got = motif_conv(tokens.to(device), *narrow, pool=pool, backend="triton")
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    factors = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * factors).sum(), exact)
    found = torch.autograd.grad((got * factors.to(device, torch.float32)).sum(), narrow)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        again = motif_conv(tokens.to(device), *narrow, pool=pool, backend="triton")
    assert torch.equal(again, got)


def test_a_row_of_another_tensor_and_other_integers(device: str) -> None:
    tokens, weight, bias = make(4, 40, 6, 5)
    tokens, weight, bias = tokens.to(device), weight.float().to(device), bias.float().to(device)
    expected = motif_conv(tokens[::2, 3:33].contiguous(), weight, bias, pool=2, backend="triton")
    for other in (tokens[::2, 3:33], tokens.long()[::2, 3:33], tokens.T.contiguous().T[::2, 3:33]):
        assert torch.equal(motif_conv(other, weight, bias, pool=2, backend="triton"), expected)


def test_the_larger_of_what_is_not_a_number_is_not_a_number(device: str) -> None:
    tokens, weight, _ = make(1, 8, 3, 3)
    weight[1, :, :] = torch.nan
    for backend in ("torch", "triton"):
        y = motif_conv(tokens.clamp(max=3).to(device), weight.float().to(device), pool=4, backend=backend)  # type: ignore[arg-type]
        assert torch.isnan(y[..., 1]).all() and not torch.isnan(y[..., [0, 2]]).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool": 3}, "pool is 3, which does not divide the length 8"),
        ({"tokens": torch.zeros(1, 8)}, "whole numbers"),
        ({"tokens": torch.zeros(8, dtype=torch.int8)}, r"tokens have shape \(8,\)"),
        ({"weight": torch.zeros(3, 4, 2)}, "with an odd width is needed"),
        ({"weight": torch.zeros(3, 5, 3)}, r"weight has shape \(3, 5, 3\)"),
        ({"bias": torch.zeros(2)}, r"bias has shape \(2,\); allowed is \(3,\)"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "tokens": torch.zeros(1, 8, dtype=torch.int8),
        "weight": torch.zeros(3, 4, 3),
        "bias": torch.zeros(3),
    }
    with pytest.raises(ValueError, match=words):
        motif_conv(**(arguments | changes))  # type: ignore[arg-type]
