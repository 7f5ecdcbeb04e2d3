"""What a command prints: results on standard output as text or, with --json, as one JSON object."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import click

JSON_KEY = "genossm.json"


def show(data: Mapping[str, Any], text: str) -> None:
    """Print a command's result: `text`, or `data` as one JSON object where the user asked for --json.

    `data` may hold dataclasses, paths, numpy scalars and arrays, and whatever JSON knows; NaN and
    infinities, which JSON lacks, become null.
    """
    if wants_json():
        click.echo(to_json(data))
    elif text:
        click.echo(text.rstrip("\n"))


def wants_json() -> bool:
    """Whether the running command was called with --json."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(JSON_KEY, False))


def to_json(value: Any) -> str:
    """`value` as a JSON text of one line, as `show` describes.

    Raises:
        TypeError: a part of `value` is nothing that JSON can hold.
    """
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The same value made of dict, list, str, int, float, bool and None only."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # Numpy scalars and arrays both have tolist(); numpy itself is not imported here, for the sake of --help.
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    raise TypeError(f"cannot print a {type(value).__name__} as JSON")
