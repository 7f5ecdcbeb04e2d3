"""`genossm predict --shard` and `genossm merge`: what they print, and their exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from genossm.checkpoint import save
from genossm.cli import main
from genossm.errors import ConfigError
from genossm.pipelines.predict import predict
from tests.test_predict import tiny_model


@pytest.fixture(scope="module")
def start(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command on two runs and a genome, without the folder."""
    folder = tmp_path_factory.mktemp("runs")
    fasta = shutil.copy(tiny_folder / "genome.fa", folder / "genome.fa")
    shutil.copy(tiny_folder / "signal.bw", folder / "signal.bw")
    for seed in (1, 2):
        save(tiny_model(seed), folder / f"run{seed}" / "model.safetensors")
    runs = [str(folder / "run1"), str(folder / "run2")]
    return ["predict", *runs, "--genome", str(fasta), "--device", "cpu"]


def test_shards_and_merge(start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, signal = str(tmp_path / "out"), str(Path(start[1]).parent / "signal.bw")
    assert main([*start, "-o", out, "--shard", "2/2", "--hdf5", "--call-peaks"]) == 0
    assert f"when all shards are done: genossm merge {out}" in capsys.readouterr().out
    assert main(["merge", out]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "error: 4 of 8 parts of" in told and "--call-peaks --shard 1/2, then merge again" in told
    command = told.partition("Make them with: genossm ")[2].partition(", then merge")[0]
    assert main(command.split()) == 0  # the command that the message names
    capsys.readouterr()
    assert main(["merge", out, "--reference", f"cuts={signal}"]) == 0
    shown = capsys.readouterr()
    assert "peaks.bw" in shown.out and "cuts                 chrA" in shown.out
    assert "lacks 1 of 3 chromosomes: chrC" in shown.err
    assert main(["--json", "merge", out]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bins"] == 1250 + 626 + 39 and result["tracks"]["peaks"]["regions"] >= 0
    whole = str(tmp_path / "whole")
    assert main(["--json", *start, "-o", whole, "--hdf5", "--call-peaks", "--reference", signal]) == 0
    reference = json.loads(capsys.readouterr().out)["reference"]
    assert [(row["track"], row["chrom"]) for row in reference][:2] == [("peaks", "chrA"), ("peaks", "chrB")]
    for name in ("peaks.bw", "cuts.bw", "predictions.h5", "peaks.narrowPeak", "qc.bed"):
        assert (Path(out) / name).read_bytes() == (Path(whole) / name).read_bytes()


def test_a_process_for_each_device(
    start: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    both = [*start, "--devices", "cpu,cpu", "--chrom", "chrA"]
    assert main([*both, "-o", str(tmp_path / "both")]) == 0
    assert main([*start, "-o", str(tmp_path / "one"), "--chrom", "chrA"]) == 0
    for name in ("peaks.bw", "cuts.bw"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    record = json.loads((tmp_path / "both" / "run.json").read_text())
    assert [shard["shard"] for shard in record["shards"]] == ["1/2", "2/2"]
    capfd.readouterr()
    assert main([*both, "-o", str(tmp_path / "shard"), "--shard", "2/2"]) == 0
    assert capfd.readouterr().out.startswith("shard 2/2: 3 parts")
    assert {path.name for path in (tmp_path / "shard" / ".parts").glob("shard-*")} == {
        "shard-3-of-4.json",
        "shard-4-of-4.json",
    }
    failing = [*start, "--devices", "cpu,cuda:99", "-o", str(tmp_path / "failing"), "--chrom", "chrA"]
    assert main(failing) == 1
    assert "the prediction failed on cuda:99 (exit status 1)" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="not models in memory"):
        predict(tiny_model(), start[4], tmp_path / "memory", devices=["cpu", "cpu"])


def test_dry_run_and_compare(start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*start, "-o", str(out), "--dry-run", "--shard", "1/2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("shard 1/2: 32 windows, 32,768 bp of 1 chromosomes") and "memory: about" in shown
    assert main(["--json", *start, "-o", str(out), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"]["windows"] == 62
    assert not out.exists()
    assert main([*start, "-o", str(out), "--compare", "--chrom", "chrB"]) == 0
    assert "chromosome end" in capsys.readouterr().out
    assert (out / "compare.json").is_file()


@pytest.mark.parametrize(
    ("extra", "status", "message"),
    [
        (["--shard", "5/4"], 2, "the shard 5/4 is not there: give i/n with i from 1 to n"),
        (["--shard", "two"], 2, "the shard 'two' is none"),
        (["--shard", "1/2", "--reference", "x.bw"], 2, "a shard writes no files"),
        (["--compare", "--region", "chrA:0-10"], 2, "--compare takes --chrom"),
        (["--precision", "tf32"], 2, "Invalid value for '--precision'"),
        (["--hdf5-dtype", "int8"], 2, "Invalid value for '--hdf5-dtype'"),
    ],
)
def test_bad_usage(
    start: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    status: int,
    message: str,
) -> None:
    out = tmp_path / "out"
    assert main([*start, "-o", str(out), *extra]) == status
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_nothing_to_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path)]) == 1
    assert "holds no parts of a prediction" in capsys.readouterr().err
    assert main(["merge"]) == 2
