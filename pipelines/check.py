"""`check`: open and compare all files of a dataset, and say what each holds, before anything is written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from genossm.dataset_config import TrackConfig, load_dataset_config
from genossm.dataset_inputs import DatasetInputs, open_inputs
from genossm.homology import Kmers, sample_kmers, shared_share
from genossm.progress import progress
from genossm.sequence import NO_BASE, encode
from genossm.splits import SPLITS

if TYPE_CHECKING:
    import pandas as pd

_SAMPLED_KMERS = 2_000_000
_SHARE_NOTED = 0.01


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; nothing in it is wrong, `notes` are oddities worth knowing.

    Tables: `chromosomes` (name, length, split, share of G and C among its bases, excluded share), `splits`
    (chromosomes, length, gc, and which share of its 50-mers outside excluded regions stands in the training
    chromosomes too, by a sample), `files` (role, track, file, rows, bases, oddities, missing chromosomes),
    `tracks` (track, kind, split, bins, unmasked bins, and of the unmasked ones how many are positive (peaks) or
    their total (signal), mean, standard deviation and maximum; the mean of a peaks track is its positive rate).
    """

    assembly: str
    genome: str
    chromosomes: pd.DataFrame
    splits: pd.DataFrame
    files: pd.DataFrame
    tracks: pd.DataFrame
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """The report as plain lists and mappings, for JSON."""
        return {
            "assembly": self.assembly,
            "genome": self.genome,
            "chromosomes": self.chromosomes.to_dict("records"),
            "splits": self.splits.to_dict("records"),
            "files": self.files.to_dict("records"),
            "tracks": self.tracks.to_dict("records"),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The report as tables for people."""
        tables = [
            f"{self.assembly}: {self.genome}",
            _table(self.chromosomes, {"length": "{:,}", "gc": "{:.4f}", "excluded": "{:.1%}"}),
            _table(
                self.splits,
                {"chromosomes": "{:,}", "length": "{:,}", "gc": "{:.4f}", "in_train": "{:.2%}"},
            ),
            _table(self.files, {"rows": "{:,}", "bases": "{:,}"}),
            _table(
                self.tracks,
                {
                    **{"bins": "{:,}", "unmasked": "{:,}", "positives": "{:,}", "total": "{:,.6g}"},
                    **{"mean": "{:.4g}", "std": "{:.4g}", "max": "{:.4g}"},
                },
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

    Every file is read whole (signal too); nothing is written but the caches of the genome and of cut sites.
    Looking for copies between splits takes about 20 ns a base. Progress is on standard error.

    Raises:
        ConfigError: the YAML is refused.
        FileError: the only problem is a missing, truncated or unreadable file.
        DataError: anything else does not fit; all problems are listed, with the offenders.
    """
    import pandas as pd

    inputs = open_inputs(load_dataset_config(config_path, overrides))
    statistics = Statistics()
    chromosomes = []
    composition = {split: np.zeros(NO_BASE + 1, dtype=np.int64) for split in SPLITS}
    kmers: dict[str, list[Kmers]] = {split: [] for split in SPLITS}
    genome_bp = sum(inputs.lengths.values())
    every = max(1, genome_bp // _SAMPLED_KMERS)
    total_bp = genome_bp * (len(inputs.config.tracks) + 1)
    with progress(total=total_bp, unit="bp", description="check", scale=True) as bar:
        for chrom, length_bp in inputs.lengths.items():
            split = inputs.split_of(chrom)
            starts, ends = inputs.excluded(chrom)
            codes = np.array(inputs.genome.chromosome(chrom))
            counts = np.array([np.count_nonzero(codes == code) for code in range(NO_BASE + 1)])
            composition[split] += counts
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                codes[start:end] = NO_BASE
            kmers[split].append(sample_kmers(codes, every))
            share = float((ends - starts).sum()) / length_bp
            row = {
                "chromosome": chrom,
                "length": length_bp,
                "split": split,
                "gc": _gc(counts),
                "excluded": share,
            }
            chromosomes.append(row)
            bar.update(length_bp)
            for track, values, mask in inputs.columns(chrom):
                statistics.add(track, split, values, mask)
                bar.update(length_bp)
    splits = _splits(inputs, composition, kmers)
    return CheckReport(
        assembly=inputs.config.assembly,
        genome=inputs.config.genome,
        chromosomes=pd.DataFrame(chromosomes),
        splits=splits,
        files=_files(inputs),
        tracks=_tracks(inputs, statistics),
        notes=(*inputs.notes, *statistics.notes(inputs.config.tracks), *_copies(splits, every)),
    )


def _gc(counts: npt.NDArray[np.int64]) -> float | None:
    """Share of G and C among bases, excluded ones too, from the counts of each code; None where there is no base."""
    bases = int(counts[:NO_BASE].sum())
    return float(counts[encode("GC")].sum()) / bases if bases else None


def _splits(
    inputs: DatasetInputs, composition: dict[str, npt.NDArray[np.int64]], kmers: dict[str, list[Kmers]]
) -> pd.DataFrame:
    """A row for each split that has chromosomes."""
    import pandas as pd

    none = np.zeros(0, dtype=np.uint64)
    distinct = {split: np.unique(np.concatenate([none, *parts])) for split, parts in kmers.items()}
    rows = [
        {
            "split": split,
            "chromosomes": len(names),
            "length": sum(inputs.lengths[chrom] for chrom in names),
            "gc": _gc(composition[split]),
            "in_train": None if split == "train" else shared_share(distinct[split], distinct["train"]),
        }
        for split, names in inputs.splits.items()
        if names
    ]
    return pd.DataFrame(rows)


def _copies(splits: pd.DataFrame, every: int) -> list[str]:
    """Sentences on held-out sequence that a model sees in training."""
    return [
        f"{row['in_train']:.1%} of the 50-mers of the {row['split']} split stand in the training chromosomes, too (1 in "
        f"{every} looked at): copies, which a model can remember; add repeats and duplications to `exclude`"
        for row in splits.to_dict("records")
        if (row["in_train"] or 0) > _SHARE_NOTED
    ]


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

    rows = []
    summaries = statistics.to_mapping()
    for track in inputs.config.tracks:
        for split, summary in summaries[track.name].items():
            total = statistics.tallies[track.name].get(split, Tally()).total
            counts = {"bins": summary["bins"], "unmasked": summary["unmasked"]}
            positives = round(total) if track.kind == "peaks" else None
            counts |= {"positives": positives, "total": None if track.kind == "peaks" else total}
            rows.append({"track": track.name, "kind": track.kind, "split": split, **counts, **summary})
    return pd.DataFrame(rows).astype({"positives": "Int64"})


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
