"""Several sequences in one row: where each begins and ends, and their layout in whole chunks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def sequence_bounds(cu_seqlens: Tensor, batch: int, length: int) -> list[tuple[int, int]]:
    """(start, end) of every sequence in a row, from the boundaries that `cu_seqlens` lists.

    Args:
        cu_seqlens: (sequences + 1,) int32 or int64: 0, the end of each sequence but the last, `length`.

    Raises:
        ValueError: another shape or dtype, boundaries that do not rise from 0 to `length`, or batch other than 1.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            "(sequences + 1,) of int32 or int64 is needed"
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens is given with a batch of {batch}; put all sequences one after another in a batch of 1"
        )
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a >= b for a, b in pairwise(bounds)):
        shown = f"{bounds}" if len(bounds) <= 12 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
        raise ValueError(
            f"cu_seqlens is {shown}; boundaries that rise from 0 to the length {length} are needed, "
            "no sequence of 0 positions"
        )
    return list(pairwise(bounds))


def chunk_spans(
    bounds: list[tuple[int, int]], chunk_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First and end position of every chunk, and each sequence's first chunk; no chunk spans two sequences.

    Returns:
        (chunks, 2) and (sequences + 1,), int64.
    """
    ends = torch.tensor([end for _, end in bounds])
    starts = torch.tensor([start for start, _ in bounds])
    counts = -((starts - ends) // chunk_size)
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    sequence = torch.arange(len(bounds)).repeat_interleave(counts)
    first = starts[sequence] + (torch.arange(len(sequence)) - firsts[sequence]) * chunk_size
    spans = torch.stack([first, torch.minimum(first + chunk_size, ends[sequence])], 1)
    return spans.to(device), firsts.to(device)


@dataclass(frozen=True)
class ChunkLayout:
    """Sequences moved apart so that each begins with a chunk of its own.

    Attributes:
        positions: (length,) int64, the place of each packed position in the spread row.
        length: positions of the spread row, a multiple of the chunk size.
        counts: chunks of each sequence.
    """

    positions: Tensor
    length: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, bounds: list[tuple[int, int]], chunk_size: int, device: torch.device) -> ChunkLayout:
        """The layout of these sequences in chunks of `chunk_size`."""
        counts = torch.tensor([-(-(end - start) // chunk_size) for start, end in bounds])
        ends = counts.cumsum(0) * chunk_size
        shifts = ends - counts * chunk_size - torch.tensor([start for start, _ in bounds])
        lengths = torch.tensor([end - start for start, end in bounds])
        positions = torch.arange(bounds[-1][1]) + shifts.repeat_interleave(lengths)
        return cls(positions.to(device), int(ends[-1]), tuple(counts.tolist()))

    def spread(self, packed: Tensor) -> Tensor:
        """(1, packed length, ...) as (1, length, ...), zeros between the sequences."""
        spread = packed.new_zeros(1, self.length, *packed.shape[2:])
        return spread.index_copy(1, self.positions, packed)

    def gather(self, spread: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return spread.index_select(1, self.positions)
