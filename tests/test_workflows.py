"""workflows/: the batch scripts are what `genossm slurm` prints; on a Slurm and with Snakemake they do what they say.

The tests that submit jobs run only where GENOSSM_TEST_SLURM=1 says that this machine's Slurm is for tests
(make test-slurm), the one that runs Snakemake here where `snakemake` is found.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from genossm.cli import main

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
SNAKEMAKE = os.environ.get("GENOSSM_SNAKEMAKE") or shutil.which("snakemake")
needs_slurm = pytest.mark.skipif(
    os.environ.get("GENOSSM_TEST_SLURM") != "1",
    reason="GENOSSM_TEST_SLURM=1 is not set: no Slurm for tests here (make test-slurm starts one)",
)
needs_snakemake = pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed")
CPU = ["--device", "cpu", "--gpus", "0", "--cpus", "1", "--mem", "1500M", "--time", "20"]


def test_the_batch_scripts_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {name: (WORKFLOWS / f"{name}.sbatch").read_text() for name in ("train", "predict-array", "merge")}
    assert main("slurm train accessibility-100kb --dataset dataset -o run --dry-run".split()) == 0
    assert capsys.readouterr().out == texts["train"]
    assert main("slurm predict run --genome genome.fa -o predictions --dry-run".split()) == 0
    assert capsys.readouterr().out == (
        f"# ==> predictions.sbatch <==\n{texts['predict-array']}\n"
        f"# ==> predictions-merge.sbatch <==\n{texts['merge']}"
    )


def test_the_profile_names_rules_that_there_are() -> None:
    profile = yaml.safe_load((WORKFLOWS / "profiles" / "slurm" / "config.yaml").read_text())
    snakefile = (WORKFLOWS / "Snakefile").read_text()
    for rule in {*profile["set-threads"], *profile["set-resources"]}:
        assert f"\nrule {rule}:\n" in snakefile


def shell(command: str, folder: Path, *, status: int = 0) -> str:
    """Run a command line with this Python's genossm on the PATH; its standard output and error."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}"
    return done.stdout


def wait_for_jobs(folder: Path, seconds: float = 400) -> None:
    """Until no job is left. A job that was queued again would wait two minutes first: it is told not to."""
    end = time.monotonic() + seconds
    told: dict[str, float] = {}
    while waiting := shell("squeue -h -o '%i %T %r' -n genossm-train,genossm-predict,genossm-merge", folder):
        for job, _, reason in (line.split(maxsplit=2) for line in waiting.splitlines()):
            if reason == "BeginTime" and time.monotonic() > told.get(job, 0) + 10:
                # Not at once: within a second of its end, slurmd takes it for the job that has ended and refuses it.
                shell(f"scontrol update jobid={job} StartTime=now+3 || true", folder)
                told[job] = time.monotonic()
        assert time.monotonic() < end, waiting
        time.sleep(0.5)


def logs(folder: Path) -> str:
    return "\n".join(f"==> {path} <==\n{path.read_text()}" for path in sorted(folder.glob("*.log")))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, with a blank in its name, of a simulated genome, its dataset and a tiny run."""
    folder = tmp_path_factory.mktemp("slurm") / "my work"
    folder.mkdir()
    shell("genossm simulate -o sim --chromosomes 3 --chromosome-bp 60000 --window 4096 --margin 512", folder)
    shell("genossm prepare sim/dataset.yaml -o dataset", folder)
    shell("genossm train tiny --dataset dataset -o run --device cpu", folder)
    return folder


@pytest.fixture(scope="module")
def predicted(work: Path) -> Path:
    """The same folder with `single`, the run's unsharded prediction."""
    shell("genossm predict run --genome sim/genome.fa -o single --hdf5 --device cpu", work)
    return work


def same_as_single(folder: Path, name: str, single: str = "single") -> bool:
    """Whether a prediction has the arrays and bigWigs of an unsharded one, byte for byte."""
    files = {path.name for path in (folder / single).iterdir() if path.suffix in (".bw", ".h5")}
    assert files == {"peaks.bw", "cuts.bw", "predictions.h5"}
    return all((folder / name / file).read_bytes() == (folder / single / file).read_bytes() for file in files)


def predict(folder: Path, out: str, *options: str, genome: str = "sim/genome.fa") -> str:
    """Submit a prediction in three shards; what was printed."""
    words = ["genossm", "slurm", "predict", "run", "--genome", genome, "-o", out, "--hdf5", "--shards", "3"]
    return shell(shlex.join([*words, *CPU, *options]), folder)


@needs_slurm
def test_an_array_and_its_merge_equal_the_single_run(predicted: Path) -> None:
    predict(predicted, "in shards", "--max-parallel", "2")
    wait_for_jobs(predicted)
    assert same_as_single(predicted, "in shards"), logs(predicted)
    assert len(list(predicted.glob("in shards-*_*.log"))) == 3


@needs_slurm
def test_a_failed_task_is_rerun_alone(predicted: Path) -> None:
    said = predict(
        predicted, "failing", "--setup", "[ $SLURM_ARRAY_TASK_ID != 3 ] || [ -e mended ] || exit 1"
    )
    wait_for_jobs(predicted)
    assert not list(predicted.glob("failing-merge-*.log")), "the merge ran after a failed task"
    assert "3" in shell("genossm merge failing", predicted, status=1)
    (predicted / "mended").touch()
    shell(said.splitlines()[-1].partition(":  ")[2], predicted)
    wait_for_jobs(predicted)
    assert same_as_single(predicted, "failing"), logs(predicted)
    assert (
        len(list(predicted.glob("failing-*_1.log"))) == 1
        and len(list(predicted.glob("failing-*_3.log"))) == 2
    )


def warn(folder: Path, job: str, started: Callable[[], bool]) -> None:
    """Once a job has started its work, tell it what Slurm tells it near the time limit."""
    end = time.monotonic() + 120
    while not started():
        assert time.monotonic() < end, logs(folder)
        time.sleep(0.05)
    shell(f"scancel --batch --signal=USR1 {job}", folder)


@needs_slurm
def test_a_training_near_its_time_limit_goes_on_in_another_job(work: Path) -> None:
    override = "--set train.epochs=12 --set train.windows_per_epoch=160"
    shell(f"genossm train tiny --dataset dataset -o unbroken --device cpu {override}", work)
    said = shell(f"genossm slurm train tiny --dataset dataset -o broken {override} {' '.join(CPU)}", work)
    job = said.split()[1].rstrip(":")
    metrics = work / "broken" / "metrics.csv"
    warn(work, job, lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    wait_for_jobs(work)
    log = (work / f"broken-{job}.log").read_text()
    assert "queueing again" in log and log.count("device: CPU") == 2, log
    for file in ("model.safetensors", "metrics.csv"):
        assert (work / "broken" / file).exists(), log
    columns = [
        [line.split(",")[:3] for line in (work / run / "metrics.csv").read_text().splitlines()]
        for run in ("unbroken", "broken")
    ]
    assert columns[0] == columns[1] and len(columns[0]) == 13


@needs_slurm
def test_a_prediction_near_its_time_limit_goes_on_in_another_job(work: Path) -> None:
    shell("genossm simulate -o large --chromosomes 3 --chromosome-bp 1500000 --no-signal", work)
    shell("genossm predict run --genome large/genome.fa -o whole --hdf5 --device cpu", work)
    said = predict(work, "warned", genome="large/genome.fa")
    job = said.split()[1].rstrip(":")
    paths = [work / f"warned-{job}_{task}.log" for task in (1, 2, 3)]
    for task, log in enumerate(paths, start=1):
        warn(work, f"{job}_{task}", lambda log=log: log.exists() and "CPU" in log.read_text())
    wait_for_jobs(work)
    texts = [log.read_text() for log in paths]
    assert any("queueing again" in text and text.count("on CPU") == 2 for text in texts), logs(work)
    assert same_as_single(work, "warned", "whole"), logs(work)


def snakemake(folder: Path, *options: str) -> str:
    assert SNAKEMAKE is not None
    words = [SNAKEMAKE, "-s", str(WORKFLOWS / "Snakefile"), "--nocolor", *options]
    return shell(shlex.join(words), folder)


@needs_snakemake
def test_the_snakefile_has_the_steps_in_order(tmp_path: Path) -> None:
    said = snakemake(tmp_path, "--cores", "1", "--dry-run", "--config", "shards=3")
    assert all(
        f"{rule} " in said for rule in ("simulate", "prepare", "train", "evaluate", "predict", "merge")
    )
    assert said.count("\nrule predict:") == 3 and not (tmp_path / "results").exists()


@needs_slurm
@needs_snakemake
def test_the_snakefile_runs_end_to_end_on_slurm(tmp_path: Path) -> None:
    folder = tmp_path / "smk"
    folder.mkdir()
    small = ["--set-threads", *(f"{rule}=1" for rule in ("prepare", "train", "evaluate", "predict"))]
    memory = [
        "--set-resources",
        *(f"{rule}:mem_mb=1500" for rule in ("train", "evaluate", "predict", "merge")),
    ]
    said = snakemake(
        folder, "--profile", str(WORKFLOWS / "profiles" / "slurm"), *small, *memory, "--default-resources",
        "mem_mb=1500", "runtime=20", "--slurm-status-command", "squeue", "--slurm-no-account",
        "--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "10",
    )  # fmt: skip
    assert "(100%) done" in said
    made = folder / "results"
    assert (made / "evaluation" / "metrics.tsv").is_file() and (made / "predictions" / "peaks.bw").is_file()
    shell(
        "genossm predict results/run --genome results/simulated/genome.fa -o single --hdf5 --device cpu",
        folder,
    )
    (folder / "in_shards").symlink_to(made / "predictions")
    assert same_as_single(folder, "in_shards")
    assert "Nothing to be done" in snakemake(folder, "--cores", "1")
