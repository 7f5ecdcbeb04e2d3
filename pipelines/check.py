"""`check`: open and compare all files of a dataset, and say what each holds, before anything is written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from genossm.dataset_config import SPLITS, TrackConfig, load_dataset_config
from genossm.dataset_inputs import DatasetInputs, open_inputs
from genossm.progress import progress

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; nothing in it is wrong, `notes` are oddities worth knowing.

    Tables: `chromosomes` (name, length, split, excluded share), `files` (role, track, file, rows, bases,
    oddities, missing chromosomes), `tracks` (track, kind, split, bins, unmasked bins, and the mean, standard
    deviation and maximum of the unmasked bins; the mean of a peaks track is its positive rate).
    """

    assembly: str
    genome: str
    chromosomes: pd.DataFrame
    files: pd.DataFrame
    tracks: pd.DataFrame
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """The report as plain lists and mappings, for JSON."""
        return {
            "assembly": self.assembly,
            "genome": self.genome,
            "chromosomes": self.chromosomes.to_dict("records"),
            "files": self.files.to_dict("records"),
            "tracks": self.tracks.to_dict("records"),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The report as tables for people."""
        tables = [
            f"{self.assembly}: {self.genome}",
            _table(self.chromosomes, {"length": "{:,}", "excluded": "{:.1%}"}),
            _table(self.files, {"rows": "{:,}", "bases": "{:,}"}),
            _table(
                self.tracks,
                {"bins": "{:,}", "unmasked": "{:,}", "mean": "{:.4g}", "std": "{:.4g}", "max": "{:.4g}"},
            ),
        ]
        notes = ["Notes", *(f"- {note}" for note in self.notes)] if self.notes else ["No oddities."]
        return "\n\n".join([*tables, "\n".join(notes)])


@dataclass
class Tally:
    """Sums over the unmasked bins of one track in one split."""

    bins: int = 0
    unmasked: int = 0
    total: float = 0.0
    squares: float = 0.0
    highest: float = -math.inf

    def add(self, values: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> None:
        """Count the bins of one chromosome: values (bins,), mask (bins,) True where a bin counts."""
        kept = values[mask].astype(np.float64)
        self.bins += int(values.size)
        self.unmasked += int(kept.size)
        self.total += float(kept.sum())
        self.squares += float(np.square(kept).sum())
        self.highest = max(self.highest, float(kept.max(initial=-math.inf)))

    def summary(self) -> dict[str, float | None]:
        """bins, unmasked, mean, std, max; None where no bin is unmasked."""
        if not self.unmasked:
            return {"bins": self.bins, "unmasked": 0, "mean": None, "std": None, "max": None}
        mean = self.total / self.unmasked
        std = math.sqrt(max(0.0, self.squares / self.unmasked - mean * mean))
        return {"bins": self.bins, "unmasked": self.unmasked, "mean": mean, "std": std, "max": self.highest}


@dataclass
class Statistics:
    """A `Tally` for each track in each split, and in all splits together."""

    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)

    def add(
        self, track: TrackConfig, split: str, values: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]
    ) -> None:
        """Count one chromosome of `split`."""
        of_track = self.tallies.setdefault(track.name, {})
        for name in ("all", split):
            of_track.setdefault(name, Tally()).add(values, mask)

    def to_mapping(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """track -> "all", "train", "valid", "test" -> bins, unmasked, mean, std, max; empty splits too."""
        return {
            track: {split: tallies.get(split, Tally()).summary() for split in ("all", *SPLITS)}
            for track, tallies in self.tallies.items()
        }

    def notes(self, tracks: Iterable[TrackConfig]) -> list[str]:
        """Sentences on tracks that a split could not be trained or scored on."""
        lines = []
        for track in tracks:
            for split, tally in self.tallies.get(track.name, {}).items():
                if split != "all" and not tally.unmasked:
                    lines.append(f"track {track.name}: every bin of the {split} split is masked")
                elif split != "all" and track.kind == "peaks" and tally.total == 0:
                    lines.append(f"track {track.name}: no positive bin in the {split} split")
        return lines


def check(config_path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> CheckReport:
    """Compare names, lengths and coordinates of all files of a dataset YAML, and report what they hold.

    Every file is read whole (signal too); nothing is written but the genome's cache. Progress is on standard
    error.

    Raises:
        ConfigError: the YAML is refused.
        FileError: the only problem is a missing, truncated or unreadable file.
        DataError: anything else does not fit; all problems are listed, with the offenders.
    """
    import pandas as pd

    inputs = open_inputs(load_dataset_config(config_path, overrides))
    statistics = Statistics()
    chromosomes = []
    total_bp = sum(inputs.lengths.values()) * len(inputs.config.tracks)
    with progress(total=total_bp, unit="bp", description="check", scale=True) as bar:
        for chrom, length_bp in inputs.lengths.items():
            split = inputs.split_of(chrom)
            starts, ends = inputs.excluded(chrom)
            share = float((ends - starts).sum()) / length_bp
            chromosomes.append({"chromosome": chrom, "length": length_bp, "split": split, "excluded": share})
            for track, values, mask in inputs.columns(chrom):
                statistics.add(track, split, values, mask)
                bar.update(length_bp)
    return CheckReport(
        assembly=inputs.config.assembly,
        genome=inputs.config.genome,
        chromosomes=pd.DataFrame(chromosomes),
        files=_files(inputs),
        tracks=_tracks(inputs, statistics),
        notes=(*inputs.notes, *statistics.notes(inputs.config.tracks)),
    )


def _files(inputs: DatasetInputs) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {
            "role": item.role,
            "track": item.track,
            "file": item.file,
            "rows": item.rows,
            "bases": item.bases,
            "oddities": ", ".join(f"{name} {count}" for name, count in item.oddities.items()),
            "missing": ", ".join(item.missing),
        }
        for item in inputs.files
    ]
    columns = ["role", "track", "file", "rows", "bases", "oddities", "missing"]
    return pd.DataFrame(rows, columns=columns).astype({"rows": "Int64", "bases": "Int64"})


def _tracks(inputs: DatasetInputs, statistics: Statistics) -> pd.DataFrame:
    import pandas as pd

    kinds = {track.name: track.kind for track in inputs.config.tracks}
    return pd.DataFrame(
        [
            {"track": track, "kind": kinds[track], "split": split, **summary}
            for track, splits in statistics.to_mapping().items()
            for split, summary in splits.items()
        ]
    )


def _table(frame: pd.DataFrame, formats: dict[str, str]) -> str:
    """The frame as aligned text; a missing value is a dash, a file its last name."""
    import pandas as pd

    shown = pd.DataFrame(index=frame.index)
    for column in frame.columns:
        form = formats.get(column, "{}")
        shown[column] = [
            "-" if pd.isna(value) or value == "" else form.format(value) for value in frame[column]
        ]
    if "file" in shown:
        shown["file"] = shown["file"].map(os.path.basename)
    widths = {column: max(len(column), *(len(text) for text in shown[column]), 0) for column in shown.columns}
    right = set(formats)

    def line(cells: dict[str, str]) -> str:
        parts = [
            text.rjust(widths[key]) if key in right else text.ljust(widths[key])
            for key, text in cells.items()
        ]
        return "  ".join(parts).rstrip()

    rows = [{str(column): str(row[column]) for column in shown.columns} for row in shown.to_dict("records")]
    return "\n".join([line({column: column for column in shown.columns}), *(line(row) for row in rows)])
