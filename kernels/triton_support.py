"""What the Triton modules share: operators in PyTorch, the sigmoid, the device that a launch goes to, and layouts."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Functions of Triton's own language have no types.

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.kernels.backend import interpreting

LIBRARY = torch.library.Library("genossm", "FRAGMENT")


def define_operator(schema: str, implementation: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Make genossm::name(...) -> ... known to PyTorch, on CUDA and, for Triton's interpreter, on the CPU.

    Args:
        shapes: the same function for tensors without data: empty results of the right shapes and dtypes.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):
        torch.library.impl(LIBRARY, name, key)(implementation)
    torch.library.register_fake(f"genossm::{name}", shapes, lib=LIBRARY)


def differentiable(
    name: str, save: Callable[..., None], gradients: Callable[..., tuple[Tensor | None, ...]]
) -> Callable[..., Any]:
    """genossm::name with a gradient. torch.library.register_autograd does the same at twice the host's time.

    Args:
        save: of the context, the inputs and the outputs, what the gradient needs.
        gradients: of the context and the outputs' gradients, those of the inputs.
    """
    operator = getattr(torch.ops.genossm, name).default

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = operator(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients(ctx, *of_outputs)
            context = _Read(ctx)  # create_graph=True
            return _Once.of(name, gradients(context, *of_outputs), (*of_outputs, *context.saved_tensors))

    def run(*inputs: Any) -> Any:
        return Recorded.apply(*inputs) if torch.is_grad_enabled() else operator(*inputs)

    return run


class _Read:
    """A context whose saved tensors may be read twice, which checkpoints do not allow."""

    def __init__(self, context: Any) -> None:
        self._context, self.saved_tensors = context, context.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _Once(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated again: their own gradient would be missing, not zero."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            f"genossm::{ctx.name} was computed by backend='triton', which has no second derivatives; take backend='torch' "
            "(of selective_scan 'reference') for what is differentiated twice"
        )

    @classmethod
    def of(
        cls, name: str, gradients: tuple[Tensor | None, ...], made_of: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients, which depend on the tensors that they were `made_of`."""
        roots = [tensor for tensor in made_of if tensor is not None and tensor.requires_grad]
        present = [tensor for tensor in gradients if tensor is not None]
        if not roots:
            return gradients
        marked = iter(cls.apply(name, len(present), *present, *roots))
        return tuple(None if tensor is None else next(marked) for tensor in gradients)


PTX = torch.version.hip is None and not interpreting()
"""Whether kernels may hold inline PTX."""


@triton.jit
def sigmoid(u, PTX: tl.constexpr):
    """1 / (1 + exp(-u)) in float32, to two units in the last place; 0 (or 1e-38) and 1 far out."""
    if PTX:
        # Triton's own division and exp2 guard against denormals, at twice the instructions
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [u],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp2(tl.minimum(u * -1.4426950408889634, 126.0)))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which Triton launches on the tensor's device; costs nothing where it is the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device (an H100's in Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def rows_of_channels(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last axis is not contiguous (that of size 1 always is)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied where it is not contiguous."""
    return None if tensor is None else tensor.contiguous()
