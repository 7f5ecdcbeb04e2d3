"""Tests of genossm.cache_file; that many processes build one cache, and where it lies, is tested with the genome."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genossm.cache_file import file_stamp, open_or_build, write_header
from genossm.errors import DataError, FileError


class Doubler:
    """Caches twice the numbers of a text file."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.built = 0

    def build(self, temporary: Path, scratch: Path) -> None:
        self.built += 1
        assert list(scratch.iterdir()) == []
        (scratch / "leftover").touch()
        numbers = np.array(self.source.read_text().split(), dtype=np.uint16) * 2
        with temporary.open("wb") as stream:
            header = {"stamp": file_stamp(self.source), "dtype": "uint16", "items": numbers.size, "who": "me"}
            write_header(stream, header)
            stream.write(numbers.data)

    def open(self) -> tuple[dict[str, Any], list[int]]:
        header, array = open_or_build(self.source, "x.genossm", lambda: file_stamp(self.source), self.build)
        assert not array.flags.writeable or not array.size
        return header, array.tolist()


@pytest.fixture
def doubler(tmp_path: Path, private_cache: Path) -> Doubler:
    (tmp_path / "a.txt").write_text("1 2 3")
    return Doubler(tmp_path / "a.txt")


def test_it_is_built_once_until_the_source_changes(doubler: Doubler, private_cache: Path) -> None:
    header, numbers = doubler.open()
    assert (header["who"], numbers) == ("me", [2, 4, 6])
    assert doubler.open()[1] == [2, 4, 6] and doubler.built == 1
    assert [path.suffix for path in private_cache.iterdir()] == [".genossm"]
    doubler.source.write_text("7")
    os.utime(doubler.source, ns=(1, 1))
    assert doubler.open()[1] == [14] and doubler.built == 2


def test_an_array_may_be_empty_and_a_header_long(doubler: Doubler, tmp_path: Path) -> None:
    doubler.source.write_text("")
    assert doubler.open()[1] == [] and doubler.open()[1] == [] and doubler.built == 1
    header = {"text": "x" * 9_999}
    with (tmp_path / "header").open("wb") as stream:
        write_header(stream, header)
        assert stream.tell() % 4096 == 0
    content = (tmp_path / "header").read_bytes()
    assert json.loads(content[content.index(b"{") :]) == header


@pytest.mark.parametrize(
    "damage", [b"", b"genossm", b"genossm cache 1\n", b"genossm cache 1\nabc", b"\0" * 9_999]
)
def test_a_damaged_file_is_built_again(doubler: Doubler, private_cache: Path, damage: bytes) -> None:
    doubler.open()
    (cache,) = private_cache.iterdir()
    content = cache.read_bytes()
    for broken in (damage, content[:-1], content + b"\0", content.replace(b"{", b"[", 1)):
        cache.write_bytes(broken)
        assert doubler.open()[1] == [2, 4, 6]
        assert cache.read_bytes() == content
    assert doubler.built == 5


def test_a_source_that_changes_meanwhile_is_refused(
    doubler: Doubler, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = doubler.build

    def and_meanwhile(temporary: Path, scratch: Path) -> None:
        build(temporary, scratch)
        doubler.source.write_text("1 2 3 4")

    monkeypatch.setattr(doubler, "build", and_meanwhile)
    with pytest.raises(DataError, match=r"a\.txt was changed while it was being read"):
        doubler.open()
    assert list(private_cache.iterdir()) == []


def test_a_missing_source_is_named(doubler: Doubler) -> None:
    doubler.source.unlink()
    with pytest.raises(FileError, match=r"a\.txt does not exist"):
        doubler.open()
