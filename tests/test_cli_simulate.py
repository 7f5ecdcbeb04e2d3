"""`genossm simulate` against the Python call, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genossm.cli import main
from genossm.pipelines.simulate import simulate


def test_the_command_writes_what_the_function_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seed", "5", "--chromosomes", "3", "--chromosome-bp", "30000"]
    assert main(["simulate", "-o", str(tmp_path / "a"), *arguments]) == 0
    assert "% of the genome is open" in capsys.readouterr().out
    simulate(tmp_path / "b", seed=5, chromosomes=3, chromosome_bp=30_000)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert main(["simulate", "-o", str(tmp_path / "c"), "--no-signal", *arguments]) == 0
    assert not (tmp_path / "c" / "signal.bw").exists() and "% of the genome" in capsys.readouterr().out
    assert main(["--json", "simulate", "-o", str(tmp_path / "a"), *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"]["seed"] == 5
    assert set(record["sites"]["promoter"]) == {"open", "closed"}


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate"]) == 2
    assert main(["simulate", "-o", str(tmp_path / "s"), "--chromosomes", "1"]) == 1
    assert "error: chromosomes is 1" in capsys.readouterr().err
    (tmp_path / "x").write_text("")
    assert main(["simulate", "-o", str(tmp_path)]) == 1
    assert "is not a simulation of genossm" in capsys.readouterr().err
