"""Damaged targets: found by what uses them, by reading the files whole once and not at every start."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import genossm as gs
from genossm.dataset import PreparedDataset
from genossm.errors import DataError
from genossm.verified import mark_verified, verify_once
from tests.test_train import TINY


@pytest.fixture
def copy(tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny dataset, and a cache folder of this test alone."""
    monkeypatch.setenv("GENOSSM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_prepared, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were read whole."""
    found: list[Path] = []
    original = PreparedDataset.verify

    def counted(self: PreparedDataset) -> None:
        found.append(self.folder)
        original(self)

    monkeypatch.setattr(PreparedDataset, "verify", counted)
    return found


def damage(folder: Path) -> None:
    """Flip a bit in the middle of the targets; size and time of modification stay, as after a bad copy."""
    path = folder / "targets.h5"
    status = path.stat()
    with path.open("r+b") as raw:
        raw.seek(status.st_size // 2)
        byte = raw.read(1)[0]
        raw.seek(status.st_size // 2)
        raw.write(bytes([byte ^ 64]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_are_read_once(copy: Path, reads: list[Path]) -> None:
    for _ in range(3):
        verify_once(PreparedDataset(copy))
    assert reads == [copy]
    damage(copy)
    for _ in range(2):
        with pytest.raises(DataError, match=r"targets\.h5 is damaged"):
            verify_once(PreparedDataset(copy))
    assert len(reads) == 3


def test_what_prepare_has_just_written_is_not_read_again(
    folder: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENOSSM_CACHE", str(tmp_path / "cache"))
    verify_once(gs.prepare(folder / "dataset.yaml", tmp_path / "out"))
    assert reads == []
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    verify_once(PreparedDataset(tmp_path / "copy"))
    assert reads == [tmp_path / "copy"]


def test_notes_that_cannot_be_read_or_written_do_no_harm(
    copy: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_once(PreparedDataset(copy))
    (note,) = (tmp_path / "cache").glob("verified-*.json")
    assert str(copy / "targets.h5") in json.loads(note.read_text())
    note.write_text("{")
    verify_once(PreparedDataset(copy))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENOSSM_CACHE", str(tmp_path / "file"))
    mark_verified(PreparedDataset(copy))
    verify_once(PreparedDataset(copy))
    monkeypatch.delenv("GENOSSM_CACHE")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    verify_once(PreparedDataset(copy))
    assert len(reads) == 4


def test_training_and_evaluation_refuse_damaged_targets(copy: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    run = gs.train(config, copy, tmp_path / "run", device="cpu", overrides=["train.epochs=1"])
    damage(copy)
    with pytest.raises(DataError, match=r"targets\.h5 is damaged: its content is not what prepare wrote"):
        gs.train(config, copy, tmp_path / "other", device="cpu")
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match=r"targets\.h5 is damaged"):
        gs.evaluate(run.path, copy, device="cpu")
