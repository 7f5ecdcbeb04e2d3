"""The large simulated genome: sizes, peaks where they are said to be, bounded memory, and a dataset that is prepared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyBigWig
import pytest

from genossm.annotations import read_annotations
from genossm.config import load_yaml
from genossm.errors import ConfigError, DataError, FileError
from genossm.genome import Genome
from genossm.pipelines.prepare import prepare
from genossm.pipelines.simulate_genome import CHROMOSOME_MB, simulate_sparse

GENOME_BP = 12_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_sparse(tmp_path_factory.mktemp("sparse") / "s", genome_bp=GENOME_BP, tracks=6, signals=2)


def test_the_genome(folder: Path, tmp_path: Path) -> None:
    genome = Genome(folder / "genome.fa", cache_dir=tmp_path)
    assert list(genome.lengths) == list(CHROMOSOME_MB)
    assert sum(genome.lengths.values()) == GENOME_BP
    assert genome.lengths["chr1"] / genome.lengths["chr21"] == pytest.approx(249 / 46.7, rel=0.01)
    codes = genome.chromosome("chr2")
    gap = np.flatnonzero(codes == 4)
    assert gap.size == pytest.approx(0.01 * codes.size, abs=2) and gap[-1] - gap[0] + 1 == gap.size
    assert np.isin(codes, (1, 2)).mean() == pytest.approx(0.41 * 0.99, abs=0.01)
    lines = (folder / "genome.fa").read_text().splitlines()
    assert max(map(len, lines)) == 60


def test_tracks_share_sites_and_have_their_own_peaks(folder: Path) -> None:
    tracks = load_yaml(folder / "dataset.yaml")["tracks"]
    assert [track["kind"] for track in tracks] == ["peaks"] * 4 + ["signal"] * 2
    record = json.loads((folder / "simulation.json").read_text())
    sites, peaks = set(), []
    for track in tracks[:4]:
        annotations = read_annotations(folder / track["file"])
        assert annotations.oddities == {}
        lengths = annotations.ends - annotations.starts
        assert lengths.min() >= 150 and lengths.max() < 1_200
        peaks.append(
            set(zip(annotations.chroms.tolist(), (annotations.starts // 4_000).tolist(), strict=True))
        )
        sites |= peaks[-1]
    assert np.mean([len(those) for those in peaks]) == pytest.approx(record["peaks_per_track"], abs=1)
    shared = len(peaks[0] & peaks[1]) / len(peaks[0])
    assert 0.2 < shared < 0.6  # by chance one in nine
    assert len(sites) > 1.5 * len(peaks[0])


def test_signal_is_high_where_peaks_are(folder: Path) -> None:
    with pyBigWig.open(str(folder / "signal006.bw")) as signal:
        counts = np.nan_to_num(signal.values("chr1", 0, signal.chroms()["chr1"], numpy=True))
    assert (counts == np.round(counts)).all()
    assert 0.01 < (counts >= 3).mean() < 0.05 and 0.005 < ((counts > 0) & (counts < 3)).mean() < 0.03


def test_it_is_prepared(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(folder / "dataset.yaml", tmp_path / "out")
    assert prepared.splits["valid"] == ("chr10",) and prepared.splits["test"] == ("chr8", "chr9")
    record = json.loads((folder / "simulation.json").read_text())
    rates = list(prepared.positive_rate.values())
    assert np.mean(rates) == pytest.approx(record["peak_fraction"] / 0.99, rel=0.05)


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = simulate_sparse(tmp_path / "a", genome_bp=GENOME_BP, tracks=6, signals=2)
    other = simulate_sparse(tmp_path / "b", genome_bp=GENOME_BP, tracks=6, signals=2, seed=2)
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
        assert (other / path.name).read_bytes() != path.read_bytes(), path.name


def test_an_existing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = simulate_sparse(tmp_path / "s", genome_bp=10_000_000, tracks=1)
    simulate_sparse(out, genome_bp=10_000_000, tracks=1)
    assert "already holds this simulation" in capsys.readouterr().err
    with pytest.raises(DataError, match="other parameters"):
        simulate_sparse(out, genome_bp=10_000_000, tracks=2)
    simulate_sparse(out, genome_bp=10_000_000, tracks=2, force=True)
    assert len(load_yaml(out / "dataset.yaml")["tracks"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"genome_bp is 1000: ask for at least 10000000 bp"):
        simulate_sparse(tmp_path / "s", genome_bp=1_000)
    with pytest.raises(ConfigError, match="tracks is 2 and signals 3"):
        simulate_sparse(tmp_path / "s", genome_bp=10_000_000, tracks=2, signals=3)
    with pytest.raises(ConfigError, match="tracks is 0"):
        simulate_sparse(tmp_path / "s", genome_bp=10_000_000, tracks=0)
    with pytest.raises(ConfigError, match="seed is -1"):
        simulate_sparse(tmp_path / "s", seed=-1)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot write the simulation"):
        simulate_sparse(tmp_path / "file" / "s", genome_bp=10_000_000, tracks=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
