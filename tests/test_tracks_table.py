"""Tests of genossm.tracks_table: rows become tracks, and a slip is told with its line."""

from __future__ import annotations

import gzip
import typing
from pathlib import Path
from typing import Any

import pytest

from genossm.dataset_config import TrackConfig
from genossm.errors import ConfigError, FileError
from genossm.tracks_table import read_tracks

HINTS = typing.get_type_hints(TrackConfig)


def write(folder: Path, *rows: str, name: str = "tracks.tsv") -> Path:
    path = folder / name
    text = "\n".join(row.replace(" | ", "\t") for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


def read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    return read_tracks(path, HINTS)


@pytest.mark.parametrize("name", ["tracks.tsv", "tracks.tsv.gz"])
def test_rows_become_tracks(tmp_path: Path, name: str) -> None:
    rows = [
        "\ufeff#name | kind | file | overlap | strand | partner | min_mapq | deduplicate | shift | biosample | scale",
        "a | peaks | a.bed | 0.25 |  |  |  |  |  | K562 | ",
        "",
        "# a remark",
        "b | signal | b.bam |  | - | c | 10 | false | 4,-4 |  | {clip: 99.9%}",
        "c | signal | c.bam |  | +",
    ]
    assert read(write(tmp_path, *rows, name=name)) == [
        (
            2,
            {
                "name": "a",
                "kind": "peaks",
                "file": "a.bed",
                "overlap": 0.25,
                "metadata": {"biosample": "K562"},
            },
        ),
        (
            5,
            {
                **{
                    "name": "b",
                    "kind": "signal",
                    "file": "b.bam",
                    "strand": "-",
                    "partner": "c",
                    "min_mapq": 10,
                },
                **{"deduplicate": False, "shift": [4, -4], "scale": {"clip": "99.9%"}},
            },
        ),
        (6, {"name": "c", "kind": "signal", "file": "c.bam", "strand": "+"}),
    ]


def test_several_files_are_parted_by_commas(tmp_path: Path) -> None:
    rows = ["name | kind | files | combine", 'a | signal | "a.bw, b.bw" | sum', "b | signal | c.bw | mean"]
    tracks = [track for _, track in read(write(tmp_path, *rows))]
    assert [track["files"] for track in tracks] == [["a.bw", "b.bw"], ["c.bw"]]


def test_columns_that_a_portal_writes_are_metadata(tmp_path: Path) -> None:
    columns = "accession experiment assay target biosample output_type replicates file_format md5".split()
    rows = [" | ".join(["name", "file", "kind", *columns]), " | ".join(["a", "a.bw", "signal", *columns])]
    (track,) = (track for _, track in read(write(tmp_path, *rows)))
    assert track["metadata"] == {column: column for column in columns}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([""], "has no tracks"),
        (["name | kind | file"], "has no tracks"),
        (
            ["name,kind,file", "a,peaks,a.bed"],
            r"line 1: the columns are name,kind,file; name, kind, and file or files",
        ),
        (["name | file", "a | a.bed"], "line 1: the columns are name, file; name, kind"),
        (["name | kind | file | agregate"], "line 1: the column 'agregate' is almost the key 'aggregate'"),
        (["name | kind | file | file"], "line 1: the column 'file' is named twice"),
        (["name | kind | file | "], "line 1: a column has no name"),
        (["name | kind | file", "a | peaks | a.bed | x"], "line 2 has 4 cells for 3 columns"),
        (
            ["name | kind | file", "a | peaks | a.bed", "b | peaks | b.bed", "a | peaks | c.bed"],
            "line 4: the track name 'a' stands in line 2, too",
        ),
        (
            ["name | kind | file | min_mapq", "a | signal | a.bam | [1"],
            r"line 2: min_mapq is '\[1', which is not valid YAML",
        ),
        (["name | kind | file", 'a | signal | "a.bam'], "line 2: unexpected end of data; correct the quotes"),
    ],
)
def test_a_slip_is_told_with_its_line(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(write(tmp_path, *rows))
    assert str(tmp_path / "tracks.tsv") in str(caught.value)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.tsv does not exist"):
        read(tmp_path / "none.tsv")
