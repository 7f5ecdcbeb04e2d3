"""Configuration files: strict filling of dataclasses, overrides, round trip."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from genossm.config import apply_overrides, build, dump_yaml, load_yaml, to_mapping
from genossm.errors import ConfigError, FileError


@dataclass(frozen=True)
class Inner:
    length: int = 3
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    rate: float
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    limit: int | None = None
    weights: dict[str, float] = field(default_factory=dict)
    flag: bool = False

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate is {self.rate}; it must be above 0")


def test_nested_values_are_filled_and_come_back() -> None:
    built = build(
        Outer,
        {"rate": "1e-3", "inner": {"kind": "b"}, "names": ["x"], "limit": None, "weights": {"t": 2}},
        where="here",
    )
    assert built == Outer(1e-3, Inner(3, "b"), ("x",), None, {"t": 2.0})
    assert build(Outer, to_mapping(built), where="again") == built


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"rate": 1, "nmes": []}, "unknown key 'nmes' in here: did you mean 'names'?"),
        ({"rate": 1, "inner": {"lenght": 4}}, "did you mean 'length'?"),
        ({"rate": 1, "zzzzz": 4}, "allowed are rate, inner"),
        ({}, "lacks the key 'rate'"),
        ({"rate": True}, "a number is needed"),
        ({"rate": 1, "limit": 2.5}, "limit is 2.5; a whole number is needed"),
        ({"rate": 1, "flag": "yes"}, "true or false is needed"),
        ({"rate": 1, "names": "x"}, "a list is needed"),
        ({"rate": 1, "inner": 3}, "a mapping"),
        ({"rate": 1, "weights": {"t": "heavy"}}, "weights.t is 'heavy'"),
        ({"rate": 1, "inner": {"kind": "c"}}, "allowed are a, b"),
        ({"rate": -1}, "rate is -1.0; it must be above 0"),
    ],
)
def test_wrong_values_are_told_with_what_is_allowed(mapping: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, mapping, where="here")
    assert words in str(caught.value)


def test_overrides_set_nested_keys_on_a_copy() -> None:
    original = {"inner": {"length": 1}}
    changed = apply_overrides(original, ["inner.length=5", "names=[p, q]", "inner.kind=b", "limit=null"])
    assert changed == {"inner": {"length": 5, "kind": "b"}, "names": ["p", "q"], "limit": None}
    assert original == {"inner": {"length": 1}}


@pytest.mark.parametrize("override", ["inner.length", "=3", "inner.length.x=3", "names=[a"])
def test_wrong_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        apply_overrides({"inner": {"length": 1}}, [override])


def test_files_are_read_or_refused_with_a_sentence(tmp_path: Path) -> None:
    good, bad, listed = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "list.yaml"
    good.write_text(dump_yaml({"rate": 1.5, "names": ["a"]}))
    assert load_yaml(good) == {"rate": 1.5, "names": ["a"]}
    bad.write_text("a: [1,\nb: }")
    listed.write_text("- 1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(bad)
    with pytest.raises(ConfigError, match="not a mapping"):
        load_yaml(listed)
    with pytest.raises(FileError, match="cannot read"):
        load_yaml(tmp_path / "absent.yaml")


def test_a_key_given_twice_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    twice, empty = tmp_path / "twice.yaml", tmp_path / "empty.yaml"
    twice.write_text("a: 1\nb: {c: 1, c: 2}\n")
    empty.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="the key 'c' is given twice"):
        load_yaml(twice)
    with pytest.raises(ConfigError, match="is empty"):
        load_yaml(empty)


def test_an_override_into_a_list_is_told() -> None:
    with pytest.raises(ConfigError, match="it is a list: replace it whole"):
        apply_overrides({"tracks": [{"name": "a"}]}, ["tracks.0.name=b"])
