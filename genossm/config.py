"""Configuration: frozen dataclasses are the truth, YAML only fills them, and a misspelled key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from genossm.errors import ConfigError, FileError

T = TypeVar("T")


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        FileError: the file is missing or unreadable.
        ConfigError: it is not YAML, or its top level is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FileError(f"cannot read the configuration {path}: {reason}; check the path") from error
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {problem}; correct that line") from error
    if loaded is None:
        raise ConfigError(f"{path} is empty; write `key: value` lines")
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} is a {type(loaded).__name__}, not a mapping of keys to values; write `key: value` lines"
        )
    return loaded


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` with each `a.b=value` set; values are read as YAML (`3`, `true`, `[a, b]`).

    Raises:
        ConfigError: an override has no `=`, or goes through a value that is not a mapping.
    """
    result = _copy(mapping)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(
                f"the override {override!r} is not of the form a.b=value; write for example train.steps=500"
            )
        *parents, last = key.strip().split(".")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                kind = (
                    "a list: replace it whole, or edit the file" if isinstance(child, list) else repr(child)
                )
                raise ConfigError(
                    f"the override {override!r} goes into {parent!r}, which has no keys: it is {kind}"
                )
            node = child
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"the override {override!r} has a value that is not valid YAML; quote it"
            ) from error
    return result


def build(cls: type[T], mapping: Mapping[str, Any], *, where: str) -> T:
    """Fill the dataclass `cls` (and those nested in it) from `mapping`.

    Args:
        cls: a dataclass; its `__post_init__` may refuse values with a ValueError.
        mapping: keys and values as YAML gives them.
        where: what the mapping came from, for messages.

    Raises:
        ConfigError: an unknown key (the nearest is named), a missing key, a wrong type or a refused value.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(fields)}"
            raise ConfigError(f"unknown key {str(key)!r} in {where}: {hint}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} lacks the key {name!r}; add it")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def to_mapping(value: Any) -> Any:
    """The plain mapping (dicts, lists, scalars) that `build` turns back into the same dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_mapping(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """YAML text of a mapping, keys in their own order."""
    return yaml.safe_dump(dict(mapping), sort_keys=False, default_flow_style=None, width=100)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not silently its last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _copy(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        real = [option for option in options if option is not type(None)]
        problems = []
        for option in real:
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                problems.append(error)
        raise problems[-1]
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigError(f"{where} is {value!r}; allowed are {', '.join(str(item) for item in allowed)}")
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else None
        if items is None:
            raise ConfigError(f"{where} is {value!r}; a list is needed, for example [a, b]")
        return tuple(
            _convert(typing.get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(items)
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; a mapping of keys to values is needed")
        return {
            str(key): _convert(typing.get_args(hint)[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; a mapping of keys to values is needed")
        return build(hint, value, where=where)  # type: ignore[arg-type]
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, str):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{where} is {value!r}; {names.get(hint, str(hint))} is needed")
