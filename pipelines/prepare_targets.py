"""Columns into targets.h5: bins x tracks in one array, in pieces that a training window reads fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from genossm.dataset_config import TrackConfig
from genossm.dataset_inputs import DatasetInputs
from genossm.hdf5_file import create_hdf5
from genossm.pipelines.prepare_columns import CHUNK_BINS, COMPRESSION, Column, read_usable
from genossm.pipelines.worker_pool import Advance
from genossm.storage import DtypeName
from genossm.targets import Intervals

if TYPE_CHECKING:
    import h5py

PLAIN_BYTES = 8_000_000_000
"""`compress: auto`: arrays up to this size are stored as they are, which is read several times faster."""

# Measured: a window of 3,072 bins x 161 tracks is read fastest from pieces of about this size.
_CHUNK_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 25
_TILE_BINS = 512
_PLAIN_INTERVALS = 1_000


def is_compressed(inputs: DatasetInputs, bins: int, dtype: DtypeName) -> bool:
    """Whether an array of `bins` x all tracks is stored compressed."""
    plain = bins * len(inputs.config.tracks) * np.dtype(dtype).itemsize <= PLAIN_BYTES
    return inputs.config.compress == "gzip" or (inputs.config.compress == "auto" and not plain)


def array_layout(bins: int, tracks: int, dtype: npt.DTypeLike, *, compressed: bool) -> dict[str, Any]:
    """How h5py is to lay out an array (bins, tracks): in one piece, or in chunks of whole rows."""
    if not compressed:
        return {}
    fitting = max(1, _CHUNK_BYTES // (tracks * np.dtype(dtype).itemsize))
    rows = min(
        CHUNK_BINS, 1 << (fitting.bit_length() - 1)
    )  # a power of two, so that blocks end where chunks do
    return {"chunks": (min(bins, rows), tracks), **COMPRESSION}


def write_targets(
    path: Path,
    inputs: DatasetInputs,
    tracks: Sequence[TrackConfig],
    columns: Sequence[Column],
    usable: Sequence[Path],
    excluded: Mapping[str, Intervals],
    *,
    dtype: DtypeName,
    compressed: bool,
    advance: Advance,
) -> None:
    """Write targets.h5, block by block.

    Args:
        path: the file.
        inputs: of all tracks.
        tracks: the columns of the arrays.
        columns: the column file of each track.
        usable: the files of usable bins, in the order of `inputs.lengths`.
        excluded: for each chromosome what is left out.
        dtype: of the stored targets, at least as wide as each column's.
        compressed: whether targets are compressed.
        advance: called with the number of values that were written.
    """
    with create_hdf5(path) as (file, flush):
        file.attrs["bin_bp"] = inputs.config.window.bin
        file.attrs["tracks"] = [track.name for track in tracks]
        for chrom, usable_path in zip(inputs.lengths, usable, strict=True):
            group = file.create_group(chrom)
            usable_bins = read_usable(usable_path)
            for written in _write_values(group, chrom, columns, usable_bins.size, dtype, compressed):
                advance(written)
                flush()
            _write_mask(group, chrom, columns, usable_bins)
            _write_intervals(group, "excluded", excluded[chrom])
            peaks = group.create_group("peaks")
            for track in tracks:
                if track.kind == "peaks":
                    _write_intervals(peaks, track.name, inputs.peaks(chrom, track.name))
            flush()


def _write_values(
    group: h5py.Group, chrom: str, columns: Sequence[Column], bins: int, dtype: DtypeName, compressed: bool
) -> Iterator[int]:
    """Write /<chrom>/targets; yields how many values were written, block by block."""
    tracks = len(columns)
    layout = array_layout(bins, tracks, dtype, compressed=compressed)
    targets = group.create_dataset("targets", (bins, tracks), dtype, **layout)
    for start, stop in _blocks(bins, tracks * np.dtype(dtype).itemsize):
        block = np.empty((tracks, stop - start), dtype=dtype)
        for row, column in zip(block, columns, strict=True):
            row[:] = column.values(chrom, start, stop)
        targets[start:stop] = _turned(block)
        yield block.size


def _write_mask(
    group: h5py.Group, chrom: str, columns: Sequence[Column], usable: npt.NDArray[np.bool_]
) -> None:
    """Write /<chrom>/mask and /<chrom>/masked.

    Pieces of the mask in which everything counts are not stored at all: 1 is what HDF5 gives for them. What most
    readers need is smaller: `masked`, runs of bins that are masked for all tracks, and the attributes `absent`, the
    tracks without any value here, and `own`, whether any track has a mask of its own beside.
    """
    bins, tracks = usable.size, len(columns)
    layout = array_layout(bins, tracks, np.uint8, compressed=True)
    mask = group.create_dataset("mask", (bins, tracks), np.uint8, fillvalue=1, **layout)
    validity = [column.validity(chrom) for column in columns]
    absent = np.flatnonzero([kind == "none" for kind in validity])
    own = [index for index, kind in enumerate(validity) if kind == "some"]
    mask.attrs["absent"], mask.attrs["own"] = absent, bool(own)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], ~usable, [False])).astype(np.int8)))
    _write_intervals(group, "masked", (edges[0::2], edges[1::2]))
    piece = layout["chunks"][0]
    for start, stop in _blocks(bins, tracks):
        here = usable[start:stop]
        if here.all() and not absent.size and not own:
            continue
        block = np.repeat(here[:, None], tracks, axis=1)
        block[:, absent] = False
        for index in own:
            block[:, index] &= columns[index].valid(chrom, start, stop)
        for low in range(0, stop - start, piece):
            part = block[low : low + piece]
            if not part.all():
                mask[start + low : start + low + len(part)] = part


def _write_intervals(group: h5py.Group, name: str, intervals: Intervals) -> None:
    pairs = np.stack(intervals, axis=1).astype(np.int64)
    group.create_dataset(name, data=pairs, **(COMPRESSION if len(pairs) > _PLAIN_INTERVALS else {}))


def _blocks(bins: int, row_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) of blocks that end where the chunks of columns and of arrays do."""
    rows = max(1, _BLOCK_BYTES // (row_bytes * CHUNK_BINS)) * CHUNK_BINS
    return [(start, min(start + rows, bins)) for start in range(0, bins, rows)]


def _turned(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(tracks, bins) as (bins, tracks); by tiles that fit into the cache, four times as fast as at once."""
    turned = np.empty(block.shape[::-1], dtype=block.dtype)
    for start in range(0, block.shape[1], _TILE_BINS):
        turned[start : start + _TILE_BINS] = block[:, start : start + _TILE_BINS].copy().T
    return turned
