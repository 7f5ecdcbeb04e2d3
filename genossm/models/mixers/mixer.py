"""What every sequence mixer offers: the whole sequence at once, or chunk after chunk with the same result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""What a recurrence carries over a chunk's edge; every tensor's first axis is the batch."""


class Mixer(nn.Module):
    """(batch, length, width) to the same shape; every output may depend on every input, left and right.

    A chunk is a run of positions with its halo: `left` positions before it and `right` ones after it, which are `halo`
    wherever the sequence goes on that far, and fewer at its ends. What lies beyond the sequence does not exist: a
    convolution sees zeros there, attention nothing.

    To run chunk by chunk, a recurrent mixer first sweeps from right to left with `leftward`, which gives the state that
    enters each chunk from its right; then `mix` goes from left to right with the states of both sides.

    Attributes:
        halo: positions of input that a chunk's outputs need on its left and on its right beside the states.
        recurrent: whether states cross a chunk's edges.
        state_parameters: parameters of the recurrence, by name: no weight decay pulls at them.
    """

    halo: tuple[int, int] = (0, 0)
    recurrent: bool = False
    state_parameters: tuple[str, ...] = ()

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.mix(x_BLD)[0]

    def mix(
        self,
        x_BLD: Tensor,
        left: int = 0,
        right: int = 0,
        from_left: State | None = None,
        from_right: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """Outputs (batch, length - left - right, width), and the state that leaves the chunk to the right.

        Args:
            x_BLD: the chunk with its halo.
            left, right: positions of halo in it.
            from_left, from_right: the states that enter; None at the ends of the sequence. The one that leaves is None
                where nothing is carried.
        """
        raise NotImplementedError

    def leftward(
        self, x_BLD: Tensor, left: int = 0, right: int = 0, from_right: State | None = None
    ) -> State | None:
        """The state that leaves the chunk to the left; arguments as for `mix`. None where nothing is carried."""
        return None


def core(x_BLD: Tensor, left: int, right: int) -> Tensor:
    """The tensor (batch, length, ...) without its halo."""
    return x_BLD[:, left : x_BLD.shape[1] - right]


def mix_by_chunks(mixer: Mixer, chunks: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of consecutive chunks (batch, length, width) of one sequence: those of the whole, cut alike."""
    with_halo = [_with_halo(chunks, index, mixer.halo) for index in range(len(chunks))]
    entering: list[State | None] = [None] * len(chunks)
    if mixer.recurrent:
        for index in range(len(chunks) - 1, 0, -1):
            x_BLD, left, right = with_halo[index]
            entering[index - 1] = mixer.leftward(x_BLD, left, right, entering[index])
    outputs: list[Tensor] = []
    state: State | None = None
    for (x_BLD, left, right), from_right in zip(with_halo, entering, strict=True):
        y_BLD, state = mixer.mix(x_BLD, left, right, state, from_right)
        outputs.append(y_BLD)
    return outputs


def _with_halo(chunks: Sequence[Tensor], index: int, halo: tuple[int, int]) -> tuple[Tensor, int, int]:
    """A chunk with as much of its neighbours as there is of the halo, and how much that is on each side."""
    before: list[Tensor] = []
    left = right = 0
    for chunk in reversed(chunks[:index]):
        if left == halo[0]:
            break
        taken = chunk[:, max(0, chunk.shape[1] - (halo[0] - left)) :]
        before.insert(0, taken)
        left += taken.shape[1]
    after: list[Tensor] = []
    for chunk in chunks[index + 1 :]:
        if right == halo[1]:
            break
        taken = chunk[:, : halo[1] - right]
        after.append(taken)
        right += taken.shape[1]
    return torch.cat([*before, chunks[index], *after], 1), left, right
