"""`genossm predict` against the Python call, what it prints, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from genossm.checkpoint import load, save
from genossm.cli import main
from genossm.genome import Genome
from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.heads import TrackHead
from genossm.models.stem import StemConfig
from genossm.pipelines.predict import predict

OUTPUTS = ("peaks.bw", "cuts.bw", "peaks.narrowPeak")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    encoder = EncoderConfig(
        width=16, pattern=("mamba2",), stem=StemConfig(channels=(8, 8, 8, 8)), state=8, head_dim=8
    )
    tracks = [TrackHead("peaks", "peaks", "bce"), TrackHead("cuts", "signal", "poisson", "sum", mean=2.0)]
    model = AccessibilityModel(
        ModelConfig(encoder, head_hidden=16), tracks, window_bp=4096, margin_bp=512, threshold={"peaks": 0.3}
    )
    with torch.no_grad():
        model.heads.output.weight.mul_(50)
    folder = tmp_path_factory.mktemp("run")
    save(model, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def fasta(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(tiny_folder / "genome.fa", tmp_path_factory.mktemp("fasta")))


def test_the_command_equals_the_python_call(
    run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cli"
    arguments = [
        "predict",
        str(run_folder),
        "--genome",
        str(fasta),
        "-o",
        str(out),
        "--device",
        "cpu",
        "--call-peaks",
    ]
    assert main([*arguments, "--chrom", "chrB", "--chrom", "chrC", "--batch-size", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("predict on CPU")
    assert "peaks.bw" in shown.out and "regions at 0.3 or more" in shown.out
    chroms = ["chrB", "chrC"]
    by_path = predict(
        run_folder, fasta, tmp_path / "api", chroms=chroms, device="cpu", call_peaks=True, batch_size=4
    )
    model, genome = load(run_folder), Genome(fasta)
    loaded = predict(
        model, genome, tmp_path / "loaded", chroms=chroms, device="cpu", call_peaks=True, batch_size=4
    )
    for name in OUTPUTS:
        assert (out / name).read_bytes() == (by_path.folder / name).read_bytes()
        assert (out / name).read_bytes() == (loaded.folder / name).read_bytes()
    identities = [
        json.loads((folder / "run.json").read_text())["identity"] for folder in (out, loaded.folder)
    ]
    assert identities[0] == identities[1]


def test_json_regions_bed_and_arrays(
    run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--json", "predict", str(run_folder), "--genome", str(fasta), "--device", "cpu"]
    (tmp_path / "x.bed").write_text("chrC\t0\t64\n")
    regions = ["--region", "chrA:1,000-1,064", "--region", "chrB:0-1", "--bed", str(tmp_path / "x.bed")]
    assert main([*start, "-o", str(tmp_path / "out"), *regions, "--hdf5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["bins"], result["gap_bins"], result["bases"]) == (6, 0, 192)
    assert [Path(file).name for file in result["files"]] == [
        "peaks.bw",
        "cuts.bw",
        "predictions.h5",
        "qc.bed",
    ]
    assert result["tracks"]["cuts"]["kind"] == "signal"


def test_overlap_and_what_it_will_cost(
    run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--json", "predict", str(run_folder), "--genome", str(fasta), "--device", "cpu"]
    command = [*start, "-o", str(tmp_path / "out"), "--overlap", "1536", "--batch-size", "4"]
    assert main([*start, "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    plain = json.loads(capsys.readouterr().out)["estimate"]
    assert main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"]["windows"] > 1.7 * plain["windows"]
    assert main([*command, "--devices", "cpu,cpu"]) == 0  # processes that are told by words
    by_call = predict(run_folder, fasta, tmp_path / "api", overlap_bp=1536, device="cpu", batch_size=4)
    for name in ("peaks.bw", "cuts.bw"):
        assert (tmp_path / "out" / name).read_bytes() == (by_call.folder / name).read_bytes()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["overlap_bp"] == record["identity"]["overlap_bp"] == 1536
    capsys.readouterr()
    assert main([*start, "-o", str(tmp_path / "compare"), "--overlap", "64", "--compare"]) == 0
    assert json.loads(capsys.readouterr().out)["overlap_bp"] == 64


def test_sequences(run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["predict", str(run_folder), "--sequences", str(fasta), "-o", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == ["run.json", "sequences.h5"]
    assert "sequences.h5" in capsys.readouterr().out


def test_whole_chromosomes(
    run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, spill = tmp_path / "out", tmp_path / "spill"
    spill.mkdir()
    start = ["predict", str(run_folder), "--genome", str(fasta), "-o", str(out), "--device", "cpu"]
    command = [*start, "--chrom", "chrC", "--mode", "chromosome"]
    assert main([*command, "--chunk-bp", "4096", "--spill", str(spill), "--call-peaks"]) == 0
    assert "peaks.bw" in capsys.readouterr().out
    by_call = predict(
        run_folder,
        fasta,
        tmp_path / "api",
        chroms="chrC",
        device="cpu",
        mode="chromosome",
        chunk_bp=4096,
        call_peaks=True,
    )
    for name in OUTPUTS:
        assert (out / name).read_bytes() == (by_call.folder / name).read_bytes()
    record = json.loads((out / "run.json").read_text())
    assert (record["mode"], record["chunk_bp"], record["batch_size"]) == ("chromosome", 4096, None)
    assert not list(spill.iterdir())
    assert main([*start, "--chrom", "chrC"]) == 1  # by windows, the values are others
    assert "holds a prediction of another model" in capsys.readouterr().err


def test_attention_to_everything_cannot_run_by_chunks(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = StemConfig(channels=(8, 8, 8, 8))
    encoder = EncoderConfig(width=16, pattern=("attention",), stem=stem, head_dim=8, window=None)
    tracks = [TrackHead("peaks", "peaks", "bce")]
    model = AccessibilityModel(ModelConfig(encoder, head_hidden=16), tracks, window_bp=4096, margin_bp=512)
    (tmp_path / "run").mkdir()
    save(model, tmp_path / "run" / "model.safetensors")
    command = ["predict", str(tmp_path / "run"), "--genome", str(fasta), "-o", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu", "--mode", "chromosome"]) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "the mode chromosome does not suit this model: attention with window None" in shown
    assert "Traceback" not in shown and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "status", "message"),
    [
        (
            ["--region", "A:0-100"],
            1,
            "error: the region 'A:0-100' names A, which the genome does not have: write chrA for A",
        ),
        (["--chrom", "chrZ"], 1, "error: the request names chrZ, which the genome does not have"),
        (["--threshold", "0.5"], 2, "--threshold needs --call-peaks"),
        (["--threshold", "2", "--call-peaks"], 2, "2.0 is not in the range 0<=x<=1"),
        (["--chrom", "chrA", "--region", "chrA:1-9"], 2, "either --chrom or --region"),
        (["--mode", "tiles"], 2, "Invalid value for '--mode'"),
        (["--chunk-bp", "4096"], 2, "--chunk-bp needs --mode chromosome"),
        (
            ["--mode", "chromosome", "--chunk-bp", "100"],
            1,
            "it must be a multiple of the model's bin of 32 bp",
        ),
        (["--mode", "chromosome", "--spill", "/nowhere"], 2, "Invalid value for '--spill'"),
        (
            ["--overlap", "100"],
            1,
            "overlap of 100 bp: it must be a multiple of the bin (32 bp) from 0 to 1536 bp",
        ),
        (["--overlap", "64", "--mode", "chromosome"], 2, "--overlap needs --mode windows"),
        (["--overlap", "-32"], 2, "Invalid value for '--overlap'"),
        (["--batch-size", "0"], 2, "Invalid value for '--batch-size'"),
        (["--sequences", "x.fa"], 2, "give one of --genome FASTA and --sequences FASTA"),
    ],
)
def test_bad_input_is_a_sentence(
    run_folder: Path,
    fasta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    status: int,
    message: str,
) -> None:
    out = tmp_path / "out"
    start = ["predict", str(run_folder), "--genome", str(fasta), "-o", str(out), "--device", "cpu"]
    assert main([*start, *extra]) == status
    shown = capsys.readouterr().err
    assert message in shown.replace("\n", " ")
    assert "Traceback" not in shown
    assert not out.exists()


def test_a_folder_of_another_run_is_refused(
    run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["predict", str(run_folder), "--genome", str(fasta), "-o", str(tmp_path), "--device", "cpu"]
    assert main([*start, "--chrom", "chrC"]) == 0
    assert main([*start, "--chrom", "chrB"]) == 1
    assert "holds a prediction of another model, genome or selection" in capsys.readouterr().err
    assert main([*start, "--chrom", "chrB", "--force"]) == 0


def test_no_model_no_genome(
    run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["predict", str(tmp_path / "none"), "--genome", str(fasta), *out]) == 1
    assert main(["predict", str(run_folder), "--genome", str(tmp_path / "none.fa"), *out]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "no trained model" in errors[0] and "none.fa" in errors[1]
    assert main(["predict", str(run_folder), *out]) == 2
    assert "give one of --genome FASTA and --sequences FASTA" in capsys.readouterr().err


def test_a_damaged_output_is_made_again_and_force_always_does(
    run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["predict", str(run_folder), "--genome", str(fasta), "-o", str(out), "--device", "cpu"]
    assert main(command) == 0
    bigwig = next(out.glob("*.bw"))
    whole = bigwig.read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert "already holds this prediction" in capsys.readouterr().err
    bigwig.write_bytes(whole[:1000])
    assert main(command) == 0
    assert bigwig.read_bytes() == whole
    capsys.readouterr()
    assert main([*command, "--force"]) == 0
    assert "already holds" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dataset.json", "config.yaml"])
def test_predictions_do_not_go_into_a_dataset_or_a_run(
    run_folder: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    assert main(["predict", str(run_folder), "--genome", str(fasta), "-o", str(out), "--device", "cpu"]) == 1
    assert "is a dataset or a run" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name]


def test_records_that_cannot_be_groups_are_refused_before_computing(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "s.fa"
    records.write_text(">a/b\nACGTACGT\n>a\nACGT\n")
    out = tmp_path / "out"
    assert (
        main(["predict", str(run_folder), "--sequences", str(records), "-o", str(out), "--device", "cpu"])
        == 1
    )
    assert "the record 'a/b'" in capsys.readouterr().err
    assert not out.exists()
