"""A lock among processes: one does the work, the others wait for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

_flock: ModuleType | None
try:
    import fcntl as _flock
except ImportError:  # Windows
    _flock = None


@contextmanager
def only_one(path: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock file `path` alone, after all who held it have let it go; a killed process lets go, too.

    Yields whether the lock works: on some file systems it does not, and several processes may get here at
    once. The file is removed at the end.

    Args:
        path: the lock file, in a folder that may be written.
        waiting: called once where another process holds the lock.
    """
    descriptor = _lock(path, waiting)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _remove(path)
            os.close(descriptor)


def _lock(path: Path, waiting: Callable[[], None] | None) -> int | None:
    if _flock is None:
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            try:
                _flock.flock(descriptor, _flock.LOCK_EX | _flock.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                    waiting = None
                _flock.flock(descriptor, _flock.LOCK_EX)
            if _is_same_file(descriptor, path):  # else the last holder removed it meanwhile: lock the new one
                return descriptor
        except OSError:
            os.close(descriptor)
            _remove(path)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    with suppress(OSError):  # an empty file that stays behind does no harm: the next one locks it
        path.unlink()
