"""How far `windows` is from `chromosome`: the table against the values of both modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from genossm.errors import ConfigError
from genossm.genome import Genome
from genossm.pipelines.predict import predict
from genossm.pipelines.predict_compare import compare_modes
from tests.test_predict import BIN_BP, tiny_model

WINDOW_BP, MARGIN_BP = 2048, 512


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    folder = tmp_path_factory.mktemp("genome")
    dice = np.random.default_rng(8)
    with (folder / "g.fa").open("w") as handle:
        for chrom, length_bp in {"chrA": 9_990, "chrB": 700, "chrC": 3_000}.items():
            bases = dice.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
            if chrom == "chrC":
                bases[1_000:1_500] = b"N"
            handle.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    return Genome(folder / "g.fa")


def values_of(genome: Genome, out: Path, **options: Any) -> dict[str, np.ndarray]:
    predict(tiny_model(), genome, out, device="cpu", hdf5=True, hdf5_dtype="float32", **options)
    with h5py.File(out / "predictions.h5") as arrays:
        return {chrom: arrays[chrom]["predictions"][:] for chrom in arrays}


def test_the_table_is_that_of_both_modes(genome: Genome, tmp_path: Path) -> None:
    report = compare_modes(tiny_model(), genome, tmp_path / "out", device="cpu")
    by_windows = values_of(genome, tmp_path / "windows")
    whole = values_of(genome, tmp_path / "whole", mode="chromosome")
    found: dict[tuple[str, int | None, int | None], list[float]] = {}
    for chrom, values in whole.items():
        length_bp = genome.lengths[chrom]
        for number, row in enumerate(np.abs(by_windows[chrom].astype(np.float64) - values)):
            if np.isnan(row[0]):
                continue
            start = number * BIN_BP
            window = start // (WINDOW_BP - 2 * MARGIN_BP) * (WINDOW_BP - 2 * MARGIN_BP) - MARGIN_BP
            edges = [start - window] if window > 0 else []
            if window + WINDOW_BP < length_bp:
                edges.append(window + WINDOW_BP - start - BIN_BP)
            from_end = min(number, len(values) - 1 - number)
            if from_end < MARGIN_BP // BIN_BP:
                found.setdefault(("chromosome end", None, None), []).append(row[0])
            elif not edges:
                found.setdefault(("no edge", None, None), []).append(row[0])
            else:
                step = (WINDOW_BP // 2 - MARGIN_BP) // 8
                group = min((min(edges) - MARGIN_BP) // step, 7)
                high = MARGIN_BP + (group + 1) * step if group < 7 else WINDOW_BP - MARGIN_BP
                found.setdefault(("window edge", MARGIN_BP + group * step, high), []).append(row[0])
            found.setdefault(("all", None, None), []).append(row[0])
    rows = [row for row in report.rows if row.track == "peaks"]
    assert {(row.place, row.from_bp, row.to_bp) for row in rows} == set(found)
    assert {row.place for row in rows} == {"window edge", "chromosome end", "all"}
    for row in rows:
        values = np.array(found[row.place, row.from_bp, row.to_bp])
        assert row.bins == values.size
        assert row.mean == pytest.approx(values.mean(), rel=1e-3, abs=1e-7)
        assert row.rms == pytest.approx(np.sqrt((values**2).mean()), rel=1e-3, abs=1e-7)
        assert row.largest == pytest.approx(values.max(), rel=1e-3, abs=1e-7)
    assert rows[-1].largest > 1e-6  # two modes, two results
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == json.loads(
        json.dumps(report.to_mapping())
    )
    assert "bp from the edge" in report.text() and "chromosome end" in report.text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.json"]


def test_a_window_that_holds_a_chromosome_has_no_edge(genome: Genome, tmp_path: Path) -> None:
    model = tiny_model(window_bp=8_192, margin_bp=128)
    report = compare_modes(model, genome, tmp_path, chroms=["chrC"], device="cpu")
    assert [row.place for row in report.rows if row.track == "cuts"] == ["no edge", "chromosome end", "all"]


def test_a_model_without_the_mode_chromosome(genome: Genome, tmp_path: Path) -> None:
    import dataclasses

    from genossm.models.accessibility import AccessibilityModel

    model = tiny_model()
    encoder = dataclasses.replace(model.config.encoder, pattern=("attention",), window=None)
    config = dataclasses.replace(model.config, encoder=encoder)
    full = AccessibilityModel(config, model.tracks, window_bp=2048, margin_bp=512)
    with pytest.raises(ConfigError, match="the mode chromosome does not suit this model"):
        compare_modes(full, genome, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
