"""A rehearsal: a model runs on tensors without data, and its FLOPs and the memory it would take on a GPU are counted.

PyTorch's fake tensors know shapes, dtypes and which storage they share; everything else is the model's own code,
autograd and the launching code of the Triton kernels (without the kernels), so that what is allocated is what a GPU would
allocate, in the same order. What differs between devices inside PyTorch is in `genossm.pipelines.cuda_behaviour`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from genossm.errors import GenossmError
from genossm.kernels.backend import HAS_TRITON
from genossm.pipelines.cuda_behaviour import CudaBehaviour, workspace

ALLOCATION_UNIT = 512
"""Bytes: PyTorch's CUDA allocator gives whole multiples of this."""
OPERATORS = ("batch_norm_gelu", "gated_norm", "motif_conv", "selective_scan", "short_conv", "ssd", "sum_pool")
"""Of genossm.kernels, with Triton kernels."""
PROCESSORS = 132
"""Multiprocessors of the GPU that is rehearsed (H100, H200): kernels cut their work, and some buffers, by them."""

aten = torch.ops.aten


class Rehearsal(contextlib.AbstractContextManager["Rehearsal"]):
    """Within this context every tensor is without data, and operators behave as on a CUDA device (an H100).

    Models are made inside it. Nothing may depend on a tensor's values, but for the number of positions of each expert,
    which is taken to be the same for all.

    Raises:
        GenossmError: Triton, whose kernels' buffers are counted, is not installed.
    """

    def __init__(self) -> None:
        if not HAS_TRITON:
            raise GenossmError(
                "memory and FLOPs are counted with the launching code of the Triton kernels, and Triton is not installed "
                "(it is there for Linux); run this on a Linux machine, a GPU is not needed"
            )
        for operator in OPERATORS:
            import_module(f"genossm.kernels.{operator}_triton")  # which registers operators and their FLOPs
        self._behaviour = CudaBehaviour()
        self._memory = _Memory(self._behaviour)
        self._flops = FlopCounterMode(display=False, custom_mapping=_TRANSFORMS)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Rehearsal:
        for context in (
            _quick_collection(),
            _no_kernels(),
            warnings.catch_warnings(),
            FakeTensorMode(allow_non_fake_inputs=True),
            self._behaviour,
            self._memory,
            self._flops,
        ):
            self._stack.enter_context(context)
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()

    @property
    def allocated(self) -> int:
        """Bytes that are in use now."""
        return self._memory.allocated

    @property
    def peak(self) -> int:
        """The most bytes that were in use at any time since the start or `forget_peak`."""
        return self._memory.peak

    @property
    def operator(self) -> str:
        """The operator that ran when the peak was reached."""
        return self._memory.operator

    def forget_peak(self) -> None:
        """Begin a new peak at what is in use now."""
        self._memory.peak = self._memory.allocated

    @property
    def flops(self) -> int:
        """Operations so far: two for each multiplication with its addition in matrix products, convolutions and
        attention, those of FFTs, and what the scans say of themselves. Elementwise work is not counted."""
        return int(self._flops.get_total_flops())


def allocation(size: int) -> int:
    """Bytes that PyTorch's CUDA allocator gives to a tensor of that many."""
    return -(-size // ALLOCATION_UNIT) * ALLOCATION_UNIT


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that are alive, and for the time of an operator those that it works in."""

    def __init__(self, behaviour: CudaBehaviour) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated = self.peak = 0
        self.operator = ""
        self._behaviour = behaviour
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._behaviour.interrupted:
            self._behaviour.interrupted = False
            gc.collect()
        if func.namespace == "genossm":
            with self, _Addresses():
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), func)
        self._reached(self.allocated + workspace(func, args, result), func)
        return result

    def _count(self, storage: torch.UntypedStorage, func: Any) -> None:
        key = storage._cdata
        if key not in self._bytes:
            size = allocation(storage.nbytes())
            self._bytes[key] = size
            self.allocated += size
            self._reached(self.allocated, func)
            weakref.finalize(storage, self._free, key)

    def _reached(self, size: int, func: Any) -> None:
        if size > self.peak:
            self.peak, self.operator = size, str(func.overloadpacket)

    def _free(self, key: int) -> None:
        self.allocated -= self._bytes.pop(key)


class _Addresses(TorchFunctionMode):
    """Data without an address are at one that suits every kernel."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return 0 if func == Tensor.data_ptr else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _quick_collection() -> Iterator[None]:
    """Python's garbage collector looks at new objects only."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _no_kernels() -> Iterator[None]:
    """Launching a Triton kernel does nothing, and the launching code sees an H100."""
    from triton.runtime.jit import KernelInterface

    from genossm.kernels import selective_scan_launch

    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (KernelInterface, "__getitem__", lambda kernel, grid: lambda *arguments, **options: None),
        (selective_scan_launch, "_processors", lambda device: PROCESSORS),
        (selective_scan_launch, "interpreting", lambda: False),
    ]
    originals = [getattr(owner, name) for owner, name, _ in replacements]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(replacements, originals, strict=True):
            setattr(owner, name, original)


def _real_transform(shape: Any, axes: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """2.5 n log2 n for each transform of n real numbers; `shape` or `out_shape` is theirs, whichever is longer."""
    return _transform(2.5, max(tuple(shape), tuple(out_shape), key=math.prod), axes)


def _complex_transform(shape: Any, axes: Any, *rest: Any, **options: Any) -> int:
    """5 n log2 n for each transform of n complex numbers."""
    return _transform(5, shape, axes)


def _transform(factor: float, shape: Any, axes: Any) -> int:
    size = math.prod(shape[axis] for axis in axes)
    return int(factor * math.prod(shape) * math.log2(max(2, size)))


_TRANSFORMS = {
    aten._fft_r2c: _real_transform,
    aten._fft_c2r: _real_transform,
    aten._fft_c2c: _complex_transform,
}
