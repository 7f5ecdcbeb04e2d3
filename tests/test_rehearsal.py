"""The rehearsal: FLOPs and bytes by hand, the same bytes as real tensors take, and what a CUDA device does otherwise."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from genossm.errors import GenossmError
from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.ssd import ssd
from genossm.models.mixers.lstm import LSTM
from genossm.models.mlp import MixtureOfExperts
from genossm.pipelines import rehearsal as module
from genossm.pipelines.rehearsal import Rehearsal


def units(*sizes: int) -> int:
    """Bytes that as many allocations take: multiples of 512."""
    return sum(-(-size // 512) * 512 for size in sizes)


class RealBytes(TorchDispatchMode):
    """The bytes of real tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(self.sizes.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.sizes:
                storage = leaf.untyped_storage()
                self.sizes[storage._cdata] = units(storage.nbytes())
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(torch.sin(self.up(x))))


def stack(x: Tensor, layers: nn.ModuleList, *, again: bool) -> Tensor:
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
    return x.square().sum()


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_memory_is_that_of_real_tensors(again: bool) -> None:
    real = RealBytes()
    with real:
        layers, x = nn.ModuleList(Block() for _ in range(5)), torch.randn(700, 24)
        before = real.now
        loss = stack(x, layers, again=again)
        kept, forward_peak, real.peak = real.now - before, real.peak - before, real.now
        loss.backward()
        backward_peak = real.peak - before
    with Rehearsal() as rehearsal:
        layers, x = nn.ModuleList(Block() for _ in range(5)), torch.randn(700, 24)
        assert rehearsal.allocated == before
        rehearsal.forget_peak()
        loss = stack(x, layers, again=again)
        assert (rehearsal.allocated - before, rehearsal.peak - before) == (kept, forward_peak)
        rehearsal.forget_peak()
        loss.backward()
        assert rehearsal.peak - before == backward_peak
        assert "." in rehearsal.operator


def test_memory_by_hand() -> None:
    rows, width = 333, 40
    with Rehearsal() as rehearsal:
        x = torch.randn(rows, width)
        y = x.exp()
        del x
        assert rehearsal.allocated == units(4 * rows * width)
        assert rehearsal.peak == 2 * units(4 * rows * width)
        view = y[::2].t()
        assert rehearsal.allocated == units(4 * rows * width)
        del y, view
        assert rehearsal.allocated == 0
        rehearsal.forget_peak()
        assert rehearsal.peak == 0


def flops_of(run: Callable[[], Tensor], *, backward: bool = False) -> int:
    with Rehearsal() as rehearsal:
        result = run()
        if backward:
            result.sum().backward()
        return rehearsal.flops


def test_flops_by_hand() -> None:
    assert flops_of(lambda: torch.randn(3, 5) @ torch.randn(5, 7)) == 2 * 3 * 5 * 7
    assert flops_of(lambda: torch.randn(3, 5).exp()) == 0
    linear = flops_of(lambda: nn.Linear(5, 7)(torch.randn(3, 5, requires_grad=True)), backward=True)
    assert linear == 3 * 2 * 3 * 5 * 7
    assert flops_of(lambda: nn.Conv1d(4, 6, 5, padding=2)(torch.randn(2, 4, 30))) == 2 * 2 * 30 * 4 * 5 * 6
    assert flops_of(lambda: torch.fft.irfft(torch.fft.rfft(torch.randn(3, 64)))) == 2 * 2.5 * 3 * 64 * 6
    assert flops_of(lambda: torch.fft.fft(torch.randn(3, 64, dtype=torch.complex64)).real) == 5 * 3 * 64 * 6
    heads = [torch.randn(2, 4, 30, 8) for _ in range(3)]
    attention = flops_of(lambda: F.scaled_dot_product_attention(*(torch.empty_like(head) for head in heads)))
    assert attention == 2 * (2 * 2 * 4 * 30 * 30 * 8)


def test_flops_of_an_lstm_by_hand() -> None:
    rows = 2 * 20
    of_gates, of_projection = 2 * (2 * rows * 4 * 6 * (12 + 6)), 2 * rows * 12 * 12  # two directions of 6
    assert flops_of(lambda: LSTM(12)(torch.randn(2, 20, 12))) == of_gates + of_projection
    x = (2, 20, 12)
    both = flops_of(lambda: LSTM(12)(torch.randn(x, requires_grad=True)), backward=True)
    assert both == 3 * (of_gates + of_projection)


def scan_inputs(length: int) -> list[Tensor]:
    x, dt = torch.randn(1, length, 2, 16), torch.rand(1, length, 2)
    return [x, dt, -torch.rand(2), torch.randn(1, length, 1, 16), torch.randn(1, length, 1, 16)]


def test_kernels_own_buffers_are_counted() -> None:
    with Rehearsal() as rehearsal:
        inputs = scan_inputs(64)
        before = rehearsal.allocated
        rehearsal.forget_peak()
        y = ssd(*inputs)
        assert isinstance(y, Tensor)
        # steps: five planes of (head, position) and a total for each head, each a multiple of 32 numbers;
        # states: what the one chunk adds, what enters it, and the last ones; then y in place of the first
        steps, states = 4 * (5 * 2 * 64 + 32), 4 * 2 * 16 * 16
        assert rehearsal.peak - before == units(steps, states, states, 4 * 64 * 2 * 16)
        assert rehearsal.allocated - before == units(4 * 64 * 2 * 16)


def test_kernels_see_an_h100_wherever_it_runs() -> None:
    with Rehearsal() as rehearsal:
        x, dt, A = torch.randn(1, 4096, 64), torch.rand(1, 4096, 64), -torch.rand(64, 16)
        B, C = torch.randn(1, 4096, 16), torch.randn(1, 4096, 16)
        before = rehearsal.allocated
        rehearsal.forget_peak()
        selective_scan(x, dt, A, B, C)
        chunks = 4096 // 32  # the shortest: there are few channels for 132 processors
        states, sums, last = 4 * chunks * 16 * 64, 4 * 2 * chunks * 64, 4 * 64 * 16
        assert rehearsal.peak - before == units(states, sums, last, 4 * 4096 * 64)


def kept_by(run: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, autocast: bool = False) -> int:
    """Bytes that are there after the function beside its input of that shape, its result with them."""
    with Rehearsal() as rehearsal:
        x = torch.randn(shape, requires_grad=True)
        before = rehearsal.allocated
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = run(x)
        kept = rehearsal.allocated - before
        del y
        return kept


def test_what_is_kept_for_the_gradient_is_as_on_cuda() -> None:
    shape, elements = (100, 64), 100 * 64
    assert kept_by(lambda x: F.dropout(x, 0.1), shape) == units(4 * elements, elements)
    assert kept_by(lambda x: F.dropout(x, 0.1, training=False), shape) == 0
    weight = units(4 * 64)  # its gradient is none of it
    assert (
        kept_by(lambda x: F.rms_norm(x, (64,), torch.ones(64)), shape)
        == units(4 * elements, 4 * 100) + weight
    )
    # x rounded is given up again: softplus keeps its input in float32
    assert kept_by(lambda x: F.softplus(x.bfloat16()), shape, autocast=True) == 2 * units(4 * elements)
    assert kept_by(lambda x: F.softplus(x.bfloat16()), shape) == 2 * units(2 * elements)


def test_a_norm_is_in_float32_where_autocast_knows_it() -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA"):
        pytest.skip("this PyTorch leaves rms_norm to the dtype that comes")
    elements = 100 * 64

    def normed(x: Tensor) -> Tensor:
        y = F.rms_norm(x.bfloat16(), (64,), torch.ones(64))
        assert y.dtype == torch.float32
        return y

    kept = units(4 * elements, 4 * 64, 4 * 100)  # x in float32, the weight, a number for each row
    assert kept_by(normed, (100, 64), autocast=True) == kept + units(4 * elements)


def test_an_lstm_keeps_six_numbers_for_each_of_its_own() -> None:
    def run(x: Tensor) -> Tensor:
        lstm = nn.LSTM(64, 32, batch_first=True, bidirectional=True)
        y: Tensor = lstm(x)[0]
        return y

    matrices = units(*[4 * 128 * 64, 4 * 128 * 32] * 2)
    assert kept_by(run, (2, 50, 64)) == units(4 * 100 * 64, 4 * 6 * 100 * 64) + matrices


def test_attention_keeps_no_matrix_of_pairs() -> None:
    shape = (2, 4, 512, 64)

    def attend(mask: bool) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            seen = torch.ones(512, 512, dtype=torch.bool) if mask else None
            return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)

        return run

    result, row_sums = 4 * math.prod(shape), 4 * math.prod(shape[:3])
    assert kept_by(attend(False), shape) < 1.1 * units(result, row_sums)
    assert kept_by(attend(True), shape) < 1.1 * units(result, row_sums, 4 * 512 * 512)


def test_experts_are_taken_to_be_used_alike() -> None:
    with Rehearsal() as rehearsal:
        experts = MixtureOfExperts(16, 2.0, 4, 2)
        y = experts(torch.randn(3, 10, 16))
        assert y.shape == (3, 10, 16)
        router, mlps = 2 * 30 * 16 * 4, 2 * 60 * 16 * 64 + 2 * 60 * 32 * 16
        assert rehearsal.flops == router + mlps + 2 * 30 * 2 * 16
        (y.sum() + experts.balance_loss).backward()


def test_pooling_makes_indices_without_a_gradient_too() -> None:
    with Rehearsal() as rehearsal, torch.inference_mode():
        x = torch.randn(1, 64, 1024)
        F.max_pool1d(x, 4)
        assert rehearsal.peak == units(4 * 64 * 1024, 4 * 64 * 256, 8 * 64 * 256)


def test_libraries_work_in_memory_of_their_own() -> None:
    with Rehearsal() as rehearsal:
        x, conv = torch.randn(1, 64, 1000), nn.Conv1d(64, 32, 3, padding=1)
        before = rehearsal.allocated
        rehearsal.forget_peak()
        with torch.no_grad():
            y = conv(x)
        size, result, weight = x.numel(), y.numel(), conv.weight.numel()
        assert rehearsal.peak - before == units(4 * result) + 4 * (size + result + weight)


def test_everything_is_as_before_afterwards() -> None:
    from triton.runtime.jit import KernelInterface

    launching, frozen = KernelInterface.__getitem__, gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), Rehearsal():
        assert KernelInterface.__getitem__ is not launching
        assert torch.randn(2).is_cuda
        raise ZeroDivisionError
    assert KernelInterface.__getitem__ is launching and gc.get_freeze_count() == frozen
    assert not torch.randn(2).is_cuda
    y = ssd(*(tensor.double() for tensor in scan_inputs(3)))
    assert isinstance(y, Tensor) and y.isfinite().all()


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAS_TRITON", False)
    with pytest.raises(GenossmError, match="Triton is not installed"):
        Rehearsal()
