"""Base codes of windows, read from the genome's cache file straight into a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.file_reader import FileReader, mapped_part
from genossm.genome import Genome
from genossm.sequence import NO_BASE


class CodeReader:
    """`Genome.window` into arrays that are there already, without the genome's pages counting to the process.

    Safe to use from several threads, to fork and to pickle.
    """

    def __init__(self, genome: Genome) -> None:
        self._genome = genome
        self._open()

    def fill(self, out: npt.NDArray[np.int8], chrom: str, start: int) -> None:
        """Fill `out`, int8 (bases,), with the codes from base `start` of `chrom` on; past either end 4 (no base).

        Raises:
            DataError: the chromosome is unknown.
            FileError: the genome's cache file cannot be read.
        """
        place = self._places.get(chrom)
        if place is None or self._file is None:
            out[:] = self._genome.window(chrom, start, start + out.shape[0])
            return
        length, offset = place
        low, high = max(start, 0), min(start + out.shape[0], length)
        if low > start or high < start + out.shape[0]:
            out[:] = NO_BASE
            if low >= high:
                return
            out = out[low - start : high - start]
        self._file.fill(out, offset + low)

    def read(self, chrom: str, start: int, end: int) -> npt.NDArray[np.int8]:
        """The same of bases [start, end) in an array of its own."""
        out = np.empty(end - start, dtype=np.int8)
        self.fill(out, chrom, start)
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {"genome": self._genome}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CodeReader.__init__(self, state["genome"])

    def _open(self) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._file: FileReader | None = None
        for chrom, length in self._genome.lengths.items():
            part = mapped_part(self._genome.chromosome(chrom))
            if part is None:  # a genome that is no memory map has no file to read from
                return
            path, offset = part
            if self._file is None:
                self._file = FileReader(path)
            self._places[chrom] = (length, offset)
