"""HDF5 predictions: layout, attributes, slices, half precision, and refusals that leave nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pytest

from genossm import hdf5_file
from genossm.errors import DataError, FileError
from genossm.outputs.hdf5 import write_hdf5

VALUES = np.random.default_rng(5).random((10, 2)).astype(np.float32)


def test_layout(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    arrays = [("chr1", 300, [(0, VALUES[:4]), (6, VALUES[6:])]), ("seq/2", 32, [(0, VALUES[:1])])]
    write_hdf5(
        path, arrays, tracks=["peaks", "cuts"], bin_bp=32, assembly="sacCer3", attributes={"mode": "windows"}
    )
    with h5py.File(path) as handle:
        assert list(handle.attrs["tracks"]) == ["peaks", "cuts"]
        assert handle.attrs["bin_bp"] == 32
        assert handle.attrs["assembly"] == "sacCer3"
        assert handle.attrs["mode"] == "windows"
        assert handle["chr1"].attrs["length_bp"] == 300
        stored = handle["chr1/predictions"]
        assert stored.dtype == np.float32
        expected = VALUES.copy()
        expected[4:6] = np.nan
        np.testing.assert_array_equal(stored[:], expected)
        np.testing.assert_array_equal(handle["seq/2/predictions"][:], VALUES[:1])


def test_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_hdf5(path, [("a", 320, [(0, VALUES)])], tracks=["p", "q"], bin_bp=32, assembly="", dtype="float16")
    with h5py.File(path) as handle:
        np.testing.assert_array_equal(handle["a/predictions"][:], VALUES.astype(np.float16))
    with pytest.raises(DataError, match="beyond 65504, the largest float16; write float32"):
        write_hdf5(
            path,
            [("a", 320, [(0, VALUES * 1e6)])],
            tracks=["p", "q"],
            bin_bp=32,
            assembly="",
            dtype="float16",
        )
    with h5py.File(path) as handle:  # the earlier file is untouched
        np.testing.assert_array_equal(handle["a/predictions"][:], VALUES.astype(np.float16))


@pytest.mark.parametrize(("first", "columns"), [(1, 2), (-1, 2), (0, 1)])
def test_slices_that_do_not_fit(tmp_path: Path, first: int, columns: int) -> None:
    with pytest.raises(DataError, match="do not fit a: 10 bins of 2 tracks"):
        write_hdf5(
            tmp_path / "x.h5",
            [("a", 320, [(first, VALUES[:, :columns])])],
            tracks=["p", "q"],
            bin_bp=32,
            assembly="",
        )
    assert list(tmp_path.iterdir()) == []


class SmallDisk:
    """A file on a disk with `free_bytes` left: what does not fit is refused."""

    def __init__(self, raw: BinaryIO, free_bytes: int) -> None:
        self._raw, self._free_bytes = raw, free_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def write(self, content: memoryview) -> int:
        if self._raw.tell() + len(content) > self._free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._raw.write(content)


@pytest.mark.parametrize("free_bytes", [0, 1_000, 100_000, 600_000])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int
) -> None:
    guard = hdf5_file._Guard
    monkeypatch.setattr(hdf5_file, "_Guard", lambda raw: guard(SmallDisk(raw, free_bytes)))
    values = np.random.default_rng(1).random((300_000, 2)).astype(np.float32)
    arrays = [("a", 300_000 * 32, [(0, values)]), ("b", 32, [(0, values[:1])])]
    with pytest.raises(FileError, match=r"no space left on the disk while writing .*x\.h5"):
        write_hdf5(tmp_path / "x.h5", arrays, tracks=["p", "q"], bin_bp=32, assembly="")
    assert list(tmp_path.iterdir()) == []
