"""The gated RMS normalisation: torch against its formula, Triton (interpreted on a CPU) against torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.gated_norm import gated_rms_norm
from genossm.models.norm import GatedRMSNorm


def make(
    rows: tuple[int, ...], channels: int, *, gate: bool, residual: bool, seed: int = 0
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    inputs = {"x": normal(*rows, channels), "weight": normal(channels)}
    if gate:
        inputs["z"] = normal(*rows, channels) * 2
    if residual:
        inputs["residual"] = normal(*rows, channels)
    return inputs


def run(inputs: dict[str, Tensor], device: str, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in inputs.items()}
    found = gated_rms_norm(**leaves, **options)  # type: ignore[call-overload]
    outputs = found if isinstance(found, tuple) else (found,)
    loss: Tensor = sum((y * torch.cos(torch.arange(y.numel(), device=device)).view_as(y)).sum() * (i + 1)
                       for i, y in enumerate(outputs))  # type: ignore[assignment]  # fmt: skip
    loss.backward()
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_torch_is_the_formula() -> None:
    inputs = make((2, 3), 12, gate=True, residual=False)
    x, weight, z = inputs["x"], inputs["weight"], inputs["z"]
    torch.testing.assert_close(gated_rms_norm(x, weight), F.rms_norm(x, (12,), weight, 1e-5))
    gated = F.rms_norm(x * F.silu(z), (12,), weight, 1e-5)
    torch.testing.assert_close(gated_rms_norm(x, weight, z), gated)
    first = F.rms_norm(x, (12,), weight, 0.1) * F.silu(z)
    torch.testing.assert_close(gated_rms_norm(x, weight, z, norm_before_gate=True, eps=0.1), first)
    parts = zip(x.chunk(3, -1), weight.chunk(3), strict=True)
    apart = torch.cat([F.rms_norm(part, (4,), factor, 1e-5) for part, factor in parts], -1)
    torch.testing.assert_close(gated_rms_norm(x, weight, groups=3), apart)
    y, total = gated_rms_norm(x, weight, residual=z)
    torch.testing.assert_close(total, x + z)
    torch.testing.assert_close(y, gated_rms_norm(x + z, weight))


def test_equals_the_encoders_module() -> None:
    module = GatedRMSNorm(16)
    inputs = make((2, 5), 16, gate=True, residual=False, seed=1)
    x, z = inputs["x"].float(), inputs["z"].float()
    torch.testing.assert_close(gated_rms_norm(x, module.weight, z), module(x, z))


def test_dtypes_of_a_residual_in_float32() -> None:
    inputs = make((7,), 16, gate=False, residual=True)
    x, residual = inputs["x"].bfloat16(), inputs["residual"].float()
    y, total = gated_rms_norm(x, inputs["weight"].float(), residual=residual)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x.float() + residual)


@pytest.mark.parametrize("gate", ["none", "before", "after"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rows", "channels", "groups"), [((1,), 24, 1), ((2, 9), 24, 3), ((3,), 33, 1)])
def test_triton_equals_torch(
    rows: tuple[int, ...], channels: int, groups: int, residual: bool, gate: str, device: str
) -> None:
    pytest.importorskip("triton")
    inputs = make(rows, channels, gate=gate != "none", residual=residual, seed=channels)
    options: dict[str, Any] = {"groups": groups, "norm_before_gate": gate == "after"}
    found = run(inputs, device, torch.float32, backend="triton", **options)
    expected = run(inputs, "cpu", torch.float64, backend="torch", **options)
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        error = (found[name].cpu() - truth).abs().max() / truth.abs().max()
        assert error < 1e-5, f"{name}: {error}"


def test_triton_sums_over_many_steps_and_takes_any_strides(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from genossm.kernels import gated_norm_triton

    monkeypatch.setattr(gated_norm_triton, "processors", lambda _: 1)
    monkeypatch.setattr(gated_norm_triton, "BACKWARD", gated_norm_triton.BACKWARD._replace(resident=3))
    inputs = make((2, 11), 20, gate=True, residual=False, seed=4)
    packed = torch.cat([inputs["x"], inputs["z"]], -1).float().to(device)
    x, z = (part.requires_grad_() for part in packed.detach().split(20, -1))
    weight = inputs["weight"].float().to(device).requires_grad_()
    gated_rms_norm(x, weight, z, backend="triton").sum().backward()
    doubles = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    gated_rms_norm(**doubles).sum().backward()
    for got, name in ((x, "x"), (z, "z"), (weight, "weight")):
        assert got.grad is not None
        torch.testing.assert_close(got.grad.cpu().double(), doubles[name].grad, rtol=1e-4, atol=1e-5)


def test_triton_with_a_float32_residual_and_one_output_unused(device: str) -> None:
    pytest.importorskip("triton")
    inputs = make((6,), 16, gate=False, residual=True, seed=6)
    grads = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        x, weight, residual = (
            inputs[name].to(device, dtype).requires_grad_() for name in ("x", "weight", "residual")
        )
        y, total = gated_rms_norm(x, weight, residual=residual, backend=backend)  # type: ignore[call-overload]
        grads.append(torch.autograd.grad(y.sum(), (x, weight, residual)))
        # the weight is no part of the sum
        y, total = gated_rms_norm(x, weight.detach(), residual=residual, backend=backend)  # type: ignore[call-overload]
        grads[-1] += torch.autograd.grad(total.square().sum(), (x, residual))
    for got, truth in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


# torch.library.opcheck itself reads .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_torch_knows_the_operator(device: str) -> None:
    pytest.importorskip("triton")
    import genossm.kernels.gated_norm_triton  # noqa: F401

    inputs = make((3,), 8, gate=True, residual=True)
    leaves = {name: tensor.float().to(device).requires_grad_() for name, tensor in inputs.items()}
    operator = torch.ops.genossm.gated_rms_norm.default
    # The gradient is that of an autograd.Function around it, not registered.
    checks = ("test_schema", "test_faketensor")
    for arguments in (
        (leaves["x"], leaves["weight"], leaves["z"], leaves["residual"], 2, 1e-5, False),
        (leaves["x"], leaves["weight"], None, None, 1, 1e-5, False),
    ):
        torch.library.opcheck(operator, arguments, test_utils=checks)

    def loss(x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(x, weight, z, backend="triton").square().sum()

    three = (leaves["x"], leaves["weight"], leaves["z"])
    expected = torch.autograd.grad(loss(*three), three)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*three)
    torch.testing.assert_close(torch.autograd.grad(compiled, three), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.ones(5)}, "weight has shape (5,)"),
        ({"z": torch.ones(2, 5)}, "z has shape (2, 5)"),
        ({"residual": torch.ones(6)}, "residual has shape (6,)"),
        ({"groups": 4}, "does not divide the 6 channels"),
        ({"x": torch.ones(2, 6, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"backend": "reference"}, "backend is 'reference'"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 6), "weight": torch.ones(6)}
    with pytest.raises(ValueError) as caught:
        gated_rms_norm(**{**arguments, **change})
    assert words in str(caught.value)
