"""Write per-bin values as a bigWig that every genome browser opens: one span per bin, gaps for no value."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyBigWig

from genossm.atomic import atomic_path
from genossm.errors import DataError, FileError
from genossm.outputs.bigwig_zoom import mend_zooms

# Shorter runs are cheaper as variable steps in one block than as one block each.
SHORT_RUN_BINS = 64
# Order and ends are checked here. pyBigWig's own check, like each of its calls, looks the name up from the first
# chromosome on: with 100,000 contigs the calls, which short slices therefore make only once, take minutes.
TRUSTED = {"validate": False}
# Measured upper bounds, zoom levels included: 7 bytes a bin in fixed steps, 19 in variable steps. Up to three
# quarters of them (the zoom levels) are written only when the file is closed.
FIXED_BYTES, VARIABLE_BYTES, FLOOR_BYTES = 8, 20, 1 << 18


def write_bigwig(
    path: str | os.PathLike[str],
    lengths: Mapping[str, int],
    slices: Iterable[tuple[str, npt.NDArray[np.float32], int]],
    bin_bp: int,
) -> None:
    """Write a bigWig, complete or not at all.

    Args:
        path: the file to write.
        lengths: every chromosome of the genome and its length in bp, in genome order; all of them go into the
            header.
        slices: (chromosome, values float32 (bins,), start_bp): bin i of a slice covers
            [start_bp + i*bin_bp, min(start_bp + (i+1)*bin_bp, chromosome length)), 0-based half-open. NaN
            bins are left out (gaps). Slices come in genome order, by start, without overlap.
        bin_bp: bases per bin.

    Raises:
        DataError: an unknown chromosome, slices out of order or overlapping or past the end, an infinite
            value, or no value at all (readers refuse a bigWig without one).
        FileError: the file cannot be written, for example because the disk is full.
    """
    order = {chrom: index for index, chrom in enumerate(lengths)}
    covered_bp, written_bytes = 0, 0
    last_chrom, last_end = "", 0
    with atomic_path(path) as temporary:
        _require_space(path, FLOOR_BYTES + 64 * len(lengths))
        try:
            handle = pyBigWig.open(str(temporary), "w")
            handle.addHeader(list(lengths.items()))
            try:
                for chrom, values, start_bp in slices:
                    _check_slice(chrom, values, start_bp, bin_bp, lengths)
                    if last_chrom and (order[chrom], start_bp) < (order[last_chrom], last_end):
                        raise DataError(
                            f"values of {chrom} from {start_bp} come after {last_chrom} up to {last_end}: "
                            "slices must be in genome order without overlap"
                        )
                    costly = len(values) <= SHORT_RUN_BINS or _is_sparse(values)
                    slice_bytes = len(values) * (VARIABLE_BYTES if costly else FIXED_BYTES)
                    _require_space(path, FLOOR_BYTES + slice_bytes + 3 * written_bytes // 4)
                    written_bytes += slice_bytes
                    covered_bp += _add(handle, chrom, values, start_bp, bin_bp, lengths[chrom])
                    last_chrom, last_end = chrom, start_bp + len(values) * bin_bp
            finally:
                handle.close()
        except RuntimeError as error:  # pyBigWig's only word for every failed write
            raise FileError(
                f"cannot write {path}: {error}; check the free space and the permissions"
            ) from error
        if covered_bp == 0:
            raise DataError(
                f"nothing to write to {path}: every bin is a gap (mostly N, or outside the regions asked for)"
            )
        _verify(temporary, path, covered_bp)
        mend_zooms(temporary, list(lengths))


def _check_slice(
    chrom: str, values: npt.NDArray[np.float32], start_bp: int, bin_bp: int, lengths: Mapping[str, int]
) -> None:
    if chrom not in lengths:
        raise DataError(
            f"values on chromosome {chrom!r}, which is not in the header: allowed are {', '.join(lengths)}"
        )
    room_bins = -(-(lengths[chrom] - start_bp) // bin_bp)
    if start_bp < 0 or start_bp % bin_bp or values.ndim != 1 or len(values) > room_bins:
        raise DataError(
            f"{values.shape} values on {chrom} from {start_bp} do not fit: one value for each {bin_bp}-bp "
            f"bin, from a multiple of {bin_bp}, up to the end at {lengths[chrom]}"
        )
    if np.isinf(values).any():
        raise DataError(
            f"an infinite value on {chrom} cannot be written to a bigWig; look at the model's output"
        )


def _add(
    handle: pyBigWig.pyBigWig,
    chrom: str,
    values: npt.NDArray[np.float32],
    start_bp: int,
    bin_bp: int,
    length_bp: int,
) -> int:
    """Add one slice and return the bases it covers."""
    present = ~np.isnan(values)
    whole_bins = min(len(values), (length_bp - start_bp) // bin_bp)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], present[:whole_bins], [False])).astype(np.int8)))
    firsts, stops = edges[0::2], edges[1::2]
    covered_bp = int((stops - firsts).sum()) * bin_bp
    if len(values) <= SHORT_RUN_BINS:
        bins = np.flatnonzero(present)
        if bins.size:
            starts = start_bp + bins * bin_bp
            ends = np.minimum(starts + bin_bp, length_bp)
            handle.addEntries(
                [chrom] * bins.size,
                starts.tolist(),
                ends=ends.tolist(),
                values=values[bins].tolist(),
                **TRUSTED,
            )
            covered_bp = int((ends - starts).sum())
        return covered_bp
    if _is_sparse(values):
        bins = np.flatnonzero(present[:whole_bins])
        if bins.size:
            handle.addEntries(
                chrom, start_bp + bins * bin_bp, values=_float64(values[bins]), span=bin_bp, **TRUSTED
            )
    else:
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
            start = start_bp + first * bin_bp
            handle.addEntries(
                chrom, start, values=_float64(values[first:stop]), span=bin_bp, step=bin_bp, **TRUSTED
            )
    if whole_bins < len(values) and present[whole_bins]:
        start = start_bp + whole_bins * bin_bp
        handle.addEntries([chrom], [start], ends=[length_bp], values=[float(values[whole_bins])], **TRUSTED)
        covered_bp += length_bp - start
    return covered_bp


def _is_sparse(values: npt.NDArray[np.float32]) -> bool:
    """Whether the values lie in runs shorter than SHORT_RUN_BINS on average."""
    present = ~np.isnan(values)
    runs = int(present[:1].sum()) + int((present[1:] & ~present[:-1]).sum())
    return int(present.sum()) < SHORT_RUN_BINS * runs


def _float64(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """pyBigWig stores float32 but reads contiguous float64 arrays; others it may read wrongly."""
    return np.ascontiguousarray(values, dtype=np.float64)


def _require_space(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Refuse to go on without room: pyBigWig 0.3.29 corrupts its memory and aborts when a write fails."""
    free_bytes = shutil.disk_usage(Path(path).parent).free
    if free_bytes < needed_bytes:
        raise FileError(
            f"no space left on the disk for {path}: about {needed_bytes / 1e6:,.1f} MB are needed and "
            f"{free_bytes / 1e6:,.1f} MB are free; free some space or write elsewhere, then run the command "
            "again"
        )


def _verify(temporary: os.PathLike[str], path: str | os.PathLike[str], covered_bp: int) -> None:
    """Open the finished file and compare its coverage: pyBigWig only warns when closing fails (full disk)."""
    try:
        with pyBigWig.open(str(temporary)) as handle:
            found_bp = handle.header()["nBasesCovered"]
    except RuntimeError as error:
        raise FileError(
            f"{path} could not be written completely; check the free space on the disk"
        ) from error
    if found_bp != covered_bp:
        raise FileError(
            f"{path} came out with {found_bp} of {covered_bp} bases; check the free space on the disk"
        )
