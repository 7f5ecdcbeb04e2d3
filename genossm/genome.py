"""A genome as one memory map of base codes, built once from a FASTA file and shared by all processes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyfaidx

from genossm.atomic import atomic_path
from genossm.chrom_names import is_primary, name_hint
from genossm.compressed import is_gzip, open_bytes, open_raw
from genossm.errors import DataError, FileError
from genossm.progress import progress, say
from genossm.sequence import NO_BASE, encode

__all__ = ["Genome", "is_primary"]

_flock: ModuleType | None
try:
    import fcntl as _flock
except ImportError:  # Windows: several processes may each build the cache, and the last one stays
    _flock = None

_MAGIC = b"genossm genome 1\n"
_HEADER_BLOCK = 4096
_SLICE_BP = 4_000_000
_LARGE_BP = 50_000_000
_REMAINS_AGE_S = 3600.0


class Genome:
    """The sequence of every chromosome of a FASTA file, as int8 codes (0..3 = ACGT, 4 = no base).

    The FASTA (plain, gzip or bgzip) is read once, through pyfaidx, into one cache file that is then
    memory-mapped. The cache is written to the folder `$GENOSSM_CACHE` where that is set, and nowhere else;
    otherwise beside the FASTA (`genome.fa.genossm`) or, where that folder cannot be written, to
    `~/.cache/genossm`. One that lies beside the FASTA already is used in any case. It is built again when
    size or time of change of the FASTA differ. Of many processes that start together one builds and the
    others wait. Pickled or forked, a Genome costs a file name, not its bases.

    Attributes:
        path: the FASTA file, absolute.
        lengths: bp of each chromosome, in file order.
        sha256: hash of names and codes; the same for plain and compressed files and for any line width or
            case.

    Args:
        path: FASTA file.
        cache_dir: the folder of the cache file, instead of all places above.

    Raises:
        FileError: the file is missing, cut off or damaged, or no cache folder can be written.
        DataError: the file is no FASTA, is empty, has duplicate names, an empty record or a character that is
            no base.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self._cache_dir = None if cache_dir is None else Path(cache_dir).expanduser().absolute()
        header, self._codes = _open_or_build(self.path, self._cache_dir)
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


def _open_or_build(source: Path, cache_dir: Path | None) -> tuple[dict[str, Any], npt.NDArray[np.int8]]:
    with open_raw(source) as raw:
        stamp = _stamp(os.fstat(raw.fileno()))
    places, writable = _cache_paths(source, cache_dir)
    for cache in places:
        if opened := _open_cache(cache, stamp):
            return opened
    for cache in writable:
        if not _can_write(cache.parent):
            continue
        with _one_builder(cache) as alone:
            if opened := _open_cache(cache, stamp):  # another process built it while this one waited
                return opened
            if alone:
                _remove_remains(cache)
            _build(source, stamp, cache)
        if opened := _open_cache(cache, stamp):
            return opened
        raise _changed(source)  # another process read it later, and put its own cache there
    raise FileError(
        f"the cache of the genome {source} cannot be written to "
        f"{' or '.join(str(cache.parent) for cache in writable)}: "
        "set GENOSSM_CACHE to a folder that you may write to"
    )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _changed(source: Path) -> DataError:
    return DataError(
        f"the genome {source} was changed while it was being read: try again when it is complete"
    )


def _cache_paths(source: Path, cache_dir: Path | None) -> tuple[list[Path], list[Path]]:
    """Where the cache file may lie, and where it may be written: the first folder that takes it."""
    resolved = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:12]
    named = f"{source.name}.{resolved}.genossm"
    if cache_dir is not None:
        return [cache_dir / named], [cache_dir / named]
    beside = source.with_name(f"{source.name}.genossm")
    if chosen := os.environ.get("GENOSSM_CACHE"):
        elsewhere = Path(os.path.expanduser(chosen)).absolute() / named
        return [elsewhere, beside], [elsewhere]
    home = os.path.expanduser("~")
    # Some containers run a user without a home, whose ~ stays as it is.
    places = [beside] if home == "~" else [beside, Path(home, ".cache", "genossm", named)]
    return places, places


def _open_cache(cache: Path, stamp: tuple[int, int]) -> tuple[dict[str, Any], npt.NDArray[np.int8]] | None:
    """Header and codes of a complete cache file that was made from the FASTA as it is now, else None."""
    try:
        stream = cache.open("rb")
    except OSError:
        return None
    with stream:
        header = _read_header(stream)
        if header is None or (header["size"], header["mtime_ns"]) != stamp:
            return None
        total = sum(header["lengths"])
        if os.fstat(stream.fileno()).st_size != header["offset"] + total:
            return None
        mapped = np.memmap(stream, dtype=np.int8, mode="r", offset=header["offset"], shape=(total,))
    return header, np.asarray(mapped)


def _read_header(stream: IO[bytes]) -> dict[str, Any] | None:
    if stream.read(len(_MAGIC)) != _MAGIC:
        return None
    size = stream.read(17)
    if len(size) != 17 or not size.strip().isdigit():
        return None
    text = stream.read(int(size) - len(_MAGIC) - 17)
    try:
        header = json.loads(text)
    except ValueError:
        return None
    header["offset"] = int(size)
    return dict(header)


def _write_header(stream: IO[bytes], header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    size = -(-(len(_MAGIC) + 17 + len(text)) // _HEADER_BLOCK) * _HEADER_BLOCK
    stream.seek(0)
    stream.write((_MAGIC + f"{size:016d}\n".encode() + text).ljust(size))


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def _one_builder(cache: Path) -> Iterator[bool]:
    """Wait until no other process builds `cache`; yields whether the lock works on this file system.

    Without a working lock several processes may build at once: each writes its own temporary file and the
    last rename stays, so that the result is right and only time is lost.
    """
    path = cache.with_name(f".{cache.name}.lock")
    descriptor = _lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _remove_lock(path)
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    if _flock is None:
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            _flock.flock(descriptor, _flock.LOCK_EX)
            if _is_same_file(descriptor, path):  # else the last holder removed it meanwhile: lock the new one
                return descriptor
        except OSError:
            os.close(descriptor)
            _remove_lock(path)
            return None
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_lock(path: Path) -> None:
    with suppress(OSError):  # an empty file that stays behind does no harm: the next builder locks it
        path.unlink()


def _remove_remains(cache: Path) -> None:
    """Remove what killed builders left behind; called by the one builder that holds the lock.

    Only old remains: where a lock does not reach from one computer to another, a second builder may be at
    work.
    """
    for remains in cache.parent.glob(f".{cache.name}.*.tmp"):
        with suppress(FileNotFoundError):  # that builder may finish, and rename it, at this moment
            if time.time() - remains.stat().st_mtime > _REMAINS_AGE_S:
                shutil.rmtree(remains) if remains.is_dir() else remains.unlink()


def _build(source: Path, stamp: tuple[int, int], cache: Path) -> None:
    with atomic_path(cache) as temporary:
        scratch = tempfile.mkdtemp(prefix=f".{cache.name}.", suffix=".tmp", dir=cache.parent)
        try:
            plain = _plain_copy(source, Path(scratch))
            faidx = _index(source, plain, Path(scratch) / "index.fai")
            try:
                _write_cache(source, stamp, faidx, temporary)
            finally:
                faidx.close()
            if _stamp(source.stat()) != stamp:
                raise _changed(source)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


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
    empty = [name for name, record in faidx.index.items() if record.rlen == 0]
    if empty or not faidx.index:
        faidx.close()
        raise DataError(
            f"the genome {source} has no bases in the record {empty[0]!r}: remove it or get the whole file"
        )
    return faidx


def _write_cache(source: Path, stamp: tuple[int, int], faidx: Any, temporary: Path) -> None:
    lengths = {name: int(record.rlen) for name, record in faidx.index.items()}
    header = {
        "source": source.name,
        "size": stamp[0],
        "mtime_ns": stamp[1],
        "names": list(lengths),
        "lengths": list(lengths.values()),
        "sha256": "0" * 64,
    }
    total = sum(lengths.values())
    digest = hashlib.sha256()
    if total > _LARGE_BP:
        say(f"reading {source.name} ({total / 1e6:,.0f} Mbp) into a cache file in {temporary.parent}, once")
    with temporary.open("wb") as stream, ExitStack() as stack:
        bar = stack.enter_context(progress(total=total, unit="bp", scale=True)) if total > _LARGE_BP else None
        _write_header(stream, header)
        for name, length in lengths.items():
            digest.update(f">{name} {length}\n".encode())
            for start in range(0, length, _SLICE_BP):
                codes = _encode_slice(source, faidx, name, start, min(start + _SLICE_BP, length))
                digest.update(codes.data)
                stream.write(codes.data)
                if bar is not None:
                    bar.update(codes.size)
        header["sha256"] = digest.hexdigest()
        _write_header(stream, header)
        stream.flush()
        os.fsync(stream.fileno())


def _encode_slice(source: Path, faidx: Any, name: str, start: int, end: int) -> npt.NDArray[np.int8]:
    letters = faidx.fetch(name, start + 1, end)
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
