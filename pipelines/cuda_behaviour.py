"""What operators of PyTorch do otherwise on a CUDA device than on a processor, for tensors without data.

Which implementation runs, what it keeps for the backward pass, in which dtype autocast has it compute, and the memory it
works in. What NVIDIA's libraries take is not documented: `workspace` and the numbers of the LSTM are estimates, which
`genossm info --measure` compares with a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]

FLOAT32 = frozenset(
    "acos asin cosh cosine_similarity cumprod cumsum dist erfinv exp expm1 group_norm interpolate layer_norm log log10 log1p "
    "log2 log_softmax logsumexp mse_loss norm pow prod reciprocal renorm rsqrt sinh softmax softplus square sum tan "
    "upsample_nearest1d".split()
)
"""Functions of a 16-bit tensor that autocast computes in float32 on CUDA (PyTorch, "CUDA Ops that can autocast to float32")."""
CUBLAS_WORKSPACE = 32 * 2**20
"""Bytes that PyTorch keeps for cuBLAS in each thread that multiplies matrices, on Hopper (8 MiB elsewhere)."""
LSTM_KEPT = 6
"""Numbers that cuDNN's LSTM keeps for the backward pass, for each position, direction and hidden unit: an estimate."""


class CudaBehaviour(TorchFunctionMode):
    """Tensors say that they are on a CUDA device, so that the kernels' choice of a backend falls on Triton, and the
    functions that differ there run as there. Autocast is that of the processor, with the dtypes of CUDA's.

    Attributes:
        interrupted: whether an exception, with which activation checkpointing ends its work, went through a function.
            It keeps tensors alive, in a cycle of Python's frames, that are gone without this mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.interrupted = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._run(func, args, kwargs or {})
        except Exception:
            self.interrupted = True
            raise

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func == IS_CUDA:
            return True
        if func is Tensor.backward:
            with self:  # off within this function otherwise, and checkpointed functions run again
                return _backward(args[0])
        name = getattr(func, "__name__", "")
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.max_pool1d:  # a processor leaves the indices out where no gradient is wanted
            return F.max_pool1d_with_indices(*args, **kwargs)[0]
        if func is torch.bincount:
            return _equal_counts(*args, **kwargs)
        if name == "lstm" and len(args) == 9:
            return _lstm(*args)
        if name in FLOAT32 and _autocasting():
            args = tuple(_widened(argument) for argument in args)
        return func(*args, **kwargs)


def _backward(loss: Tensor) -> None:
    """`loss.backward()` below the functions that a mode sees."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _autocasting() -> bool:
    return torch.is_autocast_enabled("cpu")


def _widened(argument: Any) -> Any:
    half = isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16)
    return argument.float() if half else argument


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One kernel, which keeps a byte for each element; on a processor the factors are kept, and x."""
    dropped: Tensor = torch.native_dropout(x, p, True)[0] if training and p else x
    return dropped


def _rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """One kernel, where x and the weight have one dtype: autocast's float32, if it knows this norm."""
    if _autocasting() and torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA"):
        x, weight = _widened(x), _widened(weight)
    if weight is None or weight.dtype != x.dtype:
        squares = x.float().square().mean(-1, keepdim=True)
        y = (x.float() * torch.rsqrt(squares + 1e-5)).to(x.dtype)
        return y if weight is None else y * weight
    normed: Tensor = _FusedRMSNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return normed


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps x, the weight, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Tensor:
    """A fused kernel: FlashAttention in 16 bits without a mask, else the memory-efficient one, the mask as numbers."""
    if _autocasting():
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    if attn_mask is None and query.element_size() == 2:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p)[0]  # type: ignore[no-any-return]
    bias = None
    if attn_mask is not None:
        queries, keys = attn_mask.shape[-2:]
        bias = query.new_empty(queries, -(-keys // 8) * 8)[:, :keys]
        bias = bias.expand(*query.shape[:2], queries, keys)
    kept = torch.is_grad_enabled()
    y: Tensor = aten._scaled_dot_product_efficient_attention(query, key, value, bias, kept, dropout_p)[0]
    return y


def _equal_counts(choices: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """As many of each: what a balanced mixture of experts comes to. With data, for the host reads them."""
    each, more = divmod(choices.numel(), minlength)
    with unset_fake_temporarily():
        return torch.tensor([each + (index < more) for index in range(minlength)])


def _lstm(
    x: Tensor,
    states: tuple[Tensor, Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """cuDNN's: one call for all positions of a layer, states and biases left out."""
    h, c = states
    per_direction = 4 if has_biases else 2
    y: Tensor = x
    for layer in range(layers):
        own = weights[layer * len(weights) // layers : (layer + 1) * len(weights) // layers]
        directions = [own[first : first + 2] for first in range(0, len(own), per_direction)]
        matrices = [matrix for direction in directions for matrix in direction]
        y = _CudnnLSTM.apply(y, *matrices)  # type: ignore[no-untyped-call]
    return y, torch.empty_like(h), torch.empty_like(c)


class _CudnnLSTM(torch.autograd.Function):
    """x (batch, length, inputs) and, for each direction, the matrices of inputs (4 H, inputs) and states (4 H, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *matrices: Tensor) -> Tensor:
        directions, hidden = len(matrices) // 2, matrices[1].shape[1]
        rows = x.shape[0] * x.shape[1]
        y = x.new_empty(*x.shape[:2], directions * hidden)
        kept = x.new_empty(LSTM_KEPT, directions, rows, hidden)
        gates = [x.new_empty(rows, matrix.shape[1]) @ matrix.t() for matrix in matrices]
        del gates
        ctx.save_for_backward(x, y, kept, *matrices)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, _, _, *matrices = ctx.saved_tensors
        rows = x.shape[0] * x.shape[1]
        dmatrices = []
        for matrix in matrices:
            dgates = x.new_empty(rows, matrix.shape[0])
            dinput = dgates @ matrix
            dmatrices.append(dgates.t() @ dinput)
        return (torch.empty_like(x), *dmatrices)


def workspace(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Bytes that an operator takes on a CUDA device while it runs, beside inputs and results; an estimate.

    Convolutions: PyTorch copies an input that is not contiguous, and cuDNN a tensor of which channels are not next to
    each other, inputs and results alike; with channels last, only the weights. FFTs: cuFFT works in as much as the complex side has, and PyTorch transforms
    back from a copy. The gradient of attention in 16 bits adds up that of the queries in float32.
    """
    packet = func.overloadpacket if isinstance(func, torch._ops.OpOverload) else None
    if packet is aten.convolution:
        x, weight = args[:2]
        if _channels_last(x):
            return _bytes(weight)
        return _copied(x) + _bytes(x) + _bytes(weight) + _bytes(result)
    if packet is aten.convolution_backward:
        dy, x, weight = args[:3]
        if _channels_last(x):
            return 2 * _bytes(weight)
        return _copied(dy) + _copied(x) + _bytes(dy) + _bytes(weight) + _bytes(x)
    if packet is aten._fft_r2c:
        return _bytes(result)
    if packet is aten._fft_c2r:
        return 2 * _bytes(args[0])
    if packet is aten._fft_c2c:
        return _bytes(args[0])
    if packet in (
        aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_flash_attention_backward,
    ):
        query = args[1]
        return 4 * math.prod(query.shape) if query.element_size() == 2 else 0
    return 0


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copied(tensor: Tensor) -> int:
    return 0 if tensor.is_contiguous() else _bytes(tensor)
