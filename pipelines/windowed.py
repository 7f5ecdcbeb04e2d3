"""Window by window through a model: tiles of the training window, margins cropped, bins of mostly N left out as NaN."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from genossm.errors import DataError
from genossm.genome import Genome
from genossm.interval import Interval
from genossm.models.accessibility import AccessibilityModel
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
    progress: Progress | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """For each window its target bins inside the chromosome, float32 (bins, tracks), in the order of `windows`.

    Bins of which more than half is N are NaN; a window of nothing else never reaches the model. On CUDA the model
    computes in bf16 (see `precision_on`), and the next batch is read and under way while one is handed out.

    Batches of another size differ by rounding only: by less than 1e-5 in float32; in bf16, where a GPU picks its
    matrix kernels by shape, by less than 0.02 of a probability and 2 % of an expected value.
    """
    place = torch.device(device)
    model = model.to(place).eval()
    ahead = 1 if place.type == "cuda" else 0
    running: deque[_Batch] = deque()
    for items in _batches(model, genome, windows, batch_size):
        running.append(_launch(model, items, place))
        if len(running) > ahead:
            yield from _finish(running.popleft(), len(model.tracks), progress)
    for batch in running:
        yield from _finish(batch, len(model.tracks), progress)


def precision_on(device: torch.device) -> Literal["bf16", "float32"]:
    """What a prediction computes in: bf16 where it is fast (autocast on CUDA), float32 elsewhere. Outputs are float32."""
    return "bf16" if device.type == "cuda" else "float32"


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


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Launched windows: `values` float32 (windows with codes, target bins, tracks) is there once `done` is."""

    items: Sequence[_Item]
    values: torch.Tensor | None
    done: torch.cuda.Event | None


def _batches(
    model: AccessibilityModel, genome: Genome, windows: Iterable[Window], batch_size: int
) -> Iterator[list[_Item]]:
    """Runs of windows of which `batch_size` need the model, and a last one with the rest."""
    items: list[_Item] = []
    waiting = 0
    for window in windows:
        codes = genome.window(window.chrom, window.start, window.end)
        length_bp = genome.lengths[window.chrom]
        gap = _gap_bins(codes, window, model.margin_bp, model.bin_bp, length_bp)
        start, end = target_of(window, model.margin_bp, length_bp)
        items.append(_Item(None if gap.all() else codes, gap, end - start))
        waiting += items[-1].codes is not None
        if waiting == batch_size:
            yield items
            items, waiting = [], 0
    if items:
        yield items


def _launch(model: AccessibilityModel, items: Sequence[_Item], device: torch.device) -> _Batch:
    """Start one batch through the model, margins cropped; on CUDA this returns before it is computed."""
    batch = [item.codes for item in items if item.codes is not None]
    if not batch:
        return _Batch(items, None, None)
    cuda = device.type == "cuda"
    tokens = torch.from_numpy(np.stack(batch))
    margin_bins = model.margin_bp // model.bin_bp
    bf16 = precision_on(device) == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        if cuda:
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        values = model.predict(tokens).float()
        values = values[:, margin_bins : values.shape[1] - margin_bins].contiguous()
        if not cuda:
            return _Batch(items, values, None)
        fetched = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        fetched.copy_(values, non_blocking=True)
        return _Batch(items, fetched, torch.cuda.current_stream(device).record_event())


def _finish(batch: _Batch, tracks: int, progress: Progress | None) -> Iterator[npt.NDArray[np.float32]]:
    """Wait for a batch and hand out the values of each of its windows."""
    if batch.done is not None:
        batch.done.synchronize()
    outputs = iter(() if batch.values is None else batch.values.numpy())
    for item in batch.items:
        values = np.full((len(item.gap), tracks), np.nan, dtype=np.float32)
        if item.codes is not None:
            present = ~item.gap
            values[present] = next(outputs)[: len(item.gap)][present]
            if not np.isfinite(values[present]).all():
                raise DataError(
                    "the model gave NaN or infinity where the genome has bases: its weights are damaged or overflowed; "
                    "train it again"
                )
        if progress is not None:
            progress(item.target_bp)
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
