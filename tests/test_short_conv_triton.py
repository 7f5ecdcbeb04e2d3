"""The short convolution in Triton (interpreted on a CPU) against sums in float64: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from genossm.kernels import short_conv_triton
from genossm.kernels.short_conv import short_conv

TOLERANCE = 1e-5
"""Of float32, relative to a tensor's largest element."""
PADDINGS = ["causal", "reverse", "centered", "both"]


class Case:
    """Arguments of one call, made in float64 from a seed, and the cotangents of its outputs."""

    def __init__(
        self,
        padding: str,
        length: int,
        width: int,
        *,
        batch: int = 2,
        channels: int = 5,
        states: bool = False,
        shared: bool = True,
        bias: bool = True,
        silu: bool = True,
        seed: int = 0,
    ) -> None:
        self.padding, self.silu, self.states = padding, silu, states
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        filters = () if shared else (2,)
        self.tensors: dict[str, Tensor] = {"x": normal(batch, length, channels)}
        self.tensors["weight"] = normal(*filters, channels, width)
        if bias:
            self.tensors["bias"] = normal(*filters, channels)
        if states:
            self.tensors["left"], self.tensors["right"] = (
                normal(batch, width - 1, channels) for _ in range(2)
            )
        self.cotangents = [normal(batch, max(length, width), channels) for _ in range(4)]

    def run(self, device: str, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        inputs = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in self.tensors.items()}
        initial: Any = None
        if self.states:
            pair = (inputs["left"], inputs["right"])
            initial = {"causal": pair[0], "reverse": pair[1], "both": pair}[self.padding]
        outputs = tree_leaves(
            short_conv(  # type: ignore[call-overload]
                inputs["x"],
                inputs["weight"],
                inputs.get("bias"),
                activation="silu" if self.silu else None,
                padding=self.padding,
                initial_state=initial,
                return_final_state=self.states,
                backend=backend,
            )
        )
        pairs = zip(outputs, self.cotangents, strict=False)
        sum((y * g[:, : y.shape[1]].to(y)).sum() for y, g in pairs).backward()
        found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        return found | {name: t.grad for name, t in inputs.items() if t.grad is not None}


def check(case: Case, device: str) -> None:
    found = case.run(device, torch.float32, "triton")
    expected = case.run("cpu", torch.float64, "reference")
    for name, truth in expected.items():
        got = found[name].cpu().double()
        assert got.shape == truth.shape, name
        if truth.numel():
            error = (got - truth).abs().max() / truth.abs().max().clamp_min(1e-3)
            assert error < TOLERANCE, f"{name}: {error}"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 67])
def test_equals_the_sums(padding: str, length: int, device: str) -> None:
    check(Case(padding, length, 4, silu=length != 15, bias=length != 16, seed=length), device)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_every_width(width: int, device: str) -> None:
    check(Case("both", 19, width, shared=False, seed=width), device)
    check(Case("centered", 19, width, seed=width), device)


@pytest.mark.parametrize("padding", ["causal", "reverse", "both"])
@pytest.mark.parametrize("length", [1, 2, 3, 35])
def test_states_and_their_gradients(padding: str, length: int, device: str) -> None:
    check(Case(padding, length, 4, states=True, shared=padding != "both", seed=length), device)


def test_several_blocks_of_channels_and_groups_of_sequences(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(Case("both", 6, 4, batch=1, channels=80, seed=1), device)
    few = short_conv_triton.MANY_BACKWARD._replace(resident=1)
    monkeypatch.setattr(short_conv_triton, "MANY_BACKWARD", few)
    monkeypatch.setattr(short_conv_triton, "processors", lambda _: 1)
    cut = short_conv_triton.cut_up(few, torch.device(device), 13, 8, 3, group=True)
    assert cut.grouped == 3
    check(Case("both", 5, 4, batch=13, channels=3, states=True, seed=2), device)


def test_any_strides(device: str) -> None:
    random = torch.Generator().manual_seed(3)
    packed = torch.randn(2, 21, 14, generator=random).to(device)
    weight = torch.randn(4, 4, generator=random).to(device)
    turned = torch.randn(4, 21, 2, generator=random).to(device)
    for x in (
        packed[..., 3:7],
        packed[:, ::2, :4],
        turned.permute(2, 1, 0),
        packed[:1, :, 2:6].expand(3, -1, -1),
    ):
        x = x.detach().requires_grad_()
        whole = x.detach().contiguous().requires_grad_()
        y, expected = (short_conv(t, weight, padding="both", backend="triton") for t in (x, whole))
        assert torch.equal(torch.stack(y), torch.stack(expected))
        # a gradient without strides, and one that is missing
        (got,) = torch.autograd.grad(y[1].sum(), x)
        (wanted,) = torch.autograd.grad((expected[1] * torch.ones_like(whole)).sum(), whole)
        assert torch.equal(got, wanted)


def test_pieces_equal_the_whole_and_their_gradients(device: str) -> None:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(1, 30, 3, generator=random).to(device).requires_grad_()
    weight = torch.randn(2, 3, 4, generator=random).to(device).requires_grad_()
    weights = torch.randn(2, 1, 30, 3, generator=random).to(device)
    options: dict[str, Any] = {"activation": "silu", "backend": "triton"}
    whole = short_conv(x, weight, padding="both", **options)
    causal, state = short_conv(x[:, :13], weight[0], return_final_state=True, **options)
    later = short_conv(x[:, 13:], weight[0], initial_state=state, **options)
    after, state = short_conv(x[:, 13:], weight[1], padding="reverse", return_final_state=True, **options)
    before = short_conv(x[:, :13], weight[1], padding="reverse", initial_state=state, **options)
    pieces = torch.cat([causal, later], 1), torch.cat([before, after], 1)
    found, expected = (
        torch.autograd.grad((torch.stack(y) * weights).sum(), (x, weight)) for y in (pieces, whole)
    )
    torch.testing.assert_close(torch.stack(pieces), torch.stack(whole))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_nothing_is_read_that_was_not_written(
    padding: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(padding, 19, 4, states=padding != "centered", shared=padding != "both")
    expected = case.run(device, torch.float32, "triton")
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *shape, made=made, **how: made(*shape, **how).fill_(torch.nan)
        )
    got = case.run(device, torch.float32, "triton")
    monkeypatch.undo()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_far_from_zero_is_finite(device: str) -> None:
    x = torch.tensor([-1e4, -90.0, -30.0, 0.0, 30.0, 1e4], device=device)[None, :, None].requires_grad_()
    y = short_conv(x, torch.ones(1, 1, device=device), activation="silu", backend="triton")
    expected = torch.nn.functional.silu(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x) for t in (y, expected)))


# torch.library.opcheck itself reads .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_torch_knows_the_operator(device: str) -> None:
    random = torch.Generator().manual_seed(5)
    x, weight, bias, left, right = (
        torch.randn(shape, generator=random).to(device).requires_grad_()
        for shape in ((2, 7, 3), (2, 3, 4), (3,), (2, 3, 3), (2, 3, 3))
    )
    operator = torch.ops.genossm.short_conv.default
    # The gradient is that of an autograd.Function around it, not registered.
    checks = ("test_schema", "test_faketensor")
    for arguments in (
        (x, weight, bias, left, right, short_conv_triton.BOTH, True, True),
        (x, weight[0], None, None, None, short_conv_triton.CENTERED, False, False),
    ):
        torch.library.opcheck(operator, arguments, test_utils=checks)
        given = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in arguments[:5]]
        outputs = [y if y.numel() else None for y in operator(*arguments)]
        cotangents = [None if y is None else y.detach() for y in outputs]
        torch.library.opcheck(
            torch.ops.genossm.short_conv_backward.default,
            (*given, *cotangents, *arguments[5:7]),
            test_utils=checks,
        )

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        causal, reverse = short_conv(x, weight, bias, activation="silu", padding="both", backend="triton")
        return (causal - reverse * 2).square().sum()

    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    again = checkpoint(loss, x, weight, use_reentrant=False)
    assert isinstance(again, Tensor)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, weight)
    for value in (again, compiled):
        torch.testing.assert_close(torch.autograd.grad(value, (x, weight)), expected, rtol=0, atol=0)
    with FlopCounterMode(display=False) as counter:
        loss(x, weight).backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 4 * 2


def test_a_second_derivative_is_refused(device: str) -> None:
    x = torch.randn(1, 9, 4, device=device).requires_grad_()
    weight = torch.randn(4, 3, device=device).requires_grad_()
    y = short_conv(x, weight, backend="triton")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="genossm::short_conv was computed by backend='triton'"):
        torch.autograd.grad(dx.sum(), weight)


def test_a_wide_filter_is_refused(device: str) -> None:
    x, weight = torch.zeros(1, 9, 4, device=device), torch.zeros(4, 9, device=device)
    with pytest.raises(ValueError, match="width 9"):
        short_conv(x, weight, backend="triton")
    assert short_conv(x, weight).shape == x.shape
