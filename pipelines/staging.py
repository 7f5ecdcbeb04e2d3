"""A folder that appears complete or not at all, made in pieces that outlive a kill.

What is finished waits in `.NAME.preparing` beside the folder, under names that change with what it was made from,
and is taken up by the next attempt. One process works at a time; the others wait for it.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from genossm.atomic import write_error
from genossm.errors import FileError
from genossm.lock import only_one
from genossm.progress import say

PIECE_SUFFIX = ".h5"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Stage:
    """Where a folder is being made: `pieces` outlive a failure, `result` takes the folder's place at the end."""

    folder: Path

    @property
    def pieces(self) -> Path:
        """Folder for finished pieces, files that end in PIECE_SUFFIX."""
        return self.folder / "pieces"

    @property
    def scratch(self) -> Path:
        """Folder for what nobody needs later."""
        return self.folder / "scratch"

    @property
    def result(self) -> Path:
        """Folder for what is to be `folder`."""
        return self.folder / "result"

    def keep_only(self, names: set[str]) -> None:
        """Delete every piece that is none of these, and whatever was not finished."""
        for path in self.pieces.iterdir():
            if path.name not in names:
                path.unlink()

    def finish(self, folder: Path) -> None:
        """Put `result` in the place of `folder`; an old one steps aside first, and is removed last."""
        if folder.is_dir() and any(folder.iterdir()):
            aside = self.folder / f"old-{uuid.uuid4().hex[:8]}"
            os.rename(folder, aside)
            try:
                os.rename(self.result, folder)
            except OSError:
                os.rename(aside, folder)
                raise
        else:
            os.replace(self.result, folder)


def leftover(folder: Path) -> Path:
    """Where an attempt that was killed left its pieces, if there was one."""
    return folder.with_name(f".{folder.name}.preparing")


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Yield the stage for making `folder`, alone; it is removed at the end, but for finished pieces after an error.

    Raises:
        FileError: the disk is full, or the parent folder cannot be written.
    """
    lock = folder.with_name(f".{folder.name}.preparing.lock")
    stage: Stage | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one(lock, waiting=lambda: say(f"waiting for another process that makes {folder}")) as alone:
            # Where locks do not work, each process has a stage of its own, and none can be taken up.
            own = leftover(folder)
            own = own if alone else own.with_name(f"{own.name}-{uuid.uuid4().hex[:8]}")
            stage = Stage(own)
            stage.pieces.mkdir(parents=True, exist_ok=True)
            for emptied in (stage.scratch, stage.result):
                shutil.rmtree(emptied, ignore_errors=True)
                emptied.mkdir()
            try:
                yield stage
            except BaseException:
                kept = _leave(stage, resumable=alone)
                if kept:
                    say(f"what is finished, {kept}, waits in {own} for the next attempt")
                raise
            shutil.rmtree(own, ignore_errors=True)
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, FileError) and error.__cause__ else error
        told = _write_error(cause, folder, stage)  # names the folder asked for, not a file of the stage
        if told is not None:
            raise told from cause
        raise


def _leave(stage: Stage, *, resumable: bool) -> str:
    """Remove all but finished pieces; what these are, "" where there are none."""
    for emptied in (stage.scratch, stage.result):
        shutil.rmtree(emptied, ignore_errors=True)
    pieces = [path for path in stage.pieces.iterdir() if path.suffix == PIECE_SUFFIX] if resumable else []
    if not pieces:
        shutil.rmtree(stage.folder, ignore_errors=True)
        return ""
    stage.keep_only({path.name for path in pieces})
    size = sum(path.stat().st_size for path in pieces)
    return f"{len(pieces)} tracks of {size / 1e6:,.1f} MB"


def _write_error(error: BaseException, folder: Path, stage: Stage | None) -> FileError | None:
    if isinstance(error, OSError) and error.errno in _FULL and stage is not None and stage.folder.exists():
        return FileError(
            f"no space left on the disk while writing {folder}: free some space and run the command again, which "
            f"goes on from what waits in {stage.folder}, or delete that folder too"
        )
    return write_error(error, folder)
