"""The simulated genome: its rules checked against the files themselves, determinism, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyBigWig
import pytest

from genossm.annotations import read_annotations
from genossm.config import load_yaml
from genossm.errors import ConfigError, DataError
from genossm.genome import Genome
from genossm.interval import covered_bases
from genossm.pipelines.grammar import Grammar, load_motifs
from genossm.pipelines.simulate import simulate

LENGTH_BP = 400_000
FILES = ["dataset.yaml", "genome.fa", "peaks.narrowPeak", "signal.bw", "simulation.json", "truth.tsv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("simulate") / "s", seed=3, chromosomes=3, chromosome_bp=LENGTH_BP)


@pytest.fixture(scope="module")
def truth(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "truth.tsv", sep="\t")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, folder: Path) -> None:
    again = simulate(tmp_path / "again", seed=3, chromosomes=3, chromosome_bp=LENGTH_BP)
    other = simulate(tmp_path / "other", seed=4, chromosomes=3, chromosome_bp=LENGTH_BP)
    assert sorted(path.name for path in again.iterdir()) == FILES
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
        assert (other / name).read_bytes() != (folder / name).read_bytes(), name


def test_without_the_signal_all_else_is_the_same(tmp_path: Path, folder: Path) -> None:
    bare = simulate(tmp_path / "bare", seed=3, chromosomes=3, chromosome_bp=LENGTH_BP, signal=False)
    assert sorted(path.name for path in bare.iterdir()) == [name for name in FILES if name != "signal.bw"]
    for name in ("genome.fa", "peaks.narrowPeak", "truth.tsv"):
        assert (bare / name).read_bytes() == (folder / name).read_bytes(), name
    config = load_yaml(bare / "dataset.yaml")
    assert [track["name"] for track in config["tracks"]] == ["peaks"]
    with pytest.raises(DataError, match="other parameters"):
        simulate(bare, seed=3, chromosomes=3, chromosome_bp=LENGTH_BP)


def test_more_chromosomes_leave_the_first_ones_as_they_are(tmp_path: Path, folder: Path) -> None:
    more = simulate(tmp_path / "more", seed=3, chromosomes=4, chromosome_bp=LENGTH_BP)
    assert (more / "genome.fa").read_bytes().startswith((folder / "genome.fa").read_bytes())


def test_the_rules_hold_recomputed_from_the_motifs_in_the_table(truth: pd.DataFrame) -> None:
    for _, table in truth.groupby("chrom"):
        centres = ((table.start + table.end) // 2).to_numpy()
        enhancers = centres[(table.kind == "enhancer").to_numpy()]
        assert enhancers.size
        for row, centre in zip(table.itertuples(), centres, strict=True):
            motifs = [text[:-1].split("@") for text in row.motifs.split(",")]
            names = sorted(name for name, _ in motifs)
            if row.rule == "local":
                span = row.end - row.start
                assert row.open == int(names == ["A", "B"] and span <= 60), row
            elif row.rule == "long_range":
                distances = np.abs(enhancers - centre)
                assert names == ["P"]
                assert row.open == int(((distances >= 10_000) & (distances <= 60_000)).any()), row
                assert row.enhancer_distance_bp in distances
                assert row.open == int(10_000 <= row.enhancer_distance_bp <= 60_000)
            else:
                assert (row.rule, names, row.open) == ("enhancer", ["E"], 1)


def test_both_outcomes_of_each_rule_are_common_and_enhancers_open_on_either_side(truth: pd.DataFrame) -> None:
    share = truth[truth.rule != "enhancer"].groupby("rule").open.agg(["mean", "size"])
    assert set(share.index) == {"local", "long_range"}
    assert share["mean"].between(0.1, 0.9).all()
    assert (share["size"] > 100).all()
    sides = set()
    for _, table in truth.groupby("chrom"):
        enhancers = table[table.kind == "enhancer"].start
        for row in table[(table.rule == "long_range") & (table.open == 1)].itertuples():
            reached = enhancers[(enhancers - row.start).abs().between(10_000, 60_000)]
            sides |= set(np.sign(reached - row.start).tolist()) if len(reached) == 1 else set()
            if (reached > row.start).all() or (reached < row.start).all():
                sides.add(int(np.sign(reached.iloc[0] - row.start)))
    assert sides == {-1, 1}


def test_planted_motifs_are_in_the_sequence(folder: Path, truth: pd.DataFrame, tmp_path: Path) -> None:
    genome = Genome(folder / "genome.fa", cache_dir=tmp_path)
    matrices = load_motifs()
    likelihoods = []
    for row in truth.itertuples():
        for text in row.motifs.split(","):
            name, start, strand = text.split("@")[0], int(text.split("@")[1][:-1]), text[-1]
            matrix = matrices[name]
            assert row.start <= start and start + len(matrix) <= row.end
            codes = genome.window(row.chrom, start, start + len(matrix))
            codes = codes if strand == "+" else (3 - codes)[::-1]
            likelihoods.append(np.log2(matrix[np.arange(len(matrix)), codes] / 0.25).mean())
    assert np.mean(likelihoods) > 1.4  # 2 bits a base at most; the background scores below -1
    assert np.min(likelihoods) >= 0.5 - 1e-9


def test_peaks_are_the_open_regions_and_cuts_pile_up_there(folder: Path, truth: pd.DataFrame) -> None:
    peaks = read_annotations(folder / "peaks.narrowPeak")
    assert peaks.oddities == {}
    positive = 0
    with pyBigWig.open(str(folder / "signal.bw")) as signal:
        assert signal.chroms() == {f"chr{index}": LENGTH_BP for index in (1, 2, 3)}
        for chrom, table in truth.groupby("chrom"):
            opened = table[table.open == 1]
            starts, ends = peaks.on(str(chrom))
            np.testing.assert_array_equal(starts, opened.region_start)
            np.testing.assert_array_equal(ends, opened.region_end)
            positive += int((covered_bases(starts, ends, LENGTH_BP, 32) >= 16).sum())
            cuts = np.nan_to_num(signal.values(str(chrom), 0, LENGTH_BP, numpy=True))
            assert (cuts == np.round(cuts)).all()
            inside = np.zeros(LENGTH_BP, dtype=bool)
            for start, end in zip(starts, ends, strict=True):
                inside[start:end] = True
            assert cuts[inside].mean() > 20 * cuts[~inside].mean() > 0
    assert 0.03 < positive / (3 * LENGTH_BP / 32) < 0.07


def test_the_background_drifts_and_has_n_runs_without_cuts(folder: Path, tmp_path: Path) -> None:
    genome = Genome(folder / "genome.fa", cache_dir=tmp_path)
    codes = genome.chromosome("chr1")
    gap = codes == 4
    assert 0.01 < gap.mean() < 0.04
    assert gap[0] and gap[-1] and (np.diff(gap.astype(int)) == 1).sum() == 2
    gc = np.isin(codes, (1, 2))[: LENGTH_BP // 20_000 * 20_000].reshape(-1, 20_000).mean(axis=1)
    assert gc.max() - gc.min() > 0.05
    with pyBigWig.open(str(folder / "signal.bw")) as signal:
        assert np.isnan(np.array(signal.values("chr1", 0, LENGTH_BP))[gap]).all()


def test_dataset_yaml_and_record(folder: Path) -> None:
    config = load_yaml(folder / "dataset.yaml")
    assert config["assembly"] == "simulated-3"
    assert [track["name"] for track in config["tracks"]] == ["peaks", "cuts"]
    assert config["split"] == {"valid": ["chr2"], "test": ["chr3"]}
    for path in (config["genome"], *(track["file"] for track in config["tracks"])):
        assert (folder / path).is_file()
    record = json.loads((folder / "simulation.json").read_text())
    assert record["parameters"]["seed"] == 3
    assert sum(kind["open"] + kind["closed"] for kind in record["sites"].values()) > 500


def test_motifs_are_sharp_and_apart() -> None:
    matrices = load_motifs()
    assert sorted(matrices) == ["A", "B", "E", "P"]
    for name, matrix in matrices.items():
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
        information = 2 + (matrix * np.log2(matrix)).sum(axis=1)
        assert information.sum() > 13, name


def test_an_existing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = simulate(tmp_path / "s", chromosomes=3, chromosome_bp=20_000)
    before = (out / "genome.fa").stat().st_mtime_ns
    simulate(out, chromosomes=3, chromosome_bp=20_000)
    assert "already holds this simulation" in capsys.readouterr().err
    assert (out / "genome.fa").stat().st_mtime_ns == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="other parameters"):
        simulate(out, seed=2, chromosomes=3, chromosome_bp=20_000)
    simulate(out, seed=2, chromosomes=3, chromosome_bp=20_000, force=True)
    assert json.loads((out / "simulation.json").read_text())["parameters"]["seed"] == 2
    assert (out / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "x").write_text("")
    with pytest.raises(DataError, match="is not a simulation"):
        simulate(foreign, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "s"]


def test_values_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chromosomes is 2"):
        simulate(tmp_path / "s", chromosomes=2)
    with pytest.raises(ConfigError, match="at least 20000 bp"):
        simulate(tmp_path / "s", chromosome_bp=100)
    with pytest.raises(ConfigError, match="seed is -1"):
        simulate(tmp_path / "s", seed=-1)
    with pytest.raises(ConfigError, match="sum at most 1"):
        Grammar(pairs=0.9)
    with pytest.raises(ConfigError, match="spacing_bp is 100"):
        Grammar(spacing_bp=100)
    with pytest.raises(ConfigError, match="second the larger"):
        Grammar(enhancer_near_bp=60_000)
    with pytest.raises(ConfigError, match="pair_span_bp is 500"):
        Grammar(pair_span_bp=500)
    assert list(tmp_path.iterdir()) == []
