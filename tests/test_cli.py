"""The command line's shell: quick help without torch, lazy commands, exit statuses, --json and --debug."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

import genossm
from genossm.cli import COMMANDS, console, main
from genossm.cli.options import batch_size_option, device_option, out_option, seed_option, set_option
from genossm.errors import ConfigError, DataError, FileError, GenossmError

HEAVY = ("torch", "lightning", "torchmetrics", "triton", "matplotlib", "pandas", "pyranges")


def python(code: str) -> str:
    """Standard output of a fresh interpreter that ran `code`."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts a function in the place of the `check` command."""

    def put(function: Callable[..., Any]) -> None:
        command = function if isinstance(function, click.Command) else click.command("check")(function)
        monkeypatch.setitem(sys.modules, "genossm.cli.check", SimpleNamespace(command=command))

    return put


def test_help_lists_every_command_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in text


def test_help_is_quick() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "genossm.cli", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    # The best of several: how fast the program is, not how busy the machine.
    assert min(seconds() for _ in range(5)) < 0.5


def test_import_and_help_load_nothing_heavy() -> None:
    out = python(
        "import sys, genossm\n"
        "from genossm.cli import main\n"
        "main(['--help'])\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    assert out.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_its_help_without_torch(name: str) -> None:
    out = python(
        "import sys\n"
        "from genossm.cli import main\n"
        f"status = main([{name!r}, '--help'])\n"
        f"print('end', status, [name for name in {HEAVY[:5]!r} if name in sys.modules])\n"
    )
    assert out.splitlines()[-1] == "end 0 []"
    assert out.startswith(f"Usage: genossm {name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_of_commands_says_what_each_command_says(name: str) -> None:
    command = importlib.import_module(f"genossm.cli.{name}").command
    assert isinstance(command, click.Command)
    assert command.get_short_help_str(limit=200) == COMMANDS[name]


def test_every_command_module_is_in_the_table() -> None:
    folder = Path(genossm.__file__).parent / "cli"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__", "console", "options"}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("name", genossm.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(genossm, name) is getattr(genossm, name)
    assert name in dir(genossm)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        genossm.trian  # type: ignore[attr-defined]  # noqa: B018


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"genossm {genossm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: genossm"),
        (["trian"], "Did you mean 'train'?"),
        (["qqqq"], "No such command 'qqqq'"),
        (["--unknown"], "No such option"),
        (["check", "--unknown"], "No such option"),
    ],
)
def test_bad_usage_exits_2(
    arguments: list[str], message: str, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(lambda: None)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_bad_usage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "trian"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["status"] == 2
    assert "Did you mean 'train'?" in error["message"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DataError("chr1 is unknown: use chrI"), "error: chr1 is unknown: use chrI\n"),
        (
            ConfigError("no key 'modle': did you mean 'model'?"),
            "error: no key 'modle': did you mean 'model'?\n",
        ),
        (FileError("x.fa.gz is truncated: copy it again"), "error: x.fa.gz is truncated: copy it again\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a"),
            "error: no space left on the disk (out/a): free some space or write elsewhere, then run again\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"),
            "error: No such file or directory (a.yaml): check the path and its permissions, then run again\n",
        ),
        (
            MemoryError(),
            "error: out of memory: use a smaller --batch-size, shorter windows or a larger machine\n",
        ),
        (
            KeyError("chr7"),
            "error: KeyError: 'chr7'; this is likely a fault in genossm: run with --debug for the traceback\n",
        ),
        (
            RuntimeError("first\nsecond"),
            "error: RuntimeError: first; this is likely a fault in genossm: run with --debug for the traceback\n",
        ),
    ],
)
def test_an_error_is_one_sentence_and_exits_1(
    error: Exception, sentence: str, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    install(fail)
    assert main(["check"]) == 1
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", sentence)


@pytest.mark.parametrize("arguments", [["--json", "check"], ["check", "--json"]])
def test_an_error_as_json(
    arguments: list[str], install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise DataError("chr1 is unknown")

    install(fail)
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert json.loads(output.out) == {
        "error": {"type": "DataError", "message": "chr1 is unknown", "status": 1}
    }
    assert output.err == ""


@pytest.mark.parametrize("arguments", [["--debug", "check"], ["check", "--debug"]])
def test_debug_shows_the_traceback(
    arguments: list[str], install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise GenossmError("something")

    install(fail)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert error.endswith("error: something\n")


def test_an_interrupt_exits_130(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    install(interrupt)
    assert main(["check"]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


@dataclasses.dataclass(frozen=True)
class _Row:
    path: Path
    value: float


@pytest.mark.parametrize("arguments", [["--json", "check"], ["check", "--json"]])
def test_results_as_json(
    arguments: list[str], install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def succeed() -> None:
        rows = [_Row(Path("a") / "b", 0.5), _Row(Path("c"), float("nan"))]
        numbers = {"scalar": np.float32(0.25), "array": np.array([[1, 2], [3, 4]]), "lost": np.float64("inf")}
        console.show(
            {"rows": rows, "numbers": numbers, "names": ("é", None), "flag": np.bool_(True)}, "as text"
        )

    install(succeed)
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.count("\n") == 1
    assert json.loads(output.out) == {
        "rows": [{"path": "a/b", "value": 0.5}, {"path": "c", "value": None}],
        "numbers": {"scalar": 0.25, "array": [[1, 2], [3, 4]], "lost": None},
        "names": ["é", None],
        "flag": True,
    }


def test_results_as_text(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install(lambda: console.show({"a": 1}, "as text\n"))
    assert main(["check"]) == 0
    assert capsys.readouterr().out == "as text\n"


def test_json_asked_for_once_does_not_last(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(lambda: console.show({"a": 1}, "as text"))
    assert main(["--json", "check"]) == 0
    assert main(["check"]) == 0
    assert capsys.readouterr().out == '{"a": 1}\nas text\n'


def test_what_json_cannot_hold_is_an_error() -> None:
    with pytest.raises(TypeError, match="cannot print a object as JSON"):
        console.to_json({"a": object()})


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "genossm.cli", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_under_standard_output_is_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "genossm.cli", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: no space left on the disk")
    assert b"Traceback" not in done.stderr


@click.command()
@out_option()
@set_option()
@device_option()
@batch_size_option()
@seed_option()
def options_command(out: Path, overrides: tuple[str, ...], device: str, batch_size: int, seed: int) -> None:
    """A command with every shared option."""
    click.echo(json.dumps([str(out), list(overrides), device, batch_size, seed]))


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["-o", "x"], ["x", [], "auto", 4, 1]),
        (
            [
                "--out",
                "x/y",
                "--set",
                "a.b=1",
                "--set",
                "c=",
                "--device",
                "CUDA:1",
                "--batch-size",
                "2",
                "--seed",
                "0",
            ],
            ["x/y", ["a.b=1", "c="], "cuda:1", 2, 0],
        ),
        (["-o", "x", "--set", "a=b=c", "--device", "cpu"], ["x", ["a=b=c"], "cpu", 4, 1]),
    ],
)
def test_shared_options(arguments: list[str], values: list[Any]) -> None:
    result = CliRunner().invoke(options_command, arguments)
    assert result.exit_code == 0
    assert json.loads(result.output) == values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["-o", "x", "--device", "gpu"], "'gpu' is no device: use auto, cuda, cuda:N"),
        (["-o", "x", "--device", "cuda:x"], "'cuda:x' is no device"),
        (["-o", "x", "--set", "ab"], "'ab' is no override: write key=value"),
        (["-o", "x", "--set", "a..b=1"], "is no override"),
        (["-o", "x", "--set", "=1"], "is no override"),
        (["-o", "x", "--batch-size", "0"], "batch-size"),
        (["-o", "x", "--seed", "-1"], "seed"),
    ],
)
def test_bad_values_of_shared_options_exit_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(options_command, arguments)
    assert result.exit_code == 2
    assert message in result.output
