"""`genossm slurm` prints or submits scripts, and tells what is wrong before anything is queued."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from genossm.cli import main

Captured = pytest.CaptureFixture[str]
CPU = ["--gpus", "0", "--device", "cpu"]


def call(capsys: Captured, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `genossm slurm ARGUMENTS`."""
    status = main(["slurm", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run, a dataset and a genome, and an sbatch that counts its calls in `calls`."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(
        '#!/bin/bash\n[ ! -e refuse ] || { echo "sbatch: error: $(cat refuse)" >&2; exit 1; }\n'
        'echo "$@" >> calls; echo $((40 + $(wc -l < calls)))\n'
    )
    sbatch.chmod(0o755)
    work = tmp_path / "my work"
    for folder in ("run", "dataset"):
        (work / folder).mkdir(parents=True)
    (work / "genome.fa").write_text(">a\nACGT\n")
    monkeypatch.chdir(work)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return work


def test_a_dry_run_prints_and_does_nothing(here: Path, capsys: Captured) -> None:
    before = sorted(here.rglob("*"))
    status, out, err = call(
        capsys, "train", "tiny", "--dataset", "nowhere", "-o", "run", "--dry-run", "--cpus", 3
    )
    assert (status, err) == (0, "") and out.startswith("#!/bin/bash\n")
    assert "#SBATCH --cpus-per-task=3\n" in out
    assert "genossm train tiny --dataset nowhere -o run --resume &" in out
    status, out, _ = call(
        capsys, "--json", "predict", "run", "--genome", "g.fa", "-o", "a/b", "--shards", 3, "--dry-run",
        "--merge-time", "05:00:00",
    )  # fmt: skip
    scripts = json.loads(out)["scripts"]
    assert status == 0 and list(scripts) == ["a/b.sbatch", "a/b-merge.sbatch"]
    assert "genossm predict run --genome g.fa -o a/b --shard" in scripts["a/b.sbatch"]
    merge = scripts["a/b-merge.sbatch"]
    assert '\ngenossm merge a/b --jobs "$SLURM_CPUS_PER_TASK" &\n' in merge and "--time=05:00:00\n" in merge
    assert sorted(here.rglob("*")) == before


def test_predict_submits_an_array_and_the_merge_after_it(here: Path, capsys: Captured) -> None:
    status, out, err = call(
        capsys, "predict", "run", "--genome", "genome.fa", "-o", "the out", "--shards", 4, "--chrom", "chr 1", *CPU
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert (here / "calls").read_text().splitlines() == [
        "--parsable the out.sbatch",
        "--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes the out-merge.sbatch",
    ]
    script = (here / "the out.sbatch").read_text()
    assert (
        "genossm predict run --genome genome.fa --chrom 'chr 1' --device cpu -o 'the out' --shard" in script
    )
    assert '#SBATCH --output="the out-%A_%a.log"\n' in script and "#SBATCH --array=1-4\n" in script
    assert "submitted 41: 4 tasks" in out and "squeue -j 41,42; tail -F 'the out-41_1.log'" in out
    # What it tells to do about a failed task does that.
    recipe = out.splitlines()[-1].partition(":  ")[2]
    subprocess.run(["bash", "-c", recipe], check=True, stdout=subprocess.DEVNULL)
    assert (here / "calls").read_text().splitlines()[2:] == [
        "--parsable --array=3 the out.sbatch",
        "--dependency=afterok:43 --kill-on-invalid-dep=yes the out-merge.sbatch",
    ]


def test_train_submits_one_job_that_resumes(here: Path, capsys: Captured) -> None:
    status, out, _ = call(
        capsys, "train", "tiny", "--dataset", "dataset", "-o", "runs/a", "--set", "train.epochs=3", "--json", *CPU
    )  # fmt: skip
    assert status == 0
    assert json.loads(out) == {"job": "41", "script": "runs/a.sbatch", "log": "runs/a-41.log"}
    script = (here / "runs" / "a.sbatch").read_text()
    line = next(line for line in script.splitlines() if line.startswith("genossm train"))
    assert shlex.split(line.removesuffix("&")) == (
        "genossm train tiny --dataset dataset --set train.epochs=3 --device cpu -o runs/a --resume".split()
    )


PREDICT = ["predict", "run", "--genome", "genome.fa", "-o", "out"]
TRAIN = ["train", "tiny", "--dataset", "dataset", "-o", "new"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([*PREDICT, "--batch-sze", "3"], 2, "'--batch-sze'"),
        ([*PREDICT, "--batch-size", "none"], 2, "'none' is not a valid integer"),
        ([*PREDICT, "--gpus", "0"], 2, "--gpus 0 needs --device cpu"),
        ([*PREDICT, "--gpus", "two"], 1, "gpus is 'two'"),
        ([*PREDICT, "--time", "4h"], 1, "time is '4h'"),
        ([*PREDICT, "--shards", "0"], 2, "0 is not in the range"),
        ([*PREDICT, "--extra", "#SBATCH --array=1"], 1, "the script sets --array itself"),
        (["predict", "run", "--sequences", "genome.fa", "-o", "out"], 2, "only predictions of a genome"),
        ([*PREDICT, "--shard", "1/2"], 2, "leave out --shard"),
        ([*PREDICT, "--compare"], 2, "leave out --compare"),
        ([*PREDICT, "--reference", "a.bw"], 2, "give --reference to genossm merge"),
        (["predict", "run", "gone", "--genome", "genome.fa", "-o", "out"], 2, "there is no gone"),
        (["predict", "gone", "--genome", "genome.fa", "-o", "out"], 2, "there is no gone"),
        (["predict", "run", "--genome", "gone.fa", "-o", "out"], 2, "there is no gone.fa"),
        (["predict", "--genome", "genome.fa", "-o", "out"], 2, "Missing argument 'RUN...'"),
        (["predict", "run", "--genome", "genome.fa"], 2, "Missing option '-o'"),
        ([*TRAIN, "--set", "train.epoch=3"], 1, "unknown key 'epoch'"),
        (["train", "tniy", "--dataset", "dataset", "-o", "new"], 1, "tniy"),
        (["train", "tiny", "-o", "new"], 2, "Missing option '--dataset'"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_queued(
    here: Path, capsys: Captured, arguments: list[str], status: int, words: str
) -> None:
    before = sorted(here.rglob("*"))
    got, out, err = call(capsys, *arguments)
    assert (got, out) == (status, "") and words in err and "Traceback" not in err
    assert sorted(here.rglob("*")) == before


def test_a_job_may_wait_for_the_one_that_makes_its_input(here: Path, capsys: Captured) -> None:
    waits = ["--extra", "#SBATCH --dependency=afterok:7"]
    assert call(capsys, "predict", "later", "--genome", "genome.fa", "-o", "out", *waits)[0] == 0
    assert "#SBATCH --dependency=afterok:7\n" in (here / "out.sbatch").read_text()


def test_what_slurm_refuses_is_one_sentence(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "refuse").write_text("invalid account")
    status, out, err = call(capsys, *TRAIN)
    assert (status, out) == (1, "")
    assert err.startswith("error: sbatch refused new.sbatch: invalid account;") and err.count("\n") == 1
    monkeypatch.setenv("PATH", str(here))
    assert "no sbatch on this machine" in call(capsys, *TRAIN)[2]


def test_a_merge_that_is_refused_does_not_hide_the_array(here: Path, capsys: Captured) -> None:
    sbatch = here.parent / "bin" / "sbatch"
    sbatch.write_text("#!/bin/bash\ncase $* in *afterok*) echo no >&2; exit 1;; esac\necho 9\n")
    status, _, err = call(capsys, *PREDICT)
    assert status == 1 and "the array is submitted as 9, but not the merge: sbatch refused" in err
