"""The dataset YAML: which genome, tracks, exclusions, windows and split a prepared dataset is made from.

Paths in the YAML are relative to the YAML itself and may name environment variables (`$NAME` or `${NAME}`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genossm.config import apply_overrides, build, load_yaml
from genossm.errors import ConfigError
from genossm.strands import Strand, check_strand, partner_columns
from genossm.windows import check_geometry

SPLITS = ("train", "valid", "test")
_TRACK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class TrackConfig:
    """One track: a peak file (`kind: peaks`, 0 or 1 per bin) or a bigWig (`kind: signal`, a number per bin).

    `aggregate` says how the bases of a bin become its number (signal only); `missing` whether a base absent
    from the bigWig is 0 or masked (signal only); `overlap` the least share of a bin's bases that must lie in
    a peak (peaks only); `loss` overrides the loss of a signal head: Poisson (the default of the model) or
    mean squared error. The two tracks of a stranded assay give their `strand` and each other's name as `partner`:
    on the reverse complement they swap places.
    """

    name: str
    file: str
    kind: Literal["peaks", "signal"]
    aggregate: Literal["mean", "sum", "max"] = "mean"
    missing: Literal["zero", "mask"] = "zero"
    overlap: float = 0.5
    loss: Literal["mse", "poisson"] | None = None
    strand: Strand = "."
    partner: str | None = None

    def __post_init__(self) -> None:
        check_strand(self)
        if not _TRACK_NAME.fullmatch(self.name):
            raise ValueError(
                f"track name {self.name!r}: it becomes a file name, so use letters, digits, '_', '-', '+' "
                "and '.' only"
            )
        if not self.file:
            raise ValueError(f"track {self.name!r} has an empty file name; give the peak file or bigWig")
        if not 0 < self.overlap <= 1:
            raise ValueError(
                f"overlap {self.overlap} of track {self.name!r}: it must be above 0 and at most 1, the "
                "share of a bin's bases that must lie in a peak"
            )
        defaults = (
            {"aggregate": "mean", "missing": "zero", "loss": None}
            if self.kind == "peaks"
            else {"overlap": 0.5}
        )
        for key, default in defaults.items():
            if getattr(self, key) != default:
                raise ValueError(
                    f"track {self.name!r} is of kind {self.kind}, for which {key!r} has no meaning; "
                    f"remove `{key}: {getattr(self, key)}`"
                )


@dataclass(frozen=True, slots=True)
class WindowConfig:
    """Sizes in bp: the input window, the context margin at either side of it, and the bin."""

    length: int = 131_072
    margin: int = 16_384
    bin: int = 32

    def __post_init__(self) -> None:
        try:
            check_geometry(self.length, self.margin, self.bin)
        except ConfigError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """Whole chromosomes held out for validation and test; `train` None means all that remain."""

    valid: tuple[str, ...]
    test: tuple[str, ...]
    train: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for split in SPLITS:
            for chrom in getattr(self, split) or ():
                if chrom in seen:
                    where = f"{seen[chrom]} and {split}" if seen[chrom] != split else f"{split} twice"
                    raise ValueError(
                        f"chromosome {chrom!r} is in {where}: a chromosome belongs to one split; name it once"
                    )
                seen[chrom] = split


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """What a prepared dataset is made from; paths are absolute once `load_dataset_config` has read them.

    `chroms` names the chromosomes to use (None: all that are no mitochondrion, alternate or unplaced
    sequence, plus those the split names). `chrom_names: repair` matches `1` with `chr1`. `unknown: skip`
    leaves out (and counts) rows and signal on chromosomes that the genome lacks.
    """

    assembly: str
    genome: str
    tracks: tuple[TrackConfig, ...]
    split: SplitConfig
    exclude: tuple[str, ...] = ()
    window: WindowConfig = WindowConfig()
    chroms: tuple[str, ...] | None = None
    chrom_names: Literal["exact", "repair"] = "exact"
    unknown: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if not self.assembly:
            raise ValueError("assembly is empty; name the genome build, for example sacCer3 or hg38")
        if not self.tracks:
            raise ValueError("tracks is empty; at least one peak file or bigWig is needed")
        names = [track.name for track in self.tracks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tracks are called {name!r}; give each its own name")
        for track, column in zip(self.tracks, partner_columns(self.tracks), strict=True):
            other = self.tracks[column]
            for key in ("kind", "aggregate", "missing", "overlap", "loss"):
                if getattr(track, key) != getattr(other, key):
                    raise ValueError(
                        f"tracks {track.name!r} and {other.name!r} are partners and differ in {key!r} "
                        f"({getattr(track, key)} and {getattr(other, key)}); give both the same"
                    )
        if self.chroms is not None and not self.chroms:
            raise ValueError(
                "chroms is an empty list; name the chromosomes to use, or remove the key to use all"
            )


def load_dataset_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> DatasetConfig:
    """Read a dataset YAML, apply `a.b=value` overrides, and make its paths absolute.

    `split` may also be the path of a YAML or JSON file with the keys train, valid and test (a fold file).

    Raises:
        FileError: the YAML is missing or unreadable.
        ConfigError: it is not YAML, a key is unknown or missing, a value is refused, or a path names an
            environment variable that is not set.
    """
    source = Path(path)
    folder = source.absolute().parent.resolve()  # so that ../x means what it means to the file system
    mapping = apply_overrides(load_yaml(source), overrides)
    where = str(source)
    if isinstance(mapping.get("split"), str):
        mapping["split"] = load_yaml(_absolute(mapping["split"], folder, f"{where}: split"))
    mapping = _texts_of_numbers(mapping)
    if isinstance(mapping.get("genome"), str):
        mapping["genome"] = _absolute(mapping["genome"], folder, f"{where}: genome")
    if isinstance(mapping.get("exclude"), str):
        mapping["exclude"] = [mapping["exclude"]]
    if isinstance(mapping.get("exclude"), list):
        mapping["exclude"] = [_absolute(item, folder, f"{where}: exclude") for item in mapping["exclude"]]
    if isinstance(mapping.get("tracks"), list):
        mapping["tracks"] = [_absolute_track(item, folder, where) for item in mapping["tracks"]]
    return build(DatasetConfig, mapping, where=where)


def expand_variables(text: str, where: str) -> str:
    """`text` with environment variables, `$NAME` or `${NAME}`, and a leading `~` replaced by their values.

    Raises:
        ConfigError: a variable is not set; the message names it, the nearest set one, and what to do.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if os.environ.get(name):
            return os.environ[name]
        if name in os.environ:
            raise ConfigError(
                f"{where}: {text!r} needs the environment variable {name}, which is empty; set it"
            )
        near = difflib.get_close_matches(name, list(os.environ), n=1, cutoff=0.8)
        hint = f" (did you mean ${near[0]}?)" if near else ""
        raise ConfigError(
            f"{where}: {text!r} needs the environment variable {name}, which is not set{hint}; "
            f"set it (export {name}=FOLDER) or write the path out"
        )

    return os.path.expanduser(_VARIABLE.sub(value_of, text))


def _absolute(text: Any, folder: Path, where: str) -> Any:
    """The absolute path of a path text; anything that is not text is left for `build` to refuse."""
    return (
        os.path.normpath(folder / expand_variables(text, where)) if isinstance(text, str) and text else text
    )


def _absolute_track(item: Any, folder: Path, where: str) -> Any:
    if not isinstance(item, Mapping) or "file" not in item:
        return item
    return {**item, "file": _absolute(item["file"], folder, f"{where}: track {item.get('name', '?')}")}


def _texts_of_numbers(mapping: dict[str, Any]) -> dict[str, Any]:
    """Chromosome names as texts: YAML reads `valid: [1, 2]` of an Ensembl genome as numbers."""

    def names(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value]

    result = dict(mapping)
    if "chroms" in result:
        result["chroms"] = names(result["chroms"])
    if isinstance(result.get("split"), Mapping):
        result["split"] = {key: names(value) for key, value in result["split"].items()}
    return result
