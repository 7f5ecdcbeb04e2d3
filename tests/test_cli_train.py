"""`genossm train` at the command line equals `genossm.train`, and tells what is wrong in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import genossm as gs
from genossm.cli import main

CONFIG = """\
model:
  encoder: {width: 16, pattern: [mamba2], stem: {channels: [8, 8], pool: [8, 4]}, state: 8, head_dim: 16}
  head_hidden: 8
train: {epochs: 1, windows_per_epoch: 4, batch_size: 2, workers: 0, loggers: [csv]}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `genossm ARGUMENTS`."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_trains_as_the_function_does(
    config: Path, tiny_prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(
        capsys,
        "--json",
        "train",
        config,
        "--dataset",
        tiny_prepared,
        "-o",
        tmp_path / "a",
        "--device",
        "cpu",
        "--seed",
        "4",
    )
    assert status == 0 and err.startswith("device: CPU")
    result = json.loads(out)
    run = gs.train(config, tiny_prepared, tmp_path / "b", device="cpu", seed=4)
    assert result["run"] == str(tmp_path / "a")
    assert result["score"] == pytest.approx(run.best_score) and result["best_epoch"] == run.best_epoch


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--set", "train.epoch=3"], 1, "unknown key 'epoch' in"),
        (["--set", "train.epochs=0"], 1, "epochs is 0; it must be at least 1"),
        (["--set", "epochs"], 2, "no override"),
        (["--device", "tpu"], 2, "is no device"),
        (["--genome", "/nowhere.fa"], 1, "/nowhere.fa"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(
    config: Path,
    tiny_prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    got, out, err = call(
        capsys, "train", config, "--dataset", tiny_prepared, "-o", tmp_path / "run", *device, *arguments
    )
    assert got == status and out == "" and words in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_without_cuda_auto_stops_with_a_sentence(
    config: Path,
    tiny_prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = call(capsys, "train", config, "--dataset", tiny_prepared, "-o", tmp_path / "run")
    assert status == 1 and "--device cpu" in err and not (tmp_path / "run").exists()
