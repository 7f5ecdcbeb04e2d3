"""genossm.pipelines.evaluate with a model that counts bases, so that every figure can be worked out apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from genossm import metrics
from genossm.dataset import PreparedDataset
from genossm.errors import DataError, DeviceError
from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import TrackHead
from genossm.pipelines.evaluate import evaluate, paired_bins
from genossm.pipelines.prepare import prepare


class BaseCounter(AccessibilityModel):
    """Predicts the GC share of a bin for peaks and its number of A for signal; nothing is learned."""

    def __init__(
        self, tracks: tuple[tuple[str, str], ...], *, bin_bp: int = 32, assembly: str = "tiny"
    ) -> None:
        nn.Module.__init__(self)
        self.tracks = tuple(
            TrackHead(name, kind, "bce" if kind == "peaks" else "poisson")  # type: ignore[arg-type]
            for name, kind in tracks
        )
        self.bin_bp, self.window_bp, self.margin_bp, self.assembly = bin_bp, 4096, 512, assembly
        self.equivariant, self.threshold, self.provenance = False, {}, {}
        self.scale = nn.Parameter(torch.ones(1))

    def predict(self, tokens: Tensor) -> Tensor:
        bins = tokens.reshape(tokens.shape[0], -1, self.bin_bp)
        strong = ((bins == 1) | (bins == 2)).float().mean(-1)
        adenine = (bins == 0).float().sum(-1)
        columns = [strong if track.kind == "peaks" else adenine for track in self.tracks]
        return torch.stack(columns, -1) * self.scale.detach()


class Constant(BaseCounter):
    """Predicts `value` everywhere."""

    value = 0.5

    def predict(self, tokens: Tensor) -> Tensor:
        return torch.full_like(super().predict(tokens), self.value)


TRACKS = (("peaks", "peaks"), ("signal", "signal"))


@pytest.fixture(scope="module")
def dataset(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("evaluate")
    for file in tiny_folder.iterdir():
        shutil.copy(file, folder)
    (folder / "exclude.bed").write_text("chrB\t5000\t7010\nchrB\t9000\t9007\n")
    with (folder / "dataset.yaml").open("a") as handle:
        handle.write("exclude: [exclude.bed]\n")
    return prepare(folder / "dataset.yaml", folder / "prepared")


def codes_of(dataset: PreparedDataset, chrom: str) -> np.ndarray:
    return np.asarray(dataset.genome.window(chrom, 0, dataset.lengths[chrom]))


def test_table_equals_figures_worked_out_from_the_sequence(dataset: PreparedDataset) -> None:
    # the model's columns stand in another order than the dataset's, with one more track between them
    model = BaseCounter((("signal", "signal"), ("other", "peaks"), ("peaks", "peaks")))
    table = evaluate(model, dataset, split="valid", device="cpu").set_index("track")
    assert table.index.tolist() == ["peaks", "signal", "mean"]

    codes = codes_of(dataset, "chrB")
    bins = [codes[start : start + 32] for start in range(0, len(codes), 32)]
    # the last bin is short: the window's padding counts in the model's mean
    strong = np.array([np.isin(b, (1, 2)).sum() / 32 for b in bins])
    adenine = np.array([(b == 0).sum() for b in bins])
    targets, mask = dataset.targets("chrB"), dataset.mask("chrB")
    assert 0 < mask[:, 0].sum() < len(bins)
    labels, gc = targets[mask[:, 0], 0], strong[mask[:, 0]]
    counts, predicted = np.log1p(targets[mask[:, 1], 1]), np.log1p(adenine[mask[:, 1]])

    peaks, signal, mean = table.loc["peaks"], table.loc["signal"], table.loc["mean"]
    assert peaks["bins"] == mask[:, 0].sum() and signal["bins"] == mask[:, 1].sum()
    assert peaks["positive_rate"] == pytest.approx(labels.mean())
    assert peaks["auroc"] == pytest.approx(metrics.auroc(labels, gc), abs=1e-6)
    assert peaks["auprc"] == pytest.approx(metrics.auprc(labels, gc), abs=1e-6)
    assert signal["pearson"] == pytest.approx(np.corrcoef(counts, predicted)[0, 1], abs=1e-6)
    assert signal["spearman"] == pytest.approx(metrics.spearman(counts, predicted), abs=1e-6)
    assert np.isnan(peaks["pearson"]) and np.isnan(signal["auprc"])
    assert mean["auprc"] == peaks["auprc"] and mean["pearson"] == signal["pearson"]


def test_other_resolution_counts_bases(dataset: PreparedDataset) -> None:
    table = evaluate(BaseCounter(TRACKS), dataset, split="valid", device="cpu", resolution=200).set_index(
        "track"
    )
    codes = codes_of(dataset, "chrB")
    length_bp = len(codes)
    in_peak, excluded = np.zeros(length_bp, bool), np.zeros(length_bp, bool)
    for start in range(1000, length_bp - 200, 2000):
        in_peak[start : start + 200] = True
    excluded[5000:7010] = excluded[9000:9007] = True
    strong, adenine = np.isin(codes, (1, 2)).astype(float), (codes == 0).astype(float)
    bin_mean = np.repeat([strong[i : i + 32].sum() / 32 for i in range(0, length_bp, 32)], 32)[:length_bp]
    labels, gc, observed, predicted = [], [], [], []
    mask = dataset.mask("chrB")[:, 1]
    counted = np.repeat(mask, 32)[:length_bp]
    sizes = np.minimum(32, length_bp - np.arange(len(mask)) * 32)
    adenine_per_base = np.repeat(np.add.reduceat(adenine, np.arange(0, length_bp, 32)) / sizes, 32)[
        :length_bp
    ]
    signal_per_base = np.repeat(dataset.targets("chrB")[:, 1] / sizes, 32)[:length_bp]
    for start in range(0, length_bp, 200):
        span = slice(start, min(start + 200, length_bp))
        size = span.stop - span.start
        if 4 * excluded[span].sum() >= size:
            continue
        labels.append(2 * in_peak[span].sum() >= size)
        gc.append(bin_mean[span].mean())
        observed.append(signal_per_base[span][counted[span]].sum())
        predicted.append(adenine_per_base[span][counted[span]].sum())
    peaks, signal = table.loc["peaks"], table.loc["signal"]
    assert peaks["bins"] == signal["bins"] == len(labels) < length_bp / 200 - 9
    assert peaks["positive_rate"] == pytest.approx(np.mean(labels))
    assert peaks["auprc"] == pytest.approx(
        metrics.auprc(np.array(labels), np.array(gc, np.float32)), abs=1e-6
    )
    expected = np.corrcoef(np.log1p(observed), np.log1p(predicted))[0, 1]
    assert signal["pearson"] == pytest.approx(expected, abs=1e-5)


def test_a_bin_without_a_prediction_is_left_out_at_another_resolution(dataset: PreparedDataset) -> None:
    # a short last bin can keep few bases of a 32-bp bin that is mostly N: no prediction reaches it
    predicted = np.full((dataset.bins("chrB"), 2), 0.5, np.float32)
    whole = paired_bins(dataset, "chrB", dataset.tracks, predicted, 200)
    predicted[-1] = np.nan  # 20011 bp: the last bin of 32 holds the last of 200
    cut = paired_bins(dataset, "chrB", dataset.tracks, predicted, 200)
    for (labels, before), (fewer, after) in zip(whole, cut, strict=True):
        assert np.isfinite(after).all() and len(after) == len(before) - 1
        np.testing.assert_array_equal(fewer, labels[:-1])


def test_plots_of_an_earlier_evaluation_do_not_stay(dataset: PreparedDataset, tmp_path: Path) -> None:
    evaluate(BaseCounter(TRACKS), dataset, split="valid", device="cpu", out=tmp_path)
    assert (tmp_path / "calibration.png").exists()
    evaluate(BaseCounter(TRACKS), dataset, split="valid", device="cpu", out=tmp_path, tracks=["signal"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "metrics.tsv"]


def test_batch_size_does_not_matter(dataset: PreparedDataset) -> None:
    one = evaluate(BaseCounter(TRACKS), dataset, split="valid", device="cpu", batch_size=1)
    five = evaluate(BaseCounter(TRACKS), dataset, split="valid", device="cpu", batch_size=5)
    pd.testing.assert_frame_equal(one, five)


def test_several_models_are_averaged(dataset: PreparedDataset) -> None:
    alone = evaluate(BaseCounter(TRACKS), dataset, split="valid", device="cpu").set_index("track")
    # the average of a score and a constant ranks bins as the score does
    both = evaluate([Constant(TRACKS), BaseCounter(TRACKS)], dataset, split="valid", device="cpu").set_index(
        "track"
    )
    assert both.loc["peaks", "auprc"] == pytest.approx(alone.loc["peaks", "auprc"], abs=1e-6)
    flat = evaluate(Constant(TRACKS), dataset, split="valid", device="cpu").set_index("track")
    assert flat.loc["peaks", "auroc"] == pytest.approx(0.5)
    assert flat.loc["peaks", "auprc"] == pytest.approx(flat.loc["peaks", "positive_rate"])
    assert np.isnan(flat.loc["signal", "pearson"])


def test_average_of_certain_models_is_still_a_probability(dataset: PreparedDataset, tmp_path: Path) -> None:
    models = [Constant(TRACKS) for _ in range(7)]
    for model in models:
        model.value = 1.0
    evaluate(models, dataset, split="valid", device="cpu", out=tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["calibration_error"]["peaks"] == pytest.approx(1 - record["tracks"][0]["positive_rate"])


def test_files_say_what_was_scored(dataset: PreparedDataset, tmp_path: Path) -> None:
    table = evaluate(
        BaseCounter(TRACKS), dataset.folder, split="valid", device="cpu", out=tmp_path / "scores"
    )
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "calibration.png",
        "metrics.json",
        "metrics.tsv",
        "precision_recall.png",
    ]
    stored = pd.read_csv(
        tmp_path / "scores" / "metrics.tsv", sep="\t", keep_default_na=False, na_values=["NA"]
    )
    assert stored.columns.tolist() == table.columns.tolist()
    assert stored["auprc"].to_numpy() == pytest.approx(table["auprc"].to_numpy(), abs=1e-5, nan_ok=True)
    record = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert record["chromosomes"] == ["chrB"] and record["resolution_bp"] == 32 and record["split"] == "valid"
    assert record["tracks"][0]["auprc"] == pytest.approx(table.loc[0, "auprc"])
    assert record["tracks"][0]["pearson"] is None
    assert record["device"].startswith("CPU") and record["versions"]["genossm"]
    assert record["genome_sha256"] == dataset.genome.sha256


def test_signal_alone_has_no_curves_and_occupancy_takes_no_logarithm(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    counts = evaluate(
        BaseCounter(TRACKS), dataset, split="valid", device="cpu", tracks=["signal"], out=tmp_path
    )
    assert counts["track"].tolist() == ["signal", "mean"] and counts["auprc"].isna().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "metrics.tsv"]

    source = dataset.folder.parent / "dataset.yaml"
    text = source.read_text().replace("aggregate: sum", "aggregate: sum, loss: mse")
    (source.parent / "occupancy.yaml").write_text(text)
    occupancy = prepare(source.parent / "occupancy.yaml", source.parent / "occupancy")
    table = evaluate(BaseCounter(TRACKS), occupancy, split="valid", device="cpu", tracks=["signal"])
    codes, mask = codes_of(dataset, "chrB"), dataset.mask("chrB")[:, 1]
    adenine = np.add.reduceat(codes == 0, np.arange(0, len(codes), 32))[mask]
    expected = np.corrcoef(dataset.targets("chrB")[mask, 1], adenine)[0, 1]
    assert table.loc[0, "pearson"] == pytest.approx(expected, abs=1e-6)
    assert table.loc[0, "pearson"] != pytest.approx(counts.loc[0, "pearson"], abs=1e-6)


def test_model_is_given_back_as_it_was(dataset: PreparedDataset) -> None:
    model = BaseCounter(TRACKS)
    model.train()
    evaluate(model, dataset, split="test", device="cpu")
    assert model.training


def test_scoring_training_chromosomes_is_told(
    dataset: PreparedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    model = BaseCounter(TRACKS)
    model.provenance = {"splits": {"train": ["chrA"]}}
    evaluate(model, dataset, split="train", device="cpu")
    assert "trained on chrA" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(dataset: PreparedDataset) -> None:
    fits = BaseCounter(TRACKS)
    cases = [
        (BaseCounter((("peaks", "peaks"),)), {}, "but not signal of"),
        (
            BaseCounter((("peaks", "signal"), ("signal", "signal"))),
            {},
            "peaks is peaks in .* but signal in the model",
        ),
        (BaseCounter(TRACKS, bin_bp=64), {}, "64-bp bins .* 32-bp bins"),
        (BaseCounter(TRACKS, assembly="hg38"), {}, "trained on hg38 .* is of tiny"),
        (fits, {"split": "tests"}, "no split 'tests'"),
        (fits, {"resolution": 16}, "finer than the 32-bp bins"),
        (fits, {"tracks": ["peeks"]}, "no track peeks"),
    ]
    for model, options, message in cases:
        with pytest.raises(DataError, match=message):
            evaluate(model, dataset, device="cpu", **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="list is empty"):
        evaluate([], dataset, device="cpu")


def test_mismatches_that_are_asked_for_pass(dataset: PreparedDataset) -> None:
    other = BaseCounter((("peaks", "peaks"),), assembly="hg38")
    table = evaluate(other, dataset, device="cpu", tracks=["peaks"], allow_genome_mismatch=True)
    assert table["track"].tolist() == ["peaks", "mean"]


def test_no_silent_cpu(dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--device cpu"):
        evaluate(BaseCounter(TRACKS), dataset)


def test_published_bins_and_rates_of_yeast(realdata: Path, private_cache: Path, tmp_path: Path) -> None:
    folder = realdata / "sacCer3"
    (tmp_path / "yeast.yaml").write_text(
        "assembly: sacCer3\n"
        f"genome: {folder}/sacCer3.fa.gz\n"
        f"exclude: [{folder}/mask_repeats.bed]\n"
        "tracks:\n"
        f"  - {{name: macs2, file: {folder}/atac_macs2_peaks.narrowPeak, kind: peaks}}\n"
        f"  - {{name: hmmratac, file: {folder}/atac_hmmratac_accessible_regions.narrowPeak, kind: peaks}}\n"
        "split: {valid: [chrIX, chrXI], test: [chrIV, chrXIII, chrXV]}\n"
    )
    dataset = prepare(tmp_path / "yeast.yaml", tmp_path / "yeast")
    model = BaseCounter((("macs2", "peaks"), ("hmmratac", "peaks")), assembly="sacCer3")
    table = evaluate(model, dataset, resolution=200, device="cpu", batch_size=64).set_index("track")
    assert table.loc[["macs2", "hmmratac"], "bins"].tolist() == [16663, 16663]
    assert table.loc[["macs2", "hmmratac"], "positive_rate"].round(4).tolist() == [0.0632, 0.0268]
