"""Correlation of a prediction with measured bigWigs, against numpy over the bins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyBigWig
import pytest

from genossm.errors import DataError, FileError
from genossm.genome import Genome
from genossm.pipelines.collect import PredictionResult
from genossm.pipelines.correlate import Correlations, correlate
from genossm.pipelines.predict import predict
from tests.test_predict import BIN_BP, CountingModel, expected

LENGTHS = {"chrA": 5_000, "chrB": 3_210, "chrC": 900}


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    folder = tmp_path_factory.mktemp("genome")
    dice = np.random.default_rng(2)
    with (folder / "g.fa").open("w") as handle:
        for chrom, length_bp in LENGTHS.items():
            bases = dice.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
            bases[100:300] = b"N"
            handle.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    return Genome(folder / "g.fa")


@pytest.fixture(scope="module")
def predicted(genome: Genome, tmp_path_factory: pytest.TempPathFactory) -> PredictionResult:
    return predict(CountingModel(), genome, tmp_path_factory.mktemp("out"), device="cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A bigWig of a value per base on two of the chromosomes, 0 beyond what it lists."""
    path = tmp_path_factory.mktemp("measured") / "x.bw"
    dice, bases = np.random.default_rng(4), {}
    with pyBigWig.open(str(path), "w") as handle:
        handle.addHeader([(chrom, LENGTHS[chrom]) for chrom in ("chrA", "chrB")])
        for chrom in ("chrA", "chrB"):
            bases[chrom] = np.zeros(LENGTHS[chrom])
            bases[chrom][:2_000] = dice.random(2_000).astype(np.float32)
            handle.addEntries(chrom, 0, values=bases[chrom][:2_000], span=1, step=1)
    return path, bases


def test_every_track_and_chromosome(
    genome: Genome,
    predicted: PredictionResult,
    measured: tuple[Path, dict[str, np.ndarray]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, bases = measured
    found = correlate(predicted.folder, [str(path)])
    assert "lacks 1 of 3 chromosomes: chrC" in capsys.readouterr().err
    assert [(row.track, row.chrom) for row in found.rows] == [
        (track, chrom) for track in ("gc", "a_count") for chrom in ("chrA", "chrB")
    ]
    for row in found.rows:
        starts = np.arange(0, LENGTHS[row.chrom], BIN_BP)
        truth = np.add.reduceat(bases[row.chrom], starts)
        if row.track == "gc":  # peaks: the mean, also of the shorter last bin
            truth /= np.diff(np.append(starts, LENGTHS[row.chrom]))
        values = expected(genome, row.chrom)[:, ["gc", "a_count"].index(row.track)]
        there = ~np.isnan(values)
        assert row.bins == there.sum() < len(values)
        pair = pd.DataFrame({"truth": truth[there], "values": values[there]})
        assert row.pearson == pytest.approx(pair.corr().iloc[0, 1], abs=1e-5)
        assert row.spearman == pytest.approx(pair.corr("spearman").iloc[0, 1], abs=1e-5)
    assert "chrB" in found.text() and "Pearson" in found.text()


def test_one_track(predicted: PredictionResult, measured: tuple[Path, dict[str, np.ndarray]]) -> None:
    found = correlate(predicted.folder, [f"a_count={measured[0]}"])
    assert {row.track for row in found.rows} == {"a_count"}
    itself = correlate(predicted.folder, [f"gc={predicted.folder / 'gc.bw'}"])
    assert [row.pearson for row in itself.rows] == pytest.approx([1, 1, 1], abs=1e-6)
    assert len(Correlations(itself.rows * 40).text().splitlines()) == 62


def test_what_cannot_be_compared(predicted: PredictionResult, genome: Genome, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names no track: write track=file\.bw with one of gc, a_count"):
        correlate(predicted.folder, ["gcc=x.bw"])
    with pytest.raises(FileError):
        correlate(predicted.folder, ["none.bw"])
    with pytest.raises(DataError, match="holds no finished prediction"):
        correlate(tmp_path, ["none.bw"])
    with pyBigWig.open(str(tmp_path / "other.bw"), "w") as handle:
        handle.addHeader([("A", 5_000)])
        handle.addEntries("A", 0, values=[1.0], span=1, step=1)
    with pytest.raises(DataError, match="none of the predicted chromosomes"):
        correlate(predicted.folder, [str(tmp_path / "other.bw")])
    predict(CountingModel(), None, tmp_path / "out", sequences=genome.path, device="cpu")
    with pytest.raises(DataError, match="sequences without coordinates"):
        correlate(tmp_path / "out", ["none.bw"])
