"""Cut sites: how often the enzyme of ATAC or DNase cut at each base, counted from fragments, bedpe or BAM.

A fragment [start, end), 0-based half-open, was cut at both its ends. `shift: [a, b]` says which bases count:
start + a at its left end; at its right end, as in Python's indices, end + b where b is below 0 (-1 is the last
base), else end - 1 + b (0 is the last base, too, and 1 the base behind it).

[4, -5]  start + 4, end - 5: the middle of the nine bases that Tn5 doubles (the default, for ATAC); tools that shift
         the outermost base itself call this +4/-4
[0, 0]   start, end - 1: the outermost bases (DNase)
[0, 1]   start, end: of fragments that were shifted by +4/-5 before (10x, chromap, sinto) the same as [4, -5]
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from genossm.cache_file import file_stamp, open_or_build, write_header
from genossm.chrom_names import name_hint
from genossm.compressed import open_bytes, open_raw
from genossm.errors import DataError
from genossm.external_sort import ExternalSort
from genossm.fragments import Ends, open_fragments, read_ends
from genossm.interval import bin_count
from genossm.progress import progress, say

SHIFTED_BEFORE = (0, 1)
"""The shift for fragments that were shifted by +4/-5 when they were written."""

_SLICE_BP = 2_000_000
_LARGE_BYTES = 100_000_000
_LARGEST_SHIFT = 1000


@dataclass(frozen=True, slots=True)
class CutOptions:
    """How cut sites are counted; the cache of a file is kept for each of them.

    `shift` is told above. `min_mapq` is the least mapping quality of a read of a BAM. `deduplicate` leaves
    out reads that a BAM marks as duplicates, and counts a row of fragments.tsv once, whatever the number of
    duplicates in its fifth column; False counts both. Rows of bedpe each count once: nothing marks duplicates
    there. `barcodes` is a table with the columns barcode and group: the cells of each group count apart.
    """

    shift: tuple[int, ...] = (4, -5)
    min_mapq: int = 30
    deduplicate: bool = True
    barcodes: str | None = None

    def __post_init__(self) -> None:
        if len(self.shift) != 2 or max(map(abs, self.shift)) > _LARGEST_SHIFT:
            raise ValueError(
                f"shift is {list(self.shift)}: give two whole numbers of at most {_LARGEST_SHIFT} bp, such as [4, -5] "
                "for ATAC and [0, 0] for DNase"
            )
        if not 0 <= self.min_mapq <= 255:
            raise ValueError(f"min_mapq is {self.min_mapq}: it is a mapping quality from 0 to 255")


class CutSites:
    """The cut sites of one file, counted once and kept sorted in a cache file that is memory-mapped.

    The cache (4 bytes a site) lies where that of a genome does, and is made again when the file, or the table of
    barcodes, changed. Making it takes one pass over the file and under 1 GB of memory. Of many processes that
    start together one makes it. Pickled, a CutSites costs a file name.

    Attributes:
        path: the file, absolute.
        lengths: of the chromosomes of a BAM's header their bp; of a table's those that have rows, with the
            position behind the last start of a row: their bp are at least that.
        knows_lengths: whether `lengths` are the chromosomes' own (BAM).
        rows: how many fragments or reads counted, of all groups; `unit` says which.
        left_out: what did not count, and why.
        shifted_before: whether the file is of a kind (fragments with barcodes) that is written shifted as a rule.

    Args:
        path: fragments.tsv, bedpe, BED of reads (all may be gzip) or BAM.
        options: how to count.
        group: the group of cells to count; needed where there are barcodes.
        cache_dir: the folder of the cache file.

    Raises:
        FileError: a file is missing, cut off or damaged, or BAM and pysam is not there.
        DataError: a row is malformed, the group is unknown, or no barcode of the table is in the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: CutOptions = CutOptions(),
        *,
        group: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self.options = options
        self.group = group
        self._cache_dir = None if cache_dir is None else Path(cache_dir).expanduser().absolute()
        self._header, self._sites = open_or_build(
            self.path, _tag(options), self._stamp, self._build, self._cache_dir
        )
        self.lengths: dict[str, int] = dict(self._header["lengths"])
        self.knows_lengths: bool = self._header["knows_lengths"]
        self.rows: int = self._header["rows"]
        self.unit: str = self._header["unit"]
        self.left_out: dict[str, int] = self._header["left_out"]
        self.shifted_before: bool = self._header["shifted_before"]
        self._places = self._places_of_group()

    def positions(self, chrom: str) -> npt.NDArray[np.uint32]:
        """The cut sites of `chrom`, uint32 (sites,), sorted; a base that was cut n times stands there n times.

        Raises:
            DataError: the file has no such chromosome.
        """
        self._check(chrom)
        start, end = self._places.get(chrom, (0, 0))
        return self._sites[start:end]

    def values(self, chrom: str, start: int, end: int, missing: float = 0.0) -> npt.NDArray[np.float32]:
        """How often each base of [start, end) was cut, float32 (end - start,); no base is `missing` a count.

        Raises:
            DataError: the file has no such chromosome, or the range ends before it starts.
        """
        if end < start:
            raise DataError(
                f"the range {chrom}:{start}-{end} ends before it starts: give start <= end (0-based)"
            )
        return _counts(self.positions(chrom), start, end, 1).astype(np.float32)

    def binned(
        self,
        chrom: str,
        length_bp: int,
        bin_bp: int,
        aggregate: Literal["mean", "sum", "max"] = "mean",
        missing: Literal["zero", "mask"] = "zero",
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """One value per bin of a whole chromosome, and that all of them are valid; as `Signal.binned`.

        Sites behind `length_bp` count nowhere.

        Raises:
            DataError: the file has no such chromosome, or an unknown `aggregate`.
        """
        if aggregate not in ("mean", "sum", "max"):
            raise DataError(f"cannot bin with aggregate {aggregate!r}: allowed are mean, sum and max")
        positions = self.positions(chrom)
        values = np.zeros(bin_count(length_bp, bin_bp), dtype=np.float32)
        slice_bp = max(1, _SLICE_BP // bin_bp) * bin_bp
        for start in range(0, length_bp, slice_bp):
            end = min(start + slice_bp, length_bp)
            here = slice(start // bin_bp, bin_count(end, bin_bp))
            if aggregate == "max":
                bases = _counts(positions, start, end, 1)
                values[here] = np.maximum.reduceat(bases, np.arange(0, bases.size, bin_bp))
            else:
                values[here] = _counts(positions, start, end, bin_bp)
        if aggregate == "mean":
            values[-1:] /= length_bp % bin_bp or bin_bp
            values[:-1] /= bin_bp
        return values, np.ones(values.size, dtype=np.bool_)

    def __repr__(self) -> str:
        group = "" if self.group is None else f", group {self.group}"
        return f"CutSites({str(self.path)!r}{group}: {len(self.lengths)} chromosomes)"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "options": self.options,
            "group": self.group,
            "cache_dir": self._cache_dir,
            "stamp": self._header["stamp"],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        CutSites.__init__(
            self, state["path"], state["options"], group=state["group"], cache_dir=state["cache_dir"]
        )
        if self._header["stamp"] != state["stamp"]:
            raise DataError(f"{self.path} was changed while it was in use: start the program again")

    def _check(self, chrom: str) -> None:
        if chrom not in self.lengths:
            raise DataError(f"{self.path} has no chromosome {chrom!r}; {name_hint(chrom, self.lengths)}")

    def _stamp(self) -> list[Any]:
        stamp = file_stamp(self.path)
        if self.options.barcodes is not None:
            with open_raw(Path(self.options.barcodes)) as raw:
                stamp.append(hashlib.file_digest(raw, "sha256").hexdigest())  # type: ignore[arg-type]
        return stamp

    def _build(self, temporary: Path, scratch: Path) -> None:
        _build(self.path, self.options, self._stamp(), temporary, scratch)

    def _places_of_group(self) -> dict[str, tuple[int, int]]:
        """Where the sites of each chromosome that has some begin and end in the array."""
        groups: list[str] = self._header["groups"]
        if self.options.barcodes is None:
            wanted = 0
        elif self.group in groups:
            wanted = groups.index(self.group)
        else:
            raise DataError(
                f"{self.options.barcodes} has no group {self.group!r}; {name_hint(str(self.group), groups)}"
            )
        names = list(self.lengths)
        places: dict[str, tuple[int, int]] = {}
        start = 0
        for key, count in self._header["counts"]:
            if key % len(groups) == wanted:
                places[names[key // len(groups)]] = (start, start + count)
            start += count
        return places


def read_groups(path: str | os.PathLike[str]) -> dict[str, str]:
    """barcode -> group of a table with a header that names these columns, parted by tabs or commas.

    Raises:
        FileError: the file is missing or cut off.
        DataError: a column is missing, a barcode is in two groups, or there are no rows.
    """
    with open_bytes(path) as stream:
        text = stream.read().decode("utf-8-sig", "replace")
    first = text.split("\n", 1)[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in first else ",")
    if not {"barcode", "group"} <= set(rows.fieldnames or ()):
        raise DataError(
            f"{path} has the columns {', '.join(rows.fieldnames or ()) or 'of an empty file'}: its first line "
            "must name barcode and group"
        )
    groups: dict[str, str] = {}
    for row in rows:
        barcode, group = (row["barcode"] or "").strip(), (row["group"] or "").strip()
        if not barcode or not group:
            raise DataError(f"{path}, line {rows.line_num}: a barcode and a group are needed")
        if groups.setdefault(barcode, group) != group:
            raise DataError(
                f"{path}, line {rows.line_num}: the barcode {barcode} is in the groups {groups[barcode]} and "
                f"{group}: a cell is in one"
            )
    if not groups:
        raise DataError(f"{path} has no barcodes: give a row for each cell, with barcode and group")
    return groups


def _tag(options: CutOptions) -> str:
    described = asdict(options)
    if options.barcodes is not None:
        described["barcodes"] = os.path.realpath(options.barcodes)
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]
    return f"{key}.cuts.genossm"


def _counts(positions: npt.NDArray[np.uint32], start: int, end: int, bin_bp: int) -> npt.NDArray[np.int64]:
    """Sites per bin of [start, end); only the last bin may be shorter."""
    bins = bin_count(end - start, bin_bp)
    low, high = np.searchsorted(positions, (max(start, 0), max(end, 0)))
    inside = positions[low:high].astype(np.int64) - start
    return np.bincount(inside // bin_bp, minlength=bins)


def _build(path: Path, options: CutOptions, stamp: list[Any], temporary: Path, scratch: Path) -> None:
    """Write the cache: the sites of each chromosome and group, sorted."""
    file = open_fragments(path)
    cells = None if options.barcodes is None else read_groups(options.barcodes)
    if cells is not None and not file.has_barcodes:
        raise DataError(
            f"{path} has no barcodes (column {7 if file.layout == 'pairs' else 4}), so {options.barcodes} cannot "
            "part its cells: give a fragments file with barcodes, or remove `barcodes` and `group`"
        )
    groups = ["all"] if cells is None else list(dict.fromkeys(cells.values()))
    index = _Index(groups, cells)
    left_out: Counter[str] = Counter()
    lengths = dict(file.lengths or {})
    rows = 0
    size = path.stat().st_size
    with ExternalSort(scratch) as sites, ExitStack() as stack:
        bar = None
        if size > _LARGE_BYTES:
            say(f"counting the cut sites of {path.name} into a cache file in {temporary.parent}, once")
            bar = stack.enter_context(progress(total=size, unit="B", description=path.name, scale=True))
        for ends, position in read_ends(
            file,
            barcodes=cells is not None,
            min_mapq=options.min_mapq,
            deduplicate=options.deduplicate,
            left_out=left_out,
        ):
            keys, kept = index.keys(ends)
            left_out["other_barcodes"] += int(np.count_nonzero(~kept))
            rows += int(np.count_nonzero(kept))
            if file.lengths is None:
                _extend(lengths, ends)
            _add_sites(sites, ends, keys, kept, options.shift, left_out)
            if bar is not None:
                bar.update(position - bar.n)
        if cells is not None and not index.matched:
            raise DataError(
                f"none of the barcodes of {options.barcodes} (such as {next(iter(cells))}) is in {path} "
                f"({'such as ' + index.other if index.other else 'which has none'}): write them as they are there"
            )
        sites.finish()
        header = {
            "source": path.name,
            "stamp": stamp,
            "dtype": "uint32",
            "items": sites.total,
            "lengths": [[name, lengths[name]] for name in index.chroms],
            "knows_lengths": file.lengths is not None,
            "groups": groups,
            "counts": sorted(sites.upper.items()),
            "rows": rows,
            "unit": "reads" if file.layout in ("bam", "reads") else "fragments",
            "left_out": {reason: count for reason, count in left_out.items() if count},
            "shifted_before": file.layout == "fragments" and file.has_barcodes,
        }
        with temporary.open("wb") as stream:
            write_header(stream, header)
            for block in sites.merged():
                stream.write(block.astype(np.uint32).data)  # the lower half: the position
            stream.flush()
            os.fsync(stream.fileno())


class _Index:
    """Numbers for chromosomes and groups; a key is chromosome * groups + group."""

    def __init__(self, groups: list[str], cells: dict[str, str] | None) -> None:
        self.chroms: dict[str, int] = {}
        self.matched = False
        self.other = ""
        self._groups = len(groups)
        numbers = {group: number for number, group in enumerate(groups)}
        self._cells = None if cells is None else {cell: numbers[group] for cell, group in cells.items()}

    def keys(self, ends: Ends) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The key of each row, and which rows are of a group."""
        numbers = [self.chroms.setdefault(name, len(self.chroms)) for name in ends.chroms]
        keys = np.array(numbers, dtype=np.int64)[ends.chrom] * self._groups
        if self._cells is None:
            return keys, np.ones(keys.size, dtype=np.bool_)
        found = [self._cells.get(barcode, -1) for barcode in ends.barcodes]
        self.matched = self.matched or max(found, default=-1) >= 0
        self.other = self.other or next(iter(ends.barcodes), "")
        group = np.array([*found, -1], dtype=np.int64)[ends.barcode]  # a row without barcode has the index -1
        return keys + group, group >= 0


def _extend(lengths: dict[str, int], ends: Ends) -> None:
    """Take in how far the rows reach: the position behind the last start of one on each chromosome."""
    furthest = np.zeros(len(ends.chroms), dtype=np.int64)
    np.maximum.at(furthest, ends.chrom, np.where(ends.starts >= 0, ends.starts + 1, ends.ends))
    for name, length in zip(ends.chroms, furthest.tolist(), strict=True):
        lengths[name] = max(lengths.get(name, 0), length)


def _add_sites(
    sites: ExternalSort,
    ends: Ends,
    keys: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
    shift: tuple[int, ...],
    left_out: Counter[str],
) -> None:
    """Add the cut sites of the rows `kept`; those below 0 are counted as left out."""
    left, right = shift
    for edges, offset in ((ends.starts, left), (ends.ends, right if right < 0 else right - 1)):
        positions = edges + offset
        cut = kept & (edges >= 0)
        left_out["sites_before_start"] += int(np.count_nonzero(cut & (positions < 0)))
        cut &= positions >= 0
        codes = (keys[cut] << 32 | positions[cut]).astype(np.uint64)
        sites.add(codes if ends.weights is None else np.repeat(codes, ends.weights[cut]))
