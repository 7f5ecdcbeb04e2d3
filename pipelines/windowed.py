"""Window by window through a model: margins cropped, batches of any size, bins of mostly N are NaN."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from genossm.code_reader import CodeReader
from genossm.errors import DataError, DeviceError
from genossm.genome import Genome
from genossm.interval import Interval
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.blend import blended
from genossm.pipelines.cuda_graphs import GraphedPrediction
from genossm.pipelines.device import describe
from genossm.pipelines.selection import select
from genossm.sequence import NO_BASE
from genossm.windows import Window

Progress = Callable[[int], object]
Precision = Literal["float32", "bf16"]

READ_AHEAD = 3
"""Batches that are read before they are asked for."""
UNDER_WAY = 2
"""Batches that the device has, while values of an earlier one are handed out."""


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
    overlap_bp: int = 0,
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
        overlap_bp: base pairs of target that neighbouring windows share and are blended in, see `predict`.

    Returns:
        float32 (bins, tracks): the bins that overlap [start, end), the first being number start // bin. Bins
        of which more than half is N are NaN.

    Raises:
        DataError: the chromosome is unknown or the range does not lie inside it.
        ConfigError: the overlap is no multiple of the bin, or longer than half of a window's target.
    """
    genome.chromosome(chrom)
    interval = Interval(chrom, start, genome.lengths[chrom] if end is None else end)
    selection = select(
        genome.lengths,
        window_bp=model.window_bp,
        margin_bp=model.margin_bp,
        bin_bp=model.bin_bp,
        overlap_bp=overlap_bp,
        regions=[interval],
    )
    first, stop = (int(edge) for edge in selection.bins[chrom][0])
    values = np.full((stop - first, len(model.tracks)), np.nan, dtype=np.float32)
    needed = selection.needed(selection.windows)
    targets = predict_windows(model, genome, needed, batch_size=batch_size, device=device)
    blocks = blended(selection, [selection.windows], targets, progress)
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
    precision: Precision = "float32",
    starts: Container[int] = (),
) -> Iterator[npt.NDArray[np.float32]]:
    """For each window, in order, its target bins inside the chromosome: float32 (bins, tracks).

    Bins of which more than half is N are NaN; a window of nothing else never reaches the model. Batches of another
    size differ by rounding only, on a CPU by less than 1e-5 of a probability. The genome is read, and values are handed
    out, while the device computes; on CUDA full batches run as one CUDA graph.

    Args:
        precision: `float32` (PyTorch lets convolutions use TF32 on CUDA), or `bf16` autocast.
        starts: numbers of windows that begin a batch, so that values do not depend on the windows before, not even by
            rounding.

    Raises:
        DataError: the model gives NaN or infinity.
        DeviceError: a batch does not fit into the device's memory.
    """
    place = torch.device(device)
    model = model.to(place).eval()
    under_way: deque[_UnderWay] = deque()
    try:
        start = _starter(model, place, precision)
        for batch in _ahead(_batches(model, genome, windows, batch_size, starts)):
            under_way.append(start(batch))
            if len(under_way) > UNDER_WAY:
                yield from _finished(under_way.popleft(), len(model.tracks))
        while under_way:
            yield from _finished(under_way.popleft(), len(model.tracks))
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
    """A window on its way: which of its target bins inside the chromosome are gaps."""

    gap: npt.NDArray[np.bool_]

    @property
    def needs_model(self) -> bool:
        return not self.gap.all()


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Windows one after another, and the codes (windows, bases) of those that need the model; None where none does."""

    items: list[_Item]
    codes: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _UnderWay:
    """A batch that the device may still compute: `values` (windows, bins, tracks) on the host are there after `arrival`."""

    items: list[_Item]
    values: torch.Tensor | None
    arrival: torch.cuda.Event | None


def _batches(
    model: AccessibilityModel,
    genome: Genome,
    windows: Iterable[Window],
    batch_size: int,
    starts: Container[int],
) -> Iterator[_Batch]:
    """Runs of windows of which `batch_size` need the model, and fewer before each of `starts` and at the end."""
    reader, items, used = CodeReader(genome), list[_Item](), 0
    codes = np.empty((batch_size, model.window_bp), dtype=np.int8)
    for number, window in enumerate(windows):
        if items and number in starts:
            yield _Batch(items, torch.from_numpy(codes[:used]) if used else None)
            items, used, codes = [], 0, np.empty_like(codes)
        seen = codes[used]
        reader.fill(seen, window.chrom, window.start)
        length_bp = genome.lengths[window.chrom]
        items.append(_Item(gap_bins(seen, window, model.margin_bp, model.bin_bp, length_bp)))
        used += items[-1].needs_model
        if used == batch_size:
            yield _Batch(items, torch.from_numpy(codes))
            items, used, codes = [], 0, np.empty_like(codes)
    if items:
        yield _Batch(items, torch.from_numpy(codes[:used]) if used else None)


def _ahead(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same batches, read by another thread before they are asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="genome") as reader:
        pending = deque(reader.submit(next, batches, None) for _ in range(READ_AHEAD))
        while (batch := pending.popleft().result()) is not None:
            pending.append(reader.submit(next, batches, None))
            yield batch


def _starter(
    model: AccessibilityModel, device: torch.device, precision: Precision
) -> Callable[[_Batch], _UnderWay]:
    """A function that has the device begin with a batch; it waits for nothing on CUDA."""
    margin_bins = model.margin_bp // model.bin_bp
    predict: Callable[[torch.Tensor], torch.Tensor] = model.predict
    if device.type == "cuda":
        predict = GraphedPrediction(model)

    @torch.inference_mode()
    def start(batch: _Batch) -> _UnderWay:
        if batch.codes is None:
            return _UnderWay(batch.items, None, None)
        codes = batch.codes.pin_memory() if device.type == "cuda" else batch.codes
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            values = predict(codes.to(device, non_blocking=True))
        values = values[:, margin_bins : values.shape[1] - margin_bins].float()
        if device.type != "cuda":
            return _UnderWay(batch.items, values, None)
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrival.record(torch.cuda.current_stream(device))
        return _UnderWay(batch.items, on_host, arrival)

    return start


def _finished(batch: _UnderWay, tracks: int) -> Iterator[npt.NDArray[np.float32]]:
    """The values of each window of one batch."""
    if batch.arrival is not None:
        batch.arrival.synchronize()
    outputs = iter(()) if batch.values is None else iter(batch.values.numpy())
    for item in batch.items:
        values = np.full((len(item.gap), tracks), np.nan, dtype=np.float32)
        if item.needs_model:
            present = ~item.gap
            values[present] = next(outputs)[: len(item.gap)][present]
            if not np.isfinite(values[present]).all():
                raise DataError(
                    "the model gave NaN or infinity where the genome has bases: its weights are damaged or "
                    "overflowed; train it again"
                )
        yield values


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
