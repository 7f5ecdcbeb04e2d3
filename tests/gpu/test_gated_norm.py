"""The gated RMS normalisation on a CUDA device: half precision, strides, long inputs, repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genossm.kernels.gated_norm import gated_rms_norm

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative to a tensor's norm."""


def run(inputs: dict[str, Tensor], cotangents: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    found = gated_rms_norm(**leaves, **options)  # type: ignore[call-overload]
    outputs = found if isinstance(found, tuple) else (found,)
    grads = [cotangent.to(y.dtype) for y, cotangent in zip(outputs, cotangents, strict=False)]
    results = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = {f"output {index}": y.detach() for index, y in enumerate(outputs)}
    return named | dict(zip(leaves, results, strict=True))


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert torch.isfinite(found[name]).all(), name
        error = (found[name].double() - truth).norm() / truth.norm()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["none", "before", "after"])
@pytest.mark.parametrize("residual", ["none", "same", "float32"])
def test_equals_float64(dtype: torch.dtype, gate: str, residual: str) -> None:
    random = torch.Generator("cuda").manual_seed(1)
    for rows, channels, groups in (((1,), 1024, 1), ((2, 1001), 1024, 4), ((257,), 100, 1), ((67,), 8192, 1)):

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device="cuda")

        inputs = {"x": normal(*rows, channels).to(dtype), "weight": normal(channels)}
        if gate != "none":
            inputs["z"] = normal(*rows, channels).to(dtype)
        if residual != "none":
            inputs["residual"] = normal(*rows, channels).to(dtype if residual == "same" else torch.float32)
        cotangents = [normal(*rows, channels).to(dtype) for _ in range(2)]
        options: dict[str, Any] = {"groups": groups, "norm_before_gate": gate == "after"}
        found = run(inputs, cotangents, backend="triton", **options)
        doubles = {name: tensor.double() for name, tensor in inputs.items()}
        compare(found, run(doubles, cotangents, backend="torch", **options), TOLERANCE[dtype])


@pytest.mark.xdist_group("memory")
def test_gradients_repeat_bit_by_bit_on_views_past_two_to_the_31() -> None:
    length, width = 1_048_583, 2192
    packed = torch.zeros(1, length, width, device="cuda", dtype=torch.bfloat16)
    random = torch.Generator("cuda").manual_seed(2)
    x, z = packed[..., :128], packed[..., -128:]
    for part in (x, z):
        part.copy_(torch.randn(part.shape, generator=random, device="cuda"))
    inputs = {"x": x, "weight": torch.randn(128, generator=random, device="cuda"), "z": z}
    cotangents = [torch.randn(x.shape, generator=random, device="cuda").bfloat16()]
    first = run(inputs, cotangents, backend="triton")
    again = run(inputs, cotangents, backend="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)
    copies = {name: tensor.contiguous() for name, tensor in inputs.items()}
    whole = run(copies, cotangents, backend="triton")
    assert all(torch.equal(first[name], whole[name]) for name in first)
    truth = run({name: tensor.double() for name, tensor in copies.items()}, cotangents, backend="torch")
    compare(first, truth, 8e-3)


@pytest.mark.parametrize("residual", [False, True])
def test_nothing_is_read_that_was_not_written(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator("cuda").manual_seed(3)
    x, z, other = (torch.randn(257, 1001, generator=random, device="cuda").bfloat16() for _ in range(3))
    inputs = {"x": x, "weight": torch.randn(1001, generator=random, device="cuda"), "z": z}
    if residual:
        inputs["residual"] = other
    cotangents, empty = [other, x], torch.empty
    expected = run(inputs, cotangents, backend="triton")
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(torch.nan))
    got = run(inputs, cotangents, backend="triton")
    monkeypatch.undo()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_zeros_and_large_values_are_finite() -> None:
    x = torch.zeros(100_003, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(256, device="cuda")
    found = run({"x": x, "weight": weight, "z": x}, [torch.ones_like(x)], backend="triton")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    large = torch.full((5, 256), 1e15, device="cuda")
    gates = torch.full_like(large, -1e4)
    found = run({"x": large, "weight": weight, "z": gates}, [torch.ones_like(large)], backend="triton")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_the_default_on_cuda_is_triton_under_autocast_too() -> None:
    x, weight = torch.randn(33, 64, device="cuda"), torch.randn(64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = gated_rms_norm(x, weight, x)
    assert y.dtype == torch.float32
    assert torch.equal(y, gated_rms_norm(x, weight, x, backend="triton"))
