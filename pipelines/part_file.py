"""One part of a prediction as a safetensors file: written complete, and read piece by piece, never mapped into memory."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.atomic import atomic_path
from genossm.errors import DataError
from genossm.file_reader import FileReader

NotedRuns = list[tuple[str, list[list[int]]]]
"""Notes on bins of a chromosome: what, and runs of bins [first, stop)."""
Runs = dict[str, NotedRuns]
"""Notes on bins by chromosome."""

_BLOCK_BYTES = 1 << 22
_MOST_HEADER_BYTES = 100_000_000  # as safetensors itself
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(code) for name, code in (("F32", "<f4"), ("F64", "<f8"))}


def write_part(path: Path, values: npt.NDArray[np.float32], said: Mapping[str, str]) -> None:
    """Write `values`, float32 (tracks, bins), and what the part says of itself; complete or not at all.

    Their checksum goes among what it says as `crc32`; it is that of the `notes` among it, too.
    """
    values = np.ascontiguousarray(values, dtype="<f4")
    content = values.data.cast("B") if values.size else b""
    header = {
        "__metadata__": {**said, "crc32": f"{zlib.crc32(content, _of_notes(said)):08x}"},
        "values": {"dtype": "F32", "shape": list(values.shape), "data_offsets": [0, values.nbytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(content)


class PartFile:
    """The `values` (tracks, bins) of a part, read where they are asked for.

    Attributes:
        said: what the part says of itself: `identity`, `spans`, `crc32`, and in the mode chromosome `notes`.
        shape: of the values.
        dtype: of the values.

    Raises:
        DataError: the file is damaged or cut off.
        FileError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file, size = FileReader(path), os.stat(path).st_size
        try:
            header_bytes = int.from_bytes(self._bytes(0, 8), "little")
            if not 0 < header_bytes <= min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError("the header does not fit")
            header = json.loads(self._bytes(8, header_bytes))
            entry = header["values"]
            self.said: dict[str, str] = header.get("__metadata__", {})
            self.shape = tuple(int(number) for number in entry["shape"])
            self.dtype = _DTYPES[entry["dtype"]]
            first, stop = entry["data_offsets"]
            self._start = 8 + header_bytes + first
            if len(self.shape) != 2 or stop - first != np.prod(self.shape) * self.dtype.itemsize:
                raise ValueError("the shape does not fit")
            if self._start - first + stop != size:
                raise ValueError("the size does not fit")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is truncated or damaged: delete it and predict again") from error

    def read(self, track: int, first: int, stop: int) -> npt.NDArray[np.float32]:
        """float32 (bins,): columns [first, stop) of one track."""
        out = np.empty(stop - first, dtype=self.dtype)
        self._file.fill(out, self._start + (track * self.shape[1] + first) * self.dtype.itemsize)
        return np.asarray(out, dtype=np.float32)

    def checksum(self) -> str:
        """Of the notes, and the values as they are in the file; what `said["crc32"]` must be."""
        total, found = int(np.prod(self.shape)) * self.dtype.itemsize, _of_notes(self.said)
        for start in range(0, total, _BLOCK_BYTES):
            found = zlib.crc32(self._bytes(self._start + start, min(_BLOCK_BYTES, total - start)), found)
        return f"{found:08x}"

    def _bytes(self, offset: int, count: int) -> bytes:
        out = np.empty(count, dtype=np.uint8)
        self._file.fill(out, offset)
        return out.tobytes()


def _of_notes(said: Mapping[str, str]) -> int:
    """The checksum of the notes, from which that of the values goes on; 0 where there are none."""
    return zlib.crc32(said.get("notes", "").encode())
