"""Writing the files of a prediction: killed between files and gone on with, by several processes, piece by piece."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyBigWig
import pytest

from genossm.errors import ConfigError, FileError
from genossm.genome import Genome
from genossm.pipelines import collect as collect_module
from genossm.pipelines import parts as parts_module
from genossm.pipelines import plan as plan_module
from genossm.pipelines import track_files
from genossm.pipelines.collect import writers
from genossm.pipelines.merge import merge
from genossm.pipelines.parts import Parts, PartsGone
from genossm.pipelines.plan import read_plan
from genossm.pipelines.predict import predict
from tests.test_predict import CountingModel, expected, tiny_model

ALL = ["gc.bw", "gc.narrowPeak", "a_count.bw", "predictions.h5", "qc.bed"]
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    dice = np.random.default_rng(8)
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    with path.open("w") as handle:
        for chrom, length_bp in {"chrA": 24_000, "chrB": 9_003, "chrC": 70}.items():
            bases = dice.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
            if chrom == "chrA":
                bases[3_000:5_010] = b"N"
            handle.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    return Genome(path)


@pytest.fixture
def made(genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A folder with all parts and no files."""
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 4)

    def call(name: str, **options: Any) -> Path:
        given = {"hdf5": True, "call_peaks": True, "batch_size": 2, "device": "cpu"} | options
        predict(CountingModel(), genome, tmp_path / name, shard="1/1", **given)
        return tmp_path / name

    return call


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but run.json, which tells the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def times_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".bw", ".h5")}


def counted(monkeypatch: pytest.MonkeyPatch, fail_at: str | None = None) -> list[str]:
    """The bigWigs that are written from now on; the one of this name is not."""
    written: list[str] = []
    write = track_files.write_bigwig

    def watched(path: Path, *arguments: Any) -> None:
        if path.name == fail_at:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *arguments)

    monkeypatch.setattr(track_files, "write_bigwig", watched)
    return written


def test_a_killed_merger_goes_on_with_the_next_file(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = made("whole"), made("out")
    merge(whole)
    with monkeypatch.context() as patched:
        assert counted(patched, fail_at="a_count.bw") == []
        with pytest.raises(KeyboardInterrupt):
            merge(out)
    assert not list(out.glob("*.bw")) and not (out / "run.json").exists()
    kept = times_of(out / ".parts" / "files")
    assert set(kept) == {"gc.bw", "predictions.h5"}
    written = counted(monkeypatch)
    result = merge(out)
    assert written == ["a_count.bw"]
    assert [file.name for file in result.files] == ALL
    assert kept.items() <= times_of(out).items()
    assert files_of(out) == files_of(whole)
    summaries = [json.loads((folder / "run.json").read_text())["summary"] for folder in (out, whole)]
    assert summaries[0] == summaries[1]


def test_killed_while_files_are_moved(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = made("whole"), made("out")
    merge(whole)
    replace, moved = os.replace, []

    def once(source: Path, target: Path) -> None:
        if Path(source).parent.name == "files" and Path(target).parent == out:
            if moved:
                raise KeyboardInterrupt
            moved.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(collect_module.os, "replace", once)
        with pytest.raises(KeyboardInterrupt):
            merge(out)
    assert moved == ["gc.bw"] and (out / "gc.bw").exists()
    assert counted(monkeypatch) == []
    merge(out)
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("how", ["touched", "cut", "gone", "record", "part", "options"])
def test_a_file_that_is_not_of_these_parts_is_written_again(
    made: Made, genome: Genome, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    out, whole = made("out"), made("whole", threshold=0.9 if how == "options" else None)
    merge(whole)
    plan = read_plan(out)
    assert plan is not None
    parts = Parts(out, plan)
    digest = parts.digest()
    for index in (0, 1):
        track_files.made(parts, digest, index)
        assert track_files.recorded(parts, digest, index) is not None
    file = out / ".parts" / "files" / "gc.bw"
    rewritten = {"gc.bw"}
    if how == "touched":
        os.utime(file, ns=(1, 1))
    elif how == "cut":
        os.truncate(file, 100)
    elif how == "gone":
        file.unlink()
    elif how == "record":
        (out / ".parts" / "files" / "000000.json").write_text("{")
    else:
        rewritten = {"gc.bw", "a_count.bw"}
    if how == "part":  # as another device would have made it
        path = parts.path(0)
        stored = parts_module.PartFile(path)
        values = np.stack([stored.read(track, 0, stored.shape[1]) for track in (0, 1)])
        said = dict(stored.said)
        parts_module.write_part(path, values * np.float32(1.01), said)
        assert parts.fault(0) == "" and Parts(out, plan).digest() != digest
    if how == "options":
        predict(
            CountingModel(),
            genome,
            out,
            hdf5=True,
            call_peaks=True,
            threshold=0.9,
            batch_size=2,
            device="cpu",
        )
    else:
        written = counted(monkeypatch)
        merge(out)
        assert set(written) == rewritten
    if how != "part":
        assert files_of(out) == files_of(whole)


def test_several_processes_write_what_one_does(made: Made) -> None:
    one, three, few = made("one"), made("three"), made("few")
    merge(one, jobs=1)
    merge(three, jobs=3)
    assert files_of(three) == files_of(one)
    assert writers(1_000, 161, 8, 1 << 40) == 8 and writers(1_000, 5, 8, 1 << 40) == 5
    assert writers(1_000, 161, 8, 20_000) == 2 and writers(1_000, 161, 8, 0) == 1
    assert writers(1_000, 161, None, 1 << 40) == 1 <= writers(1 << 22, 161, None, 1 << 40) <= 8
    with pytest.raises(ConfigError, match="jobs is 0; it must be at least 1"):
        merge(few, jobs=0)


def test_what_fails_in_a_process_is_told_and_the_rest_kept(made: Made) -> None:
    out = made("out")
    (out / ".parts" / "files" / "a_count.bw").mkdir(parents=True)  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"a_count\.bw"):
        merge(out, jobs=2)
    (out / ".parts" / "files" / "a_count.bw").rmdir()
    merge(out, jobs=2)
    with pytest.raises(PartsGone, match="was merged or discarded by another process"):
        track_files.write_files((out, "0" * 32, 0))


KILLED = """
import sys, time
from genossm.pipelines import track_files
write = track_files.write_bigwig
def slow(path, *arguments):
    write(path, *arguments)
    if path.name == "a_count.bw":
        time.sleep(60)
track_files.write_bigwig = slow
from genossm.pipelines.merge import merge
assert "torch" not in sys.modules
merge({out!r}, jobs=1)
"""


def test_sigkill_between_files(made: Made) -> None:
    whole, out = made("whole"), made("out")
    merge(whole)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED.format(out=str(out))], stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not (out / ".parts/files/a_count.bw").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    kept = times_of(out / ".parts" / "files")
    del kept["a_count.bw"]  # complete, but its record is not there: written again
    merge(out)
    assert kept.items() <= times_of(out).items()
    assert files_of(out) == files_of(whole)


def test_pieces_give_the_values_and_notes_of_the_whole(
    made: Made, genome: Genome, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, cut = made("whole"), made("out"), made("cut", regions=["chrA:2500-6000", "chrB:8000-9003"])
    merge(whole)
    monkeypatch.setattr(parts_module, "PIECE_BINS", 128)
    monkeypatch.setattr(parts_module, "PIECE_VALUES", 1)
    monkeypatch.setattr(parts_module, "CHUNK_BINS", 40)
    merge(out)
    for name in ("qc.bed", "gc.narrowPeak"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    merge(cut)
    assert len((out / "qc.bed").read_text().splitlines()) == 1
    with h5py.File(out / "predictions.h5") as arrays, h5py.File(cut / "predictions.h5") as some:
        for chrom in genome.names:
            truth = expected(genome, chrom).astype(np.float16)
            np.testing.assert_allclose(arrays[chrom]["predictions"][:], truth, rtol=1e-3)
        found = some["chrA"]["predictions"][:]
        assert np.isnan(found[:78]).all() and np.isnan(found[188:]).all() and not np.isnan(found[78:90]).any()
    for folder in (out, whole):
        with pyBigWig.open(str(folder / "a_count.bw")) as bigwig:
            for chrom, length_bp in genome.lengths.items():
                found = bigwig.values(chrom, 0, length_bp, numpy=True)[::32]
                np.testing.assert_allclose(found, expected(genome, chrom)[:, 1], rtol=1e-6)


def test_a_cell_takes_in_a_short_rest(made: Made) -> None:
    plan = read_plan(made("out"))
    assert plan is not None
    parts = Parts(made("out"), plan)  # chrA has 750 bins
    for most, ends in ((310, [310, 750]), (150, [150, 300, 450, 600, 750]), (2000, [750]), (700, [750])):
        assert [high for _, high, _ in parts._cells("chrA", most)] == ends
        lows = [low for low, _, _ in parts._cells("chrA", most)]
        assert lows == [0, *ends[:-1]]


def test_damaged_part_files(tmp_path: Path) -> None:
    from genossm.errors import DataError

    path = tmp_path / "x.safetensors"
    parts_module.write_part(
        path, np.arange(6, dtype=np.float32).reshape(2, 3), {"identity": "i", "spans": "[]"}
    )
    stored = parts_module.PartFile(path)
    assert stored.shape == (2, 3) and stored.said["crc32"] == stored.checksum()
    np.testing.assert_array_equal(stored.read(1, 1, 3), [4, 5])
    content = path.read_bytes()
    for damaged in (b"", content[:5], content[:40], content[:-1], content + b"x", b"\xff" * 60):
        path.write_bytes(damaged)
        with pytest.raises((DataError, FileError)):
            parts_module.PartFile(path)


def test_what_is_wanted_of_a_stretch(made: Made) -> None:
    plan = read_plan(made("out", regions=["chrA:2500-6000", "chrA:6400-6401", "chrA:9000-20000"]))
    assert plan is not None
    whole = plan.selection.wanted("chrA")
    for first in range(0, 750, 13):
        for stop in range(first + 1, 751, 29):
            np.testing.assert_array_equal(
                plan.selection.wanted("chrA", first, stop), whole[first:stop], strict=True
            )


def test_shards_of_several_batch_sizes_are_all_told(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 4)
    for index, batch_size in ((1, 2), (2, 3)):
        predict(CountingModel(), genome, tmp_path, shard=f"{index}/2", batch_size=batch_size, device="cpu")
    merge(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["batch_size"] == [2, 3]


@pytest.mark.parametrize("mode", ["windows", "chromosome"])
def test_bases_are_not_read_through_the_memory_map(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Its pages would count to the process, and grow with the chromosome."""

    def refused(*arguments: object) -> object:
        raise AssertionError("the map was read")

    monkeypatch.setattr(Genome, "window", refused)
    result = predict(tiny_model(), genome, tmp_path / "out", mode=mode, device="cpu")
    assert result.summary["gap_bins"] > 0
