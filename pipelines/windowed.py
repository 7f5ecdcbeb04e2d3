"""Window by window through a model: tiles of the training window, margins cropped, bins of mostly N left out as NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from genossm.errors import DataError
from genossm.genome import Genome
from genossm.interval import Interval
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.selection import select
from genossm.sequence import NO_BASE
from genossm.windows import Window


def predict_chromosome(
    model: AccessibilityModel,
    genome: Genome,
    chrom: str,
    *,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
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
        float32 (bins, tracks): the bins that overlap [start, end), the first being number start // bin. Bins of which
        more than half is N are NaN.

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
    progress: Callable[[int], object] | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """For each window its target bins inside the chromosome, float32 (bins, tracks), in the order of `windows`.

    Bins of which more than half is N are NaN; a window of nothing else never reaches the model.
    """
    model = model.to(device).eval()
    queue: list[tuple[npt.NDArray[np.int8] | None, npt.NDArray[np.bool_], int]] = []
    waiting = 0
    for window in windows:
        codes = genome.window(window.chrom, window.start, window.end)
        length_bp = genome.lengths[window.chrom]
        gap = _gap_bins(codes, window, model.margin_bp, model.bin_bp, length_bp)
        base_pairs = min(window.end - model.margin_bp, length_bp) - (window.start + model.margin_bp)
        queue.append((None if gap.all() else codes, gap, base_pairs))
        waiting += queue[-1][0] is not None
        if waiting == batch_size:
            yield from _flush(model, queue, device, progress)
            queue, waiting = [], 0
    yield from _flush(model, queue, device, progress)


def _flush(
    model: AccessibilityModel,
    queue: Sequence[tuple[npt.NDArray[np.int8] | None, npt.NDArray[np.bool_], int]],
    device: torch.device | str,
    progress: Callable[[int], object] | None,
) -> Iterator[npt.NDArray[np.float32]]:
    """Run the queued windows through the model as one batch, and crop the margins."""
    batch = [codes for codes, _, _ in queue if codes is not None]
    outputs: Iterator[npt.NDArray[np.float32]] = iter(())
    if batch:
        tokens = torch.from_numpy(np.stack(batch)).to(device)
        with torch.inference_mode():
            outputs = iter(model.predict(tokens).float().cpu().numpy())
    margin_bins = model.margin_bp // model.bin_bp
    for codes, gap, base_pairs in queue:
        values = np.full((len(gap), len(model.tracks)), np.nan, dtype=np.float32)
        if codes is not None:
            values = np.array(next(outputs)[margin_bins : margin_bins + len(gap)])
            if np.isnan(values[~gap]).any():
                raise DataError(
                    "the model gave NaN where the genome has bases: its weights are damaged or overflowed; train it again"
                )
            values[gap] = np.nan
        if progress is not None:
            progress(base_pairs)
        yield values


def _gap_bins(
    codes: npt.NDArray[np.int8], window: Window, margin_bp: int, bin_bp: int, length_bp: int
) -> npt.NDArray[np.bool_]:
    """bool (target bins inside the chromosome,): true where more than half of the bin's real bases is N."""
    target = codes[margin_bp : codes.size - margin_bp].reshape(-1, bin_bp)
    starts = window.start + margin_bp + np.arange(len(target)) * bin_bp
    real = np.clip(length_bp - starts, 0, bin_bp)
    inside = real > 0
    absent = (target == NO_BASE).sum(axis=1) - (bin_bp - real)
    return np.asarray(2 * absent[inside] > real[inside])
