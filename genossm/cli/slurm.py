"""`genossm slurm`: batch scripts for the user's own cluster, printed or submitted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from genossm.cli.bench import Benches as Kinds  # a group whose commands share its options
from genossm.cli.console import show
from genossm.cli.options import Decorated, Decorator, out_option

if TYPE_CHECKING:
    from genossm.pipelines.slurm import Job, Resources

# What is no option of ours belongs to `genossm train` or `genossm predict`.
PASS_ON = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


def job_options() -> Decorator[Any]:
    """What a job asks of Slurm, given to the command under the names of `Resources`, and `--dry-run`."""

    def decorate(command: Decorated) -> Decorated:
        for option in (
            click.option("--dry-run", is_flag=True, help="Print the scripts; write and submit nothing."),
            click.option("--setup", multiple=True, metavar="LINE",
                         help="Shell line to run first, such as 'module load cuda'; may be given often."),
            click.option("--extra", multiple=True, metavar="DIRECTIVE",
                         help="Another directive, such as '#SBATCH --mail-type=FAIL'; may be given often."),
            click.option("--mem", default="32G", show_default=True, metavar="SIZE", help="Memory of a task."),
            click.option("--cpus", type=click.IntRange(min=1), default=8, show_default=True, metavar="N",
                         help="Cores of a task."),
            click.option("--time", default="04:00:00", show_default=True, metavar="H:MM:SS",
                         help="Time limit of a task."),
            click.option("--gpus", default="1", show_default=True, metavar="[TYPE:]N",
                         help="GPUs of a task; 0 needs --device cpu."),
            click.option("--constraint", metavar="FEATURES"),
            click.option("--qos", metavar="NAME"),
            click.option("--partition", metavar="NAME"),
            click.option("--account", metavar="NAME"),
        ):  # fmt: skip
            command = option(command)
        return command

    return decorate


@click.group("slurm", cls=Kinds, short_help="Write and submit Slurm jobs that train, or predict in shards.")
def command() -> None:
    """Write and submit Slurm jobs that train, or predict in shards.

    With --dry-run the scripts are printed only. Scripts and logs lie beside the output folder and are named after
    it. A job that comes near its time limit stops, queues again and goes on where it was.
    """


@command.command("train", short_help="A training that goes on in job after job.", context_settings=PASS_ON)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG --dataset DIR [OPTIONS OF TRAIN]")
@out_option(help="Run folder.")
@job_options()
def train(words: tuple[str, ...], out: Path, dry_run: bool, **asked: Any) -> None:
    """One job that runs `genossm train`; what is no option of this command is handed to that one."""
    from genossm.cli.train import command as work
    from genossm.pipelines.slurm import Resources, submit, train_job

    words, resources = (*words, "-o", str(out)), Resources(**asked)
    given = _check(work, words, resources, dry_run, files=["dataset"])
    job = train_job(words, out, resources)
    if dry_run:
        _show_scripts(job)
        return
    from genossm.run_config import load_run_config

    load_run_config(given["config"], given["overrides"])  # a misspelt key is told now
    number = submit(job)
    log = f"{out}-{number}.log"
    text = (
        f"submitted {number}: train {given['config']}\n"
        f"watch:  squeue -j {number}; tail -F {shlex.quote(log)}\n"
        f"failed or cancelled, go on with:  sbatch {shlex.quote(str(job.path))}"
    )
    show({"job": number, "script": job.path, "log": log}, text)


@command.command("predict", short_help="An array, one task a shard, and a merge.", context_settings=PASS_ON)
@click.argument(
    "words", nargs=-1, type=click.UNPROCESSED, metavar="RUN... --genome FASTA [OPTIONS OF PREDICT]"
)
@out_option()
@click.option("--shards", type=click.IntRange(min=1), default=8, show_default=True, metavar="N",
              help="Parts of the genome, a task each.")  # fmt: skip
@click.option(
    "--max-parallel", type=click.IntRange(min=1), metavar="N", help="Tasks at a time. Default: all."
)
@click.option("--merge-partition", metavar="NAME", help="Partition of the merge, which needs no GPU.")
@click.option("--merge-time", default="01:00:00", show_default=True, metavar="H:MM:SS",
              help="Time limit of the merge, which queues again near it and keeps the tracks it has written.")  # fmt: skip
@job_options()
def predict(
    words: tuple[str, ...],
    out: Path,
    shards: int,
    max_parallel: int | None,
    merge_partition: str | None,
    merge_time: str,
    dry_run: bool,
    **asked: Any,
) -> None:
    """An array of `genossm predict --shard i/N` and a `genossm merge` that runs when all tasks have succeeded.

    What is no option of this command is handed to `genossm predict`.
    """
    from genossm.cli.predict import command as work
    from genossm.pipelines.slurm import Resources, predict_jobs

    words, resources = (*words, "-o", str(out)), Resources(**asked)
    given = _check(work, words, resources, dry_run, files=["runs", "genome"])
    if given["shard"] is not None:
        raise click.UsageError(
            "leave out --shard: each task of the array gets its own; --shards N says how many"
        )
    if given["genome"] is None:
        raise click.UsageError("only predictions of a genome go in shards: give --genome FASTA")
    if given["compare"] or given["references"]:
        raise click.UsageError(
            "a shard writes no files: leave out --compare, and give --reference to genossm merge"
        )
    array, merge = predict_jobs(
        words,
        out,
        shards,
        resources,
        max_parallel=max_parallel,
        merge_partition=merge_partition,
        merge_time=merge_time,
    )
    if dry_run:
        _show_scripts(array, merge)
    else:
        _submit_array(array, merge, out, shards)


def _submit_array(array: Job, merge: Job, out: Path, shards: int) -> None:
    """Submit the array, and the merge to run after it."""
    from genossm.pipelines.slurm import SlurmError, submit

    number = submit(array)
    again, after = (shlex.quote(str(job.path)) for job in (array, merge))
    chain = f"&& sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes {after}"
    try:
        last = submit(merge, after=number)
    except SlurmError as error:
        raise SlurmError(f"the array is submitted as {number}, but not the merge: {error}") from error
    text = (
        f"submitted {number}: {shards} tasks, one a shard; {last}: merge, when all have succeeded\n"
        f"watch:  squeue -j {number},{last}; tail -F {shlex.quote(f'{out}-{number}_1.log')}\n"
        f"a failed task alone, here 3, then the merge:  job=$(sbatch --parsable --array=3 {again}) {chain}"
    )
    show({"job": number, "merge_job": last, "script": array.path, "merge_script": merge.path}, text)


def _check(
    work: click.Command, words: Sequence[str], resources: Resources, dry_run: bool, *, files: Sequence[str]
) -> dict[str, Any]:
    """The options of the command that the job will run: wrong ones are told before anything is queued.

    Files that are missing are an error too, unless nothing is submitted or the job waits for another one.
    """
    name = work.name or ""
    given = work.make_context(f"genossm {name}", list(words)).params
    if given["device"] != "cpu" and not resources.has_gpu:
        raise click.UsageError("--gpus 0 needs --device cpu, as no other device is there")
    if not dry_run and not any("dependency" in line for line in resources.extra):
        for value in (given[file] for file in files):
            for path in value if isinstance(value, tuple) else [value]:
                if path is not None and not path.exists():
                    raise click.UsageError(
                        f"there is no {path}: the job would fail; give the path from the folder you are in, or let it "
                        "wait for the job that makes it (--extra '#SBATCH --dependency=afterok:JOB')"
                    )
    return given


def _show_scripts(*jobs: Job) -> None:
    """Print scripts; several with a line before each that names it."""
    texts = [f"# ==> {job.path} <==\n{job.script}" if len(jobs) > 1 else job.script for job in jobs]
    show({"scripts": {str(job.path): job.script for job in jobs}}, "\n".join(texts))
