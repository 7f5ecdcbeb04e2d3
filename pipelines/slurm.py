"""Slurm jobs: a training that goes on in job after job, a prediction with one array task per shard and a merge."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genossm.atomic import atomic_write_text
from genossm.errors import ConfigError, GenossmError

NOTICE_SECONDS = 120  # before the time limit, when Slurm warns the job
_SHORTEST_SECONDS = 300  # Slurm may warn a minute early; less time than this leaves nothing to work in
_MERGE_TIME = "01:00:00"
_MERGE_CPUS = 8  # at most, as `genossm merge` by itself
_OWN_DIRECTIVES = ("--array", "-a", "--signal", "--requeue", "--no-requeue", "--output", "-o", "--open-mode")


class SlurmError(GenossmError, RuntimeError):
    """Slurm is not there, or refused a job."""


@dataclass(frozen=True)
class Resources:
    """What a job asks of Slurm.

    Attributes:
        account, partition, qos, constraint: as sbatch takes them; None leaves a commented line to fill in.
        gpus: a number, or type:number; "0" asks for none.
        time: minutes, [hours:]minutes:seconds or days-hours[:minutes[:seconds]].
        cpus: cores of a task.
        mem: memory of a task's node, a number with K, M, G or T.
        extra: further directives, such as `#SBATCH --mail-type=FAIL`.
        setup: shell lines that run first, such as `module load cuda`.

    Raises:
        ConfigError: a value that sbatch would misread.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: str = "1"
    time: str = "04:00:00"
    cpus: int = 8
    mem: str = "32G"
    extra: Sequence[str] = ()
    setup: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("account", "partition", "qos", "constraint"):
            value = getattr(self, name)
            if value is not None and re.fullmatch(r"[^\s'\"\\#]+", value) is None:
                raise ConfigError(
                    f"{name} is {value!r}: give one word, without blanks and quotes, as sbatch takes it"
                )
        if re.fullmatch(r"([\w.-]+:)?\d+", self.gpus, flags=re.ASCII) is None:
            raise ConfigError(f"gpus is {self.gpus!r}: give a number or type:number, such as 1 or a100:1")
        if re.fullmatch(r"[1-9]\d*[KMGT]?", self.mem, flags=re.ASCII) is None:
            raise ConfigError(f"mem is {self.mem!r}: give a number with K, M, G or T, such as 32G")
        if self.cpus < 1:
            raise ConfigError(f"cpus is {self.cpus}: a task needs at least 1")
        if time_seconds(self.time) < _SHORTEST_SECONDS:
            raise ConfigError(
                f"time is {self.time!r}: a job is told to stop {NOTICE_SECONDS} s before its time limit, so give at "
                f"least {_SHORTEST_SECONDS // 60} minutes"
            )
        for line in self.extra:
            _directive(line)
        for line in self.setup:
            if "\0" in line:
                raise ConfigError(f"setup is {line!r}: give a line of shell")

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU is asked for."""
        return int(self.gpus.rpartition(":")[2]) > 0


@dataclass(frozen=True)
class Job:
    """A batch script and the file it is written to."""

    path: Path
    script: str


def time_seconds(time: str) -> int:
    """Seconds of a time limit as sbatch reads it: `90` is minutes, `1-12` a day and 12 hours.

    Raises:
        ConfigError: it is no time.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time, flags=re.ASCII)
    if match is None:
        raise ConfigError(f"time is {time!r}: give hours:minutes:seconds, such as 04:00:00, or days-hours")
    days, *rest = match.groups()
    fields = [int(field) for field in rest if field is not None]
    if days is not None:
        units = [3600, 60, 1]
    else:
        units = {1: [60], 2: [60, 1], 3: [3600, 60, 1]}[len(fields)]
    return int(days or 0) * 86_400 + sum(map(int.__mul__, fields, units))


def train_job(words: Sequence[str], out: Path, resources: Resources) -> Job:
    """The job that runs `genossm train WORDS --resume` and queues again before its time limit.

    Args:
        words: the arguments of `genossm train`, its `-o` included.
        out: the run folder; script and log lie beside it as OUT.sbatch and OUT-<job>.log.
        resources: what to ask for.

    Raises:
        ConfigError: `out` cannot name a log.
    """
    resume = [] if "--resume" in words else ["--resume"]
    head = _head("genossm-train", f"{_log(out)}-%j.log", resources)
    work = shlex.join(["genossm", "train", *words, *resume])
    return Job(_beside(out, ".sbatch"), head + _NOTE_TRAIN + _body(resources, work))


def predict_jobs(
    words: Sequence[str],
    out: Path,
    shards: int,
    resources: Resources,
    *,
    max_parallel: int | None = None,
    merge_partition: str | None = None,
    merge_time: str = _MERGE_TIME,
) -> tuple[Job, Job]:
    """The array that runs `genossm predict WORDS --shard i/SHARDS`, task i each, and the job that merges the shards.

    Args:
        words: the arguments of `genossm predict`, its `-o` included and without `--shard`.
        out: the output folder; scripts and logs lie beside it.
        shards: how many tasks.
        resources: what a task asks for; the merge asks for as many cores, 8 at most, the same memory and no GPU.
        max_parallel: at most so many tasks at a time.
        merge_partition: where the merge runs, if not where the tasks do.
        merge_time: its time limit; near it the merge queues again, and goes on with the tracks that are not written.

    Raises:
        ConfigError: a number is below 1, or `out` cannot name a log.
    """
    for name, number in (("shards", shards), ("max_parallel", max_parallel)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}; it must be at least 1")
    array = f"1-{shards}" + (f"%{max_parallel}" if max_parallel is not None else "")
    head = _head("genossm-predict", f"{_log(out)}-%A_%a.log", resources, f"#SBATCH --array={array}\n")
    work = shlex.join(["genossm", "predict", *words, "--shard"])
    # The count is written out: of `sbatch --array=3` alone, Slurm's own count is 1.
    predict = head + _NOTE_PREDICT + _body(resources, f'{work} "$SLURM_ARRAY_TASK_ID/{shards}"')
    small = Resources(
        account=resources.account,
        partition=merge_partition or resources.partition,
        qos=resources.qos,
        gpus="0",
        time=merge_time,
        cpus=min(_MERGE_CPUS, resources.cpus),
        mem=resources.mem,
        extra=resources.extra,
        setup=resources.setup,
    )
    head = _head("genossm-merge", f"{_log(out)}-merge-%j.log", small)
    work = shlex.join(["genossm", "merge", os.fspath(out), "--jobs"]) + ' "$SLURM_CPUS_PER_TASK"'
    merge = Job(_beside(out, "-merge.sbatch"), head + _NOTE_MERGE + _body(small, work))
    return Job(_beside(out, ".sbatch"), predict), merge


def submit(job: Job, *, after: str | None = None) -> str:
    """Write the job's script and hand it to sbatch; the job's id.

    With `after`, it starts once that job, every task of it, has succeeded, and is dropped where one fails.

    Raises:
        SlurmError: there is no sbatch, or it refused.
        FileError: the script cannot be written.
    """
    atomic_write_text(job.path, job.script)
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    try:
        done = subprocess.run(
            [*command, os.fspath(job.path)], capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise SlurmError(
            "there is no sbatch on this machine: run on a login node of the cluster, or print the script with --dry-run"
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise SlurmError(
            f"sbatch refused {job.path}: {said or f'exit status {done.returncode}'}; "
            "change what the job asks for and run again"
        )
    return done.stdout.strip().partition(";")[0]  # id;cluster on federated ones


def _beside(out: Path, suffix: str) -> Path:
    return out.parent / (out.name + suffix)


def _log(out: Path) -> str:
    """`out` as the start of sbatch's --output, which gives a meaning to % and \\."""
    if not out.name or out.name == ".." or re.search(r"[\x00-\x1f\\]", os.fspath(out)):
        raise ConfigError(
            f"the output folder is {os.fspath(out)!r}: scripts and logs are named after it, so give it a name, "
            "without backslashes and line breaks"
        )
    return os.fspath(out).replace("%", "%%")


def _directive(line: str) -> str:
    """A further directive as a line of the script."""
    match = re.fullmatch(r"(?:#SBATCH\s+)?(-\S.*)", line.strip())
    if match is None or not line.isprintable():
        raise ConfigError(f"extra is {line!r}: give one directive, such as '#SBATCH --mail-type=FAIL'")
    name = re.split(r"[=\s]", match[1], maxsplit=1)[0]
    if name in _OWN_DIRECTIVES:
        raise ConfigError(f"extra is {line!r}: the script sets {name} itself, and depends on it")
    return f"#SBATCH {match[1]}\n"


def _head(name: str, log: str, resources: Resources, array: str = "") -> str:
    """The directives of a script; those of `array` only for an array."""
    quoted = log if re.fullmatch(r"[\w./%-]+", log) else '"' + log.replace('"', '\\"') + '"'
    lines = f"#!/bin/bash\n#SBATCH --job-name={name}\n"
    for key in ("account", "partition", "qos", "constraint"):
        value = getattr(resources, key)
        lines += f"##SBATCH --{key}={key.upper()}\n" if value is None else f"#SBATCH --{key}={value}\n"
    lines += "#SBATCH --nodes=1\n#SBATCH --ntasks=1\n"
    if resources.has_gpu:
        lines += f"#SBATCH --gpus={resources.gpus}\n"
    lines += f"#SBATCH --cpus-per-task={resources.cpus}\n#SBATCH --mem={resources.mem}\n"
    lines += f"#SBATCH --time={resources.time}\n{array}#SBATCH --output={quoted}\n"
    return lines + "".join(_directive(line) for line in resources.extra)


def _setup(resources: Resources) -> str:
    """Lines before the command; `set -u` comes after the user's own, as conda's activation breaks under it."""
    own = resources.setup or ["# module load ...; source .../bin/activate"]
    return "".join(
        f"{line}\n" for line in [*own, "set -u", "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK", ""]
    )


def _body(resources: Resources, work: str) -> str:
    return _setup(resources) + _RUN.replace("WORK", work)


_QUEUES_AGAIN = f"""\
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{NOTICE_SECONDS}
"""
_NOTE_TRAIN = (
    _QUEUES_AGAIN
    + """\

# Train. Fill in what your cluster needs (lines with ## are comments) and what puts `genossm` on the PATH, then
# sbatch this file. Hyper-parameters belong into the configuration, not here.
# Two minutes before the time limit the training stops after the step in hand and the job queues again: it goes on
# from there. Failed or cancelled, sbatch the same file again.

"""
)
_NOTE_PREDICT = (
    _QUEUES_AGAIN
    + """\

# Predict, a task for each shard. Fill in what your cluster needs (lines with ## are comments) and what puts `genossm`
# on the PATH. Then submit this file, and the merge for when every task has succeeded:
#   job=$(sbatch --parsable THIS_FILE) && sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes MERGE_FILE
# Two minutes before the time limit a task stops and queues again; it goes on with the part that was not finished.
# A failed task alone, here the third: the same line with --array=3. For another number of shards change both
# --array and the number after the slash.

"""
)
_NOTE_MERGE = (
    _QUEUES_AGAIN
    + """\

# Merge the shards of a prediction: proves that each bin is there once, and names what is missing.
# Two minutes before the time limit it stops and queues again; it goes on with the tracks that are not written.

"""
)
_RUN = """\
restarts=20  # at most so many; 0: never queue again
child=
told=
again=
stop() {  # genossm finishes what is in hand, for 90 s at most
  [ -n "$child" ] || return 0
  kill -TERM "$child" 2>/dev/null
  for _ in {1..90}; do
    kill -0 "$child" 2>/dev/null || return 0
    sleep 1
  done
}
trap 'told=1; again=1; stop' USR1
trap 'told=1' TERM  # Slurm sends it to genossm as well, and a second one would not let it finish

WORK &
child=$!
wait "$child"
status=$?
while [ -n "$told" ]; do  # a signal ends `wait` early, with a status of its own
  told=
  status=1
  if [ -n "$again" ] && kill -0 "$child" 2>/dev/null; then break; fi
  wait "$child"
  status=$?
done
if [ -z "$again" ] || [ "$status" -eq 0 ]; then exit "$status"; fi

if [ "${SLURM_RESTART_COUNT:-0}" -ge "$restarts" ]; then
  echo "the time limit came again after $restarts restarts: give the job more time, then submit it again" >&2
  exit "$status"
fi
echo "the time limit is near: queueing again, to go on from here" >&2
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # the last task's own number is that of the whole array
scontrol requeue "${job:-$SLURM_JOB_ID}" || exit "$status"
"""
