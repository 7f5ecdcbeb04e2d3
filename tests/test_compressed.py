"""Tests of genossm.compressed: what is gzip is told by content, and cut-off files are refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from Bio import bgzf

from genossm.compressed import open_bytes
from genossm.errors import FileError

CONTENT = b"".join(b"chr1\t%d\t%d\n" % (at, at + 7) for at in range(0, 400_000, 10))


def write_bgzip(path: Path, content: bytes) -> None:
    with bgzf.BgzfWriter(str(path), "wb") as stream:
        stream.write(content)


@pytest.mark.parametrize("name", ["rows.bed", "rows.bed.gz", "rows"])
def test_the_name_does_not_matter(tmp_path: Path, name: str) -> None:
    for make in (
        lambda path: path.write_bytes(CONTENT),
        lambda path: path.write_bytes(gzip.compress(CONTENT)),
        lambda path: write_bgzip(path, CONTENT),
    ):
        path = tmp_path / name
        make(path)
        with open_bytes(path) as stream:
            assert stream.read() == CONTENT


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9, 0.999])
def test_a_cut_off_gzip_file_is_refused(tmp_path: Path, kept: float) -> None:
    whole = tmp_path / "whole.gz"
    cut = tmp_path / "cut.gz"
    for bgzip in (True, False):
        if bgzip:
            write_bgzip(whole, CONTENT)
        else:
            whole.write_bytes(gzip.compress(CONTENT))
        content = whole.read_bytes()
        cut.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(FileError, match="cut off"), open_bytes(cut) as stream:
            stream.read()


def test_a_bgzip_file_cut_between_blocks_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gz"
    write_bgzip(whole, CONTENT)
    with whole.open("rb") as stream:
        blocks = list(bgzf.BgzfBlocks(stream))
    assert len(blocks) > 3
    cut = tmp_path / "cut.gz"
    cut.write_bytes(whole.read_bytes()[: blocks[2][0]])
    gzip.decompress(cut.read_bytes())  # any other gzip reader takes it for whole
    with pytest.raises(FileError, match="end mark is missing"), open_bytes(cut) as stream:
        stream.read()


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(CONTENT))
    content[len(content) // 2] ^= 0xFF
    path = tmp_path / "damaged.gz"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"damaged|cut off"), open_bytes(path) as stream:
        stream.read()


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"), open_bytes(tmp_path / "none.bed"):
        pass
    with pytest.raises(FileError, match="is a folder"), open_bytes(tmp_path):
        pass
