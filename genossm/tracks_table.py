"""tracks.tsv: a table of tracks, one a line, for datasets of hundreds of them."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from genossm.compressed import open_bytes
from genossm.errors import ConfigError

_ALMOST_ALIKE = 0.85


def read_tracks(path: str | os.PathLike[str], hints: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The tracks of a table with their line numbers, as mappings like those of a dataset YAML.

    Columns are parted by tabs and named in the first line: `name`, `kind`, `file` or `files`, and any other key of
    a track; a cell without text leaves the key out, a list is parted by commas (`4,-5`). Columns of other names are
    kept as the track's `metadata`. Blank lines, and lines that begin with "#" after the first, are passed over.

    Args:
        path: the table, plain or gzip.
        hints: the keys of a track with their types.

    Raises:
        FileError: the table is missing or unreadable.
        ConfigError: the table has no rows or no such columns, a column is named twice or almost like a key, a row
            has more cells than columns, or two tracks have one name.
    """
    path = Path(path)
    with open_bytes(path) as stream:
        text = stream.read().decode("utf-8-sig", "replace")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    columns: list[str] = []
    tracks: list[tuple[int, dict[str, Any]]] = []
    lines: dict[str, int] = {}
    try:
        for cells in rows:
            where = f"{path}, line {rows.line_num}"
            if not any(cell.strip() for cell in cells) or (columns and cells[0].startswith("#")):
                continue
            if not columns:
                columns = _columns(cells, hints, where)
                continue
            track = _track(columns, cells, hints, where)
            name = str(track.get("name", ""))
            if name in lines:
                raise ConfigError(
                    f"{where}: the track name {name!r} stands in line {lines[name]}, too; names differ"
                )
            lines[name] = rows.line_num
            tracks.append((rows.line_num, track))
    except csv.Error as error:
        raise ConfigError(
            f"{path}, line {rows.line_num}: {error}; correct the quotes of that line"
        ) from error
    if not tracks:
        raise ConfigError(
            f"{path} has no tracks: give a line with the names of columns, and a line for each track"
        )
    return tracks


def _columns(cells: list[str], hints: Mapping[str, Any], where: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    columns[0] = columns[0].removeprefix("#").strip()
    for column in columns:
        if not column or columns.count(column) > 1:
            what = f"the column {column!r} is named twice" if column else "a column has no name"
            raise ConfigError(f"{where}: {what}; give each its own name")
        close = [] if column in hints else difflib.get_close_matches(column, hints, n=1, cutoff=_ALMOST_ALIKE)
        if close:
            raise ConfigError(
                f"{where}: the column {column!r} is almost the key {close[0]!r} of a track; correct it, or name it "
                "otherwise if it is metadata"
            )
    if not {"name", "kind"} <= set(columns) or not {"file", "files"} & set(columns):
        raise ConfigError(
            f"{where}: the columns are {', '.join(columns)}; name, kind, and file or files are needed, parted by tabs"
        )
    return columns


def _track(columns: list[str], cells: list[str], hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    if len(cells) > len(columns):
        raise ConfigError(
            f"{where} has {len(cells)} cells for {len(columns)} columns; give one cell for each column"
        )
    track: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for column, cell in zip(columns, (cell.strip() for cell in cells), strict=False):
        if not cell:
            continue
        if column in hints:
            track[column] = _value(cell, hints[column], f"{where}: {column}")
        else:
            metadata[column] = cell
    return {**track, "metadata": {**metadata, **track.get("metadata", {})}} if metadata else track


def _value(cell: str, hint: Any, where: str) -> Any:
    """A cell as YAML would give it: texts as they are, numbers, lists parted by commas."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        items = [item.strip() for item in cell.strip("[]").split(",")]
        return items if options[0] is str else [_value(item, options[0], where) for item in items]
    if hint in (bool, int, float) or origin is dict or any(map(dataclasses.is_dataclass, (hint, *options))):
        try:
            return yaml.safe_load(cell)
        except yaml.YAMLError as error:
            raise ConfigError(f"{where} is {cell!r}, which is not valid YAML; correct it") from error
    return cell
