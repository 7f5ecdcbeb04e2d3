"""Files from the web into a folder: resumed where they stopped, checked against their md5, several at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from genossm.atomic import atomic_write_text, write_error
from genossm.errors import DataError, FileError, GenossmError
from genossm.progress import move, progress, say
from genossm.web import GO_ON, RefusedError, Response, TryAgainError, Web, content_length, content_range

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to download.

    `name` is its path below the folder; `md5` (hexadecimal) and `size` (bytes) are what it must have, where that
    is known. `local_md5` is what an earlier download had: a file without `md5` that still has it is not fetched
    again. `check` raises a GenossmError when the downloaded file is not what it should be.
    """

    url: str
    name: str
    md5: str | None = None
    size: int | None = None
    local_md5: str | None = None
    check: Callable[[Path], object] | None = None

    def __post_init__(self) -> None:
        if _SAFE_NAME.fullmatch(self.name) is None:
            raise DataError(
                f"{self.url} would be written to {self.name!r}: file names of letters, digits, '_', '-', '+' and '.' "
                "are accepted only"
            )


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A complete file of the folder; `fetched` is False for one that was there already."""

    file: RemoteFile
    md5: str
    size: int
    fetched: bool


class _Mismatch(Exception):
    """What came is not what was announced."""


class ByteBar:
    """A progress bar in bytes that several threads move; what was there before the run does not count as speed."""

    def __init__(self, bar: tqdm[Any], files: Iterable[RemoteFile]) -> None:
        self._bar = bar
        self._sizes = {file.name: file.size for file in files}
        self._places = dict.fromkeys(self._sizes, 0)
        self._lock = threading.Lock()

    def expect(self, name: str, size: int | None) -> None:
        """The size of a file, where it was not known before."""
        with self._lock:
            if self._sizes[name] is None and size is not None:
                self._sizes[name] = size
                self._bar.total = (self._bar.total or 0) + size

    def move(self, name: str, place: int, *, came: bool = False) -> None:
        """A file is there up to byte `place`; `came`: the server has just sent what is new."""
        with self._lock:
            change = place - self._places[name]
            self._places[name] = place
            if came:
                self._bar.update(change)
            else:
                move(self._bar, change)


def download_all(
    files: Iterable[RemoteFile],
    folder: Path,
    *,
    web: Web,
    jobs: int = 2,
    done: Callable[[Downloaded], None] = lambda downloaded: None,
) -> list[Downloaded]:
    """Bring all files into `folder`, `jobs` at a time, with one progress bar; results in the order of `files`.

    `done` is called after each file, in the caller's thread. A file that cannot be had does not keep the others
    from coming. After an interrupt or another failure the `.part` files stay, to be gone on with.

    Raises:
        DataError: two files have one name.
        RefusedError: some files cannot be had; all others are complete.
        FileError: a server cannot be reached or stays busy, or there is no room on the disk.
    """
    wanted = list(files)
    _check_names(wanted)
    _check_room(wanted, folder)
    results: dict[str, Downloaded] = {}
    problems: list[str] = []
    total = sum(file.size or 0 for file in wanted)
    with (
        progress(total=total, unit="B", scale=True, description="fetching") as shown,
        ThreadPoolExecutor(jobs) as pool,
    ):
        bar = ByteBar(shown, wanted)
        futures = [pool.submit(download, file, folder, web, bar) for file in wanted]
        try:
            for future in as_completed(futures):
                try:
                    downloaded = future.result()
                except RefusedError as error:
                    problems.append(str(error))
                    continue
                results[downloaded.file.name] = downloaded
                done(downloaded)
        except BaseException:
            web.stop()
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        others = "; the others are complete" if len(problems) < len(wanted) else ""
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RefusedError(
            f"{len(problems)} of {len(wanted)} files cannot be had{others}: {'; '.join(problems[:5])}{more}"
        )
    return [results[file.name] for file in wanted]


def download(file: RemoteFile, folder: Path, web: Web, bar: ByteBar) -> Downloaded:
    """Bring one file into `folder`, complete and checked, by way of `<name>.part`.

    A `.part` is gone on with when the server's file is known to be the same, by its md5, ETag or Last-Modified;
    otherwise it starts again. What is not as announced is deleted and fetched once more.

    Raises:
        RefusedError: the server refuses, or the file is not as announced the second time either.
        FileError: the server cannot be reached or stays busy, or the disk is full.
    """
    target = folder / file.name
    present = _present(file, target)
    if present is not None:
        bar.expect(file.name, present.size)
        bar.move(file.name, present.size)
        return present
    half = _Half(file, target)
    for last in (False, True):
        try:
            # Only a .part that grows counts as progress: a server that breaks off at the same byte is given up.
            web.patiently(file.url, partial(_bring, file, half, web, bar), half.size)
            return half.finish(target)
        except _Mismatch as error:
            half.remove()
            bar.move(file.name, 0)
            if last:
                raise RefusedError(
                    f"{file.url}: it {error}, in two downloads, which were deleted: the server's file, or what is "
                    "said of it, is wrong; try again later"
                ) from None
            say(f"{file.url}: it {error}; fetching it once more")
    raise AssertionError("not reached")


def md5_of(path: Path) -> str:
    """The md5 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _check_names(files: Iterable[RemoteFile]) -> None:
    urls: dict[str, str] = {}
    for file in files:
        if file.name in urls:
            raise DataError(
                f"two files would be written to {file.name}: {urls[file.name]} and {file.url}; fetch them into two "
                "folders"
            )
        urls[file.name] = file.url


def _check_room(files: Iterable[RemoteFile], folder: Path) -> None:
    """Refuse what the disk has no room for, as far as sizes are known and not yet there."""
    missing = 0
    for file in files:
        places = (folder / file.name, folder / f"{file.name}.part")
        there = max((place.stat().st_size for place in places if place.is_file()), default=0)
        missing += max(0, (file.size or 0) - there)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise FileError(
            f"no room in {folder}: {tqdm.format_sizeof(missing, 'B')} are to come and "
            f"{tqdm.format_sizeof(free, 'B')} are free; free some space, choose another folder or fetch fewer files"
        )


def _present(file: RemoteFile, target: Path) -> Downloaded | None:
    """The file that is there already, by its md5."""
    if not target.is_file():
        return None
    expected, size = file.md5 or file.local_md5, target.stat().st_size
    if expected is not None and file.size in (None, size) and md5_of(target) == expected:
        return Downloaded(file, expected, size, False)
    say(f"{target} is not known to be the server's file: fetching it again")
    return None


def _bring(file: RemoteFile, half: _Half, web: Web, bar: ByteBar) -> None:
    """One request for what the `.part` lacks.

    Raises:
        TryAgainError: it did not all come.
        _Mismatch: it has another size.
    """
    start, validator = half.resume()
    bar.move(file.name, start)
    if start and start == file.size:
        return
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        headers |= {"If-Range": validator} if validator else {}
    with web.ask(file.url, headers, also=(416,)) as response:
        first, total = content_range(response)
        if response.status == 416 and start and total == start:
            return
        if response.status == 416 or (response.status == 206 and (first != start or not start)):
            half.remove()
            raise TryAgainError(f"it answers {response.status} to a request for the bytes from {start} on")
        if response.status == 206 and validator and _validator(response) not in (None, validator):
            half.remove()  # a server that knows Range and not If-Range
            raise TryAgainError("the file has changed on the server")
        if response.status != 206:
            start, total = 0, content_length(response)
        if file.size is not None and total is not None and total != file.size:
            raise _Mismatch(f"has {total} bytes instead of {file.size}")
        bar.expect(file.name, total)
        bar.move(file.name, start)
        with half.writing(response, start) as out:
            for piece in web.pieces(response):
                out.write(piece)
                bar.move(file.name, out.tell(), came=True)


class _Half:
    """The `.part` of a file, and beside it in `.part.json` which file of the server it is a part of."""

    def __init__(self, file: RemoteFile, target: Path) -> None:
        self._file = file
        self._part = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")

    def size(self) -> int:
        """Bytes of the `.part`."""
        return self._part.stat().st_size if self._part.exists() else 0

    def resume(self) -> tuple[int, str | None]:
        """Where to go on, and the validator for If-Range; 0 where the `.part` may be of another file."""
        size = self.size()
        if not size or (self._file.size is not None and size > self._file.size):
            return 0, None
        try:
            note = json.loads(self._note.read_bytes())
            url, md5, validator = note["url"], note["md5"], note["validator"]
        except (OSError, ValueError, KeyError, TypeError):  # killed before it was written, or not ours
            return 0, None
        if url != self._file.url or md5 != self._file.md5 or not (md5 or validator):
            return 0, None
        return size, validator

    @contextmanager
    def writing(self, response: Response, start: int) -> Iterator[Any]:
        """The `.part`, opened to write from byte `start` on, after a note of what the answer says of the file.

        Raises:
            FileError: the disk is full or the folder cannot be written; what is there is kept.
        """
        note = {"url": self._file.url, "md5": self._file.md5, "validator": _validator(response)}
        try:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            if not start:
                # Before the note: at no time may it stand beside a part of an older file.
                self._part.unlink(missing_ok=True)
            atomic_write_text(self._note, json.dumps(note))
            with self._part.open("ab") as out:
                yield out
        except GenossmError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise FileError(
                    f"no space left on the disk for {self._part}: free some, then {GO_ON}"
                ) from error
            raise write_error(error, self._part) or error from error

    def finish(self, target: Path) -> Downloaded:
        """Give the complete `.part` its name.

        Raises:
            _Mismatch: size or md5 are not as announced, or `check` refuses it.
        """
        size, md5 = self.size(), md5_of(self._part)
        if self._file.size is not None and size != self._file.size:
            raise _Mismatch(f"has {size} bytes instead of {self._file.size}")
        if self._file.md5 is not None and md5 != self._file.md5:
            raise _Mismatch(f"has the md5 {md5} instead of {self._file.md5}")
        if self._file.check is not None:
            try:
                self._file.check(self._part)
            except GenossmError as error:
                raise _Mismatch(f"is not what it should be ({error})") from error
        self._part.replace(target)
        self._note.unlink(missing_ok=True)
        return Downloaded(self._file, md5, size, True)

    def remove(self) -> None:
        """Forget what has come so far."""
        self._part.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


def _validator(response: Response) -> str | None:
    """What If-Range may be given to tell that the file is unchanged: a strong ETag, or the date of change."""
    etag = (response.headers.get("ETag") or "").strip()
    if re.fullmatch(r'"[^"]*"', etag):
        return etag
    return response.headers.get("Last-Modified") or None
