"""Signal along the genome from a bigWig file: values per base, or summed up per bin. 0-based half-open."""

from __future__ import annotations

import math
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pybigtools

from genossm.chrom_names import name_hint
from genossm.compressed import open_raw
from genossm.errors import DataError, FileError
from genossm.interval import bin_count

_BIGWIG_MAGIC = 0x888FFC26
_INDEX_HEADER_BYTES = 48
_NATIVE_SUFFIXES = (".bw", ".bigWig", ".bigwig")
_SLICE_BP = 2_000_000
_ABSENT_LIMIT = 0.25


class Signal:
    """One bigWig file, read through pybigtools.

    The file is opened on first use, again in every process and thread, so that forked or pickled copies never
    share a file position. Values that are NaN or infinite count as absent, like bases without an interval.

    Attributes:
        path: the file, absolute.

    Raises:
        FileError: the file is missing, no bigWig, or cut off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self._local = threading.local()
        _check_complete(self.path)
        self._lengths: dict[str, int] = dict(self._reader().chroms())

    @property
    def lengths(self) -> dict[str, int]:
        """bp of each chromosome that the file lists, in its order."""
        return dict(self._lengths)

    def values(self, chrom: str, start: int, end: int, missing: float = 0.0) -> npt.NDArray[np.float32]:
        """Value of each base of [start, end), float32 (end - start,); `missing` where there is none or past
        the ends.

        Raises:
            DataError: the file has no such chromosome, or the range ends before it starts.
            FileError: the file is damaged.
        """
        self._length(chrom)
        if end < start:
            raise DataError(
                f"the range {chrom}:{start}-{end} ends before it starts: give start <= end (0-based)"
            )
        values = self._read(chrom, start, end)
        values[~np.isfinite(values)] = missing
        return values.astype(np.float32)

    def binned(
        self,
        chrom: str,
        length_bp: int,
        bin_bp: int,
        aggregate: Literal["mean", "sum", "max"] = "mean",
        missing: Literal["zero", "mask"] = "zero",
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """One value per bin of a whole chromosome, read in slices of bounded memory.

        Bin i covers [i * bin_bp, min((i + 1) * bin_bp, length_bp)). The last, partial bin is aggregated over
        the bases that it really has.

        Args:
            chrom: chromosome.
            length_bp: its length in the genome, which must be the file's.
            bin_bp: bin width.
            aggregate: what a bin holds of its bases.
            missing: "zero" takes an absent base for 0 and every bin for valid; "mask" aggregates the bases
                that are there, and a bin that lacks a quarter or more of its bases is not valid and 0.

        Returns:
            values: float32 (ceil(length_bp / bin_bp),).
            valid: bool, same shape.

        Raises:
            DataError: the file has no such chromosome or another length for it; an unknown `aggregate` or
                `missing`.
            FileError: the file is damaged.
        """
        if aggregate not in ("mean", "sum", "max") or missing not in ("zero", "mask"):
            raise DataError(
                f"cannot bin with aggregate {aggregate!r} and missing {missing!r}: allowed are mean, sum, "
                "max and zero, mask"
            )
        own_length = self._length(chrom)
        if own_length != length_bp:
            raise DataError(
                f"{self.path} has {own_length:,} bp for {chrom} but the genome has {length_bp:,} bp: "
                "it belongs to another assembly; give a bigWig made for this genome"
            )
        values = np.zeros(bin_count(length_bp, bin_bp), dtype=np.float32)
        valid = np.ones(values.size, dtype=np.bool_)
        slice_bp = max(1, _SLICE_BP // bin_bp) * bin_bp
        for start in range(0, length_bp, slice_bp):
            end = min(start + slice_bp, length_bp)
            here = slice(start // bin_bp, bin_count(end, bin_bp))
            summed = self._whole_bins(chrom, start, end, bin_bp, aggregate) if missing == "zero" else None
            if summed is None:
                bases = self._read(chrom, start, end)
                values[here], valid[here] = aggregate_bases(bases, bin_bp, aggregate, missing)
            else:
                values[here] = summed
        return values, valid

    def __repr__(self) -> str:
        return f"Signal({str(self.path)!r}: {len(self._lengths)} chromosomes)"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_lengths": self._lengths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def _length(self, chrom: str) -> int:
        if chrom not in self._lengths:
            raise DataError(f"{self.path} has no chromosome {chrom!r}; {name_hint(chrom, self._lengths)}")
        return self._lengths[chrom]

    def _whole_bins(
        self, chrom: str, start: int, end: int, bin_bp: int, aggregate: str
    ) -> npt.NDArray[np.float64] | None:
        """The bins of [start, end), binned by pybigtools: many times faster than base by base.

        None where there is no number (a file may hold NaN), or bins are not whole.
        """
        if (end - start) % bin_bp:
            return None
        values = self._values(
            chrom,
            start,
            end,
            bins=(end - start) // bin_bp,
            exact=True,
            summary="max" if aggregate == "max" else "mean",
            uncovered=0.0,
            oob=0.0,
        )
        if not np.isfinite(values).all():
            return None
        return values * bin_bp if aggregate == "sum" else values

    def _read(self, chrom: str, start: int, end: int) -> npt.NDArray[np.float64]:
        """Values per base, NaN where absent or past an end."""
        values = np.full(end - start, np.nan)
        low, high = max(start, 0), min(end, self._lengths[chrom])
        if low < high:
            values[low - start : high - start] = self._values(chrom, low, high)
        return values

    def _values(self, chrom: str, start: int, end: int, **options: Any) -> npt.NDArray[np.float64]:
        try:
            values: npt.NDArray[np.float64] = self._reader().values(chrom, start, end, fillna=None, **options)
        except BaseException as error:
            if not _is_read_failure(error):
                raise
            self._local.opened = None
            raise FileError(
                f"{self.path} cannot be read at {chrom}:{start}-{end} ({error}): it is cut off or "
                "damaged; get it again"
            ) from error
        return values

    def _reader(self) -> Any:
        opened = getattr(self._local, "opened", None)
        if opened is None or opened[0] != os.getpid():
            opened = self._local.opened = (os.getpid(), self._open())
        return opened[1]

    def _open(self) -> Any:
        try:
            if self.path.suffix in _NATIVE_SUFFIXES:
                return pybigtools.open(str(self.path))
            # pybigtools tells the kind by the suffix; an opened file it tells by content (Galaxy calls all
            # files .dat).
            stream = open_raw(self.path)
            weakref.finalize(self, stream.close)
            return pybigtools.open(stream)
        except BaseException as error:
            if not _is_read_failure(error):
                raise
            raise FileError(
                f"{self.path} cannot be opened as a bigWig ({error}): it is cut off or damaged; get it again"
            ) from error


def is_bigwig(path: Path) -> bool:
    """Whether a file begins as a bigWig, whatever its name.

    Raises:
        FileError: the file is missing or may not be read.
    """
    with open_raw(path) as stream:
        start = stream.read(4)
    return _byte_order(start) is not None


def _is_read_failure(error: BaseException) -> bool:
    """Whether pybigtools could not read the file; at some damage its Rust code panics: no Exception."""
    return isinstance(error, (pybigtools.BBIReadError, OSError, ValueError)) or (
        type(error).__name__ == "PanicException"
    )


def aggregate_bases(
    bases: npt.NDArray[np.float64], bin_bp: int, aggregate: str, missing: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Bins (value, valid) of consecutive bases, NaN where absent; only the last bin may be partial.

    `aggregate` and `missing` as in `Signal.binned`.
    """
    first = np.arange(0, bases.size, bin_bp)
    present = np.isfinite(bases)
    width = np.diff(np.append(first, bases.size))
    counted = width if missing == "zero" else np.add.reduceat(present, first, dtype=np.int64)
    valid = (width - counted) < _ABSENT_LIMIT * width
    if aggregate == "max":
        absent_value = 0.0 if missing == "zero" else -math.inf
        values = np.maximum.reduceat(np.where(present, bases, absent_value), first)
    else:
        values = np.add.reduceat(np.where(present, bases, 0.0), first)
        if aggregate == "mean":
            values = values / np.maximum(counted, 1)
    return np.where(valid, values, 0.0), valid


def _byte_order(header: bytes) -> str | None:
    return next((sign for sign in "<>" if header[:4] == struct.pack(f"{sign}I", _BIGWIG_MAGIC)), None)


def _check_complete(path: Path) -> None:
    """Refuse what is no bigWig, or lacks an index that its header points at (format: Kent et al. 2010)."""
    with open_raw(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        header = stream.read(64)
        order = _byte_order(header)
        if order is None:
            raise FileError(
                f"{path} is no bigWig file: its first bytes are {header[:4].hex() or 'missing'}; give a "
                "bigWig"
            )
        if len(header) == 64:
            zoom_levels = struct.unpack_from(f"{order}H", header, 6)[0]
            zooms = stream.read(24 * zoom_levels)
            indexes = [struct.unpack_from(f"{order}Q", header, 24)[0]]
            indexes += [
                struct.unpack_from(f"{order}Q", zooms, at + 16)[0] for at in range(0, len(zooms) - 23, 24)
            ]
            if len(zooms) == 24 * zoom_levels and max(indexes) + _INDEX_HEADER_BYTES <= size:
                return
    raise FileError(
        f"{path} is cut off: it has {size:,} bytes and its index lies behind them; copy or download it again"
    )
