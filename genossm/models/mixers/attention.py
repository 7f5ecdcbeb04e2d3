"""Attention mixer: each position looks at those within a window on both sides, or at all.

Letters: B batch, L length, D width, H heads, P head_dim, W window, N blocks, Q queries, K keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genossm.kernels.arguments import accumulation
from genossm.models.mixers.mixer import Mixer, State, core


class Attention(Mixer):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) in a sliding window, both sides (Beltagy et al. 2020).

        y_i = sum_j softmax_j(q_i . k_j / sqrt(P)) v_j   over the j with |i - j| <= W that exist,

    q and k normalised (Dehghani et al. 2023, section 2; here by their root mean square) and scaled, then turned by
    rotary positions (Su et al. 2021, section 3.2): components p and p + P/2 of position i by the angle
    i * base^(-2p / P), so that q_i . k_j depends on i - j alone. Both in float32 (float64 in float64).

    A block of W queries attends to its own, the previous and the next block of keys under one (W, 3 W) mask, positions
    counted from the previous block's first: no angle beyond 3 W, whatever the length. The first block and what is left
    at the end take only the keys that exist. Memory is O(L W) at most, O(L) with a fused kernel.

    Linear layers start as torch's do, the scales at 1.

    Args:
        width: D.
        window: W, positions seen on either side. None: all of them (the Transformer baseline; cost L^2), without
            a mask, and then not to be run chunk by chunk.
        head_dim: P; even, must divide the width.
        base: of the rotary angles.
    """

    state_parameters: tuple[str, ...] = ("query_scale", "key_scale")

    def __init__(
        self, width: int, *, window: int | None = 256, head_dim: int = 64, base: float = 10_000.0
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"window of attention is {window}; it must be at least 1, or None for no window")
        if head_dim < 2 or head_dim % 2 or width % head_dim:
            raise ValueError(
                f"head_dim of attention is {head_dim} at width {width}; it must be even and divide the width"
            )
        if base <= 1:
            raise ValueError(f"base of attention's rotary positions is {base}; it must be above 1")
        self.window, self.heads, self.head_dim, self.base = window, width // head_dim, head_dim, base
        self.in_projection = nn.Linear(width, 3 * width, bias=False)
        self.query_scale = nn.Parameter(torch.ones(head_dim))
        self.key_scale = nn.Parameter(torch.ones(head_dim))
        self.out_projection = nn.Linear(width, width, bias=False)

    @property
    def halo(self) -> tuple[int, int]:  # type: ignore[override]
        """The window on each side.

        Raises:
            ValueError: there is no window, so no part of a sequence is enough.
        """
        if self.window is None:
            raise ValueError(
                "attention with window None looks at the whole sequence, so it has no halo and cannot run chunk by "
                "chunk; give it a window, or predict in windows of a fixed length"
            )
        return self.window, self.window

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        if self.window is not None:  # more halo than the window is of no use
            unused = max(0, left - self.window), max(0, right - self.window)
            x_BLD, left, right = core(x_BLD, *unused), left - unused[0], right - unused[1]
        qkv: Tensor = self.in_projection(x_BLD)
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.heads, self.head_dim).unbind(2)
        q, k = self._normalised(q, self.query_scale), self._normalised(k, self.key_scale)
        y = self._all(q, k, v, left, right) if self.window is None else self._sliding(q, k, v, left, right)
        y_BLD: Tensor = self.out_projection(y.flatten(2))
        return y_BLD, None

    def _normalised(self, x_BLHP: Tensor, scale_P: Tensor) -> Tensor:
        dtype = accumulation(x_BLHP.dtype)
        return F.rms_norm(x_BLHP.to(dtype), (self.head_dim,), scale_P.to(dtype), 1e-6).to(x_BLHP.dtype)

    def _all(self, q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
        turn = self._angles(k.shape[1], k)
        q = _turned(core(q, left, right), core(turn[None], left, right)[0])
        return _attend(q, _turned(k, turn), v, None)

    def _sliding(self, q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
        """The outputs (batch, length - left - right, heads, head_dim), where left and right are at most the window."""
        assert self.window is not None
        window, length = self.window, k.shape[1]
        stop = length - right
        turn = self._angles(3 * window, k)
        blocks = length // window - 2  # those with a whole block of keys before and after them
        if blocks < 1:
            return self._edge(q[:, left:stop], k, v, left, turn)
        outputs = []
        if left < window:
            outputs.append(self._edge(q[:, left:window], k[:, : 2 * window], v[:, : 2 * window], left, turn))
        tail = (blocks + 1) * window
        k_whole, v_whole = k[:, : tail + window], v[:, : tail + window]
        outputs.append(self._blocks(q[:, window:tail], k_whole, v_whole, turn))
        if tail < stop:
            outputs.append(
                self._edge(q[:, tail:stop], k[:, tail - window :], v[:, tail - window :], window, turn)
            )
        return torch.cat(outputs, 1)

    def _edge(self, q: Tensor, k: Tensor, v: Tensor, first: int, turn: Tensor) -> Tensor:
        """Fewer than 3 W keys, and queries of which the first stands at the key `first`."""
        queries, keys = q.shape[1], k.shape[1]
        mask_QK = self._within(first, queries, keys, q.device)
        return _attend(_turned(q, turn[first : first + queries]), _turned(k, turn[:keys]), v, mask_QK)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, turn: Tensor) -> Tensor:
        """N whole blocks of queries, and the N + 2 blocks of keys from the one before them to the one after them."""
        assert self.window is not None
        window = self.window
        q = _turned(_in_blocks(q, window), turn[window : 2 * window])
        k = _turned(_three_blocks(k, window), turn)
        mask_QK = self._within(window, window, 3 * window, q.device)
        y = _attend(q.flatten(0, 1), k.flatten(0, 1), _three_blocks(v, window).flatten(0, 1), mask_QK)
        return y.reshape(q.shape).flatten(1, 2)

    def _within(self, first: int, queries: int, keys: int, device: torch.device) -> Tensor:
        """(queries, keys), true where the key is in the query's window."""
        assert self.window is not None
        i_Q = torch.arange(first, first + queries, device=device)
        return (i_Q[:, None] - torch.arange(keys, device=device)).abs() <= self.window

    def _angles(self, positions: int, like: Tensor) -> Tensor:
        """i * base^(-2p / P), (positions, head_dim / 2)."""
        dtype = accumulation(like.dtype)
        p = torch.arange(self.head_dim // 2, device=like.device, dtype=dtype)
        i = torch.arange(positions, device=like.device, dtype=dtype)
        return i[:, None] * self.base ** (-2 * p / self.head_dim)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., length, heads, head_dim) turned by the angles (length, head_dim / 2), in x's dtype."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, other = x.to(angles.dtype).chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1).to(x.dtype)


def _in_blocks(x: Tensor, window: int) -> Tensor:
    """(batch, N W, ...) to (batch, N, W, ...)."""
    return x.reshape(x.shape[0], -1, window, *x.shape[2:])


def _three_blocks(x: Tensor, window: int) -> Tensor:
    """(batch, (N + 2) W, ...) to (batch, N, 3 W, ...): each inner block with the one before and the one after it."""
    blocks = _in_blocks(x, window)
    return torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask_QK: Tensor | None) -> Tensor:
    """Attention of (batch, length, heads, head_dim) tensors, in the same layout."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QK).transpose(1, 2)
