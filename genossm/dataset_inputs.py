"""The files of a dataset, opened and compared: what does not fit the genome is a problem.

`open_inputs` gathers all problems before it raises, so that a user mends them in one go. What is odd but
harmless is a note, to be printed and recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from genossm.annotations import Annotations, read_annotations
from genossm.chrom_names import is_primary, mismatch_advice, name_hint, repair_names
from genossm.dataset_config import SPLITS, DatasetConfig, TrackConfig
from genossm.errors import DataError, GenossmError
from genossm.genome import Genome
from genossm.interval import bin_count, merge
from genossm.signal import Signal
from genossm.targets import Intervals, masked_bins, no_base_runs, peak_bins

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What one input file holds: `rows` and covered `bases` on the chromosomes in use (None for a bigWig)."""

    role: str
    track: str
    file: str
    rows: int | None
    bases: int | None
    oddities: Mapping[str, int]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class DatasetInputs:
    """Opened inputs that fit together; `lengths` and `splits` hold the chromosomes in use in genome order."""

    config: DatasetConfig
    genome: Genome
    lengths: dict[str, int]
    splits: dict[str, tuple[str, ...]]
    exclude: tuple[Annotations, ...]
    peak_files: dict[str, Annotations]
    signals: dict[str, Signal]
    signal_names: dict[str, dict[str, str]]
    files: tuple[FileSummary, ...]
    notes: tuple[str, ...]

    def split_of(self, chrom: str) -> str:
        """The split that a chromosome belongs to."""
        return next(split for split, names in self.splits.items() if chrom in names)

    def excluded(self, chrom: str) -> Intervals:
        """(starts, ends) in bp: the union of the exclude files and the runs of N, within the chromosome."""
        found = [no_base_runs(self.genome.chromosome(chrom))]
        found += [annotations.on(chrom) for annotations in self.exclude]
        return merge(
            np.concatenate([starts for starts, _ in found]), np.concatenate([ends for _, ends in found])
        )

    def peaks(self, chrom: str, track: str) -> Intervals:
        """(starts, ends) in bp of the merged peaks of a peaks track; `fit` has cut them at the ends."""
        return self.peak_files[track].on(chrom)

    def columns(
        self, chrom: str
    ) -> Iterator[tuple[TrackConfig, npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
        """Each track with its targets float32 (bins,) and its mask bool (bins,), True where a bin counts."""
        usable = self.usable(chrom)
        for track in self.config.tracks:
            values, valid = self.column(chrom, track)
            yield track, values, usable & valid

    def usable(self, chrom: str) -> npt.NDArray[np.bool_]:
        """bool (bins,): False where excluded regions and runs of N mask a bin for every track."""
        return ~masked_bins(*self.excluded(chrom), self.lengths[chrom], self.config.window.bin)

    def column(
        self, chrom: str, track: TrackConfig
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """One track's targets float32 (bins,), and bool (bins,): where it has a value, whatever is excluded."""
        length_bp, bin_bp = self.lengths[chrom], self.config.window.bin
        if track.kind == "signal":
            return self._signal(track, chrom)
        values = peak_bins(*self.peaks(chrom, track.name), length_bp, bin_bp, track.overlap)
        return values, np.ones(len(values), dtype=np.bool_)

    def _signal(
        self, track: TrackConfig, chrom: str
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        length_bp, bin_bp = self.lengths[chrom], self.config.window.bin
        name = self.signal_names[track.name].get(chrom)
        if name is None:
            bins = bin_count(length_bp, bin_bp)
            return np.zeros(bins, dtype=np.float32), np.zeros(bins, dtype=np.bool_)
        values, valid = self.signals[track.name].binned(
            name, length_bp, bin_bp, track.aggregate, track.missing
        )
        finite = np.isfinite(values)
        values = np.where(finite, values, np.float32(0))
        if track.loss != "mse" and float(values.min(initial=0.0)) < 0:
            raise DataError(
                f"track {track.name} has values below 0 on {chrom} (down to {float(values.min()):g} in a "
                "bin), which its Poisson loss cannot take: set `loss: mse` for this track in the dataset "
                "YAML"
            )
        return values, valid & finite


@dataclass
class _Findings:
    """Problems and notes gathered while the inputs are opened."""

    problems: list[GenossmError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The action's result, or None and its error among the problems."""
        try:
            return action(*args, **kwargs)
        except GenossmError as error:
            self.problems.append(error)
            return None

    def raise_problems(self) -> None:
        """One problem as it is; several as one DataError that numbers them."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            lines = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
            raise DataError("\n".join([f"{len(lines)} problems in the dataset:", *lines]))


def open_inputs(config: DatasetConfig) -> DatasetInputs:
    """Open every file of a dataset and compare names, lengths and coordinates with the genome.

    Raises:
        FileError: the only problem is a missing, truncated or unreadable file.
        DataError: anything else is wrong, all of it listed with the offenders.
    """
    found = _Findings()
    genome = found.attempt(Genome, config.genome)
    lengths, splits = {}, {}
    if genome is not None:
        splits = found.attempt(resolve_splits, config, genome.lengths) or {}
        used = {chrom for names in splits.values() for chrom in names}
        lengths = {chrom: length for chrom, length in genome.lengths.items() if chrom in used}
        found.attempt(_check_window, config, lengths)

    files: list[FileSummary] = []
    exclude = [
        _open_annotations(config, file, "exclude", "", genome, lengths, found, files)
        for file in config.exclude
    ]
    peak_files, signals, signal_names = {}, {}, {}
    for track in config.tracks:
        if track.kind == "peaks":
            annotations = _open_annotations(
                config, track.file, "peaks", track.name, genome, lengths, found, files
            )
            if annotations is not None:
                peak_files[track.name] = annotations
        else:
            signal = found.attempt(Signal, track.file)
            if signal is None or genome is None:
                continue
            names = found.attempt(_match_signal, config, track, signal, genome.lengths, lengths, found.notes)
            if names is not None:
                signals[track.name], signal_names[track.name] = signal, names
                missing = tuple(chrom for chrom in lengths if chrom not in names)
                files.append(FileSummary("signal", track.name, track.file, None, None, {}, missing))
    found.raise_problems()
    assert genome is not None
    return DatasetInputs(
        config=config,
        genome=genome,
        lengths=lengths,
        splits=splits,
        exclude=tuple(item for item in exclude if item is not None),
        peak_files=peak_files,
        signals=signals,
        signal_names=signal_names,
        files=tuple(files),
        notes=tuple(found.notes),
    )


def resolve_splits(config: DatasetConfig, lengths: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """The chromosomes of train, valid and test, each in the genome's order.

    Without `chroms`, the chromosomes in use are the primary ones (no mitochondrion, alternates or unplaced
    sequences) and those that the split names. Without `train`, all that are not held out train.

    Raises:
        DataError: a name is not in the genome or not among `chroms`, or nothing is left for training.
    """
    named = {split: getattr(config.split, split) or () for split in SPLITS}
    for where, names in [
        ("chroms", config.chroms or ()),
        *((f"split {split}", named[split]) for split in SPLITS),
    ]:
        absent = [name for name in names if name not in lengths]
        if absent:
            offers = "; ".join(f"for {name!r}, {name_hint(name, lengths)}" for name in absent[:5])
            raise DataError(
                f"{where} names {_some(absent)}, which the genome {config.genome} does not have ({offers}): "
                "correct the dataset YAML"
            )
    held_out = {chrom for names in named.values() for chrom in names}
    if config.chroms is not None:
        outside = sorted(held_out - set(config.chroms))
        if outside:
            raise DataError(
                f"the split names {', '.join(outside)}, which `chroms` leaves out; add them to `chroms`"
            )
        used = set(config.chroms)
    else:
        used = {chrom for chrom in lengths if is_primary(chrom)} | held_out
    if config.split.train is None:
        named["train"] = tuple(chrom for chrom in lengths if chrom in used - held_out)
        if not named["train"]:
            raise DataError(
                f"no chromosome is left for training: valid and test name all {len(used)} in use; hold out "
                "fewer, or write `train: []` for a dataset that is only evaluated on"
            )
    elif not any(named.values()):
        raise DataError("the split names no chromosome at all; name some for train, valid or test")
    return {split: tuple(chrom for chrom in lengths if chrom in named[split]) for split in SPLITS}


def _check_window(config: DatasetConfig, lengths: Mapping[str, int]) -> None:
    if lengths and config.window.length > max(lengths.values()):
        longest = max(lengths, key=lambda chrom: lengths[chrom])
        raise DataError(
            f"the window of {config.window.length} bp is longer than every chromosome in use (the longest, "
            f"{longest}, has {lengths[longest]} bp): choose a shorter `window: length` (and margin) in the "
            "dataset YAML"
        )


def _open_annotations(
    config: DatasetConfig,
    file: str,
    role: str,
    track: str,
    genome: Genome | None,
    lengths: Mapping[str, int],
    found: _Findings,
    files: list[FileSummary],
) -> Annotations | None:
    """Read a peak or exclude file and fit it to the genome; add to `files` and to the notes what it holds."""

    def read() -> Annotations:
        annotations = read_annotations(file)
        if genome is not None:
            annotations = annotations.fit(
                genome.lengths,
                chrom_names=config.chrom_names,
                unknown=config.unknown,
                beyond="skip" if role == "exclude" else "error",
            )
        return annotations

    annotations = found.attempt(read)
    if annotations is None or not lengths:
        return annotations
    bases = {chrom: _bases(annotations.on(chrom)) for chrom in lengths}
    missing = tuple(chrom for chrom in lengths if not bases[chrom])
    rows = int(sum(annotations.count(chrom) for chrom in lengths))
    files.append(
        FileSummary(role, track, file, rows, sum(bases.values()), dict(annotations.oddities), missing)
    )
    if role == "peaks" and not sum(bases.values()):
        what = "has no peak" if not rows else f"has {rows} rows that cover no base"
        found.problems.append(
            DataError(
                f"{file} (track {track}) {what} on the {len(lengths)} chromosomes in use: a track needs "
                "peaks; give the called peaks of this genome, or remove the track"
            )
        )
    elif role == "peaks" and missing:
        found.notes.append(
            f"{Path(file).name} (track {track}) has no peak on {_some(missing)}: bins there are negatives"
        )
    elif not rows:
        found.notes.append(f"{Path(file).name} excludes nothing on the chromosomes in use")
    if annotations.oddities:
        counts = ", ".join(
            f"{name.replace('_', ' ')} {count}" for name, count in annotations.oddities.items()
        )
        found.notes.append(f"{Path(file).name}: {counts}")
    return annotations


def _match_signal(
    config: DatasetConfig,
    track: TrackConfig,
    signal: Signal,
    genome_lengths: Mapping[str, int],
    lengths: Mapping[str, int],
    notes: list[str],
) -> dict[str, str]:
    """Genome name to bigWig name for every chromosome the two share; what is not shared is noted."""
    file = track.file
    same = {name: name for name in signal.lengths if name in genome_lengths}
    repaired = repair_names(signal.lengths, genome_lengths) if config.chrom_names == "repair" else {}
    matched = {**repaired, **same}
    unknown = [name for name in signal.lengths if name not in matched]
    unexpected = [name for name in unknown if is_primary(name)]
    if unexpected and (config.unknown == "error" or not matched):
        raise DataError(
            f"{file} (track {track.name}) lists {_some(unexpected)}, which the genome does not have; "
            f"{mismatch_advice(unexpected, signal.lengths, genome_lengths)}"
        )
    names = {chrom: name for name, chrom in matched.items()}
    wrong = [chrom for chrom in names if signal.lengths[names[chrom]] != genome_lengths[chrom]]
    wrong_used = [chrom for chrom in wrong if chrom in lengths]
    if wrong_used:
        details = ", ".join(
            f"{chrom} has {signal.lengths[names[chrom]]} bp there and {genome_lengths[chrom]} in the genome"
            for chrom in wrong_used[:5]
        )
        raise DataError(
            f"{file} (track {track.name}) is of another assembly than {config.assembly}: {details}"
            f"{' …' if len(wrong_used) > 5 else ''}; use the bigWig made on this genome"
        )
    if lengths and not any(chrom in names for chrom in lengths):
        raise DataError(
            f"{file} (track {track.name}) has none of the {len(lengths)} chromosomes in use; use another "
            "bigWig"
        )
    missing = [chrom for chrom in lengths if chrom not in names]
    if missing:
        notes.append(f"{Path(file).name} (track {track.name}) lacks {_some(missing)}: masked there")
    renamed = sum(name != chrom for chrom, name in names.items())
    if renamed:
        notes.append(f"{Path(file).name}: renamed {renamed} chromosomes")
    if wrong:
        notes.append(f"{Path(file).name}: another length of {_some(wrong)}, not in use")
    if unknown:
        notes.append(f"{Path(file).name}: left out {_some(unknown)}, not in the genome")
    return names


def _some(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _bases(intervals: Intervals) -> int:
    return int((intervals[1] - intervals[0]).sum())
