"""`genossm simulate` against the Python call, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genossm.cli import main
from genossm.pipelines.simulate import simulate
from genossm.pipelines.simulate_genome import simulate_sparse


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


def test_a_sparse_genome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "simulate",
        "--sparse",
        "--genome-bp",
        "1e7",
        "--tracks",
        "3",
        "--signals",
        "1",
        "--margin",
        "16384",
    ]
    assert main([*arguments, "-o", str(tmp_path / "a")]) == 0
    assert "10,000,000 bp, 3 tracks, " in capsys.readouterr().out
    simulate_sparse(tmp_path / "b", genome_bp=10_000_000, tracks=3, signals=1)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert main(["--json", *arguments, "-o", str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["tracks"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparse", "--chromosomes", "3"], "--chromosomes has no meaning with --sparse"),
        (["--sparse", "--no-signal"], "--no-signal has no meaning with --sparse"),
        (["--tracks", "3"], "--tracks has no meaning without --sparse"),
        (["--genome-bp", "1e9"], "--genome-bp has no meaning without --sparse"),
    ],
)
def test_options_of_the_other_kind_are_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["simulate", "-o", str(tmp_path / "s"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
