"""Pieces of files straight into arrays: right bytes, by threads and forks at once, and faults that are told."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genossm import file_reader
from genossm.code_reader import CodeReader
from genossm.errors import DataError, FileError
from genossm.file_reader import FileReader, mapped_part
from genossm.genome import Genome


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the int32 0 .. 99,999."""
    path = tmp_path_factory.mktemp("numbers") / "numbers"
    np.arange(100_000, dtype=np.int32).tofile(path)
    return path


def test_pieces_are_read_where_they_are(numbers: Path) -> None:
    out = np.zeros((10, 20), dtype=np.int32)
    FileReader(numbers).fill(out[2:5], 4 * 777)
    np.testing.assert_array_equal(out[2:5].ravel(), np.arange(777, 837))
    assert not out[:2].any() and not out[5:].any()
    FileReader(numbers).fill(out[:0], 0)


def test_a_read_that_gives_less_is_gone_on_with(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = file_reader._read_into

    def short(descriptor: int, buffer: Any, offset: int) -> int:
        return original(descriptor, memoryview(buffer).cast("B")[:333], offset)

    monkeypatch.setattr(file_reader, "_read_into", short)
    out = np.empty(1000, dtype=np.int32)
    FileReader(numbers).fill(out, 4 * 50)
    np.testing.assert_array_equal(out, np.arange(50, 1050))


def test_threads_share_one_reader(numbers: Path) -> None:
    reader = FileReader(numbers)

    def right(start: int) -> bool:
        out = np.empty(500, dtype=np.int32)
        reader.fill(out, 4 * start)
        return bool((out == np.arange(start, start + 500)).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, np.random.default_rng(1).integers(0, 99_000, 400).tolist()))


def test_what_cannot_be_read_is_told(numbers: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*absent: No such file"):
        FileReader(tmp_path / "absent")
    with pytest.raises(FileError, match="ends too early, at byte 400000: it was cut off or replaced"):
        FileReader(numbers).fill(np.empty(10, dtype=np.int32), 4 * 99_995)
    with pytest.raises(FileError, match="cannot read"):
        FileReader(tmp_path).fill(np.empty(10, dtype=np.int32), 0)


def test_the_place_of_a_view_in_its_file(numbers: Path) -> None:
    view = np.asarray(np.memmap(numbers, dtype=np.int32, mode="r", offset=4096))[100:200][5:]
    assert mapped_part(view) == (numbers, 4096 + 4 * 105)
    assert mapped_part(np.arange(3)) is None


def test_codes_are_those_of_the_genome_past_its_ends_too(tiny_folder: Path) -> None:
    genome = Genome(tiny_folder / "genome.fa")
    readers = [CodeReader(genome)]
    readers.append(pickle.loads(pickle.dumps(readers[0])))
    random = np.random.default_rng(2)
    for chrom, length in genome.lengths.items():
        for start in (-3000, -5, 0, 480, length - 7, length, length + 9, *random.integers(-2000, length, 30)):
            for reader in readers:
                out = np.full(2000, 9, dtype=np.int8)
                reader.fill(out, chrom, int(start))
                np.testing.assert_array_equal(out, genome.window(chrom, int(start), int(start) + 2000))
    with pytest.raises(DataError, match="chrZ"):
        readers[0].fill(np.empty(4, dtype=np.int8), "chrZ", 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_reader_that_was_used_can_be_forked(tiny_folder: Path) -> None:
    genome = Genome(tiny_folder / "genome.fa")
    reader = CodeReader(genome)

    def reads_right(first: int) -> bool:
        out = np.empty(3000, dtype=np.int8)
        for start in range(first, first + 300):
            reader.fill(out, "chrA", start)
            if not np.array_equal(out, genome.window("chrA", start, start + 3000)):
                return False
        return True

    assert reads_right(0)
    children = []
    for first in (100, 900, 20_000):
        child = os.fork()
        if child == 0:
            os._exit(0 if reads_right(first) else 1)
        children.append(child)
    assert reads_right(5_000)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
