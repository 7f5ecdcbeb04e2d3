"""The dataset YAML: which genome, tracks, exclusions, windows and split a prepared dataset is made from.

Paths in the YAML are relative to the YAML itself and may name environment variables (`$NAME` or `${NAME}`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from genossm.config import apply_overrides, build, load_yaml
from genossm.cut_sites import CutOptions
from genossm.errors import ConfigError
from genossm.scaling import ScaleConfig
from genossm.splits import SPLITS, fold_of
from genossm.storage import StorageName
from genossm.strands import Strand, check_strand, partner_columns
from genossm.tracks_table import read_tracks
from genossm.windows import check_geometry

_TRACK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class TrackConfig:
    """One track: peaks (`kind: peaks`, 0 or 1 per bin) or a bigWig or cut sites (`kind: signal`, a number per bin).

    `file` is one file, `files` are several samples: their signal is combined by mean or sum (`combine`), and a
    base is in a peak where at least `min_samples` of them have one. `aggregate` says how the bases of a bin become
    its number (signal only); `missing` whether a base absent from the bigWig is 0 or masked (signal only);
    `overlap` the least share of a bin's bases that must lie in a peak (peaks only); `loss` overrides the loss of
    a signal head: Poisson (the default of the model) or mean squared error. The two tracks of a stranded assay
    give their `strand` and each other's name as `partner`: on the reverse complement they swap places.
    `scale` says how signal is scaled before the loss. `shift`, `min_mapq`, `deduplicate` and
    `barcodes` are of cut sites, see `CutOptions`; `group` is one of the groups of cells of `barcodes`. `metadata` is
    kept, and used for nothing.
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
    scale: ScaleConfig | None = None
    files: tuple[str, ...] = ()
    combine: Literal["mean", "sum"] = "mean"
    min_samples: int = 1
    shift: tuple[int, ...] = CutOptions().shift
    min_mapq: int = CutOptions().min_mapq
    deduplicate: bool = True
    barcodes: str | None = None
    group: str | None = None
    metadata: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_strand(self)
        if not _TRACK_NAME.fullmatch(self.name):
            raise ValueError(
                f"track name {self.name!r}: it becomes a file name, so use letters, digits, '_', '-', '+' "
                "and '.' only"
            )
        if self.file and self.files:
            raise ValueError(f"track {self.name!r} has both `file` and `files`; give one of them")
        if not all(self.paths):
            raise ValueError(f"track {self.name!r} has an empty file name; give the peak file or bigWig")
        for path in self.paths:
            if self.paths.count(path) > 1:
                raise ValueError(f"track {self.name!r} names {path} twice; name each sample once")
        if not 1 <= self.min_samples <= len(self.paths):
            raise ValueError(
                f"min_samples {self.min_samples} of track {self.name!r}: it must be at least 1 and at most the number "
                f"of its files, {len(self.paths)}"
            )
        if (self.barcodes is None) != (self.group is None):
            raise ValueError(
                f"track {self.name!r} needs both `barcodes` (the table of cells and groups) and `group` (one of them), "
                "or neither"
            )
        try:
            self.cut_options()
        except ValueError as error:
            raise ValueError(f"track {self.name!r}: {error}") from error
        if not 0 < self.overlap <= 1:
            raise ValueError(
                f"overlap {self.overlap} of track {self.name!r}: it must be above 0 and at most 1, the "
                "share of a bin's bases that must lie in a peak"
            )
        for key in _SIGNAL_KEYS if self.kind == "peaks" else ("overlap", "min_samples"):
            if getattr(self, key) != _DEFAULTS[key]:
                raise ValueError(
                    f"track {self.name!r} is of kind {self.kind}, for which {key!r} has no meaning; "
                    f"remove `{key}: {getattr(self, key)}`"
                )

    @property
    def paths(self) -> tuple[str, ...]:
        """Its files of peaks or signal, one or more."""
        return self.files or (self.file,)

    @property
    def input_files(self) -> tuple[str, ...]:
        """All files that its values depend on."""
        return self.paths if self.barcodes is None else (*self.paths, self.barcodes)

    def cut_options(self) -> CutOptions:
        """How its cut sites are counted, where its files are fragments or BAM."""
        return CutOptions(self.shift, self.min_mapq, self.deduplicate, self.barcodes)


_SIGNAL_KEYS = (
    "aggregate",
    "missing",
    "loss",
    "scale",
    "combine",
    "shift",
    "min_mapq",
    "deduplicate",
    "barcodes",
)
_DEFAULTS = {item.name: item.default for item in fields(TrackConfig)}


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
    """Whole chromosomes held out for validation and test; `train` None means all that remain.

    `folds` and `fold` record the file that they come from, and which of its folds. With `n_folds` they come from
    the genome: its chromosomes are spread over that many folds, alike in size or (`balance: positives`) in size
    and bases in peaks; `fold` is for test, the next one for validation, and the rest trains.
    """

    valid: tuple[str, ...]
    test: tuple[str, ...]
    train: tuple[str, ...] | None = None
    folds: str | None = None
    fold: int | None = None
    n_folds: int | None = None
    seed: int = 0
    balance: Literal["bases", "positives"] = "bases"

    def __post_init__(self) -> None:
        self._check_folds()
        seen: dict[str, str] = {}
        for split in SPLITS:
            for chrom in getattr(self, split) or ():
                if chrom in seen:
                    where = f"{seen[chrom]} and {split}" if seen[chrom] != split else f"{split} twice"
                    raise ValueError(
                        f"chromosome {chrom!r} is in {where}: a chromosome belongs to one split; name it once"
                    )
                seen[chrom] = split

    def _check_folds(self) -> None:
        if self.n_folds is None:
            for key, default in (("seed", 0), ("balance", "bases")):
                if getattr(self, key) != default:
                    raise ValueError(f"`{key}` needs `n_folds`: chromosomes that are named are not spread")
            if self.fold is not None and self.folds is None:
                raise ValueError("`fold` needs `folds` (a file) or `n_folds` (a number)")
            return
        if self.valid or self.test or self.train is not None or self.folds is not None:
            raise ValueError("`n_folds` makes the splits: remove `train`, `valid`, `test` and `folds`")
        if self.n_folds < 3:
            raise ValueError(f"n_folds is {self.n_folds}: at least 3 are needed, for train, valid and test")
        if self.fold is None or not 0 <= self.fold < self.n_folds:
            raise ValueError(
                f"fold is {self.fold}: with `n_folds: {self.n_folds}` give the one for test, 0 to {self.n_folds - 1}"
            )


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """What a prepared dataset is made from; paths are absolute once `load_dataset_config` has read them.

    `chroms` names the chromosomes to use (None: all that are no mitochondrion, alternate or unplaced
    sequence, plus those the split names). `chrom_names: repair` matches `1` with `chr1`. `unknown: skip`
    leaves out (and counts) rows and signal on chromosomes that the genome lacks. `storage` is the type of the
    stored targets, `auto` the narrowest that keeps every error below 0.1 %; `compress` whether they are
    compressed, `auto` for those of more than 8 GB.
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
    storage: StorageName = "auto"
    compress: Literal["auto", "none", "gzip"] = "auto"

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
            for key in ("kind", "overlap", "min_samples", *_SIGNAL_KEYS):
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

    `split` may also be the path of a YAML or JSON file with the keys train, valid and test (a fold file), and
    `tracks` that of a table (see `read_tracks`), whose paths are relative to it.

    Raises:
        FileError: the YAML is missing or unreadable.
        ConfigError: it is not YAML, a key is unknown or missing, a value is refused, or a path names an
            environment variable that is not set.
    """
    source = Path(path)
    folder = source.absolute().parent.resolve()  # so that ../x means what it means to the file system
    mapping = apply_overrides(load_yaml(source), overrides)
    where = str(source)
    if "split" in mapping:
        mapping["split"] = _split(mapping["split"], folder, f"{where}: split")
    mapping = _texts_of_numbers(mapping)
    if isinstance(mapping.get("genome"), str):
        mapping["genome"] = _absolute(mapping["genome"], folder, f"{where}: genome")
    if isinstance(mapping.get("exclude"), str):
        mapping["exclude"] = [mapping["exclude"]]
    if isinstance(mapping.get("exclude"), list):
        mapping["exclude"] = [_absolute(item, folder, f"{where}: exclude") for item in mapping["exclude"]]
    if isinstance(mapping.get("tracks"), str):
        mapping["tracks"] = _tracks_of_table(Path(_absolute(mapping["tracks"], folder, f"{where}: tracks")))
    elif isinstance(mapping.get("tracks"), list):
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
    if not isinstance(item, Mapping):
        return item
    named = f"{where}: track {item.get('name', '?')}"
    result = {**item}
    for key in ("file", "barcodes"):
        if key in item:
            result[key] = _absolute(item[key], folder, named)
    if "files" in item:
        result.setdefault("file", "")
        if isinstance(item["files"], list):
            result["files"] = [_absolute(path, folder, named) for path in item["files"]]
    return result


def _tracks_of_table(table: Path) -> list[TrackConfig]:
    """The tracks of a tracks.tsv, each built on its own, so that a message names its line."""
    rows = read_tracks(table, get_type_hints(TrackConfig))
    folder = table.parent
    return [
        build(TrackConfig, _absolute_track(row, folder, place), where=place)
        for place, row in ((f"{table}, line {line}", row) for line, row in rows)
    ]


def _split(value: Any, folder: Path, where: str) -> Any:
    """`split` as the keys of SplitConfig; what is neither a path nor a mapping is left for `build` to refuse."""
    if isinstance(value, str):
        return load_yaml(_absolute(value, folder, where))
    if not isinstance(value, Mapping):
        return value
    if "folds" in value:
        for key in SPLITS:
            if value.get(key) is not None:
                raise ConfigError(
                    f"{where} has both `folds` and `{key}`: the chromosomes are named in the file"
                )
        path = _absolute(value["folds"], folder, f"{where}: folds")
        chosen = fold_of(load_yaml(path), value.get("fold"), str(path))
        return {**value, **chosen, "folds": path}
    if value.get("n_folds") is not None:
        return {"valid": [], "test": [], **value}
    return value


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
