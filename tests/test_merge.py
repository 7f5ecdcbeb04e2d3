"""Shards and their merger: the files of one process byte for byte, whatever is killed, doubled or cut off."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyBigWig
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from genossm.errors import ConfigError, DataError
from genossm.genome import Genome
from genossm.pipelines import merge as merge_module
from genossm.pipelines import plan as plan_module
from genossm.pipelines.merge import merge
from genossm.pipelines.parts import Parts, PartsGone, PredictionStopped
from genossm.pipelines.plan import read_plan
from genossm.pipelines.predict import predict
from genossm.pipelines.stop import STOPPED_STATUS
from tests.test_predict import CountingModel, expected, tiny_model

BATCH = 2
TESTS = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    """Two chromosomes and a scaffold, with N in the first."""
    folder = tmp_path_factory.mktemp("genome")
    random_bases = np.random.default_rng(5)
    with (folder / "g.fa").open("w") as handle:
        for chrom, length_bp in {"chrA": 24_000, "chrB": 9_003, "chrC": 70}.items():
            bases = random_bases.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
            if chrom == "chrA":
                bases[3_000:5_010] = b"N"
            handle.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    return Genome(folder / "g.fa")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS)  # for the processes
    monkeypatch.setenv("PYTHONPATH", TESTS)  # for the server that they are forked from
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 4)


Shard = Callable[..., Any]


@pytest.fixture
def shard(genome: Genome, tmp_path: Path) -> Shard:
    def call(name: str, text: str | None, model: Any = None, **options: Any) -> Any:
        options = {"batch_size": BATCH, "device": "cpu", "hdf5": True} | options
        return predict(model or CountingModel(), genome, tmp_path / name, shard=text, **options)

    return call


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but run.json, which tells the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def start(genome: Genome, out: Path, **options: Any) -> Any:
    jobs = import_module("prediction_jobs")
    process = jobs.processes().Process(target=jobs.job, args=(genome.path, out), kwargs=options)
    process.start()
    return process


def test_four_shards_in_four_processes_are_one_process_byte_for_byte(genome: Genome, tmp_path: Path) -> None:
    given = {"windows_per_part": 2, "seconds": None, "hdf5": True, "call_peaks": True, "threshold": 0.5}
    jobs = [start(genome, tmp_path / "out", shard=f"{index}/4", **given) for index in (3, 1, 4, 2)]
    jobs.append(start(genome, tmp_path / "whole", **given))
    for process in jobs:
        process.join(60)
    assert [process.exitcode for process in jobs] == [0] * 5
    assert not list((tmp_path / "out").glob("*.bw"))
    result = merge(tmp_path / "out")
    assert [file.name for file in result.files] == [
        "peaks.bw",
        "peaks.narrowPeak",
        "cuts.bw",
        "predictions.h5",
        "qc.bed",
    ]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    merged, whole = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("out", "whole"))
    for name in ("identity", "summary", "sizes", "precision", "device", "batch_size", "parts", "options"):
        assert merged[name] == whole[name]
    assert [record["shard"] for record in merged["shards"]] == ["1/4", "2/4", "3/4", "4/4"]
    assert merge(tmp_path / "out") == result  # again: nothing to do


@pytest.mark.parametrize("mode", ["windows", "chromosome"])
def test_another_number_of_shards_uses_the_finished_parts(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(plan_module, "SMALLEST_PART_BP", 1)  # a part for each chromosome
    options = {"device": "cpu", "mode": mode, "hdf5": True, "batch_size": BATCH}
    out = tmp_path / "out"
    predict(tiny_model(), genome, out, shard="2/2", **options)
    found = [predict(tiny_model(), genome, out, shard=f"{index}/3", **options).summary for index in (1, 2, 3)]
    assert sum(summary["found"] for summary in found) >= 1
    assert sum(summary["bases"] for summary in found) == sum(genome.lengths.values())
    merge(out)
    predict(tiny_model(), genome, tmp_path / "whole", **options)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_killed_at_twenty_random_moments(genome: Genome, tmp_path: Path) -> None:
    """The run may be killed while it starts, computes, writes a part, or writes the files."""
    out, begun, dice = tmp_path / "out", tmp_path / "out.begun", random.Random(20)
    given: dict[str, Any] = {"windows_per_part": 2, "hdf5": True}
    start(genome, tmp_path / "whole", seconds=0.0, **given).join(60)

    def parts() -> int:
        return len(list(out.glob(".parts/*.safetensors")))

    kills = after_progress = most = 0
    while kills < 20:
        begun.unlink(missing_ok=True)
        before = parts()
        process = start(genome, out, seconds=0.02, **given)
        # Three of four get as far as a part of their own, however busy the machine is; then a moment by chance.
        waits_for_part = kills % 4 != 0
        while process.exitcode is None and (parts() <= before if waits_for_part else not begun.exists()):
            time.sleep(0.002)
        process.join(dice.uniform(0.0, 0.06))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
            after_progress += parts() > before
        process.join(60)
        most = max(most, parts())
        if process.exitcode == 0:
            assert files_of(out) == files_of(tmp_path / "whole")
            shutil.rmtree(out)  # complete before it could be killed: from the beginning
    last = start(genome, out, seconds=0.0, **given)
    last.join(60)
    assert last.exitcode == 0
    assert after_progress >= 10 and most > 3
    assert files_of(out) == files_of(tmp_path / "whole")


def test_two_jobs_on_the_same_shard(genome: Genome, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {"windows_per_part": 2, "seconds": 0.01, "hdf5": True}
    jobs = [start(genome, out, shard=f"{index}/2", **given) for index in (1, 1, 2, 2)]
    jobs.append(start(genome, tmp_path / "whole", **given))
    for process in jobs:
        process.join(60)
    assert [process.exitcode for process in jobs] == [0] * 5
    merge(out)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_two_whole_runs_in_one_folder(genome: Genome, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {"windows_per_part": 2, "seconds": 0.01}
    jobs = [start(genome, out, **given) for _ in range(2)]
    for process in jobs:
        process.join(60)
    assert [process.exitcode for process in jobs] == [0, 0]
    assert merge(out).summary["bins"] == sum(-(-length // 32) for length in genome.lengths.values())


def test_sigterm_finishes_the_part_in_hand(genome: Genome, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {"windows_per_part": 2, "seconds": 0.05}
    process = start(genome, out, **given)
    deadline = time.monotonic() + 60
    while not list(out.glob(".parts/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    before = len(list(out.glob(".parts/*.safetensors")))
    process.terminate()
    time.sleep(0.01)
    process.terminate()  # a batch system may well send it twice
    process.join(60)
    assert process.exitcode == STOPPED_STATUS
    plan = read_plan(out)
    assert plan is not None
    parts = Parts(out, plan)
    there = [index for index in range(len(parts)) if not parts.fault(index)]
    assert before <= len(there) < len(parts) and there == list(range(len(there)))
    assert not list(out.glob(".parts/*.tmp"))
    start(genome, out, **given).join(60)
    start(genome, tmp_path / "whole", **given).join(60)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_sigterm_does_what_it_did_afterwards(shard: Shard) -> None:
    before = signal.getsignal(signal.SIGTERM)

    class Asked(CountingModel):
        def predict(self, tokens: Any) -> Any:
            if self.windows == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().predict(tokens)

    with pytest.raises(PredictionStopped, match=r"1 of \d+ parts are in .*run the same command again"):
        shard("out", None, Asked())
    assert signal.getsignal(signal.SIGTERM) is before


def damaged(parts: Path, how: str) -> str:
    """Damage the third part, and return the words that tell it."""
    path = parts / "000002.safetensors"
    if how == "missing":
        path.unlink()
        return r"part 2 \(000002.safetensors, chrA:5120-7680\) is missing"
    if how == "doubled in place":
        shutil.copy(parts / "000001.safetensors", path)
        return r"part 2 .* is one doubled: it holds what is at chrA from bin 80"
    if how == "another prediction":
        with safe_open(path, framework="numpy") as stored:
            said = stored.metadata()
        save_file(load_file(path), path, said | {"identity": "0" * 32})
        return r"part 2 .* is of another prediction"
    if how == "another shape":
        with safe_open(path, framework="numpy") as stored:
            said = stored.metadata()
        save_file({"values": load_file(path)["values"][:, 1:].copy()}, path, said)
        return r"part 2 .* has values float32 \(2, 79\) and not float32 \(2, 80\)"
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-7])
        return r"part 2 .* is truncated or damaged"
    if how == "empty":
        path.write_bytes(b"")
        return r"part 2 .* is truncated or damaged"
    content[-5] ^= 1
    path.write_bytes(content)
    return r"part 2 .* has a wrong checksum"


FAULTS = (
    "missing",
    "doubled in place",
    "another prediction",
    "another shape",
    "truncated",
    "empty",
    "one bit",
)


@pytest.mark.parametrize("how", FAULTS)
def test_a_part_that_is_not_right_is_named_with_the_command_that_makes_it(
    shard: Shard, genome: Genome, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "out"
    for text in ("1/3", "2/3", "3/3"):
        shard("out", text)
    words = damaged(out / ".parts", how)
    with pytest.raises(DataError, match=words) as told:
        merge(out)
    message = str(told.value)
    command = f"genossm predict RUN --genome {genome.path} --out {out} --mode windows --batch-size 2"
    assert f"Make them with: {command}" in message
    assert "--shard 1/3, then merge again" in message and "--shard 2/3" not in message
    assert not list(out.glob("*.bw"))
    assert shard("out", "1/3").summary["found"] == 3  # of 4: only the wrong one is made again
    merge(out)
    shard("whole", None)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_shard_that_never_ran_is_named(shard: Shard, tmp_path: Path) -> None:
    for text in ("1/4", "3/4"):
        shard("out", text)
    with pytest.raises(DataError, match=r"--shard 2/4; .*--shard 4/4, then merge again") as told:
        merge(tmp_path / "out")
    assert "--shard 1/4" not in str(told.value) and "--shard 3/4" not in str(told.value)


def test_a_part_that_is_there_twice_is_named(shard: Shard, tmp_path: Path) -> None:
    shard("out", "1/1")
    parts = tmp_path / "out" / ".parts"
    shutil.copy(parts / "000001.safetensors", parts / "000001 (copy).safetensors")
    with pytest.raises(DataError, match=r"one doubled: 000001 \(copy\).safetensors. Delete them, then merge"):
        merge(tmp_path / "out")
    (parts / "000001 (copy).safetensors").unlink()
    merge(tmp_path / "out")


def test_bins_are_counted_and_not_believed(
    shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if every part were what its name says: a bin that is in no part, or in two, is told."""
    shard("out", "1/1")
    coverage = Parts.coverage

    def wrong(self: Parts, times: int) -> Any:
        found = coverage(self)
        key = max(found["chrB"])
        found["chrB"][key] = times
        return found

    for times in (0, 2):
        monkeypatch.setattr(Parts, "coverage", lambda self, times=times: wrong(self, times))
        with pytest.raises(DataError, match=rf"of chrB is in {times} parts .* exactly 1"):
            merge(tmp_path / "out")
    monkeypatch.undo()


def test_folders_without_parts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there: predict first"):
        merge(tmp_path / "none")
    with pytest.raises(DataError, match="holds no parts of a prediction"):
        merge(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shards_agree_on_what_is_made(shard: Shard, tmp_path: Path) -> None:
    shard("out", "1/2")
    with pytest.raises(ConfigError, match="give all shards the same options"):
        shard("out", "2/2", hdf5=False)
    with pytest.raises(DataError, match="unfinished prediction of another model"):
        shard("out", "2/2", chroms="chrB")
    shard("out", "2/2")
    assert (merge(tmp_path / "out").folder / "predictions.h5").is_file()


def test_a_job_that_comes_too_late_finds_the_work_done(
    shard: Shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = CountingModel()
    shard("out", "1/2", whole)
    shard("out", "2/2", whole)

    class Late(CountingModel):
        def predict(self, tokens: Any) -> Any:
            if self.windows == 0:
                merge(tmp_path / "out")
            return super().predict(tokens)

    (tmp_path / "out" / ".parts" / "000001.safetensors").rename(tmp_path / "kept")
    with pytest.raises(DataError, match="not complete"):  # the merger sees what the late job has not made yet
        shard("out", "1/2", Late())
    (tmp_path / "kept").rename(tmp_path / "out" / ".parts" / "000001.safetensors")
    (tmp_path / "out" / ".parts" / "000002.safetensors").unlink()

    class Later(CountingModel):
        def predict(self, tokens: Any) -> Any:
            if self.windows == 0:
                shard("out", "1/2", CountingModel())
                merge(tmp_path / "out")
            return super().predict(tokens)

    capsys.readouterr()
    result = shard("out", "1/2", Later())
    assert "another process has completed the prediction" in capsys.readouterr().err
    assert result.summary["bins"] and not (tmp_path / "out" / ".parts").exists()


def test_a_killed_merger_is_started_again(
    shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard("out", "1/1")

    def killed(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("collect", "atomic_write_text", "discard"):
        monkeypatch.setattr(merge_module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "out")
        monkeypatch.undo()
        monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 4)
    merge(tmp_path / "out")
    shard("whole", "1/1")
    merge(tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["windows", "chromosome"])
def test_contigs_share_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """An assembly in 300 pieces is a few files until it is merged, and its bins are where they belong."""
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 64)
    dice = np.random.default_rng(6)
    with (tmp_path / "g.fa").open("w") as handle:
        for number in range(300):
            bases = dice.choice(np.frombuffer(b"ACGTN", "S1"), int(dice.integers(1, 200)))
            handle.write(f">contig{number * 7919 % 300}\n{bases.tobytes().decode()}\n")
    genome, model = Genome(tmp_path / "g.fa"), CountingModel()
    if mode == "chromosome":
        model = tiny_model()  # type: ignore[assignment]
    options = {"device": "cpu", "mode": mode, "hdf5": True, "hdf5_dtype": "float32", "batch_size": 8}
    predict(model, genome, tmp_path / "out", shard="1/1", **options)
    files = list((tmp_path / "out" / ".parts").glob("*.safetensors"))
    assert len(files) == (5 if mode == "windows" else 1)
    merge(tmp_path / "out")
    if mode == "windows":
        with h5py.File(tmp_path / "out" / "predictions.h5") as arrays:
            for chrom in genome.names:
                np.testing.assert_allclose(
                    arrays[chrom]["predictions"][:], expected(genome, chrom), rtol=1e-6
                )
    with pyBigWig.open(str(next((tmp_path / "out").glob("*.bw")))) as bigwig:
        assert list(bigwig.chroms().items()) == list(genome.lengths.items())


def test_parts_that_are_gone_are_told(shard: Shard, tmp_path: Path) -> None:
    class Discarded(CountingModel):
        def predict(self, tokens: Any) -> Any:
            plan_module.discard(tmp_path / "out")
            return super().predict(tokens)

    with pytest.raises(PartsGone, match="merged or discarded by another process"):
        shard("out", None, Discarded())
