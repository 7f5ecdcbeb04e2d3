"""Atomic writing: complete or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from genossm.atomic import atomic_path, atomic_write_text
from genossm.errors import FileError


def test_a_file_appears_whole_and_replaces_the_old(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    atomic_write_text(target, "one")
    atomic_write_text(target, "two")
    assert target.read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left on the disk"), (errno.EROFS, "cannot write")]
)
def test_a_full_or_read_only_disk_is_a_sentence(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(FileError, match=words), atomic_path(tmp_path / "file.txt") as temporary:
        temporary.write_text("half")
        raise OSError(number, "told by the system")
    assert list(tmp_path.iterdir()) == []
