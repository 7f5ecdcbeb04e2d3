"""The benchmark of whole chromosomes: its genome, its loop against `predict`, and its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genossm.errors import ConfigError
from genossm.genome import Genome
from genossm.pipelines import benchmark_predict_tables
from genossm.pipelines.benchmark_predict import (
    PredictBenchmark,
    PredictRow,
    benchmark_predict,
    fit_growth,
    write_random_fasta,
)


@pytest.mark.parametrize("length_bp", [59, 60, 61, 1000, 6_000_123])
def test_a_random_chromosome_has_its_length_and_its_gap(length_bp: int, tmp_path: Path) -> None:
    write_random_fasta(tmp_path / "a.fa", length_bp)
    codes = Genome(tmp_path / "a.fa").chromosome("chr")
    assert len(codes) == length_bp
    absent = np.flatnonzero(codes == 4)
    assert len(absent) == int(0.07 * length_bp)
    assert not len(absent) or absent[-1] - absent[0] + 1 == len(absent)
    counts = np.bincount(codes, minlength=5)[:4]
    assert length_bp < 1000 or (counts > 0.2 * length_bp).all()


def test_every_way_is_measured_and_the_loop_gives_the_same(tmp_path: Path) -> None:
    saved: list[int] = []
    result = benchmark_predict(
        device="cpu",
        config="tiny",
        lengths=(150_000,),
        batch_size=2,
        quick=True,
        folder=tmp_path,
        save=lambda result: saved.append(len(result.rows)),
    )
    assert [row.problem for row in result.rows] == [None] * 4
    assert [row.by for row in result.rows[-2:]] == ["a loop", "Transformer, windows"]
    assert all(row.seconds and row.mbp_per_s and row.host_mib and row.start_s for row in result.rows)
    assert all(
        (row.model_share is not None and 0 < row.model_share) == (row.by != "a loop") for row in result.rows
    )
    assert result.difference is not None and result.difference < 1e-5
    assert saved == [1, 2, 3, 4, 4] and not list(tmp_path.iterdir())
    text = benchmark_predict_tables.text(result)
    assert "quick" in text and "a loop" in text and "150,000" in text
    assert "| 150,000 | Transformer, windows |" in benchmark_predict_tables.markdown(result)


def test_a_cpu_does_no_more_than_a_quick_run() -> None:
    with pytest.raises(ConfigError, match="on a CPU only a quick run is possible"):
        benchmark_predict(device="cpu")


def test_a_failure_and_the_growth_are_told() -> None:
    result = PredictBenchmark("CPU", {}, {"torch": "2"}, "tiny", "float32", 4, False)
    result.rows.append(PredictRow("genossm windows", 1000, problem="FileError: the disk is full"))
    result.growth["genossm windows"] = fit_growth((1_000_000, 2_000_000, 11_000_000), (0.75, 1.0, 3.25))
    text = benchmark_predict_tables.text(result)
    assert (
        "the disk is full" in text
        and "genossm windows 0.50 + 0.2500 per Mb (R2 1.0000; length ** 0.6" in text
    )
