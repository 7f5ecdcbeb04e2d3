"""Launching a Triton kernel again and again without its just-in-time binding, which takes 25 us for 40 arguments."""

# mypy: disable-error-code="no-any-unimported"

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

KEPT = 256
"""Plans of one operator that are kept: one for each combination of shapes, strides and options."""

Plan = TypeVar("Plan")


class KernelLaunch:
    """A kernel with its grid and all of its arguments but the tensors, which come first.

    From the second call on the compiled kernel is launched directly: tensors must then have the dtypes, and data the
    alignment to 16 bytes, of the first call's (`signature`), on the same device.

    Args:
        scalars: the arguments that follow the tensors.
        constants: the remaining arguments, by name.
        options: num_warps, num_stages, maxnreg.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        scalars: tuple[object, ...],
        constants: dict[str, object],
        options: dict[str, int | None],
    ) -> None:
        self._kernel, self._scalars, self._constants, self._options = kernel, scalars, constants, options
        self._grid = (*grid, 1, 1)[:3]
        self._run: Callable[..., object] | None = None
        self._rest: tuple[object, ...] = ()

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._run is not None:
            self._run(*tensors, *self._rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._scalars, **self._constants, **self._options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            named = self._kernel.arg_names[len(tensors) + len(self._scalars) :]
            self._rest = (*self._scalars, *(self._constants[name] for name in named))
            self._run = compiled[self._grid]


def signature(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """What compiled kernels and their arguments depend on: shapes, strides, dtypes, and alignment to 16 bytes."""
    return tuple(
        None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)
        for tensor in tensors
    )


def remembered(plans: dict[Hashable, Plan], key: Hashable, make: Callable[[], Plan]) -> Plan:
    """The plan of this key; the oldest goes where there are too many."""
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= KEPT:
            del plans[next(iter(plans))]
        plan = plans[key] = make()
    return plan
