"""The files of a dataset one by one: each is read, compared with the genome, and summed up.

What does not fit is a problem; all are gathered, so that a user mends them in one go. What is odd but harmless is
a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from genossm.annotations import Annotations, read_annotations
from genossm.chrom_names import is_primary, mismatch_advice, repair_names
from genossm.cut_sites import SHIFTED_BEFORE, CutSites
from genossm.dataset_config import DatasetConfig, TrackConfig
from genossm.errors import DataError, GenossmError
from genossm.samples import SignalReader, open_signal, shared_intervals
from genossm.signal import Signal
from genossm.targets import Intervals

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What one input file holds on the chromosomes in use.

    `rows` and the `bases` they cover of an annotation file, as `rows` the cut sites of fragments or BAM; both
    None for a bigWig.
    """

    role: str
    track: str
    file: str
    rows: int | None
    bases: int | None
    oddities: Mapping[str, int]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """Sorted, disjoint intervals of each chromosome, uint32 (n, 2): hundreds of tracks stay in memory."""

    by_chrom: dict[str, npt.NDArray[np.uint32]]

    @classmethod
    def of(cls, intervals: Mapping[str, Intervals]) -> Regions:
        """From (starts, ends) by chromosome."""
        return cls({chrom: np.stack(pair, axis=1).astype(np.uint32) for chrom, pair in intervals.items()})

    def on(self, chrom: str) -> Intervals:
        """(starts, ends) int64 on a chromosome in use."""
        starts, ends = self.by_chrom[chrom].astype(np.int64).T
        return starts, ends

    def bases(self, chrom: str) -> int:
        """How many bases of a chromosome in use they cover."""
        starts, ends = self.on(chrom)
        return int((ends - starts).sum())


@dataclass
class Findings:
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


@dataclass
class Opener:
    """Opens files and fits them to the genome; adds what they hold to `files` and to the notes."""

    config: DatasetConfig
    genome_lengths: Mapping[str, int]
    lengths: Mapping[str, int]
    found: Findings
    files: list[FileSummary] = field(default_factory=list)

    def peaks(self, track: TrackConfig) -> Regions | None:
        """The peaks of a track, of its samples together."""
        samples = [self.regions(file, "peaks", track.name) for file in track.paths]
        regions = [sample for sample in samples if sample is not None]
        if len(regions) < len(samples) or len(regions) == 1:
            return regions[0] if regions else None
        together = Regions.of(
            {
                chrom: shared_intervals([sample.on(chrom) for sample in regions], track.min_samples)
                for chrom in self.lengths
            }
        )
        if self.lengths and not any(map(together.bases, self.lengths)):
            self.found.problems.append(
                DataError(
                    f"track {track.name}: no base is in a peak of {track.min_samples} of its {len(regions)} files; "
                    "choose a smaller `min_samples`"
                )
            )
        return together

    def regions(self, file: str, role: str, track: str) -> Regions | None:
        """The rows of a peak or exclude file on the chromosomes in use."""

        def read() -> Annotations:
            annotations = read_annotations(file)
            if self.genome_lengths:
                annotations = annotations.fit(
                    self.genome_lengths,
                    chrom_names=self.config.chrom_names,
                    unknown=self.config.unknown,
                    beyond="skip" if role == "exclude" else "error",
                )
            return annotations

        annotations = self.found.attempt(read)
        if annotations is None or not self.lengths:
            return None
        regions = Regions.of({chrom: annotations.on(chrom) for chrom in self.lengths})
        bases = {chrom: regions.bases(chrom) for chrom in self.lengths}
        missing = tuple(chrom for chrom in self.lengths if not bases[chrom])
        rows = int(sum(annotations.count(chrom) for chrom in self.lengths))
        self.files.append(
            FileSummary(role, track, file, rows, sum(bases.values()), dict(annotations.oddities), missing)
        )
        if role == "peaks" and not sum(bases.values()):
            what = "has no peak" if not rows else f"has {rows} rows that cover no base"
            self.found.problems.append(
                DataError(
                    f"{file} (track {track}) {what} on the {len(self.lengths)} chromosomes in use: a track needs "
                    "peaks; give the called peaks of this genome, or remove the track"
                )
            )
        elif role == "peaks" and missing:
            self._note(file, track, f"has no peak on {some(missing)}: bins there are negatives")
        elif not rows:
            self.found.notes.append(f"{Path(file).name} excludes nothing on the chromosomes in use")
        self._note_oddities(file, annotations.oddities)
        return regions

    def signal(self, track: TrackConfig, file: str) -> tuple[SignalReader, dict[str, str]] | None:
        """A sample of a signal track, and what it calls the chromosomes."""
        reader = self.found.attempt(open_signal, file, track.cut_options(), track.group)
        if reader is None or not self.genome_lengths:
            return None
        names = self.found.attempt(self._match, track, file, reader)
        if names is None:
            return None
        missing = tuple(chrom for chrom in self.lengths if chrom not in names)
        summary = FileSummary("signal", track.name, file, None, None, {}, missing)
        if isinstance(reader, CutSites):
            checked = self.found.attempt(self._cut_sites, track, file, reader, names)
            if checked is None:
                return None
            summary = FileSummary("signal", track.name, file, checked[0], None, checked[1], missing)
        self.files.append(summary)
        return reader, names

    def _cut_sites(
        self, track: TrackConfig, file: str, reader: CutSites, names: Mapping[str, str]
    ) -> tuple[int, dict[str, int]]:
        """How many cut sites are in use, and the oddities of the file."""
        if track.missing != "zero":
            raise DataError(
                f"{file} (track {track.name}) is counted as cut sites, and each base has a count: remove `missing: mask`"
            )
        positions = {chrom: reader.positions(names[chrom]) for chrom in self.lengths if chrom in names}
        sites = sum(len(found) for found in positions.values())
        within = sum(int(np.searchsorted(found, self.lengths[chrom])) for chrom, found in positions.items())
        oddities = {**reader.left_out, **({"sites_past_end": sites - within} if sites > within else {})}
        if not within and self.lengths:
            group = "" if track.group is None else f" of the group {track.group}"
            raise DataError(
                f"{file} (track {track.name}) has no cut site{group} on the {len(self.lengths)} chromosomes in use; "
                "give another file"
            )
        counted = f"{reader.rows:,} {reader.unit} counted{'' if track.group is None else ' in all groups'}"
        self._note(file, track.name, f"{counted}, {within:,} cut sites in use")
        if reader.shifted_before and reader.options.shift != SHIFTED_BEFORE:
            self._note(
                file,
                track.name,
                f"shift is {list(reader.options.shift)}, but fragments with barcodes are shifted already as a rule (10x, "
                f"chromap, sinto): set `shift: {list(SHIFTED_BEFORE)}` if these are",
            )
        self._note_oddities(file, oddities)
        return within, oddities

    def _match(self, track: TrackConfig, file: str, reader: Signal | CutSites) -> dict[str, str]:
        """Genome name to the file's name for every chromosome the two share; what is not shared is noted."""
        lengths, given = self.lengths, reader.lengths
        same = {name: name for name in given if name in self.genome_lengths}
        repaired = repair_names(given, self.genome_lengths) if self.config.chrom_names == "repair" else {}
        matched = {**repaired, **same}
        unknown = [name for name in given if name not in matched]
        unexpected = [name for name in unknown if is_primary(name)]
        if unexpected and (self.config.unknown == "error" or not matched):
            raise DataError(
                f"{file} (track {track.name}) lists {some(unexpected)}, which the genome does not have; "
                f"{mismatch_advice(unexpected, given, self.genome_lengths)}"
            )
        names = {chrom: name for name, chrom in matched.items()}
        kind = "bigWig" if isinstance(reader, Signal) else "file"
        exact = isinstance(reader, Signal) or reader.knows_lengths
        wrong = [
            chrom
            for chrom, name in names.items()
            if given[name] > self.genome_lengths[chrom]
            or (exact and given[name] < self.genome_lengths[chrom])
        ]
        wrong_used = [chrom for chrom in wrong if chrom in lengths]
        if wrong_used:
            least = "" if exact else "at least "
            details = ", ".join(
                f"{chrom} has {least}{given[names[chrom]]} bp there and {self.genome_lengths[chrom]} in the genome"
                for chrom in wrong_used[:5]
            )
            raise DataError(
                f"{file} (track {track.name}) is of another assembly than {self.config.assembly}: {details}"
                f"{' …' if len(wrong_used) > 5 else ''}; use the {kind} made on this genome"
            )
        if lengths and not any(chrom in names for chrom in lengths):
            raise DataError(
                f"{file} (track {track.name}) has none of the {len(lengths)} chromosomes in use; use another "
                f"{kind}"
            )
        missing = [chrom for chrom in lengths if chrom not in names]
        if missing:
            self._note(file, track.name, f"lacks {some(missing)}: masked there")
        renamed = sum(name != chrom for chrom, name in names.items())
        for count, what in (
            (renamed, f"renamed {renamed} chromosomes"),
            (len(wrong), f"another length of {some(wrong)}, not in use"),
            (len(unknown), f"left out {some(unknown)}, not in the genome"),
        ):
            if count:
                self.found.notes.append(f"{Path(file).name}: {what}")
        return names

    def _note(self, file: str, track: str, what: str) -> None:
        self.found.notes.append(f"{Path(file).name} (track {track}) {what}")

    def _note_oddities(self, file: str, oddities: Mapping[str, int]) -> None:
        if oddities:
            counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in oddities.items())
            self.found.notes.append(f"{Path(file).name}: {counts}")


def some(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
