"""Predict every track along chromosomes, regions or sequences, into bigWig, narrowPeak and HDF5."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genossm import __version__
from genossm.atomic import atomic_write_text
from genossm.checkpoint import load
from genossm.errors import ConfigError, DataError, FileError
from genossm.genome import Genome
from genossm.interval import Interval
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.chromosome import (
    chosen_chunk_bp,
    predict_chromosomes,
    whole_chromosomes,
)
from genossm.pipelines.collect import collect, file_names
from genossm.pipelines.device import describe, pick_device
from genossm.pipelines.parts import WINDOWS_PER_PART, Parts
from genossm.pipelines.selection import Selection, select
from genossm.pipelines.windowed import placed, predict_chromosome, predict_windows
from genossm.progress import progress, say
from genossm.version import versions
from genossm.windows import Window

__all__ = ["PredictionResult", "predict", "predict_chromosome"]

MODES = ("windows", "chromosome")
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class PredictionResult:
    """What a prediction wrote: the folder, its files (in the order written), and a summary.

    `summary` has `bases`, `bins`, `gap_bins` and, in `tracks`, for each track `file`, `mean`, `max` and,
    where regions were called, `threshold` and `regions`.
    """

    folder: Path
    files: tuple[Path, ...]
    summary: Mapping[str, Any]


def predict(
    model: AccessibilityModel | str | os.PathLike[str],
    genome: Genome | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    chroms: str | Sequence[str] | None = None,
    regions: str | Interval | Sequence[str | Interval] | None = None,
    bed: str | os.PathLike[str] | None = None,
    sequences: str | os.PathLike[str] | None = None,
    mode: str = "windows",
    chunk_bp: int | None = None,
    spill: str | os.PathLike[str] | None = None,
    batch_size: int = 4,
    device: str = "auto",
    hdf5: bool = False,
    call_peaks: bool = False,
    threshold: float | None = None,
    force: bool = False,
) -> PredictionResult:
    """Predict all tracks of a model and write one bigWig per track into the folder `out`.

    Bin i covers [i*bin, min((i+1)*bin, chromosome length)), 0-based half-open. Values are probabilities for
    peaks and expected values per bin (in the track's own aggregate) for signal, both strands averaged unless the
    model's `reverse_complement` is `none`, or makes it symmetric by itself (`shared`, `parity`). Bins of which more
    than half is N, and bins outside the regions asked for, are gaps. The windows lie on a fixed grid, so a value
    depends neither on the batch size or the chunks (up to rounding, see `predict_windows`) nor on what else is
    predicted; regions see their context in the reference. The model computes in float32.

    A killed run goes on where it stopped when it is started again; a finished one is left as it is.

    Args:
        model: a model or the path of a run.
        genome: a genome or the path of a FASTA; None only when `sequences` are given.
        out: folder for `<track>.bw`, `<track>.narrowPeak`, `predictions.h5` (or `sequences.h5`) and
            `run.json`.
        chroms: whole chromosomes; all of the genome when neither these nor regions are named.
        regions: regions such as "chr1:1000-2000" (0-based half-open); bins that overlap them are written.
        bed: the same from a BED file.
        sequences: a FASTA of sequences without coordinates; gives HDF5 arrays `/<record>/predictions`.
        mode: "windows": tiles of the training window, margins cropped. "chromosome": every chromosome that is named,
            or holds a region, as one sequence.
        chunk_bp: base pairs of it at once, a multiple of the trunk's bin; by default 2^20 on CUDA and 2^18 on a CPU.
        spill: a folder that is there, for a temporary file of the features between layers [mode chromosome]. By
            default they wait in memory where that is enough, and otherwise in a file in `out`.
        batch_size: windows at once, across chromosomes too [mode windows].
        device: auto, cuda, cuda:N or cpu.
        hdf5: write `predictions.h5` as well.
        call_peaks: call regions of each peaks track.
        threshold: lowest probability in a called region; by default the model's own, or 0.5 where it has
            none.
        force: replace what is in `out`, another prediction or a finished one.

    Raises:
        ConfigError: options that exclude each other, a mode that is not there, or one that the model cannot run in.
        DataError: names or regions that do not fit the genome, or `out` holds another prediction.
        CheckpointError, FileError, DeviceError: the model, a file or the device is not usable.
    """
    _check_options(genome, sequences, chroms, regions, bed, batch_size, call_peaks, threshold)
    _check_mode(mode, chunk_bp, spill)
    chosen = pick_device(device)
    say(f"predict on {describe(chosen)}")
    started, clock = datetime.now(UTC), time.monotonic()
    model_path = Path(model).absolute() if isinstance(model, str | os.PathLike) else None
    network = load(model) if isinstance(model, str | os.PathLike) else model
    whole = mode == "chromosome"
    chunk_bp = chosen_chunk_bp(network, chunk_bp, chosen) if whole else None
    reference = _open(sequences if sequences is not None else genome)
    selection = select(
        reference.lengths,
        window_bp=network.window_bp,
        margin_bp=network.margin_bp,
        bin_bp=network.bin_bp,
        chroms=chroms,
        regions=regions,
        bed=bed,
    )
    if whole:
        selection = whole_chromosomes(selection)
    if sequences is not None:
        _check_records(reference)
    called = _thresholds(network, threshold) if call_peaks else {}
    identity = _identity(network, reference, selection, mode)
    options = {"hdf5": hdf5, "sequences": sequences is not None, "thresholds": called}
    tracks = _track_names(network)
    names = file_names(tracks, hdf5=hdf5, sequences=sequences is not None, called=called)
    folder = Path(out)
    earlier = _earlier(folder, identity, names, force)
    if not force and earlier.get("options") == options and earlier.get("sizes") == _sizes(folder, names):
        say(f"{folder} already holds this prediction; nothing to do")
        return PredictionResult(folder, tuple(folder / name for name in earlier["files"]), earlier["summary"])

    per_part = 1 if whole else WINDOWS_PER_PART  # whole chromosomes are windows there
    parts = Parts(folder, identity, selection, len(tracks), force=force, windows_per_part=per_part)

    def compute(windows: Sequence[Window]) -> Iterator[npt.NDArray[np.float32]]:
        if chunk_bp is None:
            return predict_windows(
                network, reference, windows, batch_size=batch_size, device=chosen, progress=bar.update
            )
        return predict_chromosomes(
            network,
            reference,
            windows,
            chunk_bp=chunk_bp,
            device=chosen,
            spill=spill,
            overflow=parts.folder,
            progress=bar.update,
        )

    with (
        placed(network, chosen),
        progress(total=selection.target_bp, unit="bp", description="predict", scale=True) as bar,
    ):
        resumed = parts.complete(compute, bar.update)
    if resumed:
        say(f"used {resumed} finished parts of an interrupted run")
    for name in set(earlier.get("files", ())) - set(names):
        (folder / name).unlink(missing_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    files, summary = collect(
        folder, network, parts, hdf5=hdf5, sequences=sequences is not None, thresholds=called
    )
    record = {
        "genossm": __version__,
        "identity": identity,
        "model": {
            "path": None if model_path is None else str(model_path),
            "assembly": network.assembly,
            "provenance": network.provenance,
        },
        "genome": {"path": str(reference.path), "sha256": reference.sha256},
        "mode": mode,
        "chunk_bp": chunk_bp,
        "bin_bp": network.bin_bp,
        "strands": network.strands,
        "options": options,
        "batch_size": None if whole else batch_size,
        "device": describe(chosen),
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "files": [file.name for file in files],
        "sizes": _sizes(folder, names),
        "summary": summary,
    }
    atomic_write_text(folder / "run.json", json.dumps(record, indent=2, default=str) + "\n")
    parts.remove()
    return PredictionResult(folder, files, summary)


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


def _check_mode(mode: str, chunk_bp: int | None, spill: str | os.PathLike[str] | None) -> None:
    if mode not in MODES:
        raise ConfigError(f"the mode {mode!r} is not there; allowed are {' and '.join(MODES)}")
    for name, value in (("chunk_bp", chunk_bp), ("spill", spill)):
        if value is not None and mode != "chromosome":
            raise ConfigError(
                f"{name} is {value}, which the mode {mode} does not use; ask for the mode chromosome"
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


def _open(source: Genome | str | os.PathLike[str] | None) -> Genome:
    assert source is not None  # _check_options has seen to it
    return source if isinstance(source, Genome) else Genome(source)


def _track_names(model: AccessibilityModel) -> list[str]:
    """Names of the tracks, each fit to be a file's name."""
    names = [track.name for track in model.tracks]
    for name in names:
        if not name or name.startswith(".") or "/" in name or os.sep in name:
            raise DataError(
                f"the track {name!r} cannot name a file: rename it in the dataset YAML (no slash, no dot in "
                "front)"
            )
    return names


def _thresholds(model: AccessibilityModel, threshold: float | None) -> dict[str, float]:
    """The lowest probability inside a called region for each peaks track: given, the model's own, or 0.5."""
    peaks = [track.name for track in model.tracks if track.kind == "peaks"]
    if not peaks:
        raise ConfigError(
            "regions are called from peaks tracks and this model has none; leave call_peaks out"
        )
    own = model.threshold
    return {
        name: float(own.get(name, DEFAULT_THRESHOLD) if threshold is None else threshold) for name in peaks
    }


def _identity(model: AccessibilityModel, genome: Genome, selection: Selection, mode: str) -> dict[str, Any]:
    """What decides every value; batch size, device and file formats are not among it."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(content.tobytes())
    wanted = hashlib.sha256()
    for chrom, ranges in selection.bins.items():
        wanted.update(chrom.encode() + b"\0" + ranges.tobytes())
    return {
        "genossm": __version__,
        "weights_sha256": weights.hexdigest(),
        "tracks": [{"name": track.name, "kind": track.kind} for track in model.tracks],
        "window_bp": model.window_bp,
        "margin_bp": model.margin_bp,
        "bin_bp": model.bin_bp,
        "genome_sha256": genome.sha256,
        "selection_sha256": wanted.hexdigest(),
        "mode": mode,
        "strands": model.strands,
    }


def _sizes(folder: Path, names: Sequence[str]) -> dict[str, int | None]:
    """Bytes of each file, None where it is missing: a damaged output is not a finished one."""
    return {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in names}


def _earlier(folder: Path, identity: Mapping[str, Any], names: Sequence[str], force: bool) -> dict[str, Any]:
    """The run.json of an earlier prediction in `folder` ({} where there is none); refuses another's."""
    foreign = [name for name in ("dataset.json", "config.yaml") if (folder / name).exists()]
    if foreign:
        raise DataError(
            f"{folder} is a dataset or a run (it holds {foreign[0]}): choose another folder for predictions"
        )
    path = folder / "run.json"
    if not path.is_file():
        present = [name for name in names if (folder / name).exists()]
        if present and not force and not (folder / ".parts" / "plan.json").is_file():
            raise DataError(
                f"{folder} already has {present[0]}, and no run.json says which prediction it is of: "
                "choose another folder, or give force (--force) to replace it"
            )
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = record["identity"] == identity
    except (ValueError, KeyError, TypeError):
        record, same = {}, False
    if not same and not force:
        raise DataError(
            f"{folder} holds a prediction of another model, genome or selection: "
            "choose another folder, or give force (--force) to replace it"
        )
    return record if same else {"files": record.get("files", [])}
