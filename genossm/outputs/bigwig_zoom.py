"""Mend the zoom levels of a bigWig that pyBigWig wrote: browsers draw notches when zoomed out otherwise.

pyBigWig 0.3.29 (libBigWig) leaves out the sum of the first record of a zoom block and of the last record of a
level: igv.js and others then draw a 0 there. Blocks with such a record are compressed anew, appended to the
file, and their entry in the level's R-tree is pointed at them. Layout: Kent et al. 2010, supplement
(little-endian throughout).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyBigWig

MAGIC = 0x888FFC26
HEADER_BYTES, ZOOM_HEADER_BYTES, TREE_HEADER_BYTES = 64, 24, 48
RECORD = np.dtype(
    [("chrom", "<u4"), ("start", "<u4"), ("end", "<u4"), ("count", "<u4")]
    + [(name, "<f4") for name in ("min", "max", "sum", "squares")]
)


def mend_zooms(path: str | os.PathLike[str], chroms: list[str]) -> None:
    """Correct the first and the last record of every zoom block of `path` from the full data, in place.

    Args:
        path: a closed bigWig written by pyBigWig.
        chroms: the names of its header, in order.
    """
    with pyBigWig.open(os.fspath(path)) as reader, open(path, "r+b") as file:
        file.seek(6)
        (levels,) = struct.unpack("<H", file.read(2))
        appended = False
        for level in range(levels):
            file.seek(HEADER_BYTES + ZOOM_HEADER_BYTES * level + 16)
            (tree,) = struct.unpack("<Q", file.read(8))
            for entry, offset, size in list(_leaves(file, tree + TREE_HEADER_BYTES)):
                file.seek(offset)
                records = np.frombuffer(zlib.decompress(file.read(size)), dtype=RECORD).copy()
                before = records.copy()
                for index in {0, len(records) - 1}:
                    _recompute(records, index, reader, chroms)
                if not np.array_equal(records, before):
                    _replace(file, entry, zlib.compress(records.tobytes()))
                    appended = True
        if appended:
            file.seek(0, os.SEEK_END)
            file.write(struct.pack("<I", MAGIC))


def _leaves(file: BinaryIO, node: int) -> Iterator[tuple[int, int, int]]:
    """(place of the entry in the file, data offset, data size) of each leaf entry of an R-tree."""
    file.seek(node)
    is_leaf, _, count = struct.unpack("<BBH", file.read(4))
    width = 32 if is_leaf else 24
    content = file.read(width * count)
    for index in range(count):
        offset = struct.unpack_from("<Q", content, index * width + 16)[0]
        if is_leaf:
            size = struct.unpack_from("<Q", content, index * width + 24)[0]
            yield node + 4 + index * width, offset, size
        else:
            yield from _leaves(file, offset)


def _recompute(
    records: npt.NDArray[np.void], index: int, reader: pyBigWig.pyBigWig, chroms: list[str]
) -> None:
    """Set one record's coverage and moments to those of the full data between its ends."""
    record = records[index]
    start, end = int(record["start"]), int(record["end"])
    found = np.array(reader.intervals(chroms[int(record["chrom"])], start, end) or (), dtype=np.float64)
    if not len(found):
        return
    bases = np.minimum(found[:, 1], end) - np.maximum(found[:, 0], start)
    values = found[:, 2]
    record["count"] = int(bases.sum())
    record["min"], record["max"] = values.min(), values.max()
    record["sum"], record["squares"] = float(bases @ values), float(bases @ values**2)


def _replace(file: BinaryIO, entry: int, block: bytes) -> None:
    """Append a block and point the leaf entry at it."""
    file.seek(0, os.SEEK_END)
    offset = file.tell()
    file.write(block)
    file.seek(entry + 16)
    file.write(struct.pack("<QQ", offset, len(block)))
