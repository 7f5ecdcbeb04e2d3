"""Peaks and regions: BED, narrowPeak and broadPeak files as numpy columns. All 0-based half-open."""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from genossm.chrom_names import is_primary, mismatch_advice, repair_names
from genossm.compressed import open_bytes
from genossm.errors import DataError
from genossm.interval import merge

_NARROWPEAK_COLUMNS = 10
_HEADER_WORDS = {"track", "browser"}
_BLOCK_ROWS = 100_000


@dataclass(frozen=True, eq=False)
class Annotations:
    """The rows of one annotation file, in file order, without duplicates and zero-length rows.

    Attributes:
        path: where they come from.
        chroms: str (rows,).
        starts, ends: int64 (rows,), base pairs, starts < ends.
        summits: int64 (rows,), absolute bp; the midpoint where the file calls none.
        scores: float64 (rows,), the fifth column, NaN where absent.
        strands: str (rows,), "+", "-" or ".".
        oddities: what was found and how often, only counts above 0: header_lines, blank_lines, duplicates,
            zero_length, before_start (clipped to 0), summit_outside (midpoint taken), and after `fit`
            past_end (clipped), renamed, skipped_unplaced, skipped_unknown.
    """

    path: Path
    chroms: npt.NDArray[np.str_]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    summits: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    strands: npt.NDArray[np.str_]
    oddities: dict[str, int]

    def __len__(self) -> int:
        return len(self.starts)

    def chrom_names(self) -> tuple[str, ...]:
        """The chromosomes that have rows, in order of first appearance."""
        return tuple(str(name) for name in dict.fromkeys(self.chroms.tolist()))

    def on(self, chrom: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The union of the rows of `chrom`: starts and ends, int64, sorted and disjoint, maybe empty."""
        here = self.chroms == chrom
        return merge(self.starts[here], self.ends[here])

    def count(self, chrom: str) -> int:
        """How many rows `chrom` has."""
        return int(np.count_nonzero(self.chroms == chrom))

    def fit(
        self,
        lengths: Mapping[str, int],
        *,
        chrom_names: Literal["exact", "repair"] = "exact",
        unknown: Literal["error", "skip"] = "error",
        beyond: Literal["error", "skip"] = "error",
    ) -> Annotations:
        """The rows as they lie on a genome, oddities counted.

        Rows that run over a chromosome's end are clipped (`past_end`). Rows on unplaced pieces that the
        genome lacks (chrUn_*, *_random, chrM ...) are left out (`skipped_unplaced`).

        Args:
            lengths: chromosome lengths of the genome in bp.
            chrom_names: "repair" renames 1 to chr1, chrMT to chrM and back where that makes a name known.
            unknown: "skip" leaves out rows on any chromosome that the genome lacks (`skipped_unknown`).
            beyond: "skip" leaves out rows wholly past an end (`skipped_past_end`), as a blacklist of the whole
                genome has them for a FASTA with a piece of it.

        Raises:
            DataError: a row lies wholly past an end and `beyond` is "error", or a chromosome is unknown.
        """
        fitted = self._renamed(repair_names(self.chrom_names(), lengths)) if chrom_names == "repair" else self
        fitted = fitted._without_unknown(lengths, unknown)
        limits = np.array([lengths[name] for name in fitted.chroms.tolist()], dtype=np.int64)
        outside = fitted.starts >= limits
        if beyond == "skip" and np.any(outside):
            skipped = int(np.count_nonzero(outside))
            fitted, limits = fitted._rows(~outside, skipped_past_end=skipped), limits[~outside]
        elif np.any(outside):
            row = int(np.argmax(outside))
            more = f" and {int(outside.sum()) - 1} more rows" if outside.sum() > 1 else ""
            lie = "lie" if more else "lies"
            raise DataError(
                f"{self.path}: {fitted._name_row(row)}{more} {lie} wholly past the end of "
                f"{fitted.chroms[row]}, which has {limits[row]:,} bp: the file probably belongs to another "
                "assembly; give one made for this genome"
            )
        past_end = int(np.count_nonzero(fitted.ends > limits))
        ends = np.minimum(fitted.ends, limits)
        return replace(
            fitted,
            ends=ends,
            summits=np.minimum(fitted.summits, ends - 1),
            oddities=_counted(fitted.oddities, past_end=past_end),
        )

    def to_pyranges(self) -> Any:
        """The rows as a pyranges.PyRanges with Chromosome, Start, End, Strand, Score and Summit."""
        import pyranges

        columns = {"Chromosome": self.chroms, "Start": self.starts, "End": self.ends}
        columns |= {"Strand": self.strands, "Score": self.scores, "Summit": self.summits}
        return pyranges.PyRanges(pd.DataFrame(columns))

    @classmethod
    def from_pyranges(cls, ranges: Any, path: str | os.PathLike[str] = "pyranges") -> Annotations:
        """Rows of a pyranges.PyRanges; Strand, Score and Summit are used where they are there.

        Args:
            ranges: the rows.
            path: what error messages call them.

        Raises:
            DataError: a row ends before it starts.
        """
        frame = ranges.df
        rows = len(frame)
        table = pd.DataFrame(
            {
                "chrom": frame["Chromosome"].astype(str) if rows else [],
                "start": frame["Start"].to_numpy(np.int64) if rows else [],
                "end": frame["End"].to_numpy(np.int64) if rows else [],
                "score": pd.to_numeric(frame["Score"], errors="coerce") if "Score" in frame else np.nan,
                "strand": frame["Strand"].astype(str) if "Strand" in frame else ".",
            }
        )
        if "Summit" in frame:
            table["offset"] = frame["Summit"].to_numpy(np.int64) - frame["Start"].to_numpy(np.int64)
        return _from_table(Path(path), table, {})

    def _renamed(self, names: Mapping[str, str]) -> Annotations:
        if not names:
            return self
        renamed = int(sum(self.count(name) for name in names))
        chroms = np.array([names.get(name, name) for name in self.chroms.tolist()], dtype=np.str_)
        return replace(self, chroms=chroms, oddities=_counted(self.oddities, renamed=renamed))

    def _without_unknown(self, lengths: Mapping[str, int], unknown: str) -> Annotations:
        absent = [name for name in self.chrom_names() if name not in lengths]
        offenders = [name for name in absent if is_primary(name)]
        if offenders and unknown == "error":
            listed = ", ".join(f"{name} ({self.count(name):,} rows)" for name in offenders[:5])
            listed += f" and {len(offenders) - 5} more" if len(offenders) > 5 else ""
            raise DataError(
                f"{self.path} names chromosomes that the genome lacks: {listed}; the genome has "
                f"{_first(lengths)}; {mismatch_advice(offenders, self.chrom_names(), lengths)}"
            )
        if not absent:
            return self
        kept = ~np.isin(self.chroms, absent)
        skipped_unknown = sum(self.count(name) for name in offenders)
        skipped_unplaced = int(np.count_nonzero(~kept)) - skipped_unknown
        return self._rows(kept, skipped_unplaced=skipped_unplaced, skipped_unknown=skipped_unknown)

    def _rows(self, kept: npt.NDArray[np.bool_], **left_out: int) -> Annotations:
        """The rows `kept`, with how many were left out, and why."""
        return replace(
            self,
            chroms=self.chroms[kept],
            starts=self.starts[kept],
            ends=self.ends[kept],
            summits=self.summits[kept],
            scores=self.scores[kept],
            strands=self.strands[kept],
            oddities=_counted(self.oddities, **left_out),
        )

    def _name_row(self, row: int) -> str:
        return f"{self.chroms[row]}:{self.starts[row]}-{self.ends[row]}"


def read_annotations(path: str | os.PathLike[str]) -> Annotations:
    """Read BED (3 columns or more), narrowPeak or broadPeak; plain, gzip or bgzip.

    Columns are split at tabs, in lines without a tab at spaces. Lines that are blank, begin with "#", "track"
    or "browser", and a first line of column names are counted and passed over; so are rows that stand there
    twice, alike in every column, and zero-length rows. Column 10 is the summit offset (-1 = none) where the
    file is called narrowPeak, or has ten columns of which the last holds whole numbers. A file without rows
    gives zero rows; whether that is an error is the caller's to say.

    Raises:
        FileError: the file is missing or cut off.
        DataError: a row has fewer than three columns, a coordinate that is no whole number, or ends before it
            starts; the message names file, line and value.
    """
    path = Path(path)
    with open_bytes(path) as stream:
        content = stream.read()
    if b"\0" in content:
        raise DataError(f"{path} is a binary file: give BED, narrowPeak or broadPeak text, plain or gzip")
    oddities: Counter[str] = Counter()
    blocks = [_columns(path, *block) for block in _row_blocks(path, content, oddities)]
    shared = [name for name in blocks[0] if all(name in block for block in blocks)]
    table = pd.DataFrame({name: np.concatenate([block[name] for block in blocks]) for name in shared})
    return _from_table(path, table, oddities)


def _row_blocks(
    path: Path, content: bytes, oddities: Counter[str]
) -> Iterator[tuple[list[list[str]], list[int]]]:
    """Fields and line numbers of the rows, many at a time: a row as a list of texts needs half a kilobyte.

    At least one block comes, be it empty. Header and blank lines are counted in `oddities`.
    """
    rows: list[list[str]] = []
    numbers: list[int] = []
    first = True
    for number, line in enumerate(_lines(content), start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            oddities["blank_lines"] += 1
        elif line.startswith("#") or _is_header(fields) or (first and _is_column_names(fields)):
            oddities["header_lines"] += 1
        elif len(fields) < 3 or not fields[0].strip():
            raise DataError(
                f"{path}, line {number}: {line.strip()[:80]!r} is no BED row: give at least chromosome, "
                "start and end, parted by tabs"
            )
        else:
            first = False
            rows.append(fields)
            numbers.append(number)
            if len(rows) == _BLOCK_ROWS:
                yield rows, numbers
                rows, numbers = [], []
    yield rows, numbers


def _lines(content: bytes) -> Iterator[str]:
    """The lines without their ends, which may be those of any system."""
    try:
        content.decode("utf-8")
        encoding = "utf-8-sig"
    except UnicodeDecodeError:
        encoding = "latin-1"  # names in old files; coordinates are checked all the same
    with io.TextIOWrapper(io.BytesIO(content), encoding=encoding) as text:
        for line in text:
            yield line.rstrip("\n")


def _is_header(fields: list[str]) -> bool:
    return fields[0].split(" ", 1)[0] in _HEADER_WORDS


def _is_column_names(fields: list[str]) -> bool:
    return (
        len(fields) >= 3
        and fields[1].lower().endswith("start")
        and fields[2].lower().endswith(("end", "stop"))
    )


def _columns(path: Path, rows: list[list[str]], numbers: list[int]) -> dict[str, npt.NDArray[Any]]:
    """The columns of some rows; "offset" is left out where they call no summits.

    "row" stands for all that a row says: two that agree in it and in their coordinates are alike.
    """
    starts = _whole_numbers(path, rows, numbers, 1, "start")
    ends = _whole_numbers(path, rows, numbers, 2, "end")
    impossible = (ends < starts) | ((starts < 0) & (ends <= 0))
    if impossible.any():
        row = int(np.argmax(impossible))
        raise DataError(
            f"{path}, line {numbers[row]}: the interval {rows[row][0]}:{starts[row]}-{ends[row]} is "
            "impossible: give 0 <= start <= end (0-based, half-open)"
        )
    columns: dict[str, npt.NDArray[Any]] = {
        "chrom": np.array([sys.intern(row[0].strip()) for row in rows], dtype=object),
        "start": starts,
        "end": ends,
        "score": _numbers([_field(row, 4) for row in rows]),
        "strand": np.array([sys.intern(_field(row, 5).strip()) for row in rows], dtype=object),
        "row": np.array([hash(tuple(row)) for row in rows], dtype=np.int64),
    }
    offsets = _summit_offsets(path, rows, numbers)
    return columns if offsets is None else {**columns, "offset": offsets}


def _field(row: list[str], column: int) -> str:
    return row[column] if len(row) > column else ""


def _summit_offsets(path: Path, rows: list[list[str]], numbers: list[int]) -> npt.NDArray[np.int64] | None:
    """Offset of each row's summit from its start, -1 where none is called; None in files of another kind."""
    if not all(len(row) == _NARROWPEAK_COLUMNS for row in rows):
        return None
    try:
        return _whole_numbers(path, rows, numbers, _NARROWPEAK_COLUMNS - 1, "summit")
    except DataError:
        if "narrowpeak" in path.name.lower():
            raise
    return None  # other tables keep other things in column 10


def _whole_numbers(
    path: Path, rows: list[list[str]], numbers: list[int], column: int, what: str
) -> npt.NDArray[np.int64]:
    """One column as int64; "1e+05", which R writes, is whole too."""
    values = _numbers([row[column] for row in rows])
    whole = np.isfinite(values) & (np.abs(values) < 2**53)
    whole[whole] = values[whole] == np.floor(values[whole])
    if not whole.all():
        row = int(np.argmin(whole))
        raise DataError(
            f"{path}, line {numbers[row]}: the {what} {rows[row][column][:40]!r} is no whole number: "
            "give BED, narrowPeak or broadPeak columns"
        )
    return values.astype(np.int64)


def _numbers(texts: list[str]) -> npt.NDArray[np.float64]:
    """Texts as numbers, NaN where one is none."""
    numbers = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce")
    return np.asarray(numbers, dtype=np.float64)


def _from_table(path: Path, table: pd.DataFrame, oddities: Mapping[str, int]) -> Annotations:
    """Count and mend the oddities of rows (chrom, start, end, score, strand, perhaps offset)."""
    duplicate = table.duplicated().to_numpy()
    table = table[~duplicate]
    zero_length = (table["start"] == table["end"]).to_numpy()
    table = table[~zero_length]
    starts = table["start"].to_numpy(np.int64)
    ends = table["end"].to_numpy(np.int64)
    if np.any(ends < starts):
        row = int(np.argmax(ends < starts))
        raise DataError(
            f"{path}: the interval {starts[row]}-{ends[row]} ends before it starts: give start <= end"
        )
    offsets = table["offset"].to_numpy(np.int64) if "offset" in table else np.full(len(table), -1)
    outside = offsets >= ends - starts
    called = (offsets >= 0) & ~outside
    before_start = int(np.count_nonzero(starts < 0))
    summits = np.where(called, starts + offsets, (np.maximum(starts, 0) + ends) // 2)
    starts = np.maximum(starts, 0)
    strands = table["strand"].to_numpy(dtype=object)
    return Annotations(
        path=path,
        chroms=table["chrom"].to_numpy(dtype=object).astype(np.str_),
        starts=starts,
        ends=ends,
        summits=np.maximum(summits, starts),
        scores=table["score"].to_numpy(np.float64),
        strands=np.where((strands == "+") | (strands == "-"), strands, ".").astype(np.str_),
        oddities=_counted(
            oddities,
            duplicates=int(duplicate.sum()),
            zero_length=int(zero_length.sum()),
            before_start=before_start,
            summit_outside=int(outside.sum()),
        ),
    )


def _counted(oddities: Mapping[str, int], **more: int) -> dict[str, int]:
    counts = dict(oddities)
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count
    return {name: count for name, count in counts.items() if count > 0}


def _first(lengths: Mapping[str, int]) -> str:
    return ", ".join(list(lengths)[:5]) + (" ..." if len(lengths) > 5 else "")
