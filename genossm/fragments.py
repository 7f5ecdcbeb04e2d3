"""Fragments and reads of ATAC and DNase from tables (fragments.tsv, bedpe, BED) and BAM, block by block.

What is taken from them are the 5' ends: where the enzyme cut. Coordinates are 0-based half-open.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from genossm.compressed import open_bytes
from genossm.errors import DataError, FileError, GenossmError

if TYPE_CHECKING:
    import pandas as pd

Layout = Literal["bam", "fragments", "pairs", "reads"]

TABLE_SUFFIXES = (".bedpe", ".tsv", ".bed", ".tagalign", ".fragments")
_BAM_MAGIC = b"BAM\1"
_CRAM_MAGIC = b"CRAM"
_BLOCK_ROWS = 1_000_000
_MOST_BP = 2**32 - 2**16  # sites, which are shifted ends, are kept as uint32
# SAM flags (SAM specification, section 1.4)
_PAIRED, _PROPER, _UNMAPPED, _REVERSE = 0x1, 0x2, 0x4, 0x10
_FLAGS_LEFT_OUT = {
    _UNMAPPED: "unmapped",
    0x100: "secondary",
    0x800: "supplementary",
    0x200: "failed_quality",
    0x400: "duplicates",
}
_COLUMNS: dict[Layout, tuple[str, ...]] = {
    "fragments": ("chrom", "start", "end", "barcode", "count"),
    "reads": ("chrom", "start", "end", "barcode", "", "strand"),
    "pairs": ("chrom", "start", "end", "chrom2", "start2", "end2", "barcode"),
}


@dataclass(frozen=True, slots=True)
class FragmentFile:
    """What kind of file it is, told by its first row.

    `layout`: "bam"; "fragments" (chromosome, start, end; perhaps barcode, and count of duplicates); "pairs"
    (bedpe of six columns or more: the two reads of a pair); "reads" (BED with a strand in column 6: one read a row).
    `skipped` header lines come before the first row, whose fields `separator` parts. `lengths` has the bp of each
    chromosome that a BAM header lists, and is None for tables.
    """

    path: Path
    layout: Layout
    columns: int = 0
    separator: str = "\t"
    skipped: int = 0
    lengths: dict[str, int] | None = None

    @property
    def has_barcodes(self) -> bool:
        """Whether rows may name a cell (BAM: the tag CB)."""
        return self.layout == "bam" or "barcode" in _COLUMNS[self.layout][: self.columns]

    @property
    def has_counts(self) -> bool:
        """Whether rows say how many duplicates they stand for."""
        return self.layout != "bam" and "count" in _COLUMNS[self.layout][: self.columns]


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """The ends of some fragments or reads: row i lies on `chroms[chrom[i]]`.

    starts, ends: int64 (rows,), base pairs, half-open; -1 where that end is none of the read. `barcode` indexes
    `barcodes`, -1 = none; both are empty where barcodes were not asked for. `weights`: how often a row counts.
    """

    chroms: list[str]
    chrom: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    barcodes: list[str]
    barcode: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64] | None = None


def is_fragment_file(path: Path) -> bool:
    """Whether a file is BAM (by content) or is called like a table of fragments or reads.

    Raises:
        FileError: the file is missing, cut off, or CRAM.
    """
    with open_bytes(path) as stream:
        start = stream.read(4)
    if start == _CRAM_MAGIC:
        raise FileError(f"{path} is CRAM, which cannot be counted here: convert it with `samtools view -b`")
    bare = path.name.lower().removesuffix(".gz").removesuffix(".bgz")
    return start == _BAM_MAGIC or bare.endswith(TABLE_SUFFIXES)


def open_fragments(path: Path) -> FragmentFile:
    """Tell what a file of fragments is.

    Raises:
        FileError: the file is missing, cut off, or BAM, and pysam is not there.
        DataError: it has no rows, or its first row is none of fragments, read pairs or reads.
    """
    with open_bytes(path) as stream:
        if stream.read(4) == _BAM_MAGIC:
            return FragmentFile(path, "bam", lengths=_bam_lengths(path))
    with open_bytes(path) as stream:
        for number, line in enumerate(stream):
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            separator = "\t" if "\t" in text else r"\s+"
            fields = text.split("\t") if separator == "\t" else text.split()
            if not text.strip() or text.startswith(("#", "track", "browser")) or _is_column_names(fields):
                continue
            return FragmentFile(path, _layout(path, number, fields), len(fields), separator, number)
    raise DataError(f"{path} has no fragments: give fragments.tsv, bedpe or BED with at least one row")


def read_ends(
    file: FragmentFile, *, barcodes: bool, min_mapq: int, deduplicate: bool, left_out: Counter[str]
) -> Iterator[tuple[Ends, int]]:
    """The ends of all fragments or reads that count, many at a time, with the bytes of the file that are read.

    A BAM's reads count one by one, paired or not; left out are those that are unmapped, secondary,
    supplementary, of failed quality, below `min_mapq`, of a pair that is not proper, and marked duplicates.
    A row of a table counts once.

    Args:
        file: what `open_fragments` gave.
        barcodes: read barcodes, too.
        min_mapq: the least mapping quality (BAM).
        deduplicate: False counts reads that are marked as duplicates, and a row of fragments with a count
            that often.
        left_out: what is left out is counted here, by reason.

    Raises:
        FileError: the file is cut off or damaged.
        DataError: a row is malformed; the message names its line.
    """
    if file.layout == "bam":
        yield from _bam_ends(file, barcodes, min_mapq, deduplicate, left_out)
        return
    import pandas as pd

    wanted = {"barcode": barcodes, "count": not deduplicate, "": False}
    names = [name for name in _COLUMNS[file.layout][: file.columns] if wanted.get(name, True)]
    places = [_COLUMNS[file.layout].index(name) for name in names]
    texts = {"chrom", "chrom2", "barcode", "strand"}
    with open_bytes(file.path) as stream:
        try:
            blocks = pd.read_csv(
                stream,
                sep=file.separator,
                header=None,
                skiprows=file.skipped,
                usecols=places,
                names=names,
                dtype={name: "category" if name in texts else np.int64 for name in names},
                na_filter=False,
                quoting=csv.QUOTE_NONE,
                chunksize=_BLOCK_ROWS,
                encoding_errors="replace",
                engine="c",
            )
            for block in blocks:
                ends = _ends_of(file, block, left_out)
                yield ends, _position(stream)
        except GenossmError:
            raise
        except (ValueError, OverflowError) as error:  # pandas' own errors are ValueErrors, too
            raise _malformed(file, error) from error


def _is_column_names(fields: list[str]) -> bool:
    return len(fields) >= 3 and "start" in fields[1].lower() and "end" in fields[2].lower()


def _layout(path: Path, number: int, fields: list[str]) -> Layout:
    what = f"{path}, line {number + 1}: {' '.join(fields)[:80]!r}"
    if len(fields) < 3 or not all(map(_is_whole, fields[1:3])):
        raise DataError(f"{what} is no fragment: give at least chromosome, start and end, parted by tabs")
    if len(fields) >= 6 and all(map(_is_whole, fields[4:6])):
        return "pairs"
    if len(fields) >= 6 and fields[5] in ("+", "-"):
        return "reads"
    if len(fields) == 4 and _is_number(fields[3]):
        raise DataError(
            f"{what} looks like bedGraph: make a bigWig of it; fragments have a barcode in column 4, or no column 4"
        )
    return "fragments"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _is_whole(text: str) -> bool:
    return _is_number(text) and float(text).is_integer()  # "1e+05", which R writes, is whole


def _ends_of(file: FragmentFile, block: pd.DataFrame, left_out: Counter[str]) -> Ends:
    """The rows of a table that count, checked."""
    starts, ends = block["start"].to_numpy(np.int64), block["end"].to_numpy(np.int64)
    kept = np.ones(len(block), dtype=np.bool_)
    if file.layout == "pairs":
        kept = _same_chromosome(block)
        left_out["pairs_apart"] += int(np.count_nonzero(~kept))
        starts = np.minimum(starts, block["start2"].to_numpy(np.int64))
        ends = np.maximum(ends, block["end2"].to_numpy(np.int64))
    if np.any(kept & ((starts < 0) | (ends < starts) | (ends > _MOST_BP))):
        raise ValueError("an impossible row")  # which is sought, for its line
    left_out["zero_length"] += int(np.count_nonzero(kept & (starts == ends)))
    kept &= starts < ends
    chrom, names = _codes(block["chrom"])
    barcode, barcodes = _codes(block["barcode"]) if "barcode" in block else (np.zeros(0, np.int64), [])
    weights = block["count"].to_numpy(np.int64) if "count" in block else None
    if weights is not None and np.any(weights < 1):
        raise ValueError("a count below 1")
    if file.layout == "reads":
        strands = block["strand"].astype(object).to_numpy()
        left_out["no_strand"] += int(np.count_nonzero(kept & (strands != "+") & (strands != "-")))
        kept &= (strands == "+") | (strands == "-")
        starts, ends = np.where(strands == "+", starts, -1), np.where(strands == "-", ends, -1)
    return Ends(
        names,
        chrom[kept],
        starts[kept],
        ends[kept],
        barcodes,
        barcode[kept] if barcodes else barcode,
        None if weights is None else weights[kept],
    )


def _same_chromosome(block: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Whether both reads of a pair lie on one chromosome; "." and -1 stand for a read without a place."""
    first, names = _codes(block["chrom"])
    second, others = _codes(block["chrom2"])
    index = {name: at for at, name in enumerate(names)}
    translated = np.array([index.get(name, -1) for name in others], dtype=np.int64)[second]
    placed = (block["start"].to_numpy() >= 0) & (block["start2"].to_numpy() >= 0)
    return np.asarray((first == translated) & placed)


def _codes(column: pd.Series[Any]) -> tuple[npt.NDArray[np.int64], list[str]]:
    return column.cat.codes.to_numpy(np.int64), [str(name) for name in column.cat.categories]


def _position(stream: IO[bytes]) -> int:
    """How far a file is read, in bytes of the file as it lies on the disk."""
    raw = getattr(stream, "fileobj", stream)
    return int(raw.tell())


def _malformed(file: FragmentFile, error: Exception) -> DataError:
    """The sentence for the first row that is refused: the fast reader does not tell its line."""
    advice = "give chromosome, start and end with 0 <= start <= end (0-based, half-open), the same columns in each row"
    numbers = {"fragments": (1, 2), "reads": (1, 2), "pairs": (1, 2, 4, 5)}[str(file.layout)]
    with open_bytes(file.path) as stream:
        for number, line in enumerate(stream):
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            fields = text.split("\t") if file.separator == "\t" else text.split()
            if number < file.skipped or not text.strip():
                continue
            whole = len(fields) >= max(numbers) + 1 and all(_is_whole(fields[at]) for at in numbers)
            if not whole or len(fields) > file.columns or not _is_possible(file, fields):
                shown = text[:80]
                return DataError(
                    f"{file.path}, line {number + 1}: {shown!r} is no row of {file.layout}: {advice}"
                )
    return DataError(f"{file.path} cannot be read as a table of {file.layout} ({error}): {advice}")


def _is_possible(file: FragmentFile, fields: list[str]) -> bool:
    starts, ends = [float(fields[1])], [float(fields[2])]
    if file.layout == "pairs":
        if fields[0] != fields[3] or min(float(fields[1]), float(fields[4])) < 0:
            return True  # left out, whatever it says
        starts, ends = [*starts, float(fields[4])], [*ends, float(fields[5])]
    count_fine = not file.has_counts or (len(fields) > 4 and _is_whole(fields[4]) and float(fields[4]) > 0)
    return 0 <= min(starts) <= max(ends) <= _MOST_BP and count_fine


def _pysam(path: Path) -> Any:
    try:
        import pysam
    except ImportError as error:
        raise FileError(
            f"{path} is BAM, and pysam, which reads it, is not installed: pip install 'genossm[bam]', or give "
            "a bedpe or fragments file"
        ) from error
    return pysam


def _bam_lengths(path: Path) -> dict[str, int]:
    with _open_bam(path) as bam:
        return dict(zip(bam.references, bam.lengths, strict=True))


@contextmanager
def _open_bam(path: Path) -> Iterator[Any]:
    """The reads of a BAM; htslib keeps silent (there is no index, and none is needed).

    Raises:
        FileError: it cannot be opened, or from reading inside the `with` block.
    """
    pysam = _pysam(path)
    verbosity = pysam.set_verbosity(0)
    bam = None
    try:
        bam = pysam.AlignmentFile(os.fspath(path), "rb", check_sq=False)
        yield bam
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} is BAM that is cut off or damaged ({error}): copy or download it again"
        ) from error
    finally:
        if bam is not None:
            with suppress(OSError):  # a damaged file cannot be closed without another error
                bam.close()
        pysam.set_verbosity(verbosity)


def _bam_ends(
    file: FragmentFile, barcodes: bool, min_mapq: int, deduplicate: bool, left_out: Counter[str]
) -> Iterator[tuple[Ends, int]]:
    reasons = dict(_FLAGS_LEFT_OUT)
    if not deduplicate:
        del reasons[0x400]
    any_reason = sum(reasons)
    names = list(file.lengths or {})
    index: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    with _open_bam(file.path) as bam:
        for read in bam.fetch(until_eof=True):
            flag = read.flag
            if flag & any_reason:
                left_out[next(reason for bit, reason in reasons.items() if flag & bit)] += 1
            elif flag & _PAIRED and not flag & _PROPER:
                left_out["no_proper_pair"] += 1
            elif read.mapping_quality < min_mapq:
                left_out["low_mapq"] += 1
            elif read.reference_end is None:  # placed, and yet without an alignment
                left_out["no_alignment"] += 1
            else:
                barcode = -1
                if barcodes and read.has_tag("CB"):
                    barcode = index.setdefault(str(read.get_tag("CB")), len(index))
                if flag & _REVERSE:
                    rows.append((read.reference_id, -1, read.reference_end, barcode))
                else:
                    rows.append((read.reference_id, read.reference_start, -1, barcode))
                if len(rows) == _BLOCK_ROWS:
                    yield _bam_block(names, rows, index), bam.tell() >> 16
                    rows = []
        yield _bam_block(names, rows, index), bam.tell() >> 16


def _bam_block(names: list[str], rows: list[tuple[int, int, int, int]], index: dict[str, int]) -> Ends:
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return Ends(names, columns[:, 0], columns[:, 1], columns[:, 2], list(index), columns[:, 3])
