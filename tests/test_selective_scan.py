"""The selective scan: the lanes of the torch backend against the step-by-step recurrence, outputs and every gradient.

Tolerances are relative to the largest element: float64 1e-12, float32 2e-5, bfloat16 3e-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels import selective_scan_torch
from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.selective_scan_torch import SideBySide

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@dataclass
class Inputs:
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    dt_bias: Tensor
    start: Tensor
    reverse_start: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def make(
    length: int,
    *,
    dtype: torch.dtype = torch.float64,
    separate: bool = False,
    complex_A: bool = False,
    complex_BC: bool = False,
    channels: int = 6,
    seed: int = 0,
) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    batch, state = 2, 5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    end = (2,) if separate else ()

    def normal(*shape: int, as_complex: bool = False) -> Tensor:
        kind = torch.complex128 if as_complex else torch.float64
        return torch.randn(*shape, generator=random, dtype=kind)

    A = -torch.rand(channels, state, *end, generator=random, dtype=torch.float64) - 0.05
    if complex_A:
        A = torch.complex(A, normal(channels, state, *end))
    number = wide.to_complex() if complex_A else wide
    inputs = Inputs(
        normal(batch, length, channels).to(dtype),
        normal(batch, length, channels, *end).to(dtype),
        A.to(number),
        normal(batch, length, state, *end, as_complex=complex_BC).to(number if complex_BC else dtype),
        normal(batch, length, state, *end, as_complex=complex_BC).to(number if complex_BC else dtype),
        normal(channels).to(wide),
        normal(batch, length, channels).to(dtype),
        normal(channels, *end).to(wide),
        normal(batch, channels, state, as_complex=complex_A).to(number),
        normal(batch, channels, state, as_complex=complex_A).to(number),
    )
    for tensor in inputs.tensors():
        tensor.requires_grad_()
    return inputs


def run(inputs: Inputs, direction: str, **options: Any) -> list[Tensor]:
    """y, final states and the gradient of a random function of them by every input."""
    both = direction == "both"
    initial: Any = (inputs.start, inputs.reverse_start) if both else inputs.start
    y, finals = selective_scan(
        *inputs.tensors()[:7],
        dt_bias=inputs.dt_bias,
        initial_state=initial,
        return_final_state=True,
        direction=direction,
        **{"dt_softplus": True, **options},
    )
    outputs = [y, *(finals if both else (finals,))]
    wanted = inputs.tensors() if both else inputs.tensors()[:-1]
    return [*outputs, *torch.autograd.grad(weighted(outputs), wanted)]


def weighted(outputs: list[Tensor]) -> Tensor:
    """The sum of the outputs, each element with a random weight."""
    random = torch.Generator().manual_seed(9)
    terms = []
    for output in outputs:
        wide = torch.complex128 if output.is_complex() else torch.float64
        weights = torch.randn(output.shape, generator=random, dtype=wide)
        terms.append(
            (output.to(wide) * weights).sum().real if output.is_complex() else (output * weights).sum()
        )
    return torch.stack(terms).sum()


def relative(got: Tensor, expected: Tensor) -> float:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    truth = expected.detach().to(wide)
    return float((got.detach().to(wide) - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(relative(a, b) for a, b in zip(got, expected, strict=True))


def scan(*arguments: Tensor, **options: Any) -> Tensor:
    y = selective_scan(*arguments, **options)
    assert isinstance(y, Tensor)
    return y


@pytest.fixture(params=[1, 2**15], ids=["one lane", "many lanes"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selective_scan_torch.FULL, "cpu", request.param)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 127, 255, 256, 257])
def test_lanes_equal_the_recurrence(length: int, direction: str) -> None:
    inputs = make(length, seed=length)
    expected = run(inputs, direction, backend="reference")
    assert worst(run(inputs, direction, backend="torch"), expected) < TOLERANCE[torch.float64]


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("complex_BC", [False, True])
def test_complex_A_equals_the_recurrence(complex_BC: bool, direction: str) -> None:
    inputs = make(131, complex_A=True, complex_BC=complex_BC, separate=direction == "both")
    expected = run(inputs, direction, backend="reference")
    got = run(inputs, direction)
    assert not got[0].is_complex() and got[1].is_complex()
    assert worst(got, expected) < TOLERANCE[torch.float64]


def test_complex_A_stands_for_itself_and_its_conjugate() -> None:
    inputs = make(40, complex_A=True, complex_BC=True)
    x, dt, A, B, C = inputs.x, F.softplus(inputs.dt), inputs.A, inputs.B, inputs.C
    state = torch.zeros(2, 6, 10, dtype=torch.complex128)
    for t in range(40):
        twice = torch.cat([A, A.conj()], 1)
        state = torch.exp(dt[:, t, :, None] * twice) * state
        state = state + (dt * x)[:, t, :, None] * torch.cat([B, B.conj()], 2)[:, t, None]
    last = (state * torch.cat([C, C.conj()], 2)[:, -1, None]).sum(-1)
    assert float(last.detach().imag.abs().max()) < 1e-12
    assert relative(scan(x, dt, A, B, C)[:, -1], last.real) < 1e-12


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("separate", [False, True])
def test_both_directions_in_every_dtype(dtype: torch.dtype, separate: bool) -> None:
    inputs = make(101, dtype=dtype, separate=separate)
    double = make(101, separate=separate)
    for wide, narrow in zip(double.tensors(), inputs.tensors(), strict=True):
        wide.data.copy_(narrow.data)
    got = run(inputs, "both")
    assert got[0].dtype == dtype
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert worst(got, run(double, "both", backend="reference")) < TOLERANCE[dtype]


@pytest.mark.parametrize("parts", ["dt", "A", "B", "C", "dt_bias"])
def test_each_parameter_may_have_a_direction_of_its_own(parts: str) -> None:
    shared, separate = make(70), make(70, separate=True, seed=3)
    setattr(shared, parts, getattr(separate, parts))
    expected = run(shared, "both", backend="reference")
    assert worst(run(shared, "both"), expected) < TOLERANCE[torch.float64]

    def one(name: str, index: int) -> Tensor:
        tensor: Tensor = getattr(shared, name)
        return tensor[..., index] if name == parts else tensor

    by_hand = shared.D * shared.x
    for index, direction in enumerate(("forward", "reverse")):
        arguments = [one(name, index) for name in ("dt", "A", "B", "C")]
        by_hand = by_hand + scan(
            shared.x, *arguments, dt_bias=one("dt_bias", index), dt_softplus=True, direction=direction
        )
    both = scan(*shared.tensors()[:7], dt_bias=shared.dt_bias, dt_softplus=True, direction="both")
    assert relative(both, by_hand * F.silu(shared.z)) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reverse_is_flip_scan_flip(backend: str) -> None:
    inputs = make(97)
    x, dt, A, B, C = inputs.x, F.softplus(inputs.dt), inputs.A, inputs.B, inputs.C
    reverse, end = selective_scan(
        x, dt, A, B, C, direction="reverse", return_final_state=True, backend=backend
    )
    flipped, flipped_end = selective_scan(
        *(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1)), return_final_state=True, backend=backend
    )
    assert isinstance(end, Tensor) and isinstance(flipped_end, Tensor)
    assert relative(reverse, flipped.flip(1)) < 1e-12
    assert relative(end, flipped_end) < 1e-12


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_split_sequence_with_carried_state_equals_the_whole(direction: Any) -> None:
    inputs = make(150)
    x, dt, A, B, C = inputs.x, F.softplus(inputs.dt), inputs.A, inputs.B, inputs.C
    whole, end = selective_scan(x, dt, A, B, C, return_final_state=True, direction=direction)
    pieces, state = {}, None
    spans = [slice(0, 71), slice(71, 150)]
    for span in spans if direction == "forward" else spans[::-1]:
        pieces[span.start], state = selective_scan(
            *(x[:, span], dt[:, span], A, B[:, span], C[:, span]),
            initial_state=state,
            return_final_state=True,
            direction=direction,
        )
    assert isinstance(state, Tensor) and isinstance(end, Tensor)
    assert relative(torch.cat([pieces[0], pieces[71]], 1), whole) < 1e-12
    assert relative(state, end) < 1e-12


@pytest.mark.parametrize("step", [1e-6, 50.0, "mixed"])
def test_extreme_steps_stay_accurate_in_float32(step: float | str) -> None:
    inputs, double = make(257, dtype=torch.float32, channels=40), make(257, channels=40)
    for wide, narrow in zip(double.tensors(), inputs.tensors(), strict=True):
        wide.data.copy_(narrow.data)
    random = torch.Generator().manual_seed(5)
    exponent = torch.rand(inputs.dt.shape, generator=random) * 17.7 - 13.8  # 1e-6 to 50
    for values in (inputs, double):
        values.dt.data.copy_(exponent.exp() if isinstance(step, str) else torch.tensor(step))
        values.dt_bias.data.zero_()
    got = run(inputs, "both", dt_softplus=False)
    assert all(torch.isfinite(result).all() for result in got)
    assert worst(got, run(double, "both", dt_softplus=False, backend="reference")) < 2e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
        lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
        lambda tensor: F.pad(tensor, (3, 4))[..., 3:-4],
    ],
)
def test_views_that_are_not_contiguous_give_the_same(change: Callable[[Tensor], Tensor]) -> None:
    tensors = [tensor.detach() for tensor in make(60).tensors()[:7]]
    strided = [change(tensor) for tensor in tensors]
    assert not strided[0].is_contiguous()
    options: dict[str, Any] = {"dt_softplus": True, "direction": "both"}
    assert relative(scan(*strided, **options), scan(*tensors, **options)) < 1e-14


def test_gradients_are_bitwise_repeatable_and_need_no_output_but_y() -> None:
    inputs = make(120, dtype=torch.float32)
    first, second = run(inputs, "both"), run(inputs, "both")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x = inputs.x.detach().requires_grad_()
    scan(x, *[tensor.detach() for tensor in inputs.tensors()[1:5]], dt_softplus=True).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def packed(
    lengths: tuple[int, ...], *, complex_A: bool = False, separate: bool = False
) -> tuple[Inputs, Tensor]:
    """A row of sequences with a state for each, and its boundaries."""
    row = make(sum(lengths), complex_A=complex_A, separate=separate, seed=1)
    random = torch.Generator().manual_seed(2)
    for name in ("x", "dt", "B", "C", "z"):
        setattr(row, name, getattr(row, name).detach()[:1].requires_grad_())
    for name in ("start", "reverse_start"):
        state = torch.randn(len(lengths), 6, 5, generator=random, dtype=row.A.dtype)
        setattr(row, name, state.requires_grad_())
    return row, torch.tensor([0, *lengths]).cumsum(0)


def one_by_one(row: Inputs, direction: str, bounds: Tensor) -> list[Tensor]:
    """What `run` gives for the whole row, from a call for each sequence; gradients by the row's own inputs."""
    both = direction == "both"
    ys, finals = [], []
    for number, (first, end) in enumerate(pairwise(bounds.tolist())):
        here, states = (
            slice(first, end),
            (row.start[number : number + 1], row.reverse_start[number : number + 1]),
        )
        y, final = selective_scan(
            *(row.x[:, here], row.dt[:, here], row.A, row.B[:, here], row.C[:, here], row.D, row.z[:, here]),
            dt_bias=row.dt_bias,
            dt_softplus=True,
            initial_state=states if both else states[0],
            return_final_state=True,
            direction=direction,  # type: ignore[arg-type]
            backend="reference",
        )
        ys.append(y)
        finals.append(final if isinstance(final, tuple) else (final,))
    outputs = [torch.cat(ys, 1), *(torch.cat(part) for part in zip(*finals, strict=True))]
    return [*outputs, *torch.autograd.grad(weighted(outputs), row.tensors() if both else row.tensors()[:-1])]


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("lengths", [(1,), (1, 15, 64, 1, 40, 63), (7, 300, 2), (65, 63), (130, 129)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_sequences_equal_each_by_itself(
    lengths: tuple[int, ...], direction: str, backend: str
) -> None:
    row, bounds = packed(lengths)
    got = run(row, direction, cu_seqlens=bounds.to(torch.int32), backend=backend)
    assert worst(got, one_by_one(row, direction, bounds)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_sequences_with_a_complex_A_and_directions_of_their_own(backend: str) -> None:
    row, bounds = packed((9, 33, 1, 12), complex_A=True, separate=True)
    got = run(row, "both", cu_seqlens=bounds, backend=backend)
    assert worst(got, one_by_one(row, "both", bounds)) < TOLERANCE[torch.float64]


def test_packed_sequences_without_states_start_from_zero() -> None:
    inputs = make(50)
    x, dt, A, B, C = inputs.x[:1], F.softplus(inputs.dt[:1]), inputs.A, inputs.B[:1], inputs.C[:1]
    whole = scan(x, dt, A, B, C, direction="both", cu_seqlens=torch.tensor([0, 20, 50]))
    pieces = [
        scan(x[:, span], dt[:, span], A, B[:, span], C[:, span], direction="both")
        for span in (slice(0, 20), slice(20, 50))
    ]
    assert relative(whole, torch.cat(pieces, 1)) < 1e-12


def test_batches_of_packed_sequences_are_mostly_not_padding() -> None:
    random = torch.Generator().manual_seed(3)
    lengths = [*(torch.rand(500, generator=random) * 11).exp().long().tolist(), 1, 1, 2, 4, 8, 2**17]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    sides = SideBySide.of(list(zip([0, *ends[:-1]], ends, strict=True)), torch.device("cpu"))
    assert sum(count * longest for count, longest in sides.shapes) < 2 * ends[-1]
    assert sum(count for count, _ in sides.shapes) == len(lengths)
    row = torch.arange(1.0, ends[-1] + 1, dtype=torch.float64)[None, :, None]
    assert torch.equal(sides.row(sides.batches(row)), row)


def test_autocast_leaves_float32_inputs_at_float32_accuracy() -> None:
    inputs = make(64, dtype=torch.float32)
    tensors = inputs.tensors()[:7]
    expected = scan(*tensors, dt_softplus=True, direction="both")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scan(*tensors, dt_softplus=True, direction="both")
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_gradient_of_the_reference_and_of_the_lanes_by_differences() -> None:
    inputs = make(4, complex_A=True, channels=2)
    tensors = [
        tensor[:1] if tensor.shape[0] == 2 and tensor.dim() > 2 else tensor for tensor in inputs.tensors()
    ]
    detached = [tensor.detach().requires_grad_() for tensor in tensors]
    for backend in ("reference", "torch"):

        def function(*values: Tensor, backend: Any = backend) -> tuple[Tensor, ...]:
            y, (forward, reverse) = selective_scan(
                *values[:7],
                dt_bias=values[7],
                dt_softplus=True,
                initial_state=(values[8], values[9]),
                return_final_state=True,
                direction="both",
                backend=backend,
            )
            return y, forward, reverse

        assert torch.autograd.gradcheck(function, detached, fast_mode=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"direction": "sideways"}, "direction is 'sideways'"),
        ({"backend": "cuda"}, "allowed are 'auto', 'triton', 'torch' and 'reference'"),
        ({"x": torch.zeros(2, 0, 4)}, "length >= 1"),
        ({"x": torch.zeros(2, 8, 4, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"dt": torch.zeros(2, 8, 4, dtype=torch.complex64)}, "dt has dtype torch.complex64"),
        ({"dt": torch.zeros(2, 8, 4, 2)}, "dt has shape (2, 8, 4, 2)"),
        ({"A": torch.zeros(4)}, "(channels, state >= 1) is needed"),
        ({"A": torch.zeros(3, 5)}, "A has shape (3, 5)"),
        ({"A": torch.zeros(4, 5, 3), "direction": "both"}, "allowed is (4, 5) or (4, 5, 2)"),
        ({"x": torch.zeros(0, 8, 4)}, "x has shape (0, 8, 4); (batch >= 1, length >= 1, channels >= 1)"),
        ({"x": torch.zeros(2, 8, 0)}, "channels >= 1) is needed"),
        ({"A": torch.zeros(4, 0)}, "A has shape (4, 0); (channels, state >= 1) is needed"),
        ({"A": torch.zeros(4, 5, dtype=torch.int32)}, "float16, complex64 or complex128"),
        ({"C": torch.zeros(2, 8, 5).to(torch.float8_e5m2)}, "C has dtype torch.float8_e5m2"),
        ({"B": torch.zeros(2, 8, 6)}, "B has shape"),
        ({"B": torch.zeros(2, 8, 5, dtype=torch.complex64)}, "B is complex and A is real"),
        ({"C": torch.zeros(2, 7, 5)}, "C has shape"),
        ({"D": torch.zeros(4, 4)}, "D has shape (4, 4)"),
        ({"z": torch.zeros(2, 8, 5)}, "z has shape"),
        ({"dt_bias": torch.zeros(4, 2)}, "dt_bias has shape (4, 2)"),
        ({"initial_state": torch.zeros(2, 4, 6)}, "initial_state has shape"),
        ({"initial_state": torch.zeros(2, 4, 5, dtype=torch.complex64)}, "initial_state is complex"),
        ({"initial_state": torch.zeros(2, 4, 5), "direction": "both"}, "not a pair"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "int32 or int64 is needed"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "with a batch of 2"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 8, 4),
        "dt": torch.zeros(2, 8, 4),
        "A": torch.zeros(4, 5),
        "B": torch.zeros(2, 8, 5),
        "C": torch.zeros(2, 8, 5),
    }
    with pytest.raises(ValueError) as caught:
        selective_scan(**{**arguments, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("bounds", [[0, 8, 8], [0, 7], [1, 8], [0, 5, 3, 8]])
def test_boundaries_that_do_not_fit_are_told(bounds: list[int]) -> None:
    x, A, B = torch.zeros(1, 8, 4), torch.zeros(4, 5), torch.zeros(1, 8, 5)
    with pytest.raises(ValueError, match="boundaries that rise from 0 to the length 8"):
        selective_scan(x, x, A, B, B, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="initial_state has shape"):
        selective_scan(x, x, A, B, B, cu_seqlens=torch.tensor([0, 3, 8]), initial_state=torch.zeros(1, 4, 5))
