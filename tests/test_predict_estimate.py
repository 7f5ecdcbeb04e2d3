"""What --dry-run expects against what a prediction then does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from genossm.errors import ConfigError
from genossm.genome import Genome
from genossm.pipelines import plan as plan_module
from genossm.pipelines.predict import predict
from genossm.pipelines.predict_estimate import estimate
from tests.test_predict import CountingModel, tiny_model

LENGTHS = {"chrA": 40_000, "chrB": 20_011, "chrC": 1_234}


@pytest.fixture(scope="module")
def genome(tiny_folder: Path) -> Genome:
    return Genome(tiny_folder / "genome.fa")


@pytest.mark.parametrize("mode", ["windows", "chromosome"])
def test_counts_and_sizes_are_those_of_the_prediction(genome: Genome, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "out"
    options = {"mode": mode, "device": "cpu", "hdf5": True}
    expected = estimate(tiny_model(), genome, out, **options)
    assert not out.exists()
    assert (expected.bases, expected.tracks, expected.chroms, expected.shard) == (61_245, 2, 3, None)
    assert expected.windows == (3 if mode == "chromosome" else 40 + 20 + 2)
    assert expected.device_bytes is None and 1e8 < expected.host_bytes < 1e10
    assert expected.fits
    shards = [estimate(tiny_model(), genome, out, shard=f"{i}/3", **options) for i in (1, 2, 3)]
    assert sum(shard.windows for shard in shards) == expected.windows
    assert sum(shard.parts for shard in shards) == expected.parts
    predict(tiny_model(), genome, out, shard="1/2", **options)
    stored = sum(path.stat().st_size for path in out.glob(".parts/*.safetensors"))
    found = estimate(tiny_model(), genome, out, **options)
    assert found.found == len(list(out.glob(".parts/*.safetensors")))
    assert (found.compute_seconds < expected.compute_seconds) or found.found == 0
    assert "are there already" in found.text() or found.found == 0
    result = predict(tiny_model(), genome, out, **options)
    assert stored < expected.parts_bytes + 50_000
    written = sum(path.stat().st_size for path in result.files)
    assert written < expected.output_bytes + 100_000 * len(result.files)  # headers and trees of small files


def test_time_is_about_right(genome: Genome, tmp_path: Path) -> None:
    class Slow(CountingModel):
        def predict(self, tokens: object) -> object:
            time.sleep(0.02)
            return super().predict(tokens)  # type: ignore[arg-type]

    expected = estimate(Slow(), genome, tmp_path / "out", device="cpu", batch_size=4)
    assert 0.9 < expected.compute_seconds / (expected.windows / 4 * 0.02) < 10
    assert "measured on a batch of 4 windows" in expected.text()
    assert "Mbp/s" in expected.text()


def test_a_disk_that_is_too_small_is_told(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genossm.pipelines import predict_estimate

    class Usage:
        free = 1_000

    monkeypatch.setattr(predict_estimate.shutil, "disk_usage", lambda path: Usage)
    # pyBigWig's own check is of the same function: leave the measuring of it out
    monkeypatch.setattr(predict_estimate, "_seconds_a_bin", lambda: 1e-6)
    expected = estimate(CountingModel(), genome, tmp_path / "out", device="cpu")
    assert not expected.fits and "TOO LITTLE" in expected.text()


def test_options_are_checked(genome: Genome, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the shard 3/2 is not there"):
        estimate(CountingModel(), genome, tmp_path, shard="3/2", device="cpu")
    assert plan_module.MOST_PARTS == 2048


@pytest.mark.parametrize(("windows", "batch", "parts"), [(10, 4, 2), (31_500, 4, 1_969), (100_000, 6, 1_852)])
def test_parts_stay_few(windows: int, batch: int, parts: int) -> None:
    size = plan_module.part_size(windows, 1000, 0, whole=False, device="cpu", batch_size=batch)
    assert -(-windows * 1000 // size) == parts <= plan_module.MOST_PARTS
    assert size % (1000 * batch) == 0
