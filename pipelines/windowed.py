"""Window by window through a model: margins cropped, batches of any size, bins of mostly N are NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from genossm.errors import DataError, DeviceError
from genossm.genome import Genome
from genossm.interval import Interval
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.device import describe
from genossm.pipelines.selection import select
from genossm.sequence import NO_BASE
from genossm.windows import Window, target_of

Progress = Callable[[int], object]


def predict_chromosome(
    model: AccessibilityModel,
    genome: Genome,
    chrom: str,
    *,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    start: int = 0,
    end: int | None = None,
) -> npt.NDArray[np.float32]:
    """Predictions of one chromosome, or of its bases [start, end), in memory.

    Args:
        model: the model; it is moved to `device` and put into evaluation mode.
        genome: where the sequence comes from.
        chrom: the chromosome.
        batch_size: windows at once.
        device: where to compute.
        progress: told the base pairs of each finished window.
        start, end: base pairs, 0-based half-open; None is the chromosome's end.

    Returns:
        float32 (bins, tracks): the bins that overlap [start, end), the first being number start // bin. Bins
        of which more than half is N are NaN.

    Raises:
        DataError: the chromosome is unknown or the range does not lie inside it.
    """
    genome.chromosome(chrom)
    interval = Interval(chrom, start, genome.lengths[chrom] if end is None else end)
    selection = select(
        genome.lengths,
        window_bp=model.window_bp,
        margin_bp=model.margin_bp,
        bin_bp=model.bin_bp,
        regions=[interval],
    )
    first, stop = (int(edge) for edge in selection.bins[chrom][0])
    values = np.full((stop - first, len(model.tracks)), np.nan, dtype=np.float32)
    blocks = predict_windows(
        model, genome, selection.windows, batch_size=batch_size, device=device, progress=progress
    )
    for window, block in zip(selection.windows, blocks, strict=True):
        low, high = selection.target_bins(window)
        kept_low, kept_high = max(low, first), min(high, stop)
        values[kept_low - first : kept_high - first] = block[kept_low - low : kept_high - low]
    return values


def predict_windows(
    model: AccessibilityModel,
    genome: Genome,
    windows: Iterable[Window],
    *,
    batch_size: int,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """For each window, in order, its target bins inside the chromosome: float32 (bins, tracks).

    Bins of which more than half is N are NaN; a window of nothing else never reaches the model. The model
    computes in float32 (PyTorch lets convolutions use TF32 on CUDA); batches of another size differ by rounding
    only, on a CPU by less than 1e-5 of a probability.

    Raises:
        DataError: the model gives NaN or infinity.
        DeviceError: a batch does not fit into the device's memory.
    """
    place = torch.device(device)
    model = model.to(place).eval()
    try:
        for items in _batches(model, genome, windows, batch_size):
            yield from _computed(model, items, place, progress)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{describe(place)} has not enough memory for batches of {batch_size} windows of "
            f"{model.window_bp:,} bp; lower the batch size (--batch-size)"
        ) from error


@contextmanager
def placed(model: AccessibilityModel, device: torch.device) -> Iterator[None]:
    """The model on `device` in evaluation mode, and afterwards where and how it was."""
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    try:
        model.to(device).eval()
        yield
    finally:
        model.to(home).train(training)


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A window on its way: `codes` None where every target bin is a gap."""

    codes: npt.NDArray[np.int8] | None
    gap: npt.NDArray[np.bool_]
    target_bp: int


def _batches(
    model: AccessibilityModel, genome: Genome, windows: Iterable[Window], batch_size: int
) -> Iterator[list[_Item]]:
    """Runs of windows of which `batch_size` need the model, and a last one with the rest."""
    items: list[_Item] = []
    waiting = 0
    for window in windows:
        codes = genome.window(window.chrom, window.start, window.end)
        length_bp = genome.lengths[window.chrom]
        gap = gap_bins(codes, window, model.margin_bp, model.bin_bp, length_bp)
        start, end = target_of(window, model.margin_bp, length_bp)
        items.append(_Item(None if gap.all() else codes, gap, end - start))
        waiting += items[-1].codes is not None
        if waiting == batch_size:
            yield items
            items, waiting = [], 0
    if items:
        yield items


def _computed(
    model: AccessibilityModel, items: Sequence[_Item], device: torch.device, progress: Progress | None
) -> Iterator[npt.NDArray[np.float32]]:
    """The values of each window of one batch, margins cropped."""
    batch = [item.codes for item in items if item.codes is not None]
    outputs: Iterator[npt.NDArray[np.float32]] = iter(())
    if batch:
        margin_bins = model.margin_bp // model.bin_bp
        with torch.inference_mode():
            values = model.predict(torch.from_numpy(np.stack(batch)).to(device)).float()
            outputs = iter(values[:, margin_bins : values.shape[1] - margin_bins].cpu().numpy())
    for item in items:
        values_of_window = np.full((len(item.gap), len(model.tracks)), np.nan, dtype=np.float32)
        if item.codes is not None:
            present = ~item.gap
            values_of_window[present] = next(outputs)[: len(item.gap)][present]
            if not np.isfinite(values_of_window[present]).all():
                raise DataError(
                    "the model gave NaN or infinity where the genome has bases: its weights are damaged or "
                    "overflowed; train it again"
                )
        if progress is not None:
            progress(item.target_bp)
        yield values_of_window


def gap_bins(
    codes: npt.NDArray[np.int8], window: Window, margin_bp: int, bin_bp: int, length_bp: int
) -> npt.NDArray[np.bool_]:
    """bool (target bins inside the chromosome,): true where more than half of the bin's real bases is N."""
    target = codes[margin_bp : codes.size - margin_bp].reshape(-1, bin_bp)
    starts = window.start + margin_bp + np.arange(len(target)) * bin_bp
    real = np.clip(length_bp - starts, 0, bin_bp)
    inside = real > 0
    absent = (target == NO_BASE).sum(axis=1) - (bin_bp - real)
    return np.asarray(2 * absent[inside] > real[inside])
