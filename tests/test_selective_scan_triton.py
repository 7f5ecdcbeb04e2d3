"""The selective scan in Triton against the step-by-step recurrence in float64: outputs and every gradient.

On a CPU the kernels run in Triton's interpreter, on few and short inputs with chunks of 4 positions. Tolerances are relative
to the largest element.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from genossm.kernels import selective_scan_launch as launches
from genossm.kernels.packing import chunk_spans
from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.selective_scan_guard import exchanges_fit

FLOAT32 = 2e-5
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "start", "reverse_start")
BY_POSITION = ("x", "dt", "B", "C", "z")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for purpose in launches.CHUNK:
        monkeypatch.setitem(launches.CHUNK, purpose, 4)
    monkeypatch.setattr(launches, "SHORTEST_CHUNK", 4)


def make(
    length: int,
    device: str,
    *,
    batch: int = 2,
    channels: int = 5,
    state: int = 5,
    separate: str = "",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs in float32; `separate` names what each direction has of its own."""
    random = torch.Generator().manual_seed(seed + length)

    def normal(name: str, *shape: int) -> Tensor:
        shape = (*shape, 2) if name in separate.split() else shape
        return torch.randn(*shape, generator=random)

    inputs = {
        "x": normal("x", batch, length, channels),
        "dt": normal("dt", batch, length, channels),
        "A": -normal("A", channels, state).abs() - 0.05,
        "B": normal("B", batch, length, state),
        "C": normal("C", batch, length, state),
        "D": normal("D", channels),
        "z": normal("z", batch, length, channels),
        "dt_bias": normal("dt_bias", channels),
        "start": normal("start", batch, channels, state),
        "reverse_start": normal("reverse_start", batch, channels, state),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def run(inputs: dict[str, Tensor], direction: str, backend: str, **options: Any) -> dict[str, Tensor]:
    """y, the final states, and the gradient of a random function of them by every input that has a part in it."""
    wide = torch.float64 if backend == "reference" else torch.float32
    given = {name: tensor.detach().to(wide).requires_grad_() for name, tensor in inputs.items()}
    starts = {"forward": given.get("start"), "reverse": given.get("reverse_start")}
    initial: Any = tuple(starts.values()) if direction == "both" else starts[direction]
    y, finals = selective_scan(
        *(given.get(name) for name in NAMES[:7]),  # type: ignore[arg-type]
        dt_bias=given.get("dt_bias"),
        initial_state=None if "start" not in given else initial,
        return_final_state=True,
        direction=direction,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        **{"dt_softplus": True, **options},
    )
    results = {"y": y}
    for index, final in enumerate(finals if isinstance(finals, tuple) else (finals,)):
        results[f"final {index}"] = final
    random = torch.Generator().manual_seed(9)
    loss = sum(
        (result * torch.randn(result.shape, generator=random).to(result)).sum() for result in results.values()
    )
    names = [
        name
        for name in given
        if direction == "both" or name != {"forward": "reverse_start"}.get(direction, "start")
    ]
    gradients = torch.autograd.grad(loss, [given[name] for name in names])  # type: ignore[arg-type]
    return {**results, **{f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = FLOAT32) -> None:
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        error = (
            got[name].detach().double() - truth.detach().double()
        ).abs().max() / truth.detach().abs().max().clamp(min=1e-30)
        assert got[name].shape == truth.shape and float(error) < tolerance, (name, float(error))


def check(inputs: dict[str, Tensor], direction: str, **options: Any) -> None:
    expected = run(inputs, direction, "reference", **options)
    assert_equal(run(inputs, direction, "triton", **options), expected)


@pytest.mark.parametrize(
    ("direction", "length", "separate"),
    [
        ("forward", 10, ""),
        ("reverse", 7, ""),
        ("both", 9, ""),
        ("both", 8, ""),
        ("both", 6, "dt A B C dt_bias"),
        ("both", 1, ""),
    ],
)
def test_outputs_and_gradients(length: int, direction: str, separate: str, device: str) -> None:
    check(make(length, device, separate=separate), direction)


@pytest.mark.parametrize("parts", ["dt", "A B", "C dt_bias"])
def test_each_parameter_may_have_a_direction_of_its_own(parts: str, device: str) -> None:
    check(make(6, device, batch=1, separate=parts), "both")


@pytest.mark.parametrize(("state", "channels"), [(1, 2), (20, 3), (3, 70)])
def test_any_number_of_states_and_channels(state: int, channels: int, device: str) -> None:
    check(make(5, device, batch=1, state=state, channels=channels), "both")


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_without_what_is_optional(direction: str, device: str) -> None:
    inputs = make(6, device)
    few = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    few["dt"] = F.softplus(few["dt"])
    check(few, direction, dt_softplus=False)


@pytest.mark.parametrize("step", [1e-6, 50.0, "mixed"])
def test_extreme_steps(step: float | str, device: str) -> None:
    inputs = make(10, device, batch=1)
    random = torch.Generator().manual_seed(5)
    exponent = (torch.rand(inputs["dt"].shape, generator=random) * 17.7 - 13.8).exp()  # 1e-6 to 50
    inputs["dt"] = exponent.to(device) if isinstance(step, str) else torch.full_like(inputs["dt"], step)
    inputs["dt_bias"].zero_()
    check(inputs, "both", dt_softplus=False)


@pytest.mark.parametrize("bias", [-12.0, 30.0])
def test_softplus_far_from_zero(bias: float, device: str) -> None:
    inputs = make(6, device, batch=1)
    inputs["dt_bias"] += bias
    check(inputs, "forward")


def packed(lengths: tuple[int, ...], device: str, separate: str = "") -> tuple[dict[str, Tensor], Tensor]:
    """A row of sequences with a state for each, and its boundaries."""
    inputs = make(sum(lengths), device, batch=1, separate=separate)
    random = torch.Generator().manual_seed(2)
    for name in ("start", "reverse_start"):
        inputs[name] = torch.randn(len(lengths), 5, 5, generator=random).to(device)
    return inputs, torch.tensor([0, *lengths]).cumsum(0).to(device)


@pytest.mark.parametrize(
    ("direction", "lengths", "separate"),
    [
        ("forward", (3, 5, 1), ""),
        ("reverse", (5, 1), ""),
        ("both", (1, 4, 2), ""),
        ("both", (2, 5), "dt A B C dt_bias"),
        ("both", (3,), ""),
    ],
)
def test_packed_sequences(lengths: tuple[int, ...], direction: str, separate: str, device: str) -> None:
    inputs, bounds = packed(lengths, device, separate)
    check(inputs, direction, cu_seqlens=bounds)


def test_more_chunks_of_a_packed_sequence_than_are_loaded_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "PASS_AHEAD", 2)
    inputs, bounds = packed((1, 11, 2), device)
    few = {name: tensor for name, tensor in inputs.items() if name not in ("start", "reverse_start")}
    check(few, "both", cu_seqlens=bounds)


def flipped(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.flip(1) if name in BY_POSITION else tensor for name, tensor in inputs.items()}


def scan(inputs: dict[str, Tensor], direction: str, initial: Any = None) -> tuple[Tensor, Any]:
    arguments = [inputs[name] for name in NAMES[:7]]
    y, final = selective_scan(
        *arguments,  # type: ignore[arg-type]
        dt_bias=inputs["dt_bias"],
        dt_softplus=True,
        initial_state=initial,
        return_final_state=True,
        direction=direction,  # type: ignore[arg-type]
        backend="triton",
    )
    return y, final


def test_directions_belong_together(device: str) -> None:
    inputs = make(7, device)
    forward, reverse = scan(inputs, "forward"), scan(inputs, "reverse")
    turned = scan(flipped(inputs), "forward")
    torch.testing.assert_close(reverse[0], turned[0].flip(1))
    torch.testing.assert_close(reverse[1], turned[1])
    both = scan(inputs, "both")
    skip = inputs["D"] * inputs["x"] * F.silu(inputs["z"])
    torch.testing.assert_close(both[0], forward[0] + reverse[0] - skip)
    torch.testing.assert_close(both[1], (forward[1], reverse[1]))


def test_a_split_sequence_equals_the_whole(device: str) -> None:
    inputs = make(11, device)
    left, right = (
        {name: tensor[:, span] if name in BY_POSITION else tensor for name, tensor in inputs.items()}
        for span in (slice(0, 5), slice(5, 11))
    )
    y, final = scan(inputs, "forward")
    first, carried = scan(left, "forward")
    second, end = scan(right, "forward", carried)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(end, final)
    y, final = scan(inputs, "reverse")
    second, entering = scan(right, "reverse")
    first, end = scan(left, "reverse", entering)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(end, final)
    # in both, each half gets the other's state: the left one's forward, the right one's reverse
    whole, ends = scan(inputs, "both")
    zero = torch.zeros_like(carried)
    first, (_, last) = scan(left, "both", (zero, entering))
    second, (at_end, _) = scan(right, "both", (carried, zero))
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close((at_end, last), ends)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
        lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
        lambda tensor: F.pad(tensor, (3, 4))[..., 3:-4],
    ],
)
def test_views_give_the_same(change: Callable[[Tensor], Tensor], device: str) -> None:
    inputs = make(5, device, separate="dt B")
    strided = {name: change(tensor) for name, tensor in inputs.items()}
    assert not strided["x"].is_contiguous()
    torch.testing.assert_close(scan(strided, "both"), scan(inputs, "both"), rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [(5,), (1, 2)])
def test_nothing_is_read_that_was_not_written(
    lengths: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, bounds = packed(lengths, device, "dt A")
    options = {"cu_seqlens": bounds} if len(lengths) > 1 else {}
    expected = run(inputs, "both", "triton", **options)
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        return empty(*arguments, **options).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    got = run(inputs, "both", "triton", **options)
    monkeypatch.undo()
    for name, truth in expected.items():
        assert torch.equal(got[name], truth), name


def test_the_operators_as_torch_library_wants_them(device: str) -> None:
    """Without the check of their autograd: the gradient is that of an autograd.Function around them, not registered."""
    inputs = make(3, device, batch=1, channels=2, state=2)
    scan(inputs, "forward")  # the first call registers them
    row, bounds = packed((1, 2), device)
    spans, firsts = chunk_spans(list(pairwise(bounds.tolist())), 4, torch.device(device))
    full, few = list(inputs.values()), list(inputs.values())[:5]
    for arguments in (
        (*full, None, None, True, "both", 0),
        (*few, *[None] * 7, False, "reverse", 0),
        (*row.values(), spans, firsts, True, "forward", 4),
    ):
        forward, backward = torch.ops.genossm.selective_scan, torch.ops.genossm.selective_scan_backward
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(forward.default, arguments, test_utils=checks)
        y, final = forward(*arguments)
        for given in ((y, final), (y, None)):
            torch.library.opcheck(backward.default, (*given, *arguments), test_utils=checks)
            gradients = backward(*given, *arguments)
            assert len(
                {gradient.untyped_storage().data_ptr() for gradient in gradients if gradient.numel()}
            ) == sum(gradient.numel() > 0 for gradient in gradients)


# torch.compile itself makes an object of the autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_checkpointed_and_under_autocast(device: str) -> None:
    inputs = make(6, device, batch=1, channels=2, state=2)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def loss(*given: Tensor) -> Tensor:
        named = dict(zip(inputs, given, strict=True))
        y, finals = scan(named, "both", (named["start"], named["reverse_start"]))
        return y.square().sum() + sum(final.square().sum() for final in finals)

    expected = torch.autograd.grad(loss(*leaves), leaves)
    again = checkpoint(loss, *leaves, use_reentrant=False)
    assert isinstance(again, Tensor)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = loss(*leaves)
    for value in (again, compiled, cast):
        torch.testing.assert_close(torch.autograd.grad(value, leaves), expected, rtol=0, atol=0)


def test_a_second_derivative_is_refused(device: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(3, device, batch=1).items()}
    y, _ = scan(inputs, "both")
    (dx,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="genossm::selective_scan was computed by backend='triton'"):
        torch.autograd.grad(dx.sum() + inputs["dt"].sum(), inputs["dt"])


def test_flops_are_counted(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make(3, device)
    with FlopCounterMode(display=False) as counter:
        scan(inputs, "both")
    assert counter.get_total_flops() == 2 * 8 * 2 * 3 * 5 * 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"A": -torch.ones(5, 5, dtype=torch.complex64)}, "A is complex"),
        ({"A": -torch.ones(5, 300), "B": torch.ones(2, 4, 300), "C": torch.ones(2, 4, 300)}, "300 states"),
        ({"x": torch.ones(2, 4, 5, dtype=torch.float64)}, "torch.float64"),
    ],
)
def test_what_it_cannot_compute_is_told(change: dict[str, Tensor], words: str, device: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in {**make(4, device), **change}.items()}
    arguments = [inputs[name] for name in NAMES[:5]]
    with pytest.raises(ValueError, match=words):
        selective_scan(*arguments, backend="triton")
    assert isinstance(selective_scan(*arguments), Tensor)


LAYOUTS = """
#blocked = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [1, 4], order = [1, 0]}>
#blocked1 = #ttg.blocked<{sizePerThread = [2, 1], threadsPerWarp = [2, 16], warpsPerCTA = [1, 4], order = [0, 1]}>
#blocked2 = #ttg.blocked<{sizePerThread = [1, 1, 1], threadsPerWarp = [1, 1, 32], warpsPerCTA = [1, 1, 4], order = [2, 1, 0]}>
#linear = #ttg.linear<{register = [[1, 0]], lane = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]], warp = [[0, 32], [0, 64]], block = []}>
#linear1 = #ttg.linear<{register = [[0, 1]], lane = [[0, 2], [0, 4], [0, 8], [0, 16], [1, 0]], warp = [[0, 32], [0, 64]], block = []}>
%1 = tt.elementwise_inline_asm "shfl.sync.bfly.b32 $0, $1, 1, 31;" {pure = true} %0 : tensor<2x128xf32, WHICH> -> tensor<2x128xf32, WHICH> loc(#loc1)
"""


@pytest.mark.parametrize(
    ("layout", "fits"),
    [
        ("#blocked", True),
        ("#blocked1", False),
        ("#linear", True),
        ("#linear1", False),
        ("#ttg.slice<{dim = 0, parent = #blocked2}>", True),
        ("#ttg.slice<{dim = 2, parent = #blocked2}>", False),
        ("#unheard_of", False),
    ],
)
def test_layouts_that_exchanges_fit_are_told_from_others(layout: str, fits: bool) -> None:
    assert exchanges_fit(LAYOUTS.replace("WHICH", layout)) == fits
