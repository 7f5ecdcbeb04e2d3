"""A whole genome in a device's memory, two bits a base, and windows gathered there all at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.code_reader import CodeReader
from genossm.errors import DataError
from genossm.genome import Genome
from genossm.packed import complement
from genossm.sequence import NO_BASE

_SLICE_BP = 1 << 26


class DeviceGenome:
    """`Genome.window` for many windows at once, on the device: 775 MB for human.

    Four bases are packed into a byte, the first in the lowest bits; where there is no base is kept as sorted runs.
    Each chromosome begins at a new byte.

    Attributes:
        chroms: the chromosomes it holds; windows name them by their place in this tuple.
        device: where it lies.

    Args:
        genome: the genome.
        device: where to hold it.
        chroms: those to hold, None for all.

    Raises:
        DataError: a chromosome is unknown, or there is none.
    """

    def __init__(
        self, genome: Genome, device: torch.device | str, *, chroms: Iterable[str] | None = None
    ) -> None:
        self.device = torch.device(device)
        self.chroms = tuple(genome.lengths if chroms is None else chroms)
        if not self.chroms:
            raise DataError(f"no chromosome of {genome.path} is named: name at least one")
        lengths = [len(genome.chromosome(chrom)) for chrom in self.chroms]
        first_bytes = [0]
        for length in lengths:
            first_bytes.append(first_bytes[-1] + -(-length // 4))
        self._packed = torch.empty(first_bytes[-1], dtype=torch.uint8, device=self.device)
        runs = []
        reader = CodeReader(genome)
        for chrom, length, first_byte in zip(self.chroms, lengths, first_bytes, strict=False):
            for start in range(0, length, _SLICE_BP):
                codes = torch.empty(min(_SLICE_BP, length - start), dtype=torch.int8)
                reader.fill(codes.numpy(), chrom, start)
                at = first_byte + start // 4
                packed, without = _pack(codes.to(self.device))
                self._packed[at : at + len(packed)] = packed
                runs.append(without + 4 * at)
        # One more behind all others, so that there always is a run at or after a base.
        end = torch.tensor([[4 * first_bytes[-1] + 1, 4 * first_bytes[-1] + 2]], device=self.device)
        joined = torch.cat([*runs, end])
        self._run_starts, self._run_ends = joined[:, 0].contiguous(), joined[:, 1].contiguous()
        self._lengths = torch.tensor(lengths, device=self.device)
        self._first_bases = 4 * torch.tensor(first_bytes[:-1], device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the device."""
        parts = (self._packed, self._run_starts, self._run_ends, self._lengths, self._first_bases)
        return sum(part.nbytes for part in parts)

    def windows(self, chroms: Tensor, starts: Tensor, length: int, *, flip: Tensor | None = None) -> Tensor:
        """Codes int8 (windows, length) of the bases from each start on; past either end of its chromosome 4.

        Args:
            chroms: int64 (windows,), places in `self.chroms`.
            starts: int64 (windows,), 0-based, of the forward strand; may be below 0 or past the end.
            length: bases of a window.
            flip: bool (windows,), which ones to give reverse-complemented; None for none.
        """
        position = starts[:, None] + torch.arange(length, device=self.device)
        inside = (position >= 0) & (position < self._lengths[chroms][:, None])
        base = (self._first_bases[chroms][:, None] + position).clamp_(0, 4 * len(self._packed) - 1)
        codes = (self._packed[base >> 2] >> ((base & 3) << 1).to(torch.uint8)) & 3
        run = torch.searchsorted(self._run_ends, base, right=True)
        there = inside & (self._run_starts[run] > base)
        codes = codes.to(torch.int8).masked_fill_(~there, NO_BASE)
        if flip is None:
            return codes
        return torch.where(flip[:, None], complement(codes).flip(1), codes)


def _pack(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of four codes 0..3 each (4 as 0), the last filled up; and the runs of 4, int64 (runs, 2): start, end."""
    without = codes == NO_BASE
    edges = F.pad(without, (1, 1)).to(torch.int8).diff().nonzero()[:, 0]
    four = F.pad(codes.masked_fill(without, 0).to(torch.uint8), (0, -len(codes) % 4)).view(-1, 4)
    packed = four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6
    return packed, edges.view(-1, 2)
