"""A genome as one memory map of base codes, built once from FASTA or 2bit and shared by all processes."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyfaidx

from genossm.cache_file import file_stamp, open_or_build, write_header
from genossm.chrom_names import is_primary, name_hint
from genossm.compressed import is_gzip, open_bytes, open_raw
from genossm.errors import DataError, FileError
from genossm.progress import progress, say
from genossm.sequence import NO_BASE, encode
from genossm.twobit import is_twobit, open_twobit

__all__ = ["Genome", "is_primary"]

Fetch = Callable[[str, int, int], str | bytes]
"""Letters of a record, from start to end, 0-based half-open."""

_SLICE_BP = 4_000_000
_LARGE_BP = 50_000_000


class Genome:
    """The sequence of every chromosome of a FASTA or 2bit file, as int8 codes (0..3 = ACGT, 4 = no base).

    FASTA (plain, gzip or bgzip), through pyfaidx, or 2bit, through Biopython, told by content, is read once
    into one cache file that is then memory-mapped. The cache is written to the folder `$GENOSSM_CACHE` where
    that is set, and nowhere else; otherwise beside the genome (`genome.fa.genossm`) or, where that folder
    cannot be written, to `~/.cache/genossm`. One that lies beside the genome already is used in any case. It
    is built again when size or time of change of the genome differ. Of many processes that start together one
    builds and the others wait. Pickled or forked, a Genome costs a file name, not its bases. Soft masks count
    for nothing.

    Attributes:
        path: the FASTA or 2bit file, absolute.
        lengths: bp of each chromosome, in file order.
        sha256: hash of names and codes; the same for FASTA, compressed FASTA and 2bit, and for any line width
            or case.

    Args:
        path: FASTA or 2bit file.
        cache_dir: the folder of the cache file, instead of all places above.

    Raises:
        FileError: the file is missing, cut off or damaged, or no cache folder can be written.
        DataError: the file is neither, is empty, has duplicate names, an empty record or a character that is
            no base.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self._cache_dir = None if cache_dir is None else Path(cache_dir).expanduser().absolute()
        header, self._codes = open_or_build(
            self.path,
            "genossm",
            lambda: file_stamp(self.path),
            lambda temporary, scratch: _build(self.path, temporary, scratch),
            self._cache_dir,
        )
        self.lengths: dict[str, int] = dict(zip(header["names"], header["lengths"], strict=True))
        self.sha256: str = header["sha256"]
        starts = itertools.accumulate(header["lengths"][:-1], initial=0)
        self._offsets = dict(zip(header["names"], starts, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Chromosome names in file order."""
        return tuple(self.lengths)

    def window(self, chrom: str, start: int, end: int) -> npt.NDArray[np.int8]:
        """Codes of bases [start, end) of `chrom`, int8 (end - start,); bases past either end are 4 (no base).

        A new array each time: change it freely.

        Raises:
            DataError: the chromosome is unknown or the window ends before it starts.
        """
        length, offset = self._place(chrom)
        if end < start:
            raise DataError(
                f"the window {chrom}:{start}-{end} ends before it starts: give start <= end (0-based)"
            )
        codes = np.full(end - start, NO_BASE, dtype=np.int8)
        low, high = max(start, 0), min(end, length)
        if low < high:
            codes[low - start : high - start] = self._codes[offset + low : offset + high]
        return codes

    def chromosome(self, chrom: str) -> npt.NDArray[np.int8]:
        """All codes of `chrom`, int8 (length,): a read-only view of the memory map, nothing is copied.

        Raises:
            DataError: the chromosome is unknown.
        """
        length, offset = self._place(chrom)
        return self._codes[offset : offset + length]

    def __contains__(self, chrom: object) -> bool:
        return chrom in self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Genome({str(self.path)!r}: {len(self)} chromosomes, {sum(self.lengths.values()):,} bp)"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "cache_dir": self._cache_dir, "sha256": self.sha256}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Genome.__init__(self, state["path"], cache_dir=state["cache_dir"])
        if self.sha256 != state["sha256"]:
            raise DataError(
                f"the genome {self.path} was changed while it was in use: start the program again"
            )

    def _place(self, chrom: str) -> tuple[int, int]:
        try:
            return self.lengths[chrom], self._offsets[chrom]
        except KeyError:
            raise DataError(
                f"the genome {self.path} has no chromosome {chrom!r}; {name_hint(chrom, self.lengths)}"
            ) from None


def _build(source: Path, temporary: Path, scratch: Path) -> None:
    """Write the cache of a FASTA or 2bit file."""
    stamp = file_stamp(source)
    if is_twobit(source):
        with open_twobit(source) as (lengths, fetch):
            _write_cache(source, stamp, lengths, fetch, temporary)
        return
    faidx = _index(source, _plain_copy(source, scratch), scratch / "index.fai")

    def letters(name: str, start: int, end: int) -> str:
        return str(faidx.fetch(name, start + 1, end))

    try:
        lengths = {name: int(record.rlen) for name, record in faidx.index.items()}
        _write_cache(source, stamp, lengths, letters, temporary)
    finally:
        faidx.close()


def _plain_copy(source: Path, scratch: Path) -> Path:
    """An uncompressed FASTA under a name that pyfaidx takes for one.

    A compressed file is unpacked for the time of the build: one pass in C is several times faster than
    pyfaidx's own bgzip reading, checks the whole file, and takes gzip as well as bgzip.
    """
    plain = scratch / "genome.fa"
    with open_raw(source) as raw:
        compressed = is_gzip(raw)
    if not compressed:
        plain.symlink_to(source)
        return plain
    with open_bytes(source) as stream, plain.open("wb") as unpacked:
        shutil.copyfileobj(stream, unpacked, 1 << 20)
    return plain


def _index(source: Path, plain: Path, index: Path) -> Any:
    # Made in two steps, so that its file can be closed when it is refused.
    faidx = pyfaidx.Faidx.__new__(pyfaidx.Faidx)
    try:
        faidx.__init__(str(plain), indexname=str(index), as_raw=True)
    except (pyfaidx.FastaIndexingError, ValueError, RuntimeError) as error:
        faidx.file.close()
        if plain.stat().st_size == 0:
            raise DataError(
                f"the genome {source} is empty: give a FASTA file with at least one record"
            ) from error
        reason = " ".join(str(error).replace(str(plain), "it").split())
        raise DataError(
            f"the genome {source} is no FASTA file that can be read ({reason.rstrip('.!')}): give '>name' "
            "lines, each name once, and within a record lines of one length"
        ) from error
    return faidx


def _write_cache(
    source: Path, stamp: list[Any], lengths: dict[str, int], fetch: Fetch, temporary: Path
) -> None:
    if not lengths:
        raise DataError(f"the genome {source} has no records: give one with at least one chromosome")
    for name, length in lengths.items():
        if not length:
            raise DataError(
                f"the genome {source} has no bases in the record {name!r}: remove it or get the whole file"
            )
    total = sum(lengths.values())
    header = {
        "source": source.name,
        "stamp": stamp,
        "dtype": "int8",
        "items": total,
        "names": list(lengths),
        "lengths": list(lengths.values()),
        "sha256": "0" * 64,
    }
    digest = hashlib.sha256()
    if total > _LARGE_BP:
        say(f"reading {source.name} ({total / 1e6:,.0f} Mbp) into a cache file in {temporary.parent}, once")
    with temporary.open("wb") as stream, ExitStack() as stack:
        bar = stack.enter_context(progress(total=total, unit="bp", scale=True)) if total > _LARGE_BP else None
        write_header(stream, header)
        for name, length in lengths.items():
            digest.update(f">{name} {length}\n".encode())
            for start in range(0, length, _SLICE_BP):
                codes = _encode_slice(source, fetch, name, start, min(start + _SLICE_BP, length))
                digest.update(codes.data)
                stream.write(codes.data)
                if bar is not None:
                    bar.update(codes.size)
        header["sha256"] = digest.hexdigest()
        write_header(stream, header)
        stream.flush()
        os.fsync(stream.fileno())


def _encode_slice(source: Path, fetch: Fetch, name: str, start: int, end: int) -> npt.NDArray[np.int8]:
    letters = fetch(name, start, end)
    if len(letters) != end - start:
        raise FileError(
            f"the genome {source} ends too early, in {name!r} near base {start + len(letters):,}: get the "
            "whole file"
        )
    try:
        return encode(letters)
    except DataError as error:
        raise DataError(
            f"the genome {source}, record {name!r}, from base {start:,} (0-based): {error}"
        ) from error
