"""The inputs of a dataset, opened and compared with the genome: targets and masks of any chromosome and track."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genossm.chrom_names import is_primary, name_hint
from genossm.dataset_config import DatasetConfig, TrackConfig
from genossm.errors import DataError
from genossm.genome import Genome
from genossm.input_files import FileSummary, Findings, Opener, Regions, some
from genossm.interval import bin_count, merge
from genossm.progress import progress
from genossm.samples import SignalReader, binned_together
from genossm.splits import SPLITS, rotate, spread
from genossm.targets import Intervals, masked_bins, no_base_runs, peak_bins

_MANY_TRACKS = 32


@dataclass(frozen=True)
class DatasetInputs:
    """Opened inputs that fit together; `lengths` and `splits` hold the chromosomes in use in genome order.

    `signals` has the samples of each signal track, `signal_names` what each of them calls a chromosome. Pickled,
    forked or shared among threads, readers open their files again where that is needed.
    """

    config: DatasetConfig
    genome: Genome
    lengths: dict[str, int]
    splits: dict[str, tuple[str, ...]]
    exclude: tuple[Regions, ...]
    peak_files: dict[str, Regions]
    signals: dict[str, tuple[SignalReader, ...]]
    signal_names: dict[str, tuple[dict[str, str], ...]]
    files: tuple[FileSummary, ...]
    notes: tuple[str, ...]

    def split_of(self, chrom: str) -> str:
        """The split that a chromosome belongs to."""
        return next(split for split, names in self.splits.items() if chrom in names)

    def excluded(self, chrom: str) -> Intervals:
        """(starts, ends) in bp: the union of the exclude files and the runs of N, within the chromosome."""
        found = [no_base_runs(self.genome.chromosome(chrom))]
        found += [regions.on(chrom) for regions in self.exclude]
        return merge(
            np.concatenate([starts for starts, _ in found]), np.concatenate([ends for _, ends in found])
        )

    def peaks(self, chrom: str, track: str) -> Intervals:
        """(starts, ends) in bp of the merged peaks of a peaks track, cut at the chromosome's ends."""
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

    def column(self, chrom: str, track: TrackConfig) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
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
        names = [names[chrom] for names in self.signal_names[track.name] if chrom in names]
        readers = self.signals[track.name]
        if len(names) < len(readers):
            bins = bin_count(length_bp, bin_bp)
            return np.zeros(bins, dtype=np.float32), np.zeros(bins, dtype=np.bool_)
        values, valid = binned_together(
            readers, names, length_bp, bin_bp, track.aggregate, track.missing, track.combine
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


def open_inputs(config: DatasetConfig) -> DatasetInputs:
    """Open every file of a dataset and compare names, lengths and coordinates with the genome.

    Raises:
        FileError: the only problem is a missing, truncated or unreadable file.
        DataError: anything else is wrong, all of it listed with the offenders.
    """
    found = Findings()
    genome = found.attempt(Genome, config.genome)
    splits: dict[str, tuple[str, ...]] = {}
    used: Iterable[str] = ()
    if genome is not None and config.split.n_folds is None:
        splits = found.attempt(resolve_splits, config, genome.lengths) or {}
        used = {chrom for names in splits.values() for chrom in names}
    elif genome is not None:
        used = found.attempt(_in_use, config, genome.lengths) or ()
    lengths = {} if genome is None else {name: bp for name, bp in genome.lengths.items() if name in used}
    found.attempt(_check_window, config, lengths)

    opener = Opener(config, {} if genome is None else genome.lengths, lengths, found)
    exclude = [opener.regions(file, "exclude", "") for file in config.exclude]
    peak_files: dict[str, Regions] = {}
    signals: dict[str, tuple[tuple[SignalReader, dict[str, str]], ...]] = {}
    many = len(config.tracks) >= _MANY_TRACKS
    for track in progress(config.tracks, unit="track", description="open") if many else config.tracks:
        if track.kind == "peaks":
            if (regions := opener.peaks(track)) is not None:
                peak_files[track.name] = regions
        else:
            samples = [opener.signal(track, file) for file in track.paths]
            signals[track.name] = tuple(sample for sample in samples if sample is not None)
    all_peaks = len(peak_files) == sum(track.kind == "peaks" for track in config.tracks)
    if genome is not None and config.split.n_folds is not None and lengths and all_peaks:
        positives = {chrom: sum(item.bases(chrom) for item in peak_files.values()) for chrom in lengths}
        splits = found.attempt(resolve_splits, config, genome.lengths, positives) or {}
    found.raise_problems()
    assert genome is not None
    return DatasetInputs(
        config=config,
        genome=genome,
        lengths=lengths,
        splits=splits,
        exclude=tuple(item for item in exclude if item is not None),
        peak_files=peak_files,
        signals={name: tuple(reader for reader, _ in samples) for name, samples in signals.items()},
        signal_names={name: tuple(names for _, names in samples) for name, samples in signals.items()},
        files=tuple(opener.files),
        notes=tuple(found.notes),
    )


def resolve_splits(
    config: DatasetConfig, lengths: Mapping[str, int], positives: Mapping[str, int] | None = None
) -> dict[str, tuple[str, ...]]:
    """The chromosomes of train, valid and test, each in the genome's order.

    Without `chroms`, the chromosomes in use are the primary ones (no mitochondrion, alternates or unplaced
    sequences) and those that the split names. Without `train`, all that are not held out train. With `n_folds`
    they are spread over the folds, by bases or, with `balance: positives`, by `positives` of each, too.

    Raises:
        DataError: a name is not in the genome or not among `chroms`, nothing is left for training, or there are
            fewer chromosomes than folds.
    """
    named = {split: getattr(config.split, split) or () for split in SPLITS}
    for where, names in [
        ("chroms", config.chroms or ()),
        *((f"split {split}", named[split]) for split in SPLITS),
    ]:
        _check_names(where, names, config, lengths)
    if config.split.n_folds is not None:
        sizes = {chrom: lengths[chrom] for chrom in _in_use(config, lengths)}
        by_positives = positives if config.split.balance == "positives" else None
        if config.split.balance == "positives" and not any((positives or {}).values()):
            raise DataError(
                "`balance: positives` needs a peaks track; add one, or remove `balance` from the split"
            )
        groups = spread(sizes, config.split.n_folds, seed=config.split.seed, positives=by_positives)
        folds = rotate(groups, config.split.fold or 0)
        return {split: tuple(chrom for chrom in sizes if chrom in folds[split]) for split in SPLITS}
    held_out = {chrom for names in named.values() for chrom in names}
    if config.chroms is not None:
        outside = sorted(held_out - set(config.chroms))
        if outside:
            raise DataError(
                f"the split names {', '.join(outside)}, which `chroms` leaves out; add them to `chroms`"
            )
    used = {*_in_use(config, lengths), *held_out}
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


def _check_names(where: str, names: Iterable[str], config: DatasetConfig, lengths: Mapping[str, int]) -> None:
    absent = [name for name in names if name not in lengths]
    if absent:
        offers = "; ".join(f"for {name!r}, {name_hint(name, lengths)}" for name in absent[:5])
        raise DataError(
            f"{where} names {some(absent)}, which the genome {config.genome} does not have ({offers}): "
            "correct the dataset YAML"
        )


def _in_use(config: DatasetConfig, lengths: Mapping[str, int]) -> tuple[str, ...]:
    """`chroms`, or the primary chromosomes, in the genome's order."""
    _check_names("chroms", config.chroms or (), config, lengths)
    return tuple(
        chrom for chrom in lengths if (is_primary(chrom) if config.chroms is None else chrom in config.chroms)
    )


def _check_window(config: DatasetConfig, lengths: Mapping[str, int]) -> None:
    if lengths and config.window.length > max(lengths.values()):
        longest = max(lengths, key=lambda chrom: lengths[chrom])
        raise DataError(
            f"the window of {config.window.length} bp is longer than every chromosome in use (the longest, "
            f"{longest}, has {lengths[longest]} bp): choose a shorter `window: length` (and margin) in the "
            "dataset YAML"
        )
