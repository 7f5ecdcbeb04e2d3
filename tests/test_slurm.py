"""Batch scripts say what was asked, quote what needs it, and stop and queue again as they should."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.errors import ConfigError
from genossm.pipelines.slurm import Job, Resources, SlurmError, predict_jobs, submit, time_seconds, train_job

CPU = Resources(gpus="0", cpus=1, mem="2G")
WORDS = ["run", "--genome", "genome.fa", "-o", "out"]


def directives(job: Job) -> list[str]:
    """What sbatch reads of a script: lines with #SBATCH above the first command."""
    lines = job.script.splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    return [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH")]


def test_directives_say_what_was_asked() -> None:
    asked = Resources(
        account="lab",
        partition="gpu",
        qos="long",
        constraint="a100|h100",
        gpus="a100:2",
        time="1-12",
        cpus=3,
        mem="7G",
        extra=["#SBATCH --mail-type=FAIL", "--nice"],
        setup=["module load cuda"],
    )
    array, merge = predict_jobs(
        WORDS, Path("out"), 5, asked, max_parallel=2, merge_partition="small", merge_time="02:30:00"
    )
    assert set(directives(array)) == {
        "--job-name=genossm-predict", "--account=lab", "--partition=gpu", "--qos=long", "--constraint=a100|h100",
        "--nodes=1", "--ntasks=1", "--gpus=a100:2", "--cpus-per-task=3", "--mem=7G", "--time=1-12", "--array=1-5%2",
        "--output=out-%A_%a.log", "--mail-type=FAIL", "--nice", "--open-mode=append", "--requeue",
        "--signal=B:USR1@120",
    }  # fmt: skip
    assert set(directives(merge)) == {
        "--job-name=genossm-merge", "--account=lab", "--partition=small", "--qos=long", "--nodes=1", "--ntasks=1",
        "--cpus-per-task=3", "--mem=7G", "--time=02:30:00", "--output=out-merge-%j.log", "--mail-type=FAIL", "--nice",
        "--open-mode=append", "--requeue", "--signal=B:USR1@120",
    }  # fmt: skip
    for job in (array, merge):
        assert (
            job.script.index("module load cuda") < job.script.index("set -u") < job.script.index("genossm ")
        )


def test_no_gpu_and_no_names_leave_no_directive() -> None:
    found = " ".join(directives(train_job(["tiny", "-o", "run"], Path("run"), CPU)))
    assert not any(name in found for name in ("--gpus", "--account", "--partition", "--qos", "--constraint"))


def test_a_task_alone_takes_its_own_part_of_all() -> None:
    array, _ = predict_jobs(WORDS, Path("out"), 5, CPU)
    assert '--shard "$SLURM_ARRAY_TASK_ID/5"' in array.script and "TASK_COUNT" not in array.script


def test_train_resumes_and_says_so_once() -> None:
    for words in (["tiny"], ["tiny", "--resume"]):
        assert train_job(words, Path("run"), CPU).script.count("--resume") == 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"account": "my lab"}, "account is 'my lab'"),
        ({"partition": "gpu\n#SBATCH --x"}, "partition is"),
        ({"gpus": "many"}, "gpus is 'many'"),
        ({"mem": "32 GB"}, "mem is '32 GB'"),
        ({"mem": "0"}, "mem is '0'"),
        ({"cpus": 0}, "cpus is 0"),
        ({"time": "4h"}, "time is '4h'"),
        ({"time": "00:04:59"}, "at least 5 minutes"),
        ({"extra": ["--array=2"]}, "the script sets --array itself"),
        ({"extra": ["#SBATCH -o x"]}, "the script sets -o itself"),
        ({"extra": ["mail me"]}, "extra is 'mail me'"),
        ({"extra": ["--nice\nrm -r x"]}, "extra is"),
        ({"setup": ["a\0"]}, "setup is"),
    ],
)
def test_what_sbatch_would_misread_is_refused(asked: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Resources(**asked)  # type: ignore[arg-type]
    assert words in str(error.value)


@pytest.mark.parametrize("out", [".", "..", "a\nb", "a\\b", ""])
def test_an_output_folder_that_cannot_name_a_log_is_refused(out: str) -> None:
    with pytest.raises(ConfigError, match="output folder"):
        train_job(["tiny"], Path(out), CPU)


@pytest.mark.parametrize("asked", [{"shards": 0}, {"shards": 2, "max_parallel": 0}])
def test_numbers_below_one_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        predict_jobs(WORDS, Path("out"), resources=CPU, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [
        ("90", 5400),
        ("5:30", 330),
        ("04:00:00", 14_400),
        ("1-12", 129_600),
        ("2-0:30", 174_600),
        ("0-0:5:1", 301),
    ],
)
def test_time_limits_are_read_as_sbatch_does(time_limit: str, seconds: int) -> None:
    assert time_seconds(time_limit) == seconds


def bin_with(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment whose PATH has the given bash scripts first, and as a job has it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "1"}
    return {**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}"}


def run(job: Job, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    (folder / "job.sh").write_text(job.script)
    return subprocess.Popen(
        ["bash", "job.sh"],
        cwd=folder,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=4
    )
)
def test_arguments_reach_the_command_as_they_were(words: list[str]) -> None:
    array, _ = predict_jobs(words, Path("out"), 5, CPU)
    line = array.script[array.script.index("genossm predict") :].partition(' "$SLURM_ARRAY')[0]
    assert shlex.split(line) == ["genossm", "predict", *words, "--shard"]


@pytest.mark.parametrize("status", [0, 1, 7])
def test_the_status_of_the_command_is_that_of_the_job(status: int, tmp_path: Path) -> None:
    environment = bin_with(
        tmp_path / "bin", genossm=f'printf "%s|" "$@"; exit {status}', scontrol="touch requeued"
    )
    words = ["my run", "--track", "a \"$b\" 'c'"]
    process = run(predict_jobs(words, Path("a b"), 5, CPU)[0], tmp_path, environment)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == status and not (tmp_path / "requeued").exists()
    assert out == "predict|my run|--track|a \"$b\" 'c'|--shard|3/5|"


# On TERM it stops after a moment with a status of its own, and a second one kills it, as with genossm.
PATIENT = (
    'trap "told=1; trap - TERM" TERM; touch started; while [ -z "$told" ]; do sleep 0.05; done; '
    "sleep 0.3; echo stopped; exit STATUS"
)


@pytest.mark.parametrize(
    ("sent", "status", "restarts", "ended", "queued", "said"),
    [
        (signal.SIGUSR1, 1, "0", 0, True, "queueing again"),
        (signal.SIGUSR1, 0, "0", 0, False, ""),
        (signal.SIGUSR1, 1, "20", 1, False, "after 20 restarts"),
        (signal.SIGTERM, 5, "0", 5, False, ""),
        (signal.SIGTERM, 0, "0", 0, False, ""),
    ],
    ids=["time-limit", "finished-in-time", "too-often", "cancelled", "cancelled-at-the-end"],
)
def test_a_signal_stops_the_command_and_the_time_limit_queues_again(
    sent: signal.Signals, status: int, restarts: str, ended: int, queued: bool, said: str, tmp_path: Path
) -> None:
    environment = bin_with(
        tmp_path / "bin", genossm=PATIENT.replace("STATUS", str(status)), scontrol='echo "$@" > requeued'
    )
    process = run(
        train_job(["tiny"], Path("run"), CPU), tmp_path, {**environment, "SLURM_RESTART_COUNT": restarts}
    )
    wait_for((tmp_path / "started").exists)
    if sent == signal.SIGTERM:
        os.killpg(process.pid, sent)  # Slurm ends all processes of a job at once
    else:
        process.send_signal(sent)  # and warns the script alone
    out, err = process.communicate(timeout=20)
    assert process.returncode == ended and out == "stopped\n" and said in err
    assert (tmp_path / "requeued").exists() == queued
    if queued:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"


def test_of_an_array_one_task_is_queued_again(tmp_path: Path) -> None:
    """The last task's number is the array's, of which Slurm would queue all tasks."""
    environment = bin_with(
        tmp_path / "bin", genossm=PATIENT.replace("STATUS", "1"), scontrol='echo "$@" > requeued'
    )
    of_array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    process = run(train_job(["tiny"], Path("run"), CPU), tmp_path, {**environment, **of_array})
    wait_for((tmp_path / "started").exists)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert (tmp_path / "requeued").read_text() == "requeue 77_3\n"


def test_a_command_that_does_not_stop_is_queued_again_all_the_same(tmp_path: Path) -> None:
    environment = bin_with(
        tmp_path / "bin",
        genossm='trap "" TERM; touch started; while [ ! -e requeued ]; do sleep 0.05; done',
        scontrol='echo "$@" > requeued',
    )
    job = train_job(["tiny"], Path("run"), CPU)
    assert "{1..90}" in job.script
    process = run(Job(job.path, job.script.replace("{1..90}", "1")), tmp_path, environment)
    wait_for((tmp_path / "started").exists)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


def test_a_requeue_that_is_refused_fails_the_job(tmp_path: Path) -> None:
    environment = bin_with(
        tmp_path / "bin", genossm=PATIENT.replace("STATUS", "5"), scontrol="echo no >&2; exit 1"
    )
    process = run(train_job(["tiny"], Path("run"), CPU), tmp_path, environment)
    wait_for((tmp_path / "started").exists)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 5 and err.endswith("no\n")


def test_submit_writes_the_script_and_returns_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = bin_with(tmp_path / "bin", sbatch=f'echo "$@" >> "{tmp_path}/calls"; echo "41;cluster"')
    monkeypatch.setenv("PATH", environment["PATH"])
    job = train_job(["tiny"], tmp_path / "new" / "run", CPU)
    assert submit(job) == "41" and submit(job, after="40") == "41"
    assert job.path == tmp_path / "new" / "run.sbatch" and job.path.read_text() == job.script
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable {job.path}",
        f"--parsable --dependency=afterok:40 --kill-on-invalid-dep=yes {job.path}",
    ]


def test_what_slurm_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = train_job(["tiny"], tmp_path / "run", CPU)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="no sbatch on this machine"):
        submit(job)
    refusing = bin_with(
        tmp_path / "bin", sbatch='echo "sbatch: error: invalid partition specified: zz" >&2; exit 1'
    )
    monkeypatch.setenv("PATH", f"{refusing['PATH']}:/bin:/usr/bin")
    with pytest.raises(SlurmError, match=r"refused .*: invalid partition specified: zz; change"):
        submit(job)
