"""A file made once from another file and memory-mapped by all processes: where it lies, who makes it, when again.

A cache file is a JSON header, padded to whole blocks, and after it one array. It belongs to its source as that
was when it was read: the header keeps a stamp (size, time of change and what else the content depends on).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from genossm.atomic import atomic_path
from genossm.compressed import open_raw
from genossm.errors import DataError, FileError
from genossm.lock import only_one

_MAGIC = b"genossm cache 1\n"
_SIZE_DIGITS = 17
_HEADER_BLOCK = 4096
_REMAINS_AGE_S = 3600.0

Build = Callable[[Path, Path], None]
"""Writes the cache to its first argument, with the folder that is its second for scratch files."""


def open_or_build(
    source: Path, tag: str, stamp: Callable[[], list[Any]], build: Build, cache_dir: Path | None = None
) -> tuple[dict[str, Any], npt.NDArray[Any]]:
    """Header and read-only array of the cache of `source`, which is built where it is missing or out of date.

    It is written to `cache_dir`, else to the folder `$GENOSSM_CACHE` where that is set, and nowhere else; else
    beside the source (`SOURCE.tag`) or, where that folder cannot be written, to `~/.cache/genossm`. One that
    lies beside the source already is used in any case, unless `cache_dir` is given. Of many processes that
    start together one builds and the others wait.

    Args:
        source: the file that it is made from, absolute.
        tag: end of the cache's name; another for each way to read the source.
        stamp: what the content depends on, as JSON texts and numbers; asked again after building.
        build: writes a complete file with `write_header`, whose header has this stamp, and the array.
        cache_dir: the folder of the cache file.

    Raises:
        FileError: the disk is full, or no folder for the cache can be written.
        DataError: the source was changed while it was being read.
    """
    wanted = stamp()
    places, writable = _cache_paths(source, tag, cache_dir)
    for cache in places:
        if opened := _open(cache, wanted):
            return opened
    for cache in writable:
        if not _can_write(cache.parent):
            continue
        # Where the lock does not work several may build at once: each its own temporary file, the last one stays.
        with only_one(cache.with_name(f".{cache.name}.lock")) as alone:
            if opened := _open(cache, wanted):  # another process built it while this one waited
                return opened
            if alone:
                _remove_remains(cache)
            _build_at(cache, source, wanted, stamp, build)
        if opened := _open(cache, wanted):
            return opened
        raise _changed(source)  # another process read it later, and put its own cache there
    raise FileError(
        f"the cache of {source} cannot be written to "
        f"{' or '.join(str(cache.parent) for cache in writable)}: "
        "set GENOSSM_CACHE to a folder that you may write to"
    )


def cache_folder() -> Path | None:
    """`$GENOSSM_CACHE`, else ~/.cache/genossm, there or not; None where neither is known."""
    if chosen := os.environ.get("GENOSSM_CACHE"):
        return Path(os.path.expanduser(chosen)).absolute()
    home = os.path.expanduser("~")
    # Some containers run a user without a home, whose ~ stays as it is.
    return None if home == "~" else Path(home, ".cache", "genossm")


def file_stamp(path: Path) -> list[Any]:
    """Size and time of change of a file.

    Raises:
        FileError: the file is missing or may not be read.
    """
    with open_raw(path) as raw:
        status = os.fstat(raw.fileno())
    return [status.st_size, status.st_mtime_ns]


def write_header(stream: IO[bytes], header: dict[str, Any]) -> None:
    """Write the header at the start of a cache file; the array follows at the position that this leaves.

    The header has "stamp", "dtype" and "items" (of the array). Written again in place it must not grow.
    """
    text = json.dumps(header).encode()
    size = -(-(len(_MAGIC) + _SIZE_DIGITS + len(text)) // _HEADER_BLOCK) * _HEADER_BLOCK
    stream.seek(0)
    stream.write((_MAGIC + f"{size:0{_SIZE_DIGITS - 1}d}\n".encode() + text).ljust(size))


def _read_header(stream: IO[bytes]) -> dict[str, Any] | None:
    if stream.read(len(_MAGIC)) != _MAGIC:
        return None
    size = stream.read(_SIZE_DIGITS)
    if len(size) != _SIZE_DIGITS or not size.strip().isdigit():
        return None
    try:
        header = json.loads(stream.read(int(size) - len(_MAGIC) - _SIZE_DIGITS))
    except ValueError:
        return None
    header["offset"] = int(size)
    return dict(header)


def _open(cache: Path, stamp: list[Any]) -> tuple[dict[str, Any], npt.NDArray[Any]] | None:
    """Header and array of a complete cache file of this stamp, else None."""
    try:
        stream = cache.open("rb")
    except OSError:
        return None
    with stream:
        header = _read_header(stream)
        if header is None or header["stamp"] != stamp:
            return None
        dtype, items, offset = np.dtype(header["dtype"]), header["items"], header["offset"]
        if os.fstat(stream.fileno()).st_size != offset + items * dtype.itemsize:
            return None
        if not items:
            return header, np.zeros(0, dtype)  # an empty file cannot be mapped
        mapped = np.memmap(stream, dtype=dtype, mode="r", offset=offset, shape=(items,))
    return header, np.asarray(mapped)


def _changed(source: Path) -> DataError:
    return DataError(f"{source} was changed while it was being read: try again when it is complete")


def _cache_paths(source: Path, tag: str, cache_dir: Path | None) -> tuple[list[Path], list[Path]]:
    """Where the cache file may lie, and where it may be written: the first folder that takes it."""
    resolved = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:12]
    named = f"{source.name}.{resolved}.{tag}"
    if cache_dir is not None:
        return [cache_dir / named], [cache_dir / named]
    beside = source.with_name(f"{source.name}.{tag}")
    folder = cache_folder()
    if folder is None:
        return [beside], [beside]
    if os.environ.get("GENOSSM_CACHE"):
        return [folder / named, beside], [folder / named]
    return [beside, folder / named], [beside, folder / named]


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _build_at(
    cache: Path, source: Path, wanted: list[Any], stamp: Callable[[], list[Any]], build: Build
) -> None:
    with atomic_path(cache) as temporary:
        scratch = tempfile.mkdtemp(prefix=f".{cache.name}.", suffix=".tmp", dir=cache.parent)
        try:
            build(temporary, Path(scratch))
            if stamp() != wanted:
                raise _changed(source)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_remains(cache: Path) -> None:
    """Remove what killed builders left behind; called by the one builder that holds the lock.

    Only old remains: where a lock does not reach from one computer to another, a second builder may be at
    work.
    """
    for remains in cache.parent.glob(f".{cache.name}.*.tmp"):
        with suppress(FileNotFoundError):  # that builder may finish, and rename it, at this moment
            if time.time() - remains.stat().st_mtime > _REMAINS_AGE_S:
                shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
