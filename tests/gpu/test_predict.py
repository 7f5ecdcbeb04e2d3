"""On a CUDA device: prediction against the CPU, from end to end; chunks, shards, several devices, estimates, a killed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch

from genossm import checkpoint
from genossm.genome import Genome
from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.heads import TrackHead
from genossm.pipelines import plan as plan_module
from genossm.pipelines.chromosome import predict_chromosomes
from genossm.pipelines.merge import merge
from genossm.pipelines.predict import predict
from genossm.pipelines.predict_estimate import estimate
from genossm.pipelines.windowed import predict_chromosome
from genossm.windows import Window

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> AccessibilityModel:
    """Random weights, with outputs spread widely enough for rounding to show."""
    torch.manual_seed(3)
    tracks = [
        TrackHead("peaks", "peaks", "bce"),
        TrackHead("cuts", "signal", "poisson", "sum", mean=2.0),
    ]
    encoder = EncoderConfig(width=64, pattern=("mamba2", "mamba2"), state=16, head_dim=32)
    model = AccessibilityModel(ModelConfig(encoder, head_hidden=32), tracks, window_bp=8192, margin_bp=1024)
    with torch.no_grad():
        model.heads.output.weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    bases = np.random.default_rng(2).choice(np.frombuffer(b"ACGT", "S1"), 200_005)
    bases[50_000:70_000] = b"N"
    path.write_text(f">chr1\n{bases.tobytes().decode()}\n")
    return Genome(path)


def test_cuda_equals_the_cpu_whatever_the_batch_size(model: AccessibilityModel, genome: Genome) -> None:
    exact = predict_chromosome(model, genome, "chr1", device="cpu")
    assert np.nanstd(exact[:, 0]) > 0.005
    for batch_size in (1, 3, 64):
        found = predict_chromosome(model, genome, "chr1", batch_size=batch_size, device="cuda")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
        np.testing.assert_allclose(found[:, 0], exact[:, 0], rtol=0, atol=0.02)  # convolutions in TF32


Arrays = dict[str, npt.NDArray[np.float32]]


def arrays_of(folder: Path) -> Arrays:
    with h5py.File(folder / "predictions.h5") as arrays:
        return {chrom: arrays[chrom]["predictions"][:] for chrom in arrays}


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but run.json, which tells the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cuda", 4)


@pytest.fixture(scope="module")
def run(model: AccessibilityModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as other processes load it."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(model, folder / checkpoint.MODEL_FILE)
    return folder


@pytest.mark.parametrize("mode", ["windows", "chromosome"])
@pytest.mark.usefixtures("exact")
def test_from_end_to_end_it_is_the_cpu(
    model: AccessibilityModel, genome: Genome, tmp_path: Path, mode: str
) -> None:
    given: dict[str, Any] = {"mode": mode, "hdf5": True, "hdf5_dtype": "float32"}
    on_cpu = predict(model, genome, tmp_path / "cpu", device="cpu", precision="float32", **given)
    wanted = arrays_of(on_cpu.folder)["chr1"]
    spread = np.nanstd(wanted, axis=0)
    for precision, tolerance in (("float32", 1e-4), ("bf16", None)):
        result = predict(model, genome, tmp_path / precision, device="cuda", precision=precision, **given)
        found = arrays_of(result.folder)["chr1"]
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        assert result.summary["gap_bins"] == on_cpu.summary["gap_bins"] > 0
        far = np.nanmax(np.abs(found - wanted), axis=0)
        if tolerance is None:  # of single values bf16 keeps two digits or three
            assert (np.sqrt(np.nanmean((found - wanted) ** 2, axis=0)) < 0.2 * spread).all()
        else:
            assert (far < tolerance * np.nanmax(np.abs(wanted), axis=0)).all()
        record = (result.folder / "run.json").read_text()
        assert f'"precision": "{precision}"' in record
    assert not (files_of(tmp_path / "bf16")["peaks.bw"] == files_of(tmp_path / "float32")["peaks.bw"])


@pytest.mark.parametrize("pattern", [("mamba2",), ("mamba",), ("mamba2", "attention")], ids="-".join)
@pytest.mark.usefixtures("exact")
def test_chunks_of_64_and_256_kb_and_one_pass_agree(pattern: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(5)
    length_bp = 600_011
    dice = np.random.default_rng(9)
    bases = dice.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
    (tmp_path / "g.fa").write_bytes(b">chr\n" + bases.tobytes() + b"\n")
    encoder = EncoderConfig(width=64, pattern=pattern, state=16, head_dim=32, window=65)
    heads = [TrackHead("peaks", "peaks", "bce")]
    model = AccessibilityModel(ModelConfig(encoder, head_hidden=32), heads, window_bp=8192, margin_bp=1024)
    with torch.no_grad():
        model.heads.output.weight.mul_(20)
    model = model.cuda().eval()
    trunk_bp = model.encoder.trunk_bp
    values = []
    for chunk_bp in (1 << 16, 1 << 18, -(-length_bp // trunk_bp) * trunk_bp):
        (found,) = predict_chromosomes(
            model,
            Genome(tmp_path / "g.fa"),
            [Window("chr", 0, length_bp)],
            chunk_bp=chunk_bp,
            device=torch.device("cuda"),
            overflow=tmp_path,
        )
        values.append(found)
    assert values[-1].std() > 0.005
    for found in values[:-1]:
        np.testing.assert_allclose(found, values[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["windows", "chromosome"])
@pytest.mark.usefixtures("_small_parts")
def test_four_shards_are_one_run_byte_for_byte(
    model: AccessibilityModel, genome: Genome, tmp_path: Path, mode: str
) -> None:
    given: dict[str, Any] = {"mode": mode, "hdf5": True, "device": "cuda", "batch_size": 3}
    for index in (3, 1, 4, 2):
        predict(model, genome, tmp_path / "out", shard=f"{index}/4", **given)
    merge(tmp_path / "out")
    predict(model, genome, tmp_path / "whole", **given)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one CUDA device: two are needed")
def test_two_devices_share_a_prediction(run: Path, genome: Genome, tmp_path: Path) -> None:
    given: dict[str, Any] = {"hdf5": True, "batch_size": 4}
    both = predict(run, genome, tmp_path / "both", devices=["cuda:0", "cuda:1"], **given)
    one = predict(run, genome, tmp_path / "one", device="cuda:0", **given)
    assert both.summary["bins"] == one.summary["bins"]
    for chrom, values in arrays_of(both.folder).items():
        np.testing.assert_array_equal(values, arrays_of(one.folder)[chrom])


@pytest.mark.parametrize("mode", ["windows", "chromosome"])
def test_the_estimate(model: AccessibilityModel, genome: Genome, tmp_path: Path, mode: str) -> None:
    expected = estimate(model, genome, tmp_path / "out", mode=mode, device="cuda")
    assert expected.device_bytes is not None and 1 << 20 < expected.device_bytes < 1 << 34
    assert expected.compute_seconds > 0 and expected.fits and expected.precision == "bf16"
    assert expected.bases == 200_005 and "on the device" in expected.text()
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from genossm.pipelines import plan
from genossm.pipelines.parts import Parts
from genossm.pipelines.predict import predict
plan.SMALLEST_PART_WINDOWS["cuda"] = 4
write = Parts._write
def slow(self, index, values):
    if index == 2:
        time.sleep(120)
    write(self, index, values)
Parts._write = slow
predict({run!r}, {genome!r}, {out!r}, device="cuda", hdf5=True, batch_size=4)
"""


@pytest.mark.usefixtures("_small_parts")
def test_a_killed_run_goes_on(
    run: Path, genome: Genome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    names = {"run": str(run), "genome": str(genome.path), "out": str(out)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED.format(**names)], stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while len(list(out.glob(".parts/*.safetensors"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    given: dict[str, Any] = {"device": "cuda", "hdf5": True, "batch_size": 4}
    predict(run, genome, out, **given)
    assert "used 2 finished parts of an interrupted run" in capsys.readouterr().err
    predict(run, genome, tmp_path / "whole", **given)
    assert files_of(out) == files_of(tmp_path / "whole")
