"""How large the states of recurrent mixers get in windows of a model's training length, and where they get larger.

In training a state sums up a window at most; along a chromosome it may grow beyond all that the layers after it have seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from math import isfinite, sqrt

import numpy as np
import torch
from torch import Tensor

from genossm.code_reader import CodeReader
from genossm.interval import merge
from genossm.models.accessibility import AccessibilityModel
from genossm.models.mixers.mixer import State
from genossm.pipelines.part_file import NotedRuns
from genossm.sequence import NO_BASE
from genossm.windows import Window

WINDOWS = 8
"""Windows, at most, in which states are measured."""
CHUNKS = 4
"""Chunks of such a window: states are looked at where they leave one."""
CHUNK_BP = 1 << 18
"""Base pairs that a model computes at once while its states are measured, at most, or one chunk."""
FACTOR = 2.0
"""A state is out of range beyond so many times the largest one that was measured."""
NOTE = "out_of_range:state:layer"

Limits = Mapping[tuple[int, int], float]
"""The largest root-mean-square in range, by the layer's number from 0 and that of the tensor in its state."""


class StateSizes:
    """The root-mean-square of each state that leaves a chunk, in the order told: a `watch` of `AccessibilityModel.stream`.

    Of several sequences in a batch the largest. Sizes stay on the device until they are asked for: no chunk waits for the one before.
    """

    def __init__(self) -> None:
        self._places: list[tuple[int, int, int, int]] = []
        self._sizes: list[Tensor] = []

    def __call__(self, layer: int, first: int, stop: int, state: State) -> None:
        for number, part in enumerate(state):
            real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
            dtype = torch.promote_types(real.dtype, torch.float32)
            norms = torch.linalg.vector_norm(real.flatten(1), dim=1, dtype=dtype)
            self._places.append((layer, number, first, stop))
            self._sizes.append((norms.amax() / sqrt(max(1, part[0].numel()))).double())

    def told(self) -> Iterator[tuple[tuple[int, int], tuple[int, int], float]]:
        """((layer, tensor of its state), (first trunk bin, the one after the last), size) of each state."""
        sizes = torch.stack(self._sizes).tolist() if self._sizes else []
        for (layer, number, first, stop), size in zip(self._places, sizes, strict=True):
            yield (layer, number), (first, stop), size

    def beyond(self, limits: Limits, bins: int, bins_a_trunk_bin: int) -> NotedRuns:
        """What to note of a chromosome of so many output bins, layer after layer: chunks whose state is out of range.

        A state that is not finite is so whatever the limits, and no other one where its tensor has no limit.
        """
        chunks: dict[int, list[tuple[int, int]]] = {}
        for key, chunk, size in self.told():
            if not isfinite(size) or size > limits.get(key, np.inf):
                chunks.setdefault(key[0], []).append(chunk)
        noted: NotedRuns = []
        for layer, found in sorted(chunks.items()):
            starts, ends = np.array(found, dtype=np.int64).T * bins_a_trunk_bin
            runs = np.stack(merge(starts, np.minimum(ends, bins)), axis=1)
            noted.append((f"{NOTE}{layer + 1}", runs.tolist()))
        return noted


def has_states(model: AccessibilityModel) -> bool:
    """Whether the model has a recurrent mixer; without one there is nothing to measure or to watch."""
    return any(mixer.recurrent for mixer in model.encoder.mixers())


def state_limits(model: AccessibilityModel, reader: CodeReader, lengths: Mapping[str, int]) -> Limits:
    """`FACTOR` times the largest root-mean-square of each state over `WINDOWS` windows, from whichever side it comes.

    It depends on the model and the genome alone, so all shards of a prediction have the same. Computed as the autocast
    around it says.

    Args:
        model: the model, on the device and in evaluation mode.
        reader: of the genome.
        lengths: chromosome lengths in bp, in genome order.
    """
    trunk_bp = model.encoder.trunk_bp
    chunk_bp = max(1, model.window_bp // CHUNKS // trunk_bp) * trunk_bp
    limits: dict[tuple[int, int], float] = {}
    windows = measured_windows(lengths, model.window_bp, reader)
    for length_bp, alike in groupby(windows, lambda window: -(-window.length_bp // trunk_bp) * trunk_bp):
        codes = [reader.read(window.chrom, window.start, window.start + length_bp) for window in alike]
        tokens, at_once = torch.from_numpy(np.stack(codes)), max(1, CHUNK_BP // chunk_bp)
        for first in range(0, len(tokens), at_once):
            sizes, batch = StateSizes(), tokens[first : first + at_once]
            for _ in model.stream(batch, chunk_bp=chunk_bp, keep="device", watch=sizes):
                pass
            for key, _, size in sizes.told():
                if isfinite(size):
                    limits[key] = max(limits.get(key, 0.0), FACTOR * size)
    return limits


def measured_windows(lengths: Mapping[str, int], window_bp: int, reader: CodeReader) -> Iterator[Window]:
    """A window for each of `WINDOWS` equal shares of the genome, cut into windows end to end: the first from the middle of
    its share on of which no more than half is N, or none.

    Where no chromosome is as long as a window, the longest chromosomes.
    """
    for share in _shares(lengths, window_bp):
        for window in share:
            codes = reader.read(window.chrom, window.start, window.end)
            if 2 * np.count_nonzero(codes == NO_BASE) <= len(codes):
                yield window
                break


def measured_bp(lengths: Mapping[str, int], window_bp: int) -> int:
    """Base pairs of the windows in which states are measured, at most."""
    return sum(next(share).length_bp for share in _shares(lengths, window_bp))


def _shares(lengths: Mapping[str, int], window_bp: int) -> Iterator[Iterator[Window]]:
    """The windows of each share, from its middle on."""
    names: Sequence[str] = list(lengths)
    counts = [lengths[chrom] // window_bp for chrom in names]
    ends = list(accumulate(counts))
    total = ends[-1]
    if not total:
        longest = sorted(names, key=lengths.__getitem__, reverse=True)
        yield from (iter([Window(chrom, 0, lengths[chrom])]) for chrom in longest[:WINDOWS])
        return

    def window(number: int) -> Window:
        index = bisect_right(ends, number)
        start = (number - ends[index] + counts[index]) * window_bp
        return Window(names[index], start, start + window_bp)

    shares = min(WINDOWS, total)
    for share in range(shares):
        first, stop = share * total // shares, (share + 1) * total // shares
        middle = (first + stop) // 2
        yield (window(number) for span in ((middle, stop), (first, middle)) for number in range(*span))
