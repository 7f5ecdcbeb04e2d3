"""The SSD scan: every backend against the step-by-step recurrence, outputs and every gradient.

Tolerances are relative to the largest element: float64 1e-12, float32 2e-5, bfloat16 3e-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels import ssd_torch
from genossm.kernels.ssd import ssd

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@dataclass
class Inputs:
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    states: tuple[Tensor, Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.x, self.dt, self.A, self.B, self.C, self.D, *self.states]


def make(
    length: int,
    *,
    dtype: torch.dtype = torch.float64,
    separate: bool = False,
    groups: int = 2,
    wide_D: bool = False,
    seed: int = 0,
) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    batch, heads, head_dim, state = 2, 4, 3, 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    directions = (2,) if separate else ()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dt = torch.rand(batch, length, heads, *directions, generator=random, dtype=torch.float64)
    A = -torch.rand(heads, *directions, generator=random, dtype=torch.float64) - 0.05
    inputs = Inputs(
        normal(batch, length, heads, head_dim).to(dtype),
        dt.to(wide),
        A.to(wide),
        normal(batch, length, groups, state).to(dtype),
        normal(batch, length, groups, state).to(dtype),
        normal(*((heads, head_dim) if wide_D else (heads,))).to(wide),
        (
            normal(batch, heads, head_dim, state).to(wide),
            normal(batch, heads, head_dim, state).to(wide),
        ),
    )
    for tensor in inputs.tensors():
        tensor.requires_grad_()
    return inputs


def run(inputs: Inputs, direction: str, also: tuple[Tensor, ...] = (), **options: Any) -> list[Tensor]:
    """y, final states and the gradient of a random function of them by every input, `also` those given in options."""
    initial: Any = inputs.states if direction == "both" else inputs.states[0]
    y, finals = ssd(
        inputs.x,
        inputs.dt,
        inputs.A,
        inputs.B,
        inputs.C,
        inputs.D,
        initial_state=initial,
        return_final_state=True,
        direction=direction,
        **options,
    )
    outputs = [y, *(finals if direction == "both" else (finals,))]
    random = torch.Generator().manual_seed(9)
    loss = sum(
        (output.double() * torch.randn(output.shape, generator=random, dtype=torch.float64)).sum()
        for output in outputs
    )
    wanted = inputs.tensors() if direction == "both" else inputs.tensors()[:-1]
    return [*outputs, *torch.autograd.grad(loss, [*wanted, *also])]


def relative(got: Tensor, expected: Tensor) -> float:
    truth = expected.detach().double()
    return float((got.detach().double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize(
    ("length", "chunk"),
    [
        (1, 4),
        (15, 16),
        (16, 16),
        (17, 16),
        (63, 8),
        (64, None),
        (65, None),
        (67, 1),
        (139, 2),
        (256, 64),
        (257, 64),
    ],
)
def test_chunked_form_equals_the_recurrence(length: int, chunk: int | None, direction: str) -> None:
    inputs = make(length, seed=length)
    expected = run(inputs, direction, backend="reference")
    got = run(inputs, direction, backend="torch", chunk_size=chunk)
    assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("separate", "groups", "wide_D"), [(False, 1, True), (True, 4, False)])
def test_both_directions_in_every_dtype(
    dtype: torch.dtype, separate: bool, groups: int, wide_D: bool
) -> None:
    inputs = make(75, dtype=dtype, separate=separate, groups=groups, wide_D=wide_D)
    double = make(75, separate=separate, groups=groups, wide_D=wide_D)
    for wide, narrow in zip(double.tensors(), inputs.tensors(), strict=True):
        wide.data.copy_(narrow.data)
    expected = run(double, "both", backend="reference")
    got = run(inputs, "both", chunk_size=32)
    assert got[0].dtype == dtype
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reverse_is_flip_scan_flip_and_both_is_the_sum(backend: str) -> None:
    inputs = make(50, separate=True)
    x, B, C = inputs.x, inputs.B, inputs.C
    dt, A = inputs.dt, inputs.A
    forward = ssd(x, dt[..., 0], A[:, 0], B, C, backend=backend)
    flipped = ssd(x.flip(1), dt[..., 1].flip(1), A[:, 1], B.flip(1), C.flip(1), backend=backend)
    reverse = ssd(x, dt[..., 1], A[:, 1], B, C, direction="reverse", backend=backend)
    both = ssd(x, dt, A, B, C, inputs.D, direction="both", backend=backend)
    assert isinstance(forward, Tensor) and isinstance(flipped, Tensor)
    assert isinstance(reverse, Tensor) and isinstance(both, Tensor)
    assert relative(reverse, flipped.flip(1)) < 1e-12
    assert relative(both, forward + reverse + inputs.D[:, None] * x) < 1e-12


def test_a_split_sequence_with_carried_state_equals_the_whole() -> None:
    inputs = make(100)
    x, dt, A, B, C = inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C
    whole, end = ssd(x, dt, A, B, C, return_final_state=True)
    first, middle = ssd(x[:, :37], dt[:, :37], A, B[:, :37], C[:, :37], return_final_state=True)
    second, final = ssd(
        x[:, 37:], dt[:, 37:], A, B[:, 37:], C[:, 37:], initial_state=middle, return_final_state=True
    )
    assert isinstance(end, Tensor) and isinstance(final, Tensor)
    assert relative(torch.cat([first, second], 1), whole) < 1e-12
    assert relative(final, end) < 1e-12


@pytest.mark.parametrize("step", [1e-6, 50.0])
def test_extreme_steps_stay_finite_with_finite_gradients(step: float) -> None:
    inputs = make(70, dtype=torch.float32)
    inputs.dt.data.fill_(step)
    results = run(inputs, "both", chunk_size=16)
    assert all(torch.isfinite(result).all() for result in results)
    double = make(70)
    double.dt.data.fill_(step)
    expected = run(double, "both", backend="reference")
    assert relative(results[0], expected[0]) < 2e-5


def test_small_steps_among_large_ones_keep_their_digits() -> None:
    inputs, double = make(300, dtype=torch.float32), make(300)
    random = torch.Generator().manual_seed(4)
    dt = torch.exp(torch.rand(inputs.dt.shape, generator=random) * 17.7 - 13.8)  # 1e-6 to 50
    for wide, narrow in zip(double.tensors(), inputs.tensors(), strict=True):
        wide.data.copy_(narrow.data)
    for values in (inputs, double):
        values.dt.data.copy_(dt)
        values.A.data.mul_(16)
    got, expected = run(inputs, "both"), run(double, "both", backend="reference")
    assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) < 2e-6


@pytest.mark.parametrize("separate", [False, True])
def test_blocks_of_chunks_and_recomputing_change_nothing(
    separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(150, separate=separate)
    expected = run(inputs, "both", chunk_size=16)
    monkeypatch.setitem(ssd_torch.BLOCK_ELEMENTS, "cpu", 2 * 2 * 16 * 4 * 3)
    in_blocks = run(inputs, "both", chunk_size=16)
    monkeypatch.setattr(ssd_torch, "RECOMPUTE_ABOVE", 0)
    recomputed = run(inputs, "both", chunk_size=16)
    assert max(relative(a, b) for a, b in zip(in_blocks, expected, strict=True)) < 1e-13
    assert all(torch.equal(a, b) for a, b in zip(recomputed, in_blocks, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("separate_dt", "separate_bias"), [(False, False), (False, True), (True, False)])
def test_bias_softplus_and_gate_are_what_they_say(
    backend: str, separate_dt: bool, separate_bias: bool
) -> None:
    inputs = make(45)
    if separate_dt:
        inputs.dt = make(45, separate=True).dt
    random = torch.Generator().manual_seed(3)
    z = torch.randn(inputs.x.shape, generator=random, dtype=torch.float64, requires_grad=True)
    shape = (4, 2) if separate_bias else (4,)
    bias = torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True)
    got = run(inputs, "both", (z, bias), z=z, dt_bias=bias, dt_softplus=True, backend=backend, chunk_size=16)

    wide = inputs.dt if separate_dt or not separate_bias else inputs.dt[..., None].expand(-1, -1, -1, 2)
    steps = F.softplus(wide + (bias[:, None] if separate_dt else bias))
    y, finals = ssd(
        *(inputs.x, steps, inputs.A, inputs.B, inputs.C, inputs.D),
        initial_state=inputs.states,
        return_final_state=True,
        direction="both",
        backend="reference",
    )
    weights = torch.Generator().manual_seed(9)
    outputs = [y * F.silu(z), *finals]
    loss = sum((o * torch.randn(o.shape, generator=weights, dtype=torch.float64)).sum() for o in outputs)
    expected = [*outputs, *torch.autograd.grad(loss, [*inputs.tensors(), z, bias])]
    assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize(
    ("lengths", "chunk"), [((1,), 8), ((1, 15, 64, 1, 40), 16), ((7, 300, 2), 2), ((65, 63), None)]
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_sequences_equal_each_by_itself(
    lengths: tuple[int, ...], chunk: int | None, direction: Any, backend: str
) -> None:
    total, count = sum(lengths), len(lengths)
    inputs = make(total)
    random = torch.Generator().manual_seed(2)

    def states() -> Tensor:
        return torch.randn(count, 4, 3, 5, generator=random, dtype=torch.float64, requires_grad=True)

    row = Inputs(
        *(inputs.x[:1], inputs.dt[:1], inputs.A, inputs.B[:1], inputs.C[:1], inputs.D), (states(), states())
    )
    dtype = torch.int32 if count == 2 else torch.int64
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    got = run(row, direction, cu_seqlens=bounds, chunk_size=chunk, backend=backend)

    ys, finals = [], []
    for number, (first, end) in enumerate(pairwise(bounds.tolist())):
        initial = tuple(state[number : number + 1] for state in row.states)
        y, final = ssd(
            *(
                row.x[:, first:end],
                row.dt[:, first:end],
                row.A,
                row.B[:, first:end],
                row.C[:, first:end],
                row.D,
            ),
            initial_state=initial if direction == "both" else initial[0],
            return_final_state=True,
            direction=direction,
            backend="reference",
        )
        ys.append(y)
        finals.append(final if isinstance(final, tuple) else (final,))
    outputs = [torch.cat(ys, 1), *(torch.cat(part) for part in zip(*finals, strict=True))]
    weights = torch.Generator().manual_seed(9)
    loss = sum((o * torch.randn(o.shape, generator=weights, dtype=torch.float64)).sum() for o in outputs)
    wanted = row.tensors() if direction == "both" else row.tensors()[:-1]
    expected = [*outputs, *torch.autograd.grad(loss, wanted)]
    assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) < 1e-12


def test_packed_sequences_without_states_start_from_zero() -> None:
    inputs = make(50)
    arguments = (inputs.x[:1], inputs.dt[:1], inputs.A, inputs.B[:1], inputs.C[:1])
    bounds = torch.tensor([0, 20, 50])
    whole = ssd(*arguments, direction="both", cu_seqlens=bounds, chunk_size=8)
    x, dt, A, B, C = arguments
    pieces = [
        ssd(x[:, span], dt[:, span], A, B[:, span], C[:, span], direction="both")
        for span in (slice(0, 20), slice(20, 50))
    ]
    assert isinstance(whole, Tensor)
    assert relative(whole, torch.cat([piece for piece in pieces if isinstance(piece, Tensor)], 1)) < 1e-12


def test_gradient_of_the_reference_by_differences() -> None:
    inputs = make(3)
    tensors = [t[:1].detach() if t.dim() > 2 else t.detach() for t in inputs.tensors()]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        y, (forward, reverse) = ssd(
            *values[:6],
            initial_state=(values[6], values[7]),
            return_final_state=True,
            direction="both",
            backend="reference",
        )
        return y, forward, reverse

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], fast_mode=True)


def test_second_derivatives_by_differences() -> None:
    inputs = make(5)
    tensors = [t[:1].detach() if t.dim() > 2 else t.detach() for t in inputs.tensors()]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        y, (forward, reverse) = ssd(
            *values[:6],
            initial_state=(values[6], values[7]),
            return_final_state=True,
            direction="both",
            chunk_size=2,
            backend="torch",
        )
        return y, forward, reverse

    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_views_that_are_not_contiguous_give_the_same() -> None:
    inputs = make(40)
    packed = torch.randn(2, 40, 4 * 3 + 7, dtype=torch.float64)
    packed[..., 7:] = inputs.x.detach().flatten(2)
    view = packed[..., 7:].unflatten(-1, (4, 3))
    straight = ssd(inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C)
    strided = ssd(view, inputs.dt, inputs.A, inputs.B, inputs.C)
    assert isinstance(straight, Tensor) and isinstance(strided, Tensor)
    assert torch.equal(strided, straight)


def test_autocast_leaves_float32_inputs_at_float32_accuracy() -> None:
    inputs = make(64, dtype=torch.float32)
    expected = run(inputs, "both")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ssd(
            inputs.x,
            inputs.dt,
            inputs.A,
            inputs.B,
            inputs.C,
            inputs.D,
            initial_state=inputs.states,
            direction="both",
        )
    assert isinstance(got, Tensor) and torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"direction": "sideways"}, "direction is 'sideways'"),
        ({"backend": "cuda"}, "allowed are 'auto', 'triton', 'torch' and 'reference'"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"x": torch.zeros(2, 0, 4, 3)}, "length >= 1"),
        ({"x": torch.zeros(0, 8, 4, 3)}, "x has shape (0, 8, 4, 3); (batch >= 1, length >= 1, heads >= 1"),
        ({"x": torch.zeros(2, 8, 0, 3)}, "heads >= 1, head_dim >= 1) is needed"),
        ({"x": torch.zeros(2, 8, 4, 0)}, "heads >= 1, head_dim >= 1) is needed"),
        ({"x": torch.zeros(())}, "x has shape ()"),
        ({"B": torch.zeros(2, 8, 2, 0)}, "B has shape (2, 8, 2, 0)"),
        ({"x": torch.zeros(2, 8, 4, 3, dtype=torch.int32)}, "floating-point"),
        ({"D": torch.zeros(4).to(torch.float8_e4m3fn)}, "D has dtype torch.float8_e4m3fn; a floating-point"),
        (
            {"initial_state": torch.zeros(2, 4, 3, 5, dtype=torch.complex64)},
            "initial_state has dtype torch.com",
        ),
        ({"dt": torch.zeros(2, 8, 4, 2)}, "dt has shape (2, 8, 4, 2)"),
        ({"A": torch.zeros(3)}, "A has shape (3,)"),
        ({"B": torch.zeros(2, 8, 3, 5)}, "groups dividing the 4 heads"),
        ({"C": torch.zeros(2, 8, 2, 6)}, "C has shape"),
        ({"D": torch.zeros(4, 4)}, "D has shape (4, 4)"),
        ({"initial_state": torch.zeros(2, 4, 3, 4)}, "initial_state has shape"),
        ({"initial_state": torch.zeros(2, 4, 3, 5), "direction": "both"}, "not a pair"),
        ({"z": torch.zeros(2, 8, 4)}, "z has shape (2, 8, 4)"),
        ({"dt_bias": torch.zeros(4, 2)}, "dt_bias has shape (4, 2)"),
        ({"C": torch.zeros(2, 8, 2, 5, dtype=torch.complex64)}, "C has dtype torch.complex64"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "int32 or int64 is needed"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "with a batch of 2"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 8, 4, 3),
        "dt": torch.zeros(2, 8, 4),
        "A": torch.zeros(4),
        "B": torch.zeros(2, 8, 2, 5),
        "C": torch.zeros(2, 8, 2, 5),
    }
    with pytest.raises(ValueError) as caught:
        ssd(**{**arguments, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("bounds", [[0, 7], [1, 8], [0, 5, 5, 8], [0, 6, 4, 8]])
def test_boundaries_that_do_not_rise_to_the_length_are_told(bounds: list[int]) -> None:
    x, dt, A, B = torch.zeros(1, 8, 4, 3), torch.zeros(1, 8, 4), torch.zeros(4), torch.zeros(1, 8, 2, 5)
    with pytest.raises(ValueError, match="that rise from 0 to the length 8 are needed"):
        ssd(x, dt, A, B, B, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"allowed is \(2, 4, 3, 5\)"):
        ssd(x, dt, A, B, B, cu_seqlens=torch.tensor([0, 3, 8]), initial_state=torch.zeros(1, 4, 3, 5))
