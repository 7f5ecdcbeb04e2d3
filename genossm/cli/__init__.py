"""The `genossm` command: each subcommand is loaded only when it is run, and errors become sentences."""

from __future__ import annotations

import copy
import difflib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from genossm import __version__
from genossm.cli.console import JSON_KEY, to_json
from genossm.errors import GenossmError

# In the order of the work. The lines are here so that --help imports no command; a test compares them
# with each command's own short help.
COMMANDS = {
    "fetch": "Fetch ENCODE files, a genome or a blacklist from their servers.",
    "check": "Compare names, lengths and coordinates of all files of a dataset.",
    "prepare": "Turn a genome, peaks and signal into a folder ready for training.",
    "info": "Tell a model's parameters, receptive field, FLOPs and memory.",
    "train": "Train a model on a prepared dataset.",
    "evaluate": "Score a trained model on held-out chromosomes.",
    "compare": "Train several configurations with several seeds, in one table.",
    "predict": "Predict every track along chromosomes, regions or sequences.",
    "merge": "Write the files of a prediction that was made in shards.",
    "slurm": "Write and submit Slurm jobs that train, or predict in shards.",
    "simulate": "Write a small genome with planted, known regulatory grammar.",
    "demo": "Run the whole path on a simulated genome and write one report page.",
    "bench": "Check and time scan kernels, whole encoders, prediction, and the reading of data, on this machine.",
}


class LazyGroup(click.Group):
    """A click group whose commands live in genossm/cli/<name>.py as `command`, imported when run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, with --json and --debug added so that they may stand after its name as well."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"genossm.cli.{cmd_name}").command
        command = copy.copy(command)
        command.params = [*command.params, *_shared_options()]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, naming the nearest one where there is none of that name."""
        name = args[0]
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        if name not in COMMANDS and near and not name.startswith("-"):
            ctx.fail(f"No such command {name!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table above, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[JSON_KEY] = True


def _shared_options() -> list[click.Option]:
    """--json and --debug. The first is kept in the context; both are looked up by `main` for errors."""
    return [
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=_set_json,
            help="Print the result, or the error, as one JSON object.",
        ),
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."),
    ]


@click.group(
    cls=LazyGroup,
    params=_shared_options(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="genossm", message="%(prog)s %(version)s")
def group() -> None:
    """Train state-space models on 100-kb DNA windows and predict chromatin accessibility genome-wide.

    Coordinates are 0-based and half-open, like BED. Results go to standard output, progress to
    standard error. Exit status: 0 done, 1 bad data or a failure, 2 bad usage.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 bad data or a failure, 2 bad usage.

    Errors are one sentence on standard error, or with --json one JSON object on standard output; a
    traceback is shown only with --debug.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = words[: words.index("--")] if "--" in words else words
    try:
        status = group.main(args=words, prog_name="genossm", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing to say, and nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except (Exception, click.Abort) as error:
        return _report(error, as_json="--json" in flags, debug="--debug" in flags)
    return status if isinstance(status, int) else 0


def _report(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Print an error as one sentence and return the exit status that goes with it."""
    if debug:
        traceback.print_exception(error)
    status = 1
    if isinstance(error, click.ClickException):
        status, sentence = error.exit_code, error.format_message()
    elif isinstance(error, click.Abort):
        status, sentence = 130, "interrupted"
    else:
        sentence = _sentence(error)
    if as_json:
        click.echo(to_json({"error": {"type": type(error).__name__, "message": sentence, "status": status}}))
    elif isinstance(error, click.UsageError):
        error.show()
    else:
        click.echo(f"error: {sentence}", err=True)
    return status


def _sentence(error: BaseException) -> str:
    """What an exception means to a user."""
    if isinstance(error, GenossmError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left on the disk{where}: free some space or write elsewhere, then run again"
        return f"{os.strerror(error.errno)}{where}: check the path and its permissions, then run again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: use a smaller --batch-size, shorter windows or a larger machine"
    first_line = next(iter(str(error).splitlines()), "")
    what = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return f"{what}; this is likely a fault in genossm: run with --debug for the traceback"
