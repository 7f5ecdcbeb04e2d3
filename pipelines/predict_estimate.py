"""What a prediction needs of time, memory and disk, measured on a batch of it before it starts."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genossm.amounts import duration_text, size_text
from genossm.genome import Genome
from genossm.interval import bin_count
from genossm.models.accessibility import AccessibilityModel
from genossm.outputs.bigwig import write_bigwig
from genossm.pipelines.collect import writers
from genossm.pipelines.device import describe
from genossm.pipelines.parts import Parts
from genossm.pipelines.plan import read_plan
from genossm.pipelines.predict_job import Job, make_job
from genossm.pipelines.shards import Shard
from genossm.pipelines.state_range import has_states, measured_bp
from genossm.sequence import NO_BASE
from genossm.windows import Window

CUDA_BATCHES = 8
WRITTEN_BINS = 1 << 16
BIGWIG_BYTES = 8
"""Most bytes of a bin in a bigWig, zoom levels included."""

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class PredictionEstimate:
    """What `predict` expects to do; sizes in bytes, times in seconds.

    `windows` (those that are computed in two parts count twice), `bases` (of their targets), `parts` and `found` (of
    these, there already) are those of the shard, or of all. `compute_seconds` is for the parts that are not there, every window taken for one that has bases;
    `write_seconds` is for the files, which a shard leaves to `merge`. `host_bytes` and `device_bytes` are peaks, the
    second None without a GPU; `parts_bytes` lie beside `output_bytes` until the end.
    """

    mode: str
    device: str
    precision: str
    tracks: int
    chroms: int
    windows: int
    bases: int
    parts: int
    found: int
    shard: str | None
    compute_seconds: float
    write_seconds: float
    host_bytes: int
    device_bytes: int | None
    parts_bytes: int
    output_bytes: int
    free_bytes: int
    sample: str

    @property
    def fits(self) -> bool:
        """Whether the disk has the room."""
        return self.parts_bytes + self.output_bytes <= self.free_bytes

    def text(self) -> str:
        """The estimate in lines for people."""
        of = "" if self.shard is None else f"shard {self.shard}: "
        there = f" ({self.found:,} are there already)" if self.found else ""
        device = "" if self.device_bytes is None else f", {size_text(self.device_bytes)} on the device"
        rate = self.bases / self.compute_seconds / 1e6 if self.compute_seconds and not self.found else None
        return "\n".join(
            [
                f"{of}{self.windows:,} windows, {self.bases:,} bp of {self.chroms:,} chromosomes, {self.tracks} tracks, "
                f"in {self.parts:,} parts{there}; mode {self.mode}, {self.precision}, {self.device}",
                f"time: about {duration_text(self.compute_seconds)} to compute"
                + (f" ({rate:,.2f} Mbp/s)" if rate is not None else "")
                + (
                    f" and {duration_text(self.write_seconds)} to write the files"
                    if self.shard is None
                    else ""
                )
                + f", measured on {self.sample}",
                f"memory: about {size_text(self.host_bytes)}{device}",
                f"disk: up to {size_text(self.output_bytes)} for the files and {size_text(self.parts_bytes)} beside them until "
                f"they are complete; {size_text(self.free_bytes)} are free"
                + ("" if self.fits else ": TOO LITTLE"),
            ]
        )


def estimate(
    model: AccessibilityModel | StrPath | Sequence[AccessibilityModel | StrPath],
    genome: Genome | StrPath | None,
    out: StrPath,
    *,
    shard: str | Shard | None = None,
    **options: Any,
) -> PredictionEstimate:
    """Run a batch (or a chunk, in the mode chromosome), write a small bigWig to a temporary folder, and take the rest to
    be like that. Nothing is written to `out`.

    Arguments and errors as of `predict`, without `force`.
    """
    part_of = Shard.parse(shard) if isinstance(shard, str) else shard
    job = make_job(model, genome, out, **options)
    stored = read_plan(Path(out))
    plan = job.plan
    if stored is not None and stored.key == plan.key:
        plan = replace(plan, part_bp=stored.part_bp)
    parts = Parts(Path(out), plan)
    indices = range(len(parts)) if part_of is None else part_of.share(parts.bases_read)
    missing = [index for index in indices if parts.fault(index)]
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    with job.placed():
        per_base, sample = _seconds_a_base(job)
    tracks = len(plan.tracks)
    longest = max(plan.lengths[chrom] for chrom in plan.bins)
    all_bins = sum(bin_count(plan.lengths[chrom], plan.bin_bp) for chrom in plan.bins)
    hdf5_bytes = {None: 0, "float16": 2, "float32": 4}[plan.options.hdf5]
    bigwig_bytes = 0 if plan.options.sequences else BIGWIG_BYTES
    stored_bins = sum(
        stop - first
        for index in indices
        for first, stop in map(plan.selection.target_bins, parts.groups[index])
    )
    is_cuda = job.device.type == "cuda"
    free_bytes = shutil.disk_usage(_existing(Path(out))).free
    return PredictionEstimate(
        mode="chromosome" if plan.whole else "windows",
        device=describe(job.device),
        precision=job.precision,
        tracks=tracks,
        chroms=len({window.chrom for index in indices for window in parts.groups[index]}),
        windows=sum(len(plan.selection.needed(parts.groups[index])) for index in indices),
        bases=parts.bases(indices),
        parts=len(indices),
        found=len(indices) - len(missing),
        shard=None if part_of is None else str(part_of),
        compute_seconds=per_base
        * (sum(parts.bases_read[index] for index in missing) + _measured_bp(job, missing)),
        write_seconds=_seconds_a_bin()
        * plan.bin_total
        * tracks
        / writers(plan.bin_total, tracks, None, free_bytes),
        # values of a chromosome on their way into the files, besides what the batch took
        host_bytes=_peak_bytes() + 16 * bin_count(longest, plan.bin_bp) + _feature_bytes(job, longest),
        device_bytes=torch.cuda.max_memory_allocated(job.device) if is_cuda else None,
        parts_bytes=4 * tracks * stored_bins,
        output_bytes=tracks * (bigwig_bytes * plan.bin_total + hdf5_bytes * all_bins),
        free_bytes=free_bytes,
        sample=sample,
    )


def _seconds_a_base(job: Job) -> tuple[float, str]:
    """Seconds for each base that is read, and what they were measured on."""
    on_cuda = job.device.type == "cuda"
    if job.chunk_bp is not None:
        chrom = max(job.plan.bins, key=job.plan.lengths.__getitem__)
        trunk_bp = job.networks[0].encoder.trunk_bp
        length_bp = min(-(-job.plan.lengths[chrom] // trunk_bp) * trunk_bp, job.chunk_bp)
        if on_cuda:
            _stream(job, chrom, length_bp)
        return _stream(job, chrom, length_bp) / length_bp, f"the first {length_bp:,} bp of {chrom}"
    windows = _with_bases(job)
    batch_bp = len(windows) * job.plan.window_bp
    if not on_cuda:
        return _done(job, windows, 1)[0] / batch_bp, f"a batch of {len(windows)} windows"
    done = _done(
        job, windows, 1 + CUDA_BATCHES
    )  # from the first on: with it kernels are compiled and graphs recorded
    seconds = (done[-1] - done[0]) / CUDA_BATCHES
    return seconds / batch_bp, f"{CUDA_BATCHES} batches of {len(windows)} windows"


def _measured_bp(job: Job, missing: Sequence[int]) -> int:
    """Bases in which states are measured before whole chromosomes are computed."""
    network = job.networks[0]
    if job.chunk_bp is None or not missing or not has_states(network):
        return 0
    return measured_bp(job.reference.lengths, network.window_bp)


def _with_bases(job: Job) -> list[Window]:
    """A batch of windows from all over the selection, of those that are not of N alone."""
    windows = job.plan.selection.windows
    found: list[Window] = []
    for index in np.random.default_rng(0).permutation(len(windows)).tolist():
        window = windows[index]
        if (job.reference.window(window.chrom, window.start, window.end) != NO_BASE).any():
            found.append(window)
        if len(found) == job.batch_size:
            break
    return found or [windows[0]]


def _done(job: Job, windows: list[Window], times: int) -> list[float]:
    """Seconds from the start until each of so many batches was done."""
    job = replace(job, plan=replace(job.plan, overlap_bp=0))  # these windows alone
    started = time.perf_counter()
    values = job.values([windows] * times, Path(tempfile.gettempdir()))
    ends = [time.perf_counter() - started for _ in values]
    return ends[len(windows) - 1 :: len(windows)]


def _stream(job: Job, chrom: str, length_bp: int) -> float:
    """Seconds for the first bases of a chromosome, through all models."""

    def read(start: int, end: int) -> torch.Tensor:
        return torch.from_numpy(job.reference.window(chrom, start, end))[None]

    assert job.chunk_bp is not None
    started = time.perf_counter()
    with torch.autocast(job.device.type, torch.bfloat16, enabled=job.precision == "bf16"):
        for network in job.networks:
            for _, values in network.stream(read, chunk_bp=job.chunk_bp, length=length_bp):
                values.cpu()
    return time.perf_counter() - started


def _seconds_a_bin() -> float:
    """Seconds for a value in a bigWig."""
    values = np.random.default_rng(0).random(WRITTEN_BINS, dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="genossm-estimate-") as folder:
        started = time.perf_counter()
        write_bigwig(Path(folder) / "x.bw", {"x": 32 * WRITTEN_BINS}, [("x", values, 0)], 32)
        return (time.perf_counter() - started) / WRITTEN_BINS


def _feature_bytes(job: Job, longest_bp: int) -> int:
    """What waits in memory between the layers of the longest chromosome, in the mode chromosome."""
    if job.chunk_bp is None or job.spill is not None:
        return 0
    encoder = job.networks[0].encoder
    weight = encoder.norm.weight
    return len(job.networks) * longest_bp // encoder.trunk_bp * weight.numel() * weight.element_size()


def _peak_bytes() -> int:
    """The most memory of the host that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
