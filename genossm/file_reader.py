"""Reading pieces of a file straight into arrays, by any number of threads and forked processes at once."""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.errors import FileError


class FileReader:
    """A file that is read at given positions.

    Unlike a memory map its pages do not count to the process: of a genome read at random a map soon holds all.
    The position is given with each read, so threads and forked processes share the one descriptor.

    Raises:
        FileError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {os.strerror(error.errno or 0)}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def fill(self, out: npt.NDArray[Any], offset: int) -> None:
        """Fill `out`, C-contiguous, with the file's bytes from `offset` on.

        Raises:
            FileError: the file ends before, or cannot be read.
        """
        if not out.size:
            return
        buffer: Any = out
        left = out.nbytes
        while True:
            try:
                count = _read_into(self._descriptor, buffer, offset)
            except OSError as error:
                raise FileError(f"cannot read {self.path}: {os.strerror(error.errno or 0)}") from error
            if count == left:
                return
            if not count:
                raise FileError(f"{self.path} ends too early, at byte {offset}: it was cut off or replaced")
            left, offset = left - count, offset + count
            buffer = memoryview(out.data).cast("B")[-left:]


if sys.platform == "linux":

    def _read_into(descriptor: int, buffer: Any, offset: int) -> int:
        return os.preadv(descriptor, [buffer], offset)

else:  # macOS has no preadv here

    def _read_into(descriptor: int, buffer: Any, offset: int) -> int:
        view = memoryview(buffer).cast("B")
        piece = os.pread(descriptor, view.nbytes, offset)
        view[: len(piece)] = piece
        return len(piece)


def mapped_part(view: npt.NDArray[Any]) -> tuple[Path, int] | None:
    """The file that a view of a memory map shows, and at which byte it begins; None where it is no map."""
    owner = view.base
    while owner is not None and not isinstance(owner, np.memmap):
        owner = getattr(owner, "base", None)
    if owner is None or owner.filename is None:
        return None
    return Path(owner.filename), owner.offset + view.ctypes.data - owner.ctypes.data
