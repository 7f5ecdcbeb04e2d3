"""Predict every track along chromosomes, regions or sequences, into bigWig, narrowPeak and HDF5."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.errors import DataError
from genossm.genome import Genome
from genossm.interval import Interval
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.collect import PredictionResult
from genossm.pipelines.device import describe
from genossm.pipelines.merge import (
    RUN_FILE,
    alone,
    finish,
    finished,
    merge,
    options_of,
    write_shard_record,
)
from genossm.pipelines.part_file import Runs
from genossm.pipelines.parts import Parts, PartsGone
from genossm.pipelines.plan import PARTS_FOLDER, PLAN_FILE, Plan, read_plan, settle
from genossm.pipelines.predict_job import Job, make_job
from genossm.pipelines.shards import Shard
from genossm.pipelines.spread import spread
from genossm.pipelines.stop import stop_asked
from genossm.pipelines.windowed import predict_chromosome
from genossm.progress import move, progress, say
from genossm.windows import Window

__all__ = ["PredictionResult", "predict", "predict_chromosome"]

StrPath = str | os.PathLike[str]


def predict(
    model: AccessibilityModel | StrPath | Sequence[AccessibilityModel | StrPath],
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
    devices: Sequence[str] | None = None,
    shard: str | Shard | None = None,
    hdf5: bool = False,
    hdf5_dtype: str = "float16",
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
    predicted; regions see their context in the reference.

    A killed run goes on where it stopped when it is started again; a finished one is left as it is. SIGTERM ends it
    after the part in hand. However it is divided into shards and runs, the files are the same byte for byte, for one
    batch size and kind of device.

    Args:
        model: a model or the path of a run; of several (folds, say), which must agree in tracks and windows, the mean.
        genome: a genome or the path of a FASTA; None only when `sequences` are given.
        out: folder for `<track>.bw`, `<track>.narrowPeak`, `predictions.h5` (or `sequences.h5`), `qc.bed` and
            `run.json`.
        chroms: whole chromosomes; all of the genome when neither these nor regions are named.
        regions: regions such as "chr1:1000-2000" (0-based half-open); bins that overlap them are written.
        bed: the same from a BED file.
        sequences: a FASTA of sequences without coordinates; gives HDF5 arrays `/<record>/predictions`.
        mode: "windows": tiles of the training window, margins cropped. "chromosome": every chromosome that is named,
            or holds a region, as one sequence.
        overlap_bp: base pairs of target that neighbouring windows share, a multiple of the model's bin and at most half of
            the target; there values fade from one window's to the next one's, for more windows [mode windows].
        chunk_bp: base pairs of it at once, a multiple of the trunk's bin; by default 2^20 on CUDA and 2^18 on a CPU.
        spill: a folder that is there, for a temporary file of the features between layers [mode chromosome]. By
            default they wait in memory where that is enough, and otherwise in a file in `out`.
        batch_size: windows at once, across chromosomes too [mode windows].
        precision: "float32", "bf16" (autocast), or "auto": bf16 on CUDA and float32 on a CPU.
        device: auto, cuda, cuda:N or cpu.
        devices: several of them, in its place: a process for each makes its share of the parts.
        shard: "i/n": only the i-th of n shares of the parts, alike in bases. Shards may run anywhere and at any time on
            one file system; `merge` then writes the files.
        hdf5: write `predictions.h5` as well.
        hdf5_dtype: type of its numbers, and of those in `sequences.h5`: "float16" or "float32".
        call_peaks: call regions of each peaks track.
        threshold: lowest probability in a called region; by default the model's own, or 0.5 where it has
            none.
        force: replace what is in `out`, another prediction or a finished one.

    Raises:
        ConfigError: options that exclude each other, a mode that is not there, or one that the model cannot run in, an
            overlap that does not fit the windows.
        DataError: names or regions that do not fit the genome, or `out` holds another prediction.
        CheckpointError, FileError, DeviceError: the model, a file or the device is not usable.
        PredictionStopped: SIGTERM came.
    """
    part_of = Shard.parse(shard) if isinstance(shard, str) else shard
    job = make_job(
        model,
        genome,
        out,
        chroms=chroms,
        regions=regions,
        bed=bed,
        sequences=sequences,
        mode=mode,
        overlap_bp=overlap_bp,
        chunk_bp=chunk_bp,
        spill=spill,
        batch_size=batch_size,
        precision=precision,
        device=devices[0] if devices else device,
        hdf5=hdf5,
        hdf5_dtype=hdf5_dtype,
        call_peaks=call_peaks,
        threshold=threshold,
    )
    say(f"predict on {', '.join(devices) if devices else describe(job.device)}")
    folder = Path(out)
    if _is_done(folder, job.plan, force):
        done = finished(folder)
        assert done is not None  # _is_done has seen to it
        say(f"{folder} already holds this prediction; nothing to do")
        return done
    parts = Parts(folder, settle(folder, job.plan, shard=part_of is not None, force=force))
    if devices and len(devices) > 1:
        if force:
            (folder / RUN_FILE).unlink(missing_ok=True)  # else the processes find nothing to do
        spread(parts.plan.command, devices, part_of)
        if part_of is None:
            return merge(folder)
        return _shard_result(parts, folder, part_of)
    try:
        return _computed(job, parts, folder, part_of)
    except PartsGone:
        done = finished(folder)
        if done is None or not _is_done(folder, job.plan, force=False):
            raise
        say(f"another process has completed the prediction in {folder} meanwhile")
        return done


def _computed(job: Job, parts: Parts, folder: Path, shard: Shard | None) -> PredictionResult:
    """Make the parts that are missing, of a shard or all, and of all the files too."""
    started, clock = datetime.now(UTC), time.monotonic()
    times: dict[str, Any] = {
        "device": describe(job.device),
        "batch_size": job.batch_size if job.chunk_bp is None else None,
        "started": started.isoformat(timespec="seconds"),
    }
    indices = range(len(parts)) if shard is None else shard.share(parts.bases_read)
    noted: Runs = {}
    if shard is not None:
        write_shard_record(folder, shard, times)

    def compute(groups: Sequence[Sequence[Window]]) -> Iterator[npt.NDArray[np.float32]]:
        return job.values(groups, parts.folder, bar.update, noted)

    bases = parts.bases(indices)
    with (
        stop_asked("the part in hand") as stopped,
        job.placed(),
        progress(total=bases, unit="bp", description="predict", scale=True) as bar,
    ):
        found = parts.complete(
            compute, bar.update, indices=indices, already=partial(move, bar), stopped=stopped, noted=noted
        )
    if found:
        say(f"used {found} finished parts of an interrupted run")
    times["seconds"] = round(time.monotonic() - clock, 1)
    if shard is not None:
        write_shard_record(folder, shard, times)
        if not indices:
            say(f"shard {shard} is empty: there are only {len(parts)} parts to share")
        return _shard_result(parts, folder, shard, found)
    with alone(folder):
        if read_plan(folder) is None:
            raise PartsGone(f"{parts.folder} was merged or discarded by another process")
        return finish(folder, parts, times)


def _shard_result(parts: Parts, folder: Path, shard: Shard, found: int = 0) -> PredictionResult:
    indices = shard.share(parts.bases_read)
    summary = {"shard": str(shard), "parts": len(indices), "found": found, "bases": parts.bases(indices)}
    return PredictionResult(folder, (), summary)


def _is_done(folder: Path, plan: Plan, force: bool) -> bool:
    """Whether `folder` holds the finished files of this plan; refuses what is another's, unless forced.

    Raises:
        DataError: it is a dataset or a run, or holds another prediction, and `force` was not given.
    """
    foreign = [name for name in ("dataset.json", "config.yaml") if (folder / name).exists()]
    if foreign:
        raise DataError(
            f"{folder} is a dataset or a run (it holds {foreign[0]}): choose another folder for predictions"
        )
    if force:
        return False
    path = folder / "run.json"
    if not path.is_file():
        present = [name for name in plan.file_names() if (folder / name).exists()]
        if present and not (folder / PARTS_FOLDER / PLAN_FILE).is_file():
            raise DataError(
                f"{folder} already has {present[0]}, and no run.json says which prediction it is of: "
                "choose another folder, or give force (--force) to replace it"
            )
        return False
    try:
        record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = record["identity"] == plan.identity
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError(
            f"{folder} holds a prediction of another model, genome or selection: "
            "choose another folder, or give force (--force) to replace it"
        )
    return record["options"] == options_of(plan) and finished(folder) is not None
