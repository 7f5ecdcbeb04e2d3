"""`genossm compare` at the command line: real processes, exit statuses, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genossm.cli import main
from genossm.pipelines.compare_tables import Comparison, summarise
from genossm.pipelines.compare_trial import Candidate, Trial
from genossm.run_config import RunConfig

CONFIG = """\
model:
  encoder: {width: 16, pattern: [conv], stem: {channels: [8, 8], pool: [8, 4]}}
  head_hidden: 8
train: {epochs: 5, windows_per_epoch: 4, batch_size: 2, workers: 0, loggers: [csv]}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


def test_a_comparison_by_real_processes(
    config: Path, tiny_prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["compare", str(config), "--dataset", str(tiny_prepared), "-o", str(out), "--device", "cpu"]
    words += ["--seeds", "7", "--set", "train.epochs=1", "--json"]
    assert main(words) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["out"] == str(out) and result["failures"] == []
    (row,) = result["runs"]
    assert (row["run"], row["state"], row["steps"]) == ("small-seed7", "done", 2)
    assert 0 < row["test/peaks/auprc"] <= 1 and 0 < row["valid/peaks/auprc"] <= 1
    assert (
        captured.err.startswith("comparing on CPU") and "[1/1] small-seed7: test peaks/auprc" in captured.err
    )
    log = (out / "logs" / "small-seed7.log").read_text()
    assert "device: CPU" in log and "evaluating on CPU" in log and "Traceback" not in log


def test_a_failure_shows_in_the_exit_status(
    config: Path,
    tiny_prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stand_in(configs: object, dataset: object, out: Path, **options: object) -> Comparison:
        assert options["seeds"] == (1, 20) and options["jobs"] == 2 and options["ensembles"] is False
        candidate = Candidate("small", "small.yaml", RunConfig(), 10, 1, 1)
        trial = Trial(candidate, 1, out / "small-seed1", error="it rained")
        return summarise(out, [candidate], [trial.row({})], {}, ["small-seed1: it rained"])

    monkeypatch.setattr("genossm.pipelines.compare.compare", stand_in)
    words = ["compare", str(config), "--dataset", str(tiny_prepared), "-o", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--seeds", "1,20", "--jobs", "2", "--no-ensembles"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "small-seed1: it rained"
    assert captured.err == f"error: 1 failed, see the table; the log is in {tmp_path / 'logs'}\n"


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--seeds", "1-3"], 2, "'1-3' is no list of seeds"),
        (["--jobs", "0"], 2, "0 is not in the range"),
        (["--set", "epochs"], 2, "no override"),
        (["--set", "train.epoch=3"], 1, "unknown key 'epoch' in"),
        (["--seeds", "3,3"], 1, "the seeds are [3, 3]"),
        (["--sites", "nowhere.tsv"], 1, "nowhere.tsv"),
        (["--dataset", "nowhere"], 1, "nowhere is no prepared dataset"),
    ],
)
def test_bad_usage_is_2_and_bad_data_is_1(
    config: Path,
    tiny_prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    status: int,
    words: str,
) -> None:
    out = tmp_path / "out"
    base = ["compare", str(config), "--dataset", str(tiny_prepared), "-o", str(out), "--device", "cpu"]
    assert main([*base, *more]) == status
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and "Traceback" not in captured.err
    assert not out.exists()
