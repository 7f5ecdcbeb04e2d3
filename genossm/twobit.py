"""2bit files (UCSC), read through Biopython: names, lengths, and bases of any range; both byte orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from genossm.compressed import open_raw
from genossm.errors import DataError, FileError

_SIGNATURE = 0x1A412743


def is_twobit(path: Path) -> bool:
    """Whether a file begins as 2bit, whatever its name.

    Raises:
        FileError: the file is missing or may not be read.
    """
    with open_raw(path) as raw:
        start = raw.read(4)
    return any(start == _SIGNATURE.to_bytes(4, order) for order in ("little", "big"))


@contextmanager
def open_twobit(path: Path) -> Iterator[tuple[dict[str, int], Callable[[str, int, int], bytes]]]:
    """The records of a 2bit file: lengths in bp in file order, and fetch(name, start, end) -> letters.

    Letters are ACGTN, in lower case where soft-masked. 2bit knows no other codes: those of the FASTA that it
    was made from are N.

    Raises:
        FileError: the file is cut off or damaged; from fetch too.
        DataError: it has 64-bit offsets (version 1), or a name twice.
    """
    from Bio.SeqIO.TwoBitIO import TwoBitIterator

    with open_raw(path) as raw:
        order: Literal["little", "big"]
        order = "little" if raw.read(4) == _SIGNATURE.to_bytes(4, "little") else "big"
        version, count = (int.from_bytes(raw.read(4), order) for _ in range(2))
        if version != 0:
            raise DataError(
                f"the genome {path} is 2bit of version {version} (64-bit offsets), which cannot be read: give "
                "2bit of version 0 (faToTwoBit without -long) or FASTA"
            )
        raw.seek(0)
        try:
            records = {record.id: record.seq for record in TwoBitIterator(raw)}  # type: ignore[no-untyped-call]
        except (ValueError, RuntimeError, MemoryError) as error:  # MemoryError: a damaged count
            raise _damaged(path, error) from error
        if len(records) != count:
            raise DataError(
                f"the genome {path} has {count} records of {len(records)} names: give each its own name"
            )

        def fetch(name: str, start: int, end: int) -> bytes:
            try:
                return bytes(records[name][start:end])
            except (ValueError, RuntimeError) as error:
                raise _damaged(path, error) from error

        yield {name: len(sequence) for name, sequence in records.items()}, fetch


def _damaged(path: Path, error: BaseException) -> FileError:
    return FileError(f"the genome {path} is 2bit that is cut off or damaged ({error}): get the whole file")
