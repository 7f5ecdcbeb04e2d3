"""What a prediction is to do, checked and ready to compute: models, sequence, plan and device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from math import exp
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from genossm import __version__
from genossm.checkpoint import load
from genossm.errors import ConfigError, DataError, FileError
from genossm.genome import Genome
from genossm.interval import Interval
from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import MAX_LOG_RATE, unscaled
from genossm.pipelines.blend import blended
from genossm.pipelines.chromosome import chosen_chunk_bp, predict_chromosomes
from genossm.pipelines.device import pick_device
from genossm.pipelines.part_file import Runs
from genossm.pipelines.plan import OutputOptions, Plan, PlannedTrack, command_words, part_size
from genossm.pipelines.selection import Selection, select, whole_chromosomes
from genossm.pipelines.windowed import placed, predict_windows
from genossm.version import versions
from genossm.windows import Window

StrPath = str | os.PathLike[str]
AnyModel = AccessibilityModel | StrPath
Precision = Literal["bf16", "float32"]

MODES = ("windows", "chromosome")
PRECISIONS = ("auto", "bf16", "float32")
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Models whose values are averaged, what they read, and how; `plan` is what comes of it."""

    networks: tuple[AccessibilityModel, ...]
    reference: Genome
    plan: Plan
    device: torch.device
    precision: Precision
    batch_size: int
    chunk_bp: int | None
    spill: StrPath | None

    @contextmanager
    def placed(self) -> Iterator[None]:
        """All models on the device, and afterwards where and how they were."""
        with ExitStack() as stack:
            for network in self.networks:
                stack.enter_context(placed(network, self.device))
            yield

    def values(
        self,
        groups: Sequence[Sequence[Window]],
        overflow: Path,
        advance: Callable[[int], object] | None = None,
        noted: Runs | None = None,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """For each window of each group, in order, the bins that are its own: float32 (bins, tracks), gaps NaN.

        Of several models the mean. No batch has windows of two groups, and a group's first window is blended with the
        one before it again, so values do not depend on the other groups. `overflow` is for features of a chromosome that
        is too long for memory; `advance` is told the base pairs that are done. `noted` takes in where states of recurrent
        mixers are out of range (of any model), before a chromosome's values come.
        """
        last = self.networks[-1]
        streams = [
            self._stream(network, groups, overflow, advance if network is last else None, noted)
            for network in self.networks
        ]
        if len(streams) == 1:
            yield from streams[0]
            return
        for blocks in zip(*streams, strict=True):
            yield np.asarray(np.stack(blocks).mean(axis=0, dtype=np.float64), dtype=np.float32)

    def _stream(
        self,
        network: AccessibilityModel,
        groups: Sequence[Sequence[Window]],
        overflow: Path,
        advance: Callable[[int], object] | None,
        noted: Runs | None,
    ) -> Iterator[npt.NDArray[np.float32]]:
        if self.chunk_bp is None:
            selection = self.plan.selection
            needed = [selection.needed(group) for group in groups]
            targets = predict_windows(
                network,
                self.reference,
                chain.from_iterable(needed),
                batch_size=self.batch_size,
                device=self.device,
                precision=self.precision,
                starts=set(accumulate(map(len, needed))),
            )
            return blended(selection, groups, targets, advance)
        values = predict_chromosomes(
            network,
            self.reference,
            list(chain.from_iterable(groups)),
            chunk_bp=self.chunk_bp,
            device=self.device,
            spill=self.spill,
            overflow=overflow,
            progress=advance,
            noted=noted,
        )
        return self._cast(values)

    def _cast(self, values: Iterator[npt.NDArray[np.float32]]) -> Iterator[npt.NDArray[np.float32]]:
        """The same, computed in the job's precision."""
        while True:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                block = next(values, None)
            if block is None:
                return
            yield block


def make_job(
    model: AnyModel | Sequence[AnyModel],
    genome: Genome | StrPath | None,
    out: StrPath,
    *,
    chroms: str | Sequence[str] | None = None,
    regions: str | Interval | Sequence[str | Interval] | None = None,
    bed: StrPath | None = None,
    sequences: StrPath | None = None,
    mode: str = "windows",
    overlap_bp: int = 0,
    chunk_bp: int | None = None,
    spill: StrPath | None = None,
    batch_size: int = 4,
    precision: str = "auto",
    device: str = "auto",
    hdf5: bool = False,
    hdf5_dtype: str = "float16",
    call_peaks: bool = False,
    threshold: float | None = None,
) -> Job:
    """Check all that can be checked before anything is computed or written; arguments and errors as of `predict`."""
    _check_options(genome, sequences, chroms, regions, bed, batch_size, call_peaks, threshold)
    _check_mode(mode, overlap_bp, chunk_bp, spill)
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("hdf5_dtype", hdf5_dtype, ("float16", "float32"))
    chosen = pick_device(device)
    given = [model] if isinstance(model, AccessibilityModel | str | os.PathLike) else model
    models = list(given) if isinstance(given, Sequence) else [given]
    networks = tuple(load(item) if isinstance(item, str | os.PathLike) else item for item in models)
    network = _check_alike(networks)
    whole = mode == "chromosome"
    chunks = chunk_bp
    for member in networks if whole else ():
        chunks = chosen_chunk_bp(member, chunk_bp, chosen)
    source = sequences if sequences is not None else genome
    assert source is not None  # _check_options has seen to it
    reference = source if isinstance(source, Genome) else Genome(source)
    selection = select(
        reference.lengths,
        window_bp=network.window_bp,
        margin_bp=network.margin_bp,
        bin_bp=network.bin_bp,
        overlap_bp=overlap_bp,
        chroms=chroms,
        regions=regions,
        bed=bed,
    )
    if whole:
        selection = whole_chromosomes(selection)
    if sequences is not None:
        _check_records(reference)
    _check_track_names(network)
    computed: Precision = (
        "bf16" if precision == "bf16" or (precision == "auto" and chosen.type == "cuda") else "float32"
    )
    paths = [str(Path(item).absolute()) if isinstance(item, str | os.PathLike) else None for item in models]
    described = [
        {"path": path, "assembly": member.assembly, "provenance": member.provenance}
        for path, member in zip(paths, networks, strict=True)
    ]
    total_bp = sum(reference.lengths[chrom] for chrom in selection.bins)
    plan = Plan(
        identity=_identity(networks, reference, selection, mode, computed),
        tracks=tuple(map(_planned, network.tracks)),
        lengths=dict(reference.lengths),
        bins={chrom: rows.tolist() for chrom, rows in selection.bins.items()},
        window_bp=network.window_bp,
        margin_bp=network.margin_bp,
        bin_bp=network.bin_bp,
        whole=whole,
        part_bp=part_size(
            len(selection.windows),
            network.window_bp,
            total_bp,
            whole=whole,
            device=chosen.type,
            batch_size=batch_size,
            overlap=overlap_bp > 0,
        ),
        options=OutputOptions(
            hdf5=("float32" if hdf5_dtype == "float32" else "float16")
            if hdf5 or sequences is not None
            else None,
            sequences=sequences is not None,
            thresholds=_thresholds(networks, threshold) if call_peaks else {},
        ),
        assembly=network.assembly,
        record={
            "model": described[0] if len(described) == 1 else None,
            "models": described,
            "genome": {"path": str(reference.path), "sha256": reference.sha256},
            "mode": mode,
            "overlap_bp": None if whole else overlap_bp,
            "chunk_bp": chunks,
            "bin_bp": network.bin_bp,
            "strands": network.strands,
            "precision": computed,
            "versions": versions(),
        },
        command=tuple(
            command_words(
                [path or "RUN" for path in paths],
                genome=None if sequences is not None else reference.path,
                sequences=None if sequences is None else reference.path,
                out=Path(out).absolute(),
                chrom=[chroms] if isinstance(chroms, str) else chroms,
                region=[regions] if isinstance(regions, str | Interval) else regions,
                bed=None if bed is None else Path(bed).absolute(),
                mode=mode,
                overlap=overlap_bp or None,
                chunk_bp=chunk_bp,
                spill=None if spill is None else Path(spill).absolute(),
                batch_size=batch_size,
                precision=computed,
                device=device,
                hdf5=hdf5,
                hdf5_dtype=hdf5_dtype if hdf5 or sequences is not None else None,
                call_peaks=call_peaks,
                threshold=threshold,
            )
        ),
        overlap_bp=overlap_bp,
    )
    return Job(networks, reference, plan, chosen, computed, batch_size, chunks if whole else None, spill)


def _planned(track: Any) -> PlannedTrack:
    low, high = (0.0, 1.0) if track.kind == "peaks" else (None, None)
    if track.loss == "poisson":  # a rate that reaches the cut of the heads means nothing
        cut = unscaled(torch.tensor(exp(MAX_LOG_RATE) * track.mean, dtype=torch.float64), track.scaling)
        low, high = 0.0, float(np.nextafter(np.float32(float(cut) * 0.999), np.float32(0)))
    return PlannedTrack(track.name, track.kind, track.aggregate, low, high)


def _check_alike(networks: Sequence[AccessibilityModel]) -> AccessibilityModel:
    """The first of the models, all of which give the same tracks in the same bins and windows."""
    if not networks:
        raise ConfigError("there is no model: give at least one run")
    first = networks[0]
    for number, other in enumerate(networks[1:], start=2):
        for what, one, two in (
            (
                "tracks",
                [(track.name, track.kind, track.aggregate) for track in first.tracks],
                [(track.name, track.kind, track.aggregate) for track in other.tracks],
            ),
            ("a bin of", first.bin_bp, other.bin_bp),
            ("windows of", first.window_bp, other.window_bp),
            ("a margin of", first.margin_bp, other.margin_bp),
            ("the assembly", first.assembly, other.assembly),
        ):
            if one != two:
                raise ConfigError(
                    f"the models cannot be averaged: the first has {what} {one} and number {number} has {two}; give runs "
                    "of the same tracks, windows and assembly"
                )
    return first


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


def _check_track_names(model: AccessibilityModel) -> None:
    for track in model.tracks:
        name = track.name
        if not name or name.startswith(".") or "/" in name or os.sep in name:
            raise DataError(
                f"the track {name!r} cannot name a file: rename it in the dataset YAML (no slash, no dot in "
                "front)"
            )


def _check_options(
    genome: object,
    sequences: object,
    chroms: object,
    regions: object,
    bed: object,
    batch_size: int,
    call_peaks: bool,
    threshold: float | None,
) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; at least 1 window is needed")
    if threshold is not None and not call_peaks:
        raise ConfigError(
            f"a threshold of {threshold} was given, but no regions are called; ask for call_peaks too"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(
            f"the threshold is {threshold}; probabilities lie between 0 and 1: give one of those"
        )
    if sequences is None and genome is None:
        raise ConfigError("neither a genome nor sequences were given: name a FASTA file for one of them")
    if sequences is not None and not (genome is chroms is regions is bed is None):
        raise ConfigError(
            "sequences have no coordinates: give them without a genome, chromosomes, regions or a BED file"
        )


def _check_mode(
    mode: str, overlap_bp: int, chunk_bp: int | None, spill: str | os.PathLike[str] | None
) -> None:
    if mode not in MODES:
        raise ConfigError(f"the mode {mode!r} is not there; allowed are {' and '.join(MODES)}")
    for name, value in (("chunk_bp", chunk_bp), ("spill", spill)):
        if value is not None and mode != "chromosome":
            raise ConfigError(
                f"{name} is {value}, which the mode {mode} does not use; ask for the mode chromosome"
            )
    if overlap_bp and mode != "windows":
        raise ConfigError(
            f"overlap_bp is {overlap_bp}, which the mode {mode} does not use; ask for the mode windows"
        )
    if spill is not None and not Path(spill).is_dir():
        raise FileError(f"the folder {spill} for features between layers is not there: make it first")


def _check_records(sequences: Genome) -> None:
    """Refuse records whose names cannot be those of HDF5 groups, before anything is computed."""
    for name in sequences.names:
        if "/" in name or name in (".", ".."):
            raise DataError(
                f"the record {name!r} of {sequences.path} cannot name an HDF5 group; rename it (no slash, not . or ..)"
            )


def _thresholds(models: Sequence[AccessibilityModel], threshold: float | None) -> dict[str, float]:
    """The lowest probability inside a called region for each peaks track: given, or the mean of the models' own."""
    peaks = [track.name for track in models[0].tracks if track.kind == "peaks"]
    if not peaks:
        raise ConfigError(
            "regions are called from peaks tracks and this model has none; leave call_peaks out"
        )
    if threshold is not None:
        return dict.fromkeys(peaks, float(threshold))
    return {
        name: float(np.mean([model.threshold.get(name, DEFAULT_THRESHOLD) for model in models]))
        for name in peaks
    }


def _identity(
    models: Sequence[AccessibilityModel],
    genome: Genome,
    selection: Selection,
    mode: str,
    precision: Precision,
) -> Mapping[str, Any]:
    """What decides every value; batch size, device and file formats are not among it."""
    wanted = hashlib.sha256()
    for chrom, ranges in selection.bins.items():
        wanted.update(chrom.encode() + b"\0" + ranges.tobytes())
    weights = [_weights_sha256(model) for model in models]
    model = models[0]
    return {
        "genossm": __version__,
        "weights_sha256": weights[0] if len(weights) == 1 else weights,
        "tracks": [{"name": track.name, "kind": track.kind} for track in model.tracks],
        "window_bp": model.window_bp,
        "margin_bp": model.margin_bp,
        "bin_bp": model.bin_bp,
        "genome_sha256": genome.sha256,
        "selection_sha256": wanted.hexdigest(),
        "mode": mode,
        "strands": model.strands if len(models) == 1 else [one.strands for one in models],
        "precision": precision,
        # not where there is none: predictions of before are still the same ones
        **({"overlap_bp": selection.overlap_bp} if selection.overlap_bp else {}),
    }


def _weights_sha256(model: AccessibilityModel) -> str:
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(content.tobytes())
    return weights.hexdigest()
