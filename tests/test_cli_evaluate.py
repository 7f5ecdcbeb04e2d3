"""`genossm evaluate` against the function it calls: table, JSON, files, exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from genossm import checkpoint
from genossm.cli import main
from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.heads import TrackHead
from genossm.models.stem import StemConfig
from genossm.pipelines.evaluate import evaluate
from genossm.pipelines.prepare import prepare


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared dataset `data` and two untrained runs `run1`, `run2`."""
    folder = tmp_path_factory.mktemp("cli-evaluate")
    shutil.copytree(tiny_folder, folder / "tiny")
    data = prepare(folder / "tiny" / "dataset.yaml", folder / "data")
    stem = StemConfig(channels=(4, 4, 4, 8), pool=(4, 2, 2, 2))
    config = ModelConfig(
        EncoderConfig(width=8, pattern=("mamba2",), stem=stem, state=4, head_dim=8), head_hidden=8
    )
    heads = [TrackHead("peaks", "peaks", "bce"), TrackHead("signal", "signal", "poisson", "sum")]
    for number in (1, 2):
        torch.manual_seed(number)
        model = AccessibilityModel(
            config, heads, window_bp=data.window_bp, margin_bp=data.margin_bp, assembly=data.assembly
        )
        checkpoint.save(model, folder / f"run{number}" / checkpoint.MODEL_FILE)
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return ["evaluate", str(folder / "run1"), "--dataset", str(folder / "data"), "--device", "cpu", *more]


def test_json_equals_the_function(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--split", "valid", "-o", str(tmp_path / "scores"), "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    table = evaluate(folder / "run1", folder / "data", split="valid", device="cpu")
    assert [row["track"] for row in result["rows"]] == ["peaks", "signal", "mean"]
    for row, expected in zip(result["rows"], table.to_dict(orient="records"), strict=True):
        for name in ("bins", "positive_rate", "auroc", "auprc", "pearson", "spearman"):
            if expected[name] == expected[name]:
                assert row[name] == pytest.approx(expected[name])
            else:
                assert row[name] is None
    record = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert record["models"] == [str(folder / "run1")] and (tmp_path / "scores" / "metrics.tsv").is_file()


def test_text_is_a_table_and_the_device_comes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--split", "valid", "--resolution", "200", "--track", "peaks")) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == [
        "track",
        "kind",
        "bins",
        "positive_rate",
        "auroc",
        "auprc",
        "pearson",
        "spearman",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["peaks", "mean"]
    assert lines[1].split()[2] == str(-(-20_011 // 200)) and lines[1].split()[-1] == "-"
    assert captured.err.splitlines()[0].startswith("evaluating on CPU")


def test_several_runs_are_an_ensemble(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(folder, "--split", "valid", "--json")
    assert main([*words[:2], str(folder / "run2"), *words[2:]]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    table = evaluate([folder / "run1", folder / "run2"], folder / "data", split="valid", device="cpu")
    assert rows[0]["auprc"] == pytest.approx(table.loc[0, "auprc"])


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--split", "tests"], 2, "'tests' is not one of"),
        (["--resolution", "0"], 2, "0 is not in the range"),
        (["--resolution", "16"], 1, "error: resolution 16 bp is finer than the 32-bp bins"),
        (["--track", "peeks"], 1, "has no track peeks"),
        (["--dataset", "nowhere"], 1, "nowhere is no prepared dataset"),
    ],
)
def test_bad_usage_is_2_and_bad_data_is_1(
    folder: Path, more: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, *more)) == status
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_a_run_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(folder)
    words[1] = str(folder / "run9")
    assert main(words) == 1
    assert "there is no trained model at" in capsys.readouterr().err
    assert main(["evaluate", "--dataset", str(folder / "data")]) == 2
