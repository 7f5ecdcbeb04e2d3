"""Windows that overlap: the last bins of one and the first of the next, faded into each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from genossm.pipelines.selection import Selection
from genossm.windows import Window

Block = npt.NDArray[np.float32]


def blended(
    selection: Selection,
    groups: Iterable[Iterable[Window]],
    blocks: Iterator[Block],
    advance: Callable[[int], object] | None = None,
) -> Iterator[Block]:
    """For each window of each group, in order, the bins that are its own: float32 (bins, tracks), gaps NaN.

    Args:
        selection: says what is a window's own.
        groups: windows, in order.
        blocks: for each window of `selection.needed(group)`, group after group, all of its target bins inside the
            chromosome; they are changed.
        advance: told the base pairs of each window's own bins, once they are there.
    """
    overlap_bins = selection.overlap_bp // selection.bin_bp
    weights = ((np.arange(overlap_bins) + 0.5) / max(1, overlap_bins))[:, None]
    for group in groups:
        previous, tail = None, np.empty((0, 0), dtype=np.float32)
        for window in group:
            before = selection.before(window)
            if before is not None and before != previous:
                tail = next(blocks)[-overlap_bins:]
            block = next(blocks)
            if before is not None:
                block[:overlap_bins] = (1 - weights) * tail + weights * block[:overlap_bins]
            first, stop = selection.target_bins(window)
            previous, tail = window, block[stop - first :]
            if advance is not None:
                advance(selection.target_bp_of(window))
            yield block[: stop - first]
