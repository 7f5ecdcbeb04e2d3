"""Writing an HDF5 file such that a full disk is an error, not a crash.

The HDF5 library (seen with 1.14 under h5py 3.16) cannot close a file whose writes failed: on a full disk it
prints pages of messages and ends the process with a segmentation fault. Here it writes through a Python file
that takes every byte; the first failure is kept, and raised where HDF5 is not in the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import h5py


@contextmanager
def create_hdf5(path: str | os.PathLike[str]) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Yield a new HDF5 file at `path` and a function that writes out what HDF5 holds back.

    Call that function now and then: it is where a full disk is found out early. The file is on the disk when
    the block ends. Whoever calls removes it after an error.

    Raises:
        OSError: the first failure to write, with its errno (ENOSPC: the disk is full).
    """
    import h5py

    with Path(path).open("w+b", buffering=0) as raw:
        guard = _Guard(raw)
        file = h5py.File(guard, "w", libver=("v110", "v110"))

        def flush() -> None:
            file.flush()
            guard.raise_failure()

        try:
            yield file, flush
        except Exception:
            guard.raise_failure()  # what HDF5 says after a failed write only hides it
            raise
        finally:
            file.close()
        guard.raise_failure()
        os.fsync(raw.fileno())  # some file systems find out about a full disk only now


class _Guard:
    """What h5py needs of a file; after the first failed write all further ones are dropped."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._failure: OSError | None = None

    def raise_failure(self) -> None:
        """Raise the first failure, if there was one."""
        if self._failure is not None:
            raise self._failure

    def write(self, content: bytes | memoryview) -> int:
        """Take all of `content`."""
        left = memoryview(content)
        size = left.nbytes
        while left.nbytes and self._failure is None:
            try:
                left = left[self._raw.write(left) :]
            except OSError as error:
                self._failure = error
        return size

    def read(self, size: int = -1) -> bytes:
        """h5py knows a file by this method, and calls `readinto`."""
        return self._raw.read(size)

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from the current position."""
        return self._raw.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._raw.tell()

    def truncate(self, size: int) -> int:
        """Set the length of the file."""
        try:
            return self._raw.truncate(size)
        except OSError as error:
            self._failure = self._failure or error
            return size

    def flush(self) -> None:
        """Nothing is held back here."""
