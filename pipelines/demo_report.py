"""The page of a demo: test metrics, each planted rule on its own, a locus, training curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from genossm.dataset import PreparedDataset
from genossm.models.accessibility import AccessibilityModel
from genossm.outputs import plots, report
from genossm.pipelines.site_scores import read_sites, rule_scores
from genossm.signal import Signal
from genossm.version import versions

LOCUS_BP = 100_000
OPEN, CLOSED, ENHANCER = "#2a8c7d", "#b8324f", "#8a4fa3"
KINDS = {
    "pair": "A and B within 60 bp",
    "single_a": "A alone",
    "single_b": "B alone",
    "far_pair": "A and B 150-300 bp apart",
    "promoter": "promoter",
    "enhancer": "enhancer",
}
RULES = {"local": "local: motif A beside motif B", "long_range": "long range: promoter and enhancer"}
DONE = {
    "simulate": "a genome with planted motifs, its peaks, its cut counts and the truth",
    "prepare": "targets and masks per bin, windows by split",
    "train": "the model; the epoch with the best validation AUPRC is kept",
    "evaluate": "the test chromosome, which neither training nor the choice of epoch saw",
    "predict": "bigWigs and called regions of the test chromosome",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the demo and its wall time in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class DemoRun:
    """What the page tells about: the demo's folder, dataset, test metrics, and the run's stored model."""

    folder: Path
    dataset: PreparedDataset
    table: pd.DataFrame
    model: AccessibilityModel
    quick: bool

    @property
    def trained_bp(self) -> int:
        """Length of the windows that the model was trained on."""
        return self.model.provenance["train"]["window_bp"] or self.dataset.window_bp

    @property
    def reach_bp(self) -> int:
        """The farthest an enhancer can stand from a promoter that it opens."""
        record = json.loads((self.folder / "simulation" / "simulation.json").read_text(encoding="utf-8"))
        return int(record["parameters"]["grammar"]["enhancer_far_bp"])

    @property
    def short_sighted(self) -> bool:
        """Whether most enhancers lie outside of what the model saw of a promoter's surroundings."""
        return self.trained_bp < self.reach_bp


def write_demo_report(path: Path, run: DemoRun, steps: Sequence[Step]) -> None:
    """Write the demo's page to `path`, from the files that the steps left in the demo's folder."""
    track = next(track.name for track in run.dataset.tracks if track.kind == "peaks")
    sites = site_predictions(run.folder, run.dataset, track)
    rules = rule_table(sites)
    sections = [
        report.Section("In short", _summary(run, rules, track)),
        report.Section("Test metrics", _metrics(run)),
        report.Section("Rule by rule", _rules(run, sites, rules)),
        report.Section("A locus", _locus(run, sites)),
        report.Section("Training", _training(run.folder / "run" / "metrics.csv")),
        report.Section("How it was made", _made(run, steps)),
    ]
    report.write_report(
        path,
        title="genossm demo",
        subtitle=(
            "A genome was simulated with a known regulatory grammar; a state-space model was trained on its "
            "sequence, peaks and cut counts, and tested on a chromosome that it had never seen."
        ),
        sections=sections,
        footer=f"Made by genossm {versions()['genossm']}. This page needs no network.",
    )


def site_predictions(folder: Path, dataset: PreparedDataset, track: str) -> pd.DataFrame:
    """The planted sites of the test chromosomes with `predicted`, the mean probability over each stretch.

    Probabilities are read back from the bigWig in `folder`/predictions: the page shows what a browser would.
    """
    sites = read_sites(folder / "simulation" / "truth.tsv")
    sites = sites[sites["chrom"].isin(dataset.splits["test"])].reset_index(drop=True)
    bigwig = Signal(folder / "predictions" / f"{track}.bw")
    spans = zip(sites["chrom"], sites["region_start"], sites["region_end"], strict=True)
    sites["predicted"] = [
        float(bigwig.values(chrom, int(start), int(end)).mean()) for chrom, start, end in spans
    ]
    return sites


def rule_table(sites: pd.DataFrame) -> pd.DataFrame:
    """One row per rule: open and closed sites, their mean probability, AUROC of open over closed."""
    scores = rule_scores(sites).set_index("rule").reindex(list(RULES)).reset_index()
    scores["rule"] = list(RULES.values())
    scores = scores.fillna({"open": 0, "closed": 0}).astype({"open": int, "closed": int})
    return scores[["rule", "open", "closed", "predicted_open", "predicted_closed", "auroc"]]


def locus_start(sites: pd.DataFrame, length_bp: int, span_bp: int = LOCUS_BP) -> int:
    """Start of the stretch of a chromosome that shows most: open and closed promoters, then any sites."""
    promoters = sites[sites["rule"] == "long_range"]
    best, best_score = 0, (-1, -1)
    for start in range(0, max(1, length_bp - span_bp + 1), 5_000):
        inside = promoters[(promoters["start"] >= start) & (promoters["end"] <= start + span_bp)]
        opened = int(inside["open"].sum())
        every = int(((sites["start"] >= start) & (sites["end"] <= start + span_bp)).sum())
        score = (min(opened, len(inside) - opened), every)
        if score > best_score:
            best, best_score = start, score
    return best


def _summary(run: DemoRun, rules: pd.DataFrame, track: str) -> list[report.Block]:
    rows = run.table.set_index("track")
    auprc, rate = rows.loc[track, "auprc"], rows.loc[track, "positive_rate"]
    signal = [track.name for track in run.dataset.tracks if track.kind == "signal"]
    local, far = rules.loc[0, "auroc"], rules.loc[1, "auroc"]
    far_note = "promoters with an enhancer 10-60 kb away against those without"
    if run.short_sighted:
        far_note += f"; chance is expected of training on {run.trained_bp:,}-bp pieces"
    figures = [
        (f"{auprc:.3f}", "AUPRC of open bins", f"{auprc / rate:.1f} times the positive rate of {rate:.3f}"),
        (f"{local:.3f}", "AUROC, local rule", "open motif pairs against closed decoys"),
        (f"{far:.3f}", "AUROC, long-range rule", far_note),
        *(
            (f"{rows.loc[name, 'pearson']:.3f}", f"Pearson of {name}", "log1p counts per bin")
            for name in signal[:1]
        ),
    ]
    blocks: list[report.Block] = [report.Figures(figures)]
    if run.quick:
        blocks.append(report.Text("This was a quick run to try the machinery: the model is hardly trained."))
    blocks.append(
        report.Text(
            f"All figures are of {', '.join(run.dataset.splits['test'])}, held out whole. An AUPRC equal to "
            "the positive rate, or an AUROC of 0.5, is chance."
        )
    )
    return blocks


def _metrics(run: DemoRun) -> list[report.Block]:
    decimals = dict.fromkeys(("positive_rate", "auroc", "auprc", "pearson", "spearman"), ".3f")
    headings = {"positive_rate": "positive rate", "auroc": "AUROC", "auprc": "AUPRC"}
    headings |= {"pearson": "Pearson", "spearman": "Spearman"}
    window = run.dataset
    caption = (
        f"Unmasked bins of {window.bin_bp} bp. Peaks are ranked by predicted probability; AUPRC is average "
        "precision. Signal is correlated as log1p of the counts of each bin."
    )
    blocks: list[report.Block] = [
        report.Table(run.table, caption, {"bins": ",d", **decimals}, headings, (len(run.table) - 1,))
    ]
    words = {
        "precision_recall": "Precision against recall",
        "calibration": "Observed rate against prediction",
    }
    images = [
        report.Image((run.folder / "evaluation" / f"{name}.png").read_bytes(), description)
        for name, description in words.items()
        if (run.folder / "evaluation" / f"{name}.png").exists()
    ]
    return [*blocks, report.Row(images)]


def _rules(run: DemoRun, sites: pd.DataFrame, rules: pd.DataFrame) -> list[report.Block]:
    headings = {"predicted_open": "mean probability, open", "predicted_closed": "mean probability, closed"}
    groups: dict[str, npt.NDArray[Any]] = {}
    colors: dict[str, str] = {}
    for kind, words in KINDS.items():
        for is_open in (True, False):
            values = sites.loc[(sites["kind"] == kind) & (sites["open"] == is_open), "predicted"].to_numpy()
            if values.size:
                name = f"{words}: {'open' if is_open else 'closed'}"
                groups[name] = values
                colors[name] = OPEN if is_open else CLOSED
    figure = plots.group_plot(groups, colors, "Predicted probability of each planted site", "probability")
    return [
        report.Text(
            "Two rules decide what is open. Near: motifs A and B within 60 bp of each other open the site; "
            "each alone, or both farther apart, are decoys. Far: a promoter motif is open only if an "
            "enhancer motif stands 10 to 60 kb away, on either side; the promoters themselves look alike, "
            "so a model with a short view cannot tell them apart."
        ),
        report.Text(_sight(run)),
        report.Table(rules, "", dict.fromkeys(rules.columns[3:], ".3f"), {**headings, "auroc": "AUROC"}),
        report.Image(
            plots.figure_png(figure),
            "Dots: the predicted probability of each planted site, by kind",
            "One dot a site of the test chromosome (green open, red closed, as planted), the bar is the "
            "median.",
        ),
    ]


def _sight(run: DemoRun) -> str:
    """What may be expected of the long-range rule, given the windows that the model was trained on."""
    full = f"{run.dataset.window_bp:,} bp"
    if not run.short_sighted:
        return (
            f"This model was trained on windows of {run.trained_bp:,} bp, which hold a promoter and its "
            "enhancer together: both rules can be learned from them."
        )
    text = (
        f"This model was trained on pieces of {run.trained_bp:,} bp, so that minutes on a CPU suffice. Most "
        "enhancers stand farther from their promoter than such a piece reaches, so the long-range rule is "
        "expected at chance here: open and closed promoters get about the same probability."
    )
    if run.trained_bp < run.dataset.window_bp:
        text += (
            f" Full windows of {full} are what `train.window_bp: null` (and `train.margin_bp: null`) gives; "
            "that training takes longer."
        )
    return text


def _locus(run: DemoRun, sites: pd.DataFrame) -> list[report.Block]:
    data = run.dataset
    chrom = data.splits["test"][0]
    length_bp, bin_bp = data.lengths[chrom], data.bin_bp
    own = sites[sites["chrom"] == chrom]
    start = locus_start(own, length_bp) // bin_bp * bin_bp
    end = min(start + LOCUS_BP, length_bp)
    first, stop = start // bin_bp, -(-end // bin_bp)
    tracks = []
    for column, track in enumerate(data.tracks):
        bigwig = Signal(run.folder / "predictions" / f"{track.name}.bw")
        values, valid = bigwig.binned(chrom, length_bp, bin_bp, "mean", "mask")
        predicted = np.where(valid, values, np.nan)[first:stop]
        mask = data.mask(chrom, first, stop)[:, column]
        observed = np.where(mask, data.targets(chrom, first, stop)[:, column], np.nan)
        tracks.append(plots.LocusTrack(track.name, track.kind, observed, predicted))
    marks = []
    rows = (
        ("pair", True, "A beside B", OPEN),
        ("promoter", True, "promoter, open", OPEN),
        ("promoter", False, "promoter, closed", CLOSED),
        ("enhancer", True, "enhancer", ENHANCER),
    )
    for kind, is_open, label, color in rows:
        for site in own[(own["kind"] == kind) & (own["open"] == is_open)].itertuples():
            middle = (site.start + site.end) // 2
            if start <= middle < end:
                marks.append(plots.LocusMark(middle, label, color))
    figure = plots.locus_plot(chrom, start, bin_bp, tracks, marks)
    return [
        report.Image(
            plots.figure_png(figure),
            f"Observed and predicted tracks over {chrom}:{start:,}-{end:,}, with planted sites below",
            f"`{chrom}:{start}-{end}` of the test chromosome, {bin_bp}-bp bins. Ticks below are the truth "
            "that was planted.",
        )
    ]


def _training(metrics_csv: Path) -> list[report.Block]:
    if not metrics_csv.exists():
        return [report.Text("This run kept no csv log, so there is no curve to show.")]
    log = pd.read_csv(metrics_csv)
    curves = []
    for name in ("train/loss", "valid/auprc"):
        part = log[["step", name]].dropna()
        curves.append((part["step"].tolist(), part[name].tolist()))
    figure = plots.training_plot(curves[0], curves[1])
    return [
        report.Image(
            plots.figure_png(figure),
            "Training loss and validation AUPRC by step",
            "The model of the best validation AUPRC is the one that was tested; the test chromosome had no "
            "say.",
        )
    ]


def _made(run: DemoRun, steps: Sequence[Step]) -> list[report.Block]:
    table = pd.DataFrame(
        {
            "step": [step.name for step in steps],
            "seconds": [step.seconds for step in steps],
            "result": [DONE[step.name] for step in steps],
        }
    )
    data, trained = run.dataset, run.model.provenance
    evaluated, predicted = (
        json.loads((run.folder / name).read_text(encoding="utf-8"))
        for name in ("evaluation/metrics.json", "predictions/run.json")
    )
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    splits = "; ".join(f"{name}: {', '.join(chroms)}" for name, chroms in data.splits.items())
    megabases = sum(data.lengths.values()) / 1e6
    packages = ", ".join(f"{name} {number}" for name, number in trained["versions"].items())
    return [
        report.Table(
            table, "Wall time of this run; steps that were found done take no time.", {"seconds": ",.1f"}
        ),
        report.Facts(
            {
                "trained": f"{trained['started']} on {trained['device']}, on windows of "
                f"{run.trained_bp:,} bp; the model of epoch {trained['epoch']} was kept",
                "evaluated": f"{evaluated['when']} on {evaluated['device']}",
                "predicted": f"{predicted['started']} on {predicted['device']}, in windows of "
                f"{data.window_bp:,} bp, of which {data.margin_bp:,} bp at either side are context only",
                "model": f"{parameters:,} parameters, {data.bin_bp}-bp bins",
                "genome": f"{len(data.lengths)} chromosomes, {megabases:.1f} Mb; {splits}",
                "seed": str(trained["seed"]),
                "versions": packages,
            }
        ),
        report.Text(
            f"{'The full demo' if run.quick else 'The same'} by hand, each step with its own options "
            "(`genossm COMMAND --help`):"
        ),
        report.Commands(
            [
                f"genossm simulate -o simulation --seed {trained['seed']}",
                "genossm check simulation/dataset.yaml",
                "genossm prepare simulation/dataset.yaml -o dataset",
                "genossm train demo --dataset dataset -o run --device cpu --set "
                f"train.seed={trained['seed']}",
                "genossm evaluate run --dataset dataset -o evaluation --device cpu",
                "genossm predict run --genome simulation/genome.fa -o predictions --chrom "
                f"{data.splits['test'][0]} --call-peaks --device cpu",
            ]
        ),
    ]
