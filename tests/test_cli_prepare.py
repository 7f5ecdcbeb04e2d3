"""`genossm prepare` and `genossm check` as commands: what they print, their options and exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyBigWig
import pytest
from click.testing import CliRunner

from genossm.cli import group, main
from genossm.dataset import PreparedDataset
from genossm.errors import DataError


def test_prepare_prints_what_it_made(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(group, ["prepare", str(folder / "dataset.yaml"), "-o", str(out)])
    assert result.exit_code == 0, result.output
    rate = PreparedDataset(out).positive_rate["peaks"]
    assert result.stdout == (
        f"{out}: tiny, 2 tracks, windows: 14 train, 7 valid, 1 test\n  peaks: {rate:.2%} of bins positive\n"
    )
    assert "preparing tiny: 3 chromosomes, 0.1 Mb, 2 tracks, 22 windows" in result.stderr
    assert "note: signal.bw (track signal) lacks chrC: masked there" in result.stderr
    again = CliRunner().invoke(group, ["prepare", str(folder / "dataset.yaml"), "--out", str(out)])
    assert again.stdout == result.stdout
    assert "is up to date" in again.stderr


def test_prepare_as_json(folder: Path, tmp_path: Path) -> None:
    arguments = ["--json", "prepare", str(folder / "dataset.yaml"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["folder"] == str(tmp_path / "out")
    assert printed["windows"] == {"train": 14, "valid": 7, "test": 1}
    assert printed["positive_rate"]["peaks"] == PreparedDataset(tmp_path / "out").positive_rate["peaks"]
    assert printed["dtype"] == "uint8"
    assert printed["storage_error"]["signal"] == {"largest": 0.0, "rms": 0.0}
    assert printed["split_check"]["leaks"] == 0


def test_the_error_of_storing_is_printed(folder: Path, tmp_path: Path) -> None:
    bigwig = pyBigWig.open(str(folder / "signal.bw"), "w")
    bigwig.addHeader([("chrA", 40_000), ("chrB", 20_011)])
    bigwig.addEntries(["chrA"] * 2, [100, 900], ends=[200, 1_000], values=[0.1, 0.7])
    bigwig.close()
    out = tmp_path / "out"
    arguments = ["prepare", str(folder / "dataset.yaml"), "-o", str(out)]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    coding = PreparedDataset(out).storage.codings[1]
    assert 0 < coding.rms_error < coding.largest_error < 5e-4
    assert result.stdout.splitlines()[2:] == [
        f"  signal: stored as float16, relative error {coding.largest_error:.2g} at most, {coding.rms_error:.2g} rms"
    ]


def test_many_tracks_are_not_all_listed(folder: Path, tmp_path: Path) -> None:
    tracks = ", ".join(
        f"{{name: t{number}, file: {folder / 'peaks.narrowPeak'}, kind: peaks}}" for number in range(12)
    )
    arguments = [
        "prepare",
        str(folder / "dataset.yaml"),
        "-o",
        str(tmp_path / "out"),
        "--set",
        f"tracks=[{tracks}]",
    ]
    lines = CliRunner().invoke(group, arguments).stdout.splitlines()
    assert len(lines) == 12 and lines[10].startswith("  t9: ")
    assert lines[11] == f"  and 2 more peaks tracks: see {tmp_path / 'out' / 'dataset.json'}"


def test_a_dry_run_prints_the_estimate_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    arguments = ["prepare", str(folder / "dataset.yaml"), "-o", str(tmp_path / "out"), "--dry-run"]
    result = CliRunner().invoke(group, [*arguments, "--jobs", "3"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("2 tracks x 1,915 bins in 22 windows: about ")
    assert "with 3 processes, measured on peaks, signal on chrC" in result.stdout
    printed = json.loads(CliRunner().invoke(group, ["--json", *arguments]).stdout)
    assert printed["estimate"]["bins"] == 1_915 and printed["fits"] is True
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_overrides_and_force(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["prepare", str(folder / "dataset.yaml"), "-o", str(out), "--set", "window.bin=64"]
    assert CliRunner().invoke(group, arguments).exit_code == 0
    assert PreparedDataset(out).bin_bp == 64
    made = (out / "targets.h5").stat().st_mtime_ns
    assert CliRunner().invoke(group, [*arguments, "--force"]).exit_code == 0
    assert (out / "targets.h5").stat().st_mtime_ns > made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "dataset.yaml"], "Missing option '-o'"),
        (["prepare", "-o", "out"], "Missing argument"),
        (["check"], "Missing argument"),
        (["check", "dataset.yaml", "--set", "nothing"], "is no override"),
        (["prepare", "dataset.yaml", "-o", "out", "--forse"], "No such option"),
        (["prepare", "dataset.yaml", "-o", "out", "--jobs", "0"], "0 is not in the range x>=1"),
    ],
)
def test_bad_usage_exits_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_bad_data_exits_1_through_the_group_and_the_program(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "peaks.narrowPeak").write_text("")
    arguments = ["prepare", str(folder / "dataset.yaml"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, DataError)
    assert main(arguments) == 1
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ")
    assert sentence.count("\n") == 1
    program = subprocess.run(
        [sys.executable, "-m", "genossm.cli", *arguments], capture_output=True, text=True
    )
    assert (program.returncode, program.stdout, program.stderr) == (1, "", sentence)
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_yaml_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["check", "none.yaml"], ["prepare", "none.yaml", "-o", str(tmp_path / "out")]):
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith(
            "error: cannot read the configuration none.yaml: No such file"
        )


def test_the_commands_import_no_torch() -> None:
    code = (
        "import sys\n"
        "import genossm.cli.check, genossm.cli.prepare\n"
        "assert not {'torch', 'pandas', 'h5py', 'numpy'} & set(sys.modules)\n"
        "import genossm.pipelines.prepare\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
