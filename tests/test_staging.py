"""A folder in the making: complete or absent, its finished pieces kept, what is not finished removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import genossm.pipelines.staging as module
from genossm.errors import DataError, FileError
from genossm.pipelines.staging import leftover, staged


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_result_takes_the_place_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    for content in ("first", "second"):
        with staged(folder) as stage:
            (stage.result / "a").write_text(content)
            (stage.pieces / "piece.h5").touch()
            (stage.scratch / "b").touch()
            assert names(tmp_path / "new") == sorted([".out.preparing", ".out.preparing.lock", *(
                ["out"] if content == "second" else []
            )])  # fmt: skip
            stage.finish(folder)
        assert (folder / "a").read_text() == content
        assert names(tmp_path / "new") == ["out"]


def test_finished_pieces_outlive_an_error_and_nothing_else_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(DataError, match="mine"), staged(folder) as stage:
        (stage.result / "a").touch()
        (stage.scratch / "b").touch()
        (stage.pieces / "done.h5").write_bytes(b"x" * 2_000_000)
        (stage.pieces / "half.tmp").touch()
        raise DataError("mine")
    assert "what is finished, 1 tracks of 2.0 MB, waits in" in capsys.readouterr().err
    assert names(leftover(folder)) == ["pieces"]
    with staged(folder) as stage:
        assert names(stage.pieces) == ["done.h5"]
        assert names(stage.result) == names(stage.scratch) == []
        stage.keep_only({"another.h5"})
        assert names(stage.pieces) == []
    assert names(tmp_path) == []


def test_an_error_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as stage:
        (stage.pieces / "half.tmp").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleaned_up_but_for_pieces(tmp_path: Path) -> None:
    stage = leftover(tmp_path / "out")
    for name in ("pieces/done.h5", "result/dataset.json", "scratch/0"):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).touch()
    with staged(tmp_path / "out") as now:
        assert now.folder == stage
        assert [names(part) for part in (now.pieces, now.result, now.scratch)] == [["done.h5"], [], []]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileError, match=r"no space left .* writing .*out; nothing was left behind"):
        with staged(tmp_path / "out"):
            raise full
    with pytest.raises(
        FileError, match=r"run the command again, which goes on from what waits in .*preparing"
    ):
        with staged(tmp_path / "out") as stage:
            (stage.pieces / "done.h5").touch()
            raise full
    with pytest.raises(FileError, match=r"cannot write .*out: Permission denied; choose a folder"):
        with staged(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied")


def test_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "out", os.rename
    folder.mkdir()
    (folder / "old").touch()

    def failing(old: Path, new: Path) -> None:
        if old.name == "result":
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(module.os, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"), staged(folder) as stage:
        stage.finish(folder)
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["out"]


def test_without_locks_every_process_has_its_own_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genossm.lock._flock", None)
    with pytest.raises(KeyError), staged(tmp_path / "out") as first:
        (first.pieces / "done.h5").touch()
        with staged(tmp_path / "out") as second:
            assert second.folder != first.folder
        raise KeyError
    assert names(tmp_path) == []  # nobody could take it up
