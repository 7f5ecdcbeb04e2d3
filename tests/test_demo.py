"""genossm.pipelines.demo from simulation to page on a tiny genome, and the tables of its page by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyBigWig
import pytest

from genossm.checkpoint import load
from genossm.dataset import PreparedDataset
from genossm.errors import DataError
from genossm.pipelines import demo_report
from genossm.pipelines.demo import STEPS, DemoResult, demo


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return demo(tmp_path_factory.mktemp("demo") / "out", device="cpu", quick=True)


def test_every_step_leaves_its_files(quick_demo: DemoResult) -> None:
    made = {
        str(path.relative_to(quick_demo.folder)) for path in quick_demo.folder.rglob("*") if path.is_file()
    }
    assert {
        "simulation/genome.fa",
        "dataset/targets.h5",
        "run/model.safetensors",
        "run/metrics.csv",
        "evaluation/metrics.tsv",
        "evaluation/precision_recall.png",
        "evaluation/calibration.png",
        "predictions/peaks.bw",
        "predictions/cuts.bw",
        "predictions/peaks.narrowPeak",
        "predictions/run.json",
        "report.html",
    } <= made
    assert not [name for name in made if ".tmp" in name or ".parts" in name]
    assert tuple(quick_demo.seconds) == STEPS


def test_page_is_offline_and_shows_the_figures(quick_demo: DemoResult) -> None:
    html = quick_demo.report.read_text(encoding="utf-8")
    assert re.search(r"(https?:)?//", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)) is None
    assert html.count("data:image/png;base64,") == 5
    peaks = quick_demo.table.set_index("track").loc["peaks"]
    assert 0.02 < peaks["positive_rate"] < 0.12
    for figure in (peaks["auprc"], peaks["positive_rate"], peaks["auroc"]):
        assert f"{figure:.3f}" in html
    assert "hardly trained" in html and "chr3" in html and "CPU" in html
    stored = json.loads((quick_demo.folder / "evaluation" / "metrics.json").read_text())
    assert stored["tracks"][0]["auprc"] == pytest.approx(peaks["auprc"])


def test_page_says_what_the_training_windows_allow(quick_demo: DemoResult, tmp_path: Path) -> None:
    def page(dataset_bp: int, trained_bp: int | None) -> str:
        model, data = load(quick_demo.folder / "run"), PreparedDataset(quick_demo.folder / "dataset")
        model.provenance["train"]["window_bp"] = trained_bp
        model.provenance |= {"device": "an abacus", "versions": {"torch": "0.0.7"}, "seed": 41}
        data.window_bp = dataset_bp
        run = demo_report.DemoRun(quick_demo.folder, data, quick_demo.table, model, quick=False)
        demo_report.write_demo_report(tmp_path / "page.html", run, [])
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    short, full = page(131_072, 16_384), page(131_072, None)
    chance = "the long-range rule is expected at chance here"
    for words in (
        "trained on pieces of 16,384 bp, so that minutes on a CPU suffice",
        chance,
        "train.window_bp: null",
    ):
        assert words in short and words not in full
    assert "chance is expected of training on 16,384-bp pieces" in short
    assert "trained on windows of 131,072 bp, which hold a promoter and its enhancer together" in full
    # what is said of the training is what the run stored, not what made the page
    assert (
        "torch 0.0.7" in short and "on an abacus, on windows of 16,384 bp" in short and "--seed 41" in short
    )
    # no longer windows are on offer where the dataset's own are as short
    quick = quick_demo.report.read_text(encoding="utf-8")
    assert chance in quick and "train.window_bp: null" not in quick


def test_bigwig_of_the_test_chromosome_is_whole(quick_demo: DemoResult) -> None:
    data = PreparedDataset(quick_demo.folder / "dataset")
    with pyBigWig.open(str(quick_demo.folder / "predictions" / "peaks.bw")) as handle:
        assert handle.chroms() == data.lengths
        values = np.array(handle.values("chr3", 0, data.lengths["chr3"]))
    kept = np.repeat(data.mask("chr3")[:, 0], data.bin_bp)[: len(values)]
    assert np.isfinite(values[kept]).all() and (values[kept] >= 0).all() and (values[kept] <= 1).all()


def test_run_again_it_finds_everything_done(
    quick_demo: DemoResult, capsys: pytest.CaptureFixture[str]
) -> None:
    model = quick_demo.folder / "run" / "model.safetensors"
    before = (model.read_bytes(), model.stat().st_mtime_ns)
    again = demo(quick_demo.folder, device="cpu", quick=True)
    assert (model.read_bytes(), model.stat().st_mtime_ns) == before
    pd.testing.assert_frame_equal(again.table, quick_demo.table)
    told = capsys.readouterr().err
    assert all(re.search(rf"\[{i}/6\] {name}: \d+\.\d s", told) for i, name in enumerate(STEPS, 1))
    assert f"open {again.report}" in told


def test_another_seed_in_the_same_folder_is_refused(quick_demo: DemoResult) -> None:
    with pytest.raises(DataError):
        demo(quick_demo.folder, seed=2, device="cpu", quick=True)


def sites_of(rows: list[tuple[int, str, str, bool, float]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["start", "kind", "rule", "open", "predicted"])
    frame["end"] = frame["start"] + 20
    return frame


def test_rule_table_by_hand() -> None:
    sites = sites_of(
        [
            (0, "pair", "local", True, 0.9),
            (1, "pair", "local", True, 0.3),
            (2, "single_a", "local", False, 0.1),
            (3, "far_pair", "local", False, 0.5),
            (4, "promoter", "long_range", True, 0.6),
            (5, "enhancer", "enhancer", True, 0.8),
        ]
    )
    table = demo_report.rule_table(sites)
    local, far = table.iloc[0], table.iloc[1]
    assert (local["open"], local["closed"]) == (2, 2)
    assert local["predicted_open"] == pytest.approx(0.6) and local["predicted_closed"] == pytest.approx(0.3)
    # of the four pairs of open and closed, only 0.3 against 0.5 is the wrong way round
    assert local["auroc"] == pytest.approx(3 / 4)
    assert (far["open"], far["closed"]) == (1, 0)
    assert np.isnan(far["predicted_closed"]) and np.isnan(far["auroc"])


def test_locus_shows_open_and_closed_promoters_together() -> None:
    sites = sites_of(
        [
            *((5_000 + i, "promoter", "long_range", True, 0.5) for i in range(5)),
            (260_000, "promoter", "long_range", True, 0.5),
            (300_000, "promoter", "long_range", False, 0.5),
        ]
    )
    start = demo_report.locus_start(sites, 500_000)
    assert start <= 260_000 and start + demo_report.LOCUS_BP >= 300_020
    assert demo_report.locus_start(sites.iloc[:0], 50_000) == 0


def test_site_predictions_are_means_over_the_sites_stretch(quick_demo: DemoResult) -> None:
    data = PreparedDataset(quick_demo.folder / "dataset")
    sites = demo_report.site_predictions(quick_demo.folder, data, "peaks")
    assert set(sites["chrom"]) == {"chr3"} and len(sites) > 20
    with pyBigWig.open(str(quick_demo.folder / "predictions" / "peaks.bw")) as handle:
        for site in sites.iloc[::7].itertuples():
            values = np.nan_to_num(np.array(handle.values("chr3", site.region_start, site.region_end)))
            assert site.predicted == pytest.approx(values.mean(), abs=1e-6)
