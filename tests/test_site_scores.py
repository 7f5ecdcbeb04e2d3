"""Scores of whole sites: means over regions against base-by-base ones, rules by hand, and `evaluate --sites`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from genossm import metrics
from genossm.cli import main
from genossm.dataset import PreparedDataset
from genossm.errors import DataError, FileError
from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import TrackHead
from genossm.pipelines.evaluate import evaluate, evaluate_sites
from genossm.pipelines.site_scores import SiteScores, read_sites, region_means, rule_scores

HEADER = "chrom\tstart\tend\topen\trule\tregion_start\tregion_end\tnote"
ROWS = (  # chrB of the tiny dataset is 20,011 bp, chrA starts with 500 N
    "chrB\t100\t120\t1\tnear\t64\t164\tx",
    "chrB\t300\t320\t0\tnear\t290\t291\tx",
    "chrB\t500\t530\t1\tfar\t333\t999\t",
    "chrB\t5000\t5030\t0\tfar\t4999\t5301\tx",
    "chrB\t7000\t7030\t0\tfar\t7001\t7300\tx",
    "chrB\t19990\t20010\t1\tfar\t19900\t20011\tx",
    "chrA\t9000\t9030\t1\tfar\t9000\t9300\tx",
    "chrA\t10\t40\t0\tnear\t10\t40\tx",
)


class GcShare(AccessibilityModel):
    """Predicts the share of G and C in a bin for the peaks track and nothing for the signal."""

    def __init__(self, power: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.tracks = (TrackHead("signal", "signal", "poisson", "sum"), TrackHead("peaks", "peaks", "bce"))
        self.bin_bp, self.window_bp, self.margin_bp, self.assembly = 32, 4096, 512, "tiny"
        self.equivariant, self.threshold, self.provenance = False, {}, {}
        self.power = nn.Parameter(torch.tensor(power))

    def predict(self, tokens: Tensor) -> Tensor:
        bins = tokens.reshape(tokens.shape[0], -1, 32)
        strong = ((bins == 1) | (bins == 2)).float().mean(-1) ** self.power.detach()
        return torch.stack([torch.ones_like(strong), strong], -1)


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    path = tmp_path / "sites.tsv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n")
    return path


def gc_of_bins(dataset: PreparedDataset, chrom: str) -> np.ndarray:
    """Share of G and C of the bin that each base of a chromosome lies in; the last bin is padded to 32 bases."""
    codes = np.asarray(dataset.genome.window(chrom, 0, -(-dataset.lengths[chrom] // 32) * 32))
    share = np.isin(codes, (1, 2)).reshape(-1, 32).mean(axis=1)
    return np.repeat(share, 32)[: dataset.lengths[chrom]]


@given(data=st.data())
def test_region_means_are_means_over_bases(data: st.DataObject) -> None:
    bin_bp, length_bp = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 60))
    seed = data.draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    bins = -(-length_bp // bin_bp)
    values = random.random((bins, 2)).astype(np.float32)
    values[random.random((bins, 2)) < 0.3] = np.nan
    starts = random.integers(0, length_bp, 7)
    ends = np.array([random.integers(start + 1, length_bp + 1) for start in starts])
    got = region_means(values, starts, ends, bin_bp=bin_bp, length_bp=length_bp)
    bases = np.repeat(values.astype(np.float64), bin_bp, axis=0)[:length_bp]
    for row, start, end in zip(got, starts, ends, strict=True):
        for track in range(2):
            there = bases[start:end, track][~np.isnan(bases[start:end, track])]
            assert row[track] == pytest.approx(there.mean() if there.size else np.nan, abs=1e-12, nan_ok=True)


def test_rules_by_hand() -> None:
    rows = [
        ("near", True, 0.9),
        ("near", True, 0.3),
        ("near", False, 0.1),
        ("near", False, 0.5),
        ("always", True, 0.8),
    ]
    table = rule_scores(pd.DataFrame(rows, columns=["rule", "open", "predicted"])).set_index("rule")
    assert table.index.tolist() == ["always", "near"]
    near = table.loc["near"]
    assert (near["sites"], near["open"], near["closed"], near["positive_rate"]) == (4, 2, 2, 0.5)
    assert near["predicted_open"] == pytest.approx(0.6) and near["predicted_closed"] == pytest.approx(0.3)
    assert near["auroc"] == pytest.approx(3 / 4)  # 0.3 against 0.5 is the wrong way round
    assert near["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    always = table.loc["always"]
    assert np.isnan([always["auroc"], always["auprc"], always["predicted_closed"]]).all()


def test_a_table_is_read(sites: Path, tmp_path: Path) -> None:
    table = read_sites(sites)
    assert table["open"].tolist() == [True, False, True, False, False, True, True, False]
    assert table.loc[1, ["start", "end", "region_start", "region_end"]].tolist() == [300, 320, 290, 291]
    assert table.loc[2, "note"] == "" and table["region_end"].dtype == np.int64
    bare = tmp_path / "bare.tsv.gz"
    with gzip.open(bare, "wt") as file:
        file.write("rule\topen\tchrom\tstart\tend\nr\t1\tNA\t5\t9\n")
    alone = read_sites(bare)
    assert alone.loc[0, ["chrom", "region_start", "region_end"]].tolist() == ["NA", 5, 9]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chrom\tstart\tend\trule\nc\t1\t2\tr\n", "needs chrom, start, end, open, rule"),
        (
            "chrom\tstart\tend\topen\trule\tregion_end\nc\t1\t2\t1\tr\t9\n",
            "region_start and region_end both or",
        ),
        ("chrom\tstart\tend\topen\trule\nc\t-1\t2\t1\tr\n", "start holds '-1'"),
        ("chrom\tstart\tend\topen\trule\nc\t1\t2.5\t1\tr\n", "end holds '2.5'"),
        ("chrom\tstart\tend\topen\trule\nc\t1\t2\tyes\tr\n", "open holds 'yes'; allowed are 1 and 0"),
        ("chrom\tstart\tend\topen\trule\nc\t7\t7\t1\tr\n", "covers no base"),
        ("", "is no table of sites"),
    ],
)
def test_a_wrong_table_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_sites(path)
    with pytest.raises(FileError, match="cannot read the sites"):
        read_sites(tmp_path / "absent.tsv")


def test_sites_that_do_not_fit_are_refused(sites: Path) -> None:
    with pytest.raises(DataError, match=r"has no site on chrC; its sites are on chrB, chrA"):
        SiteScores(sites, {"chrC": 1_234}, ["peaks"])
    with pytest.raises(DataError, match=r"chrB:19900-20011 runs past the end of chrB \(20,010 bp\)"):
        SiteScores(sites, {"chrB": 20_010}, ["peaks"])
    with pytest.raises(DataError, match="there is none; leave the sites out"):
        SiteScores(sites, {"chrB": 20_011}, [])


def test_sites_are_scored_by_the_mean_over_their_regions(
    sites: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    dataset = PreparedDataset(tiny_prepared)
    models = [GcShare(), GcShare(2.0)]
    table, scores = evaluate_sites(
        models, dataset, sites, split="valid", resolution=200, out=tmp_path / "out", device="cpu"
    )
    pd.testing.assert_frame_equal(
        table, evaluate(models, dataset, split="valid", resolution=200, device="cpu")
    )

    share = gc_of_bins(dataset, "chrB")
    bases = (share + share**2) / 2  # the two models averaged
    regions = [(64, 164), (290, 291), (333, 999), (4999, 5301), (7001, 7300), (19900, 20011)]
    means = np.array([bases[start:end].mean() for start, end in regions])
    by_rule = scores.set_index("rule")
    assert scores["track"].tolist() == ["peaks", "peaks"] and by_rule.index.tolist() == ["far", "near"]
    assert by_rule.loc["far", "sites"] == 4 and by_rule.loc["near", "sites"] == 2
    assert by_rule.loc["far", "predicted_open"] == pytest.approx(means[[2, 5]].mean(), abs=1e-6)
    assert by_rule.loc["far", "predicted_closed"] == pytest.approx(means[[3, 4]].mean(), abs=1e-6)
    labels = np.array([1, 0, 0, 1])
    for name, figure in (("auroc", metrics.auroc), ("auprc", metrics.auprc)):
        assert by_rule.loc["far", name] == pytest.approx(figure(labels, means[2:]), abs=1e-6)
        assert by_rule.loc["near", name] == pytest.approx(figure(np.array([1, 0]), means[:2]), abs=1e-6)

    stored = pd.read_csv(tmp_path / "out" / "sites.tsv", sep="\t")
    assert stored.columns.tolist() == scores.columns.tolist()
    assert stored["auprc"].to_numpy() == pytest.approx(scores["auprc"].to_numpy(), abs=1e-5)
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["sites"][0]["auprc"] == pytest.approx(by_rule.loc["far", "auprc"])
    assert record["sites_file"]["path"] == str(sites) and len(record["sites_file"]["sha256"]) == 64


def test_a_site_in_a_run_of_n_is_left_out_and_told(
    sites: Path, tiny_prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, scores = evaluate_sites(
        GcShare(), tiny_prepared, sites, split="train", out=tmp_path / "out", device="cpu"
    )
    assert "1 of 2 sites left out" in capsys.readouterr().err
    assert scores["rule"].tolist() == ["far"] and scores.loc[0, "sites"] == 1
    assert (tmp_path / "out" / "sites.tsv").is_file()
    evaluate(GcShare(), tiny_prepared, split="train", out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "sites.tsv").exists()
    with pytest.raises(DataError, match="there is none; leave the sites out"):
        evaluate_sites(GcShare(), tiny_prepared, sites, split="valid", tracks=["signal"], device="cpu")


def test_the_command_prints_both_tables(
    sites: Path, tiny_prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("genossm.pipelines.evaluate.load", lambda path: GcShare())
    words = ["evaluate", "run", "--dataset", str(tiny_prepared), "--split", "valid", "--device", "cpu"]
    assert main([*words, "--sites", str(sites)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["track", "kind"] and "" in lines
    second = lines[lines.index("") + 1 :]
    assert second[0].split()[:5] == ["track", "rule", "sites", "open", "closed"]
    assert [line.split()[:5] for line in second[1:]] == [
        ["peaks", "far", "4", "2", "2"],
        ["peaks", "near", "2", "1", "1"],
    ]
    assert main([*words, "--sites", str(sites), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    _, scores = evaluate_sites(GcShare(), tiny_prepared, sites, split="valid", device="cpu")
    assert [row["auprc"] for row in result["sites"]] == pytest.approx(scores["auprc"].tolist())
    assert main(words) == 0 and "rule" not in capsys.readouterr().out
