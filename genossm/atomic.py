"""Writing without halves: a file appears under its name complete, or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genossm.errors import FileError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it takes the place of `path`, on failure it is removed.

    Raises:
        FileError: the disk is full or the folder cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        told = write_error(error, target)
        if told is None:
            raise
        raise told from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_error(error: BaseException, target: Path) -> FileError | None:
    """The sentence for a failure to write `target`, which left nothing behind; None where it is something else."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FileError(
            f"no space left on the disk while writing {target}; nothing was left behind: free some space or "
            "choose another folder, then run the command again"
        )
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return FileError(f"cannot write {target}: {os.strerror(number)}; choose a folder you may write to")
    return None


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path`, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
