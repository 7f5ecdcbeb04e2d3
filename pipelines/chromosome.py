"""Whole chromosomes through a model, each as one sequence: chunk by chunk, with the result of one pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genossm.code_reader import CodeReader
from genossm.errors import ConfigError, DataError, DeviceError, FileError
from genossm.genome import Genome
from genossm.models.accessibility import AccessibilityModel
from genossm.models.stream import Watch
from genossm.pipelines.device import describe
from genossm.pipelines.part_file import Runs
from genossm.pipelines.state_range import Limits, StateSizes, has_states, state_limits
from genossm.pipelines.windowed import gap_bins
from genossm.windows import Window

CHUNK_BP = {"cpu": 1 << 18, "cuda": 1 << 20}
"""Base pairs of a chunk, where nobody asked for another number."""

GAP_BINS = 1 << 16
"""Bins of which N are counted at once."""

MOST_IN_MEMORY = 16 << 30
"""Bytes of features that wait in the host's memory, at most, and no more than half of the machine's; more go to a file."""


def chosen_chunk_bp(model: AccessibilityModel, chunk_bp: int | None, device: torch.device) -> int:
    """The chunk that was asked for, or one that suits the device and the trunk's bin.

    Raises:
        ConfigError: it is no multiple of the trunk's bin, or a mixer of the model cannot run chunk by chunk.
    """
    trunk_bp = model.encoder.trunk_bp
    if chunk_bp is None:
        chunk_bp = max(1, CHUNK_BP[device.type] // trunk_bp) * trunk_bp
    if chunk_bp < 1 or chunk_bp % trunk_bp:
        raise ConfigError(
            f"chunk_bp is {chunk_bp}; it must be a multiple of the model's bin of {trunk_bp} bp"
        )
    try:
        for mixer in model.encoder.mixers():
            _ = mixer.halo
    except ValueError as error:
        raise ConfigError(f"the mode chromosome does not suit this model: {error}") from error
    return chunk_bp


def predict_chromosomes(
    model: AccessibilityModel,
    genome: Genome,
    windows: Iterable[Window],
    *,
    chunk_bp: int,
    device: torch.device,
    spill: str | os.PathLike[str] | None = None,
    overflow: str | os.PathLike[str],
    progress: Callable[[int], object] | None = None,
    noted: Runs | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """For each chromosome, in order, its values: float32 (bins, tracks), NaN in bins of which more than half is N.

    The chromosome's end is padded with "no base" to a multiple of the trunk's bin. One of nothing but N never reaches
    the model, which computes in its own type, or in that of the autocast around each `next` (bf16 on CUDA, from
    `predict`, unless it is told otherwise).

    Args:
        model: the model, on the device and in evaluation mode.
        genome: where the sequence comes from.
        windows: one for each chromosome, see `selection.whole_chromosomes`.
        chunk_bp: base pairs at once, see `chosen_chunk_bp`; changes speed and memory, and results by rounding only.
        device: where to compute.
        spill: a folder for the features between layers, which then wait there and not in memory.
        overflow: a folder for those of a chromosome that is too long for memory, where there is no `spill`.
        progress: told the base pairs that were done.
        noted: takes in, before a chromosome's values come, the bins where a state of a recurrent mixer is out of the range
            that it has in windows of the model's length (`state_range`); by default states are not looked at.

    Raises:
        DataError: the model gives NaN or infinity.
        DeviceError: a chunk does not fit into the device's memory.
        FileError: the features cannot be kept in the folder.
    """
    folder, reader = Path(overflow if spill is None else spill), CodeReader(genome)
    limits: Limits | None = None
    for chrom in (window.chrom for window in windows):
        gap = _gaps(reader, chrom, genome.lengths[chrom], model.bin_bp)
        if gap.all():
            if progress is not None:
                progress(genome.lengths[chrom])
            yield np.full((len(gap), len(model.tracks)), np.nan, dtype=np.float32)
            continue
        padded_bp = -(-genome.lengths[chrom] // model.encoder.trunk_bp) * model.encoder.trunk_bp
        keep = folder if spill is not None else _place(model, padded_bp, device, folder)
        sizes = StateSizes() if noted is not None and has_states(model) else None
        try:
            if sizes is not None and limits is None:
                limits = state_limits(model, reader, genome.lengths)
            values = _values(
                model, reader, chrom, genome.lengths[chrom], padded_bp, chunk_bp, keep, progress, sizes
            )[: len(gap)]
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{describe(device)} has not enough memory for chunks of {chunk_bp:,} bp; make them shorter (--chunk-bp)"
            ) from error
        except OSError as error:
            raise FileError(
                f"the features of {chrom} cannot be kept in {folder}: {error}; name another folder (--spill)"
            ) from error
        values[gap] = np.nan
        if not np.isfinite(values[~gap]).all():
            raise DataError(
                f"the model gave NaN or infinity on {chrom}, where the genome has bases: its weights are damaged or "
                "overflowed; train it again"
            )
        if noted is not None and sizes is not None and limits is not None:
            bins_a_trunk_bin = model.encoder.trunk_bp // model.bin_bp
            noted.setdefault(chrom, []).extend(sizes.beyond(limits, len(gap), bins_a_trunk_bin))
        yield values


def _values(
    model: AccessibilityModel,
    reader: CodeReader,
    chrom: str,
    length_bp: int,
    padded_bp: int,
    chunk_bp: int,
    keep: Literal["cpu", "device"] | Path,
    progress: Callable[[int], object] | None,
    watch: Watch | None,
) -> npt.NDArray[np.float32]:
    """The values of all bins of the padded chromosome: float32 (bins, tracks)."""

    def read(start: int, end: int) -> Tensor:
        return torch.from_numpy(reader.read(chrom, start, end))[None]

    done, told = 0.0, 0

    def advance(share: float) -> None:
        nonlocal done, told
        done += share
        reached = round(done * length_bp)
        if progress is not None and reached > told:
            progress(reached - told)
            told = reached

    values = np.empty((padded_bp // model.bin_bp, len(model.tracks)), dtype=np.float32)
    chunks = model.stream(read, chunk_bp=chunk_bp, length=padded_bp, keep=keep, advance=advance, watch=watch)
    for first, values_BLT in chunks:
        values[first : first + values_BLT.shape[1]] = values_BLT[0].float().cpu().numpy()
    return values


def _gaps(reader: CodeReader, chrom: str, length_bp: int, bin_bp: int) -> npt.NDArray[np.bool_]:
    """bool (bins,): true where more than half of a bin's bases is N; piece by piece, without a copy of the chromosome."""
    piece_bp, gaps = GAP_BINS * bin_bp, []
    for start in range(0, length_bp, piece_bp):
        end = min(start + piece_bp, -(-length_bp // bin_bp) * bin_bp)
        codes = reader.read(chrom, start, end)
        gaps.append(gap_bins(codes, Window(chrom, start, end), 0, bin_bp, length_bp))
    return np.concatenate(gaps)


def _place(
    model: AccessibilityModel, padded_bp: int, device: torch.device, folder: Path
) -> Literal["cpu", "device"] | Path:
    """Where the features of a chromosome wait: on the device if they take a quarter of what is free there, at most."""
    weight = model.encoder.norm.weight
    needed = padded_bp // model.encoder.trunk_bp * weight.numel() * weight.element_size()
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0] // 4:
        return "device"
    return "cpu" if needed <= _host_limit() else folder


def _host_limit() -> int:
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no POSIX system
        return MOST_IN_MEMORY
    return min(MOST_IN_MEMORY, machine // 2)
