"""Reading a file that may be gzip or bgzip, told by its first bytes and not by its name."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from genossm.errors import FileError

# The empty block that bgzip writes last (SAM specification, section 4.1.2); without it the file was cut off.
_BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


@contextmanager
def open_bytes(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a plain, gzip or bgzip file.

    Raises:
        FileError: the file is missing, unreadable, cut off or damaged; also from reading inside the `with`
            block.
    """
    path = Path(path)
    with open_raw(path) as raw:
        if not is_gzip(raw):
            yield raw
            return
        if _is_bgzip(raw) and not _has_bgzip_end(raw):
            raise FileError(
                f"{path} is cut off: bgzip's end mark is missing; copy or download the file again"
            )
        try:
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield stream  # type: ignore[misc]  # a GzipFile reads like any binary file
        except EOFError as error:
            raise FileError(
                f"{path} is cut off: its gzip data end too early; copy or download the file again"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise FileError(f"{path} is damaged gzip ({error}); copy or download the file again") from error


def open_raw(path: Path) -> IO[bytes]:
    """Open `path` for reading bytes.

    Raises:
        FileError: the file is missing, a folder, or may not be read.
    """
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise FileError(f"the file {path} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise FileError(f"{path} is a folder, not a file: name the file") from error
    except PermissionError as error:
        raise FileError(f"the file {path} may not be read: check its permissions") from error
    except OSError as error:
        raise FileError(f"the file {path} cannot be read ({error.strerror}): check the path") from error


def is_gzip(raw: IO[bytes]) -> bool:
    """Whether an opened file begins as gzip (bgzip included); the position goes back to the start."""
    raw.seek(0)
    magic = raw.read(2)
    raw.seek(0)
    return magic == b"\x1f\x8b"


def _is_bgzip(raw: IO[bytes]) -> bool:
    head = raw.read(18)
    raw.seek(0)
    return head[:4] == b"\x1f\x8b\x08\x04" and head[12:14] == b"BC"


def _has_bgzip_end(raw: IO[bytes]) -> bool:
    size = raw.seek(0, os.SEEK_END)
    raw.seek(max(0, size - len(_BGZIP_END)))
    end = raw.read()
    raw.seek(0)
    return end == _BGZIP_END
