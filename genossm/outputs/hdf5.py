"""Write predictions as HDF5 arrays: one dataset of bins x tracks for each chromosome or sequence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import h5py
import numpy as np
import numpy.typing as npt

from genossm.atomic import atomic_path
from genossm.errors import DataError
from genossm.hdf5_file import create_hdf5

CHUNK_BINS = 4096
FLUSHED_VALUES = 1 << 20
Slices = Iterable[tuple[int, npt.NDArray[np.float32]]]


def write_hdf5(
    path: str | os.PathLike[str],
    arrays: Iterable[tuple[str, int, Slices]],
    *,
    tracks: Sequence[str],
    bin_bp: int,
    assembly: str,
    dtype: Literal["float16", "float32"] = "float32",
    attributes: Mapping[str, str | int | float] | None = None,
) -> None:
    """Write `/<chrom>/predictions` (bins, tracks) for each chromosome, complete or not at all.

    The file's attributes are `tracks` (names, in the order of the columns), `bin_bp`, `assembly` and those
    given; each group has `length_bp`. Bin i covers [i*bin_bp, min((i+1)*bin_bp, length_bp)), 0-based
    half-open; bins without a value are NaN.

    Args:
        path: the file to write.
        arrays: (chromosome, length_bp, slices); a slice is (first bin, values float32 (bins, tracks)),
            written where it belongs, so that memory stays that of one slice.
        tracks: names of the columns.
        dtype: float16 halves the file, but holds no value beyond 65,504.

    Raises:
        DataError: a slice that does not fit, or a value too large for float16.
        FileError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary, create_hdf5(temporary) as (handle, flush):
        handle.attrs["tracks"] = np.array(list(tracks), dtype=h5py.string_dtype())
        handle.attrs["bin_bp"] = bin_bp
        handle.attrs["assembly"] = assembly
        handle.attrs.update(attributes or {})
        unflushed = 0
        for chrom, length_bp, slices in arrays:
            _write_chromosome(handle, chrom, length_bp, slices, len(tracks), bin_bp, dtype)
            unflushed += length_bp // bin_bp * len(tracks)
            if unflushed >= FLUSHED_VALUES:  # for each of 100,000 contigs it would take longer than all else
                flush()
                unflushed = 0


def _write_chromosome(
    handle: h5py.File, chrom: str, length_bp: int, slices: Slices, tracks: int, bin_bp: int, dtype: str
) -> None:
    bins = -(-length_bp // bin_bp)
    group = handle.create_group(chrom)
    group.attrs["length_bp"] = length_bp
    dataset = group.create_dataset(
        "predictions",
        shape=(bins, tracks),
        dtype=dtype,
        chunks=(min(CHUNK_BINS, bins), tracks),
        compression="gzip",  # lzf gives other bytes from time to time
        compression_opts=1,
        shuffle=True,
        fillvalue=np.nan,
    )
    largest = float(np.finfo(dtype).max)
    for first, values in slices:
        if values.ndim != 2 or values.shape[1] != tracks or first < 0 or first + len(values) > bins:
            raise DataError(
                f"values {values.shape} from bin {first} do not fit {chrom}: {bins} bins of {tracks} tracks "
                "are needed"
            )
        peak = float(np.nanmax(np.abs(values), initial=0.0))
        if peak > largest:
            raise DataError(
                f"a value of {peak:g} on {chrom} is beyond {largest:g}, the largest {dtype}; write float32 "
                "instead"
            )
        dataset[first : first + len(values)] = values
