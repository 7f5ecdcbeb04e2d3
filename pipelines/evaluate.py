"""Score a model on whole held-out chromosomes: a table by track, curves, and a record of how."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from genossm import metrics
from genossm.atomic import atomic_path, atomic_write_text
from genossm.checkpoint import load
from genossm.dataset import PreparedDataset
from genossm.dataset_config import TrackConfig
from genossm.errors import DataError
from genossm.models.accessibility import AccessibilityModel
from genossm.outputs import plots
from genossm.pipelines.device import describe, pick_device
from genossm.pipelines.site_scores import SiteScores, sites_sha256
from genossm.pipelines.windowed import placed, predict_chromosome
from genossm.progress import progress, say
from genossm.rebin import rebin, rebin_mean
from genossm.targets import MASKED_SHARE, masked_bins, peak_bins
from genossm.verified import verify_once
from genossm.version import versions

COLUMNS = ("track", "kind", "bins", "positive_rate", "auroc", "auprc", "pearson", "spearman")
_PIECE_BINS = 1 << 17
Model = AccessibilityModel | str | os.PathLike[str]
Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class TrackBins:
    """All bins of a split that count for one track: `observed` and `predicted` float32 (bins,)."""

    track: TrackConfig
    observed: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.float32]


def evaluate(
    model: Model | Sequence[Model],
    dataset: PreparedDataset | str | os.PathLike[str],
    *,
    split: str = "test",
    resolution: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    batch_size: int = 4,
    allow_genome_mismatch: bool = False,
    tracks: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Predict the chromosomes of a split and compare with the dataset, bin by bin, over unmasked bins only.

    Peaks tracks get `positive_rate`, `auroc` and `auprc` (average precision); signal tracks get `pearson` and
    `spearman` of log1p values, or of the values themselves for a track of `loss: mse` (occupancy, not
    counts).

    Args:
        model: a model or the folder of a run, or several, whose predictions are averaged.
        dataset: a prepared dataset or its folder.
        split: "train", "valid" or "test".
        resolution: None scores the dataset's own bins. Otherwise a bin size in bp of at least those:
            predictions and signal are re-binned by bases, a bin is positive when at least half of it lies in
            a peak, and bins of which at least a quarter is excluded are left out.
        out: folder for metrics.tsv, metrics.json (with models, dataset, device and versions),
            precision_recall.png and calibration.png (the plots only where there is a peaks track).
        device: "auto" (CUDA or an error), "cuda", "cuda:N" or "cpu".
        batch_size: windows computed at once; it does not change the result.
        allow_genome_mismatch: score a model on another assembly than it was trained on.
        tracks: names of the dataset's tracks to score; None = all.

    Returns:
        One row per track and a last row "mean" (over the tracks where a figure is defined), with the columns
        track, kind, bins, positive_rate, auroc, auprc, pearson, spearman; NaN where a figure does not apply.

    Raises:
        DataError: unknown split or track, a track the model lacks or has as another kind, other bins or
            assembly, or a file of the dataset is damaged.
        DeviceError: the device is not there.
    """
    table, _ = _evaluate(
        model,
        dataset,
        None,
        split=split,
        resolution=resolution,
        out=out,
        device=device,
        batch_size=batch_size,
        allow_genome_mismatch=allow_genome_mismatch,
        tracks=tracks,
    )
    return table


def evaluate_sites(
    model: Model | Sequence[Model],
    dataset: PreparedDataset | str | os.PathLike[str],
    sites: str | os.PathLike[str],
    *,
    split: str = "test",
    resolution: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    batch_size: int = 4,
    allow_genome_mismatch: bool = False,
    tracks: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As `evaluate`, and from the same predictions score a table of sites with known answers, rule by rule.

    A site's score is the mean predicted probability over the bases of its region, each having the value of its bin
    (the dataset's own bins, whatever `resolution` is); N runs are left out of the mean. Only sites on the split's
    chromosomes count.

    Args:
        sites: a table such as `truth.tsv` of `simulate`, see `genossm.pipelines.site_scores.read_sites`.
        out: gets sites.tsv, too.

    Returns:
        The table of `evaluate`, and one row per peaks track and rule with the columns track, rule, sites, open, closed,
        positive_rate, predicted_open, predicted_closed, auroc and auprc.

    Raises:
        DataError: as `evaluate`; the sites do not fit the dataset, or no peaks track is scored.
        FileError: the sites cannot be read.
        DeviceError: the device is not there.
    """
    table, scores = _evaluate(
        model,
        dataset,
        sites,
        split=split,
        resolution=resolution,
        out=out,
        device=device,
        batch_size=batch_size,
        allow_genome_mismatch=allow_genome_mismatch,
        tracks=tracks,
    )
    assert scores is not None
    return table, scores


def _evaluate(
    model: Model | Sequence[Model],
    dataset: PreparedDataset | str | os.PathLike[str],
    sites: str | os.PathLike[str] | None,
    *,
    split: str,
    resolution: int | None,
    out: str | os.PathLike[str] | None,
    device: str,
    batch_size: int,
    allow_genome_mismatch: bool,
    tracks: Sequence[str] | None,
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    data = dataset if isinstance(dataset, PreparedDataset) else PreparedDataset(dataset)
    chroms = _chromosomes(data, split)
    wanted = _wanted_tracks(data, tracks)
    verify_once(data)
    if resolution is not None and resolution < data.bin_bp:
        raise DataError(
            f"resolution {resolution} bp is finer than the {data.bin_bp}-bp bins of {data.folder}; "
            f"ask for {data.bin_bp} or more"
        )
    scorer = None
    if sites is not None:
        peaks = [track.name for track in wanted if track.kind == "peaks"]
        scorer = SiteScores(sites, {chrom: data.lengths[chrom] for chrom in chroms}, peaks)
    chosen = pick_device(device)
    several = [model] if isinstance(model, AccessibilityModel | str | os.PathLike) else list(model)
    if not several:
        raise DataError("there is no model to evaluate: the list is empty; give at least one run folder")
    models = [one if isinstance(one, AccessibilityModel) else load(one) for one in several]
    for one in models:
        _compare(one, data, wanted, allow_genome_mismatch)
        _tell_trained(one, chroms)
    names = [_name_of(one) for one in several]
    say(f"evaluating on {describe(chosen)}: {', '.join(names)}, {split} split ({', '.join(chroms)})")

    bins = _collect(models, data, chroms, wanted, resolution, chosen, batch_size, scorer)
    table = _table(bins)
    scores = None if scorer is None else scorer.table()
    if out is not None:
        record = {
            "models": names,
            "dataset": str(data.folder),
            "assembly": data.assembly,
            "genome_sha256": data.genome.sha256,
            "split": split,
            "chromosomes": list(chroms),
            "resolution_bp": resolution or data.bin_bp,
            "device": describe(chosen),
            "versions": versions(),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if scorer is not None:
            record["sites_file"] = {"path": str(scorer.path), "sha256": sites_sha256(scorer.path)}
        write_evaluation(Path(out), bins, table, record, scores)
    return table, scores


def write_evaluation(
    folder: Path,
    bins: Sequence[TrackBins],
    table: pd.DataFrame,
    record: dict[str, Any],
    scores: pd.DataFrame | None = None,
) -> None:
    """Write metrics.tsv, metrics.json, with `scores` sites.tsv, and where a peaks track has positives two plots."""
    _write_tsv(folder / "metrics.tsv", table)
    if scores is None:
        (folder / "sites.tsv").unlink(missing_ok=True)  # of an earlier evaluation in this folder
    else:
        _write_tsv(folder / "sites.tsv", scores)
        record = record | {"sites": json.loads(scores.to_json(orient="records", double_precision=10))}
    scored = [one for one in bins if one.track.kind == "peaks" and one.observed.any()]
    groups = {one.track.name: metrics.calibration(one.observed, one.predicted) for one in scored}
    rows = json.loads(table.to_json(orient="records", double_precision=10))
    content = record | {
        "tracks": rows[:-1],
        "mean": rows[-1],
        "calibration_error": {name: group.error for name, group in groups.items()},
    }
    atomic_write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    images = [folder / name for name in ("precision_recall.png", "calibration.png")]
    if not scored:
        for image in images:  # those of an earlier evaluation in this folder
            image.unlink(missing_ok=True)
        return
    curves = {
        one.track.name: metrics.precision_recall(one.observed, one.predicted, max_points=1000)
        for one in scored
    }
    rates = {one.track.name: metrics.positive_rate(one.observed) for one in scored}
    plots.save_png(plots.precision_recall_plot(curves, rates), images[0])
    plots.save_png(plots.calibration_plot(groups), images[1])


def _write_tsv(path: Path, table: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, sep="\t", index=False, float_format="%.6g", na_rep="NA")


def paired_bins(
    dataset: PreparedDataset,
    chrom: str,
    tracks: Sequence[TrackConfig],
    predicted: npt.NDArray[np.float32],
    resolution_bp: int | None = None,
) -> list[Pair]:
    """For each track the observed and the predicted values of those bins of a chromosome that count.

    Args:
        predicted: float32 (bins, tracks), the dataset's bins over the whole chromosome, NaN = gap.
        resolution_bp: None takes the dataset's bins and its mask. Otherwise a bin counts when less than a
            quarter of its bases is excluded, less than a quarter has no signal, and there is a prediction.
            Peaks are taken from the intervals, so that a label is exact.

    Returns:
        One pair of float32 arrays (kept bins,) per track.
    """
    columns = [dataset.track_names.index(track.name) for track in tracks]
    mask, targets = _mask_and_targets(dataset, chrom, columns)
    if resolution_bp is None:
        return [(targets[keep, i], predicted[keep, i]) for i, keep in enumerate(mask.T)]
    length_bp, bin_bp = dataset.lengths[chrom], dataset.bin_bp
    excluded = dataset.excluded(chrom)
    missing = ~mask & ~masked_bins(*excluded, length_bp, bin_bp)[:, None]
    kept = rebin_mean(missing, bin_bp, length_bp, resolution_bp) < MASKED_SHARE
    kept &= ~masked_bins(*excluded, length_bp, resolution_bp)[:, None]
    pairs: list[Pair] = []
    for i, track in enumerate(tracks):
        own = predicted[:, i]
        if track.kind == "peaks":
            labels = peak_bins(*dataset.peaks(chrom, track.name), length_bp, resolution_bp)
            probability = rebin_mean(own, bin_bp, length_bp, resolution_bp).astype(np.float32)
            keep = kept[:, i] & ~np.isnan(probability)  # NaN where all its bases lie in bins of mostly N
            pairs.append((labels[keep], probability[keep]))
            continue
        both = np.stack([targets[:, i], own], axis=1)
        both[~mask[:, i] | np.isnan(own)] = np.nan
        both = rebin(both, bin_bp, length_bp, resolution_bp, track.aggregate).astype(np.float32)
        both = both[kept[:, i] & ~np.isnan(both[:, 0])]
        pairs.append((both[:, 0], both[:, 1]))
    return pairs


def _mask_and_targets(
    dataset: PreparedDataset, chrom: str, columns: Sequence[int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Both (bins, columns) of a chromosome; the tracks that are not wanted are read a piece at a time, and not kept."""
    bins = dataset.bins(chrom)
    mask = np.empty((bins, len(columns)), np.bool_)
    targets = np.empty((bins, len(columns)), np.float32)
    for start in range(0, bins, _PIECE_BINS):
        piece = slice(start, min(start + _PIECE_BINS, bins))
        mask[piece] = dataset.mask(chrom, piece.start, piece.stop)[:, columns]
        targets[piece] = dataset.targets(chrom, piece.start, piece.stop)[:, columns]
    return mask, targets


def _collect(
    models: Sequence[AccessibilityModel],
    data: PreparedDataset,
    chroms: Sequence[str],
    tracks: Sequence[TrackConfig],
    resolution: int | None,
    device: torch.device,
    batch_size: int,
    scorer: SiteScores | None,
) -> list[TrackBins]:
    parts: dict[str, list[Pair]] = {track.name: [] for track in tracks}
    total_bp = len(models) * sum(data.lengths[chrom] for chrom in chroms)
    with progress(total=total_bp, unit="bp", description="predict", scale=True) as bar:
        for chrom in chroms:
            predicted = np.zeros((data.bins(chrom), len(tracks)), np.float32)
            for model in models:
                columns = _columns(model, tracks)
                with placed(model, device):
                    values = predict_chromosome(
                        model, data.genome, chrom, batch_size=batch_size, device=device, progress=bar.update
                    )
                predicted += values[:, columns]
            # Divided once, after the sum, so that rounding takes no mean of probabilities above 1.
            predicted /= np.float32(len(models))
            if scorer is not None:
                columns = [index for index, track in enumerate(tracks) if track.kind == "peaks"]
                scorer.add(chrom, predicted[:, columns], data.bin_bp)
            for track, pair in zip(
                tracks, paired_bins(data, chrom, tracks, predicted, resolution), strict=True
            ):
                parts[track.name].append(pair)
    return [
        TrackBins(track, *(np.concatenate([part[side] for part in parts[track.name]]) for side in (0, 1)))
        for track in tracks
    ]


def _table(bins: Sequence[TrackBins]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for one in bins:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, float("nan"))
        row |= {"track": one.track.name, "kind": one.track.kind, "bins": one.observed.size}
        if one.track.kind == "peaks":
            row["positive_rate"] = metrics.positive_rate(one.observed)
            row["auroc"] = metrics.auroc(one.observed, one.predicted)
            row["auprc"] = metrics.auprc(one.observed, one.predicted)
        else:
            observed, predicted = one.observed, one.predicted
            if one.track.loss != "mse":
                observed, predicted = (np.log1p(np.maximum(values, 0)) for values in (observed, predicted))
            row["pearson"] = metrics.pearson(observed, predicted)
            row["spearman"] = metrics.spearman(observed, predicted)
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    mean = {"track": "mean", "kind": "", "bins": round(table["bins"].mean())}
    mean |= {name: table[name].mean() for name in COLUMNS[3:]}
    return pd.concat([table, pd.DataFrame([mean])], ignore_index=True)


def _chromosomes(data: PreparedDataset, split: str) -> tuple[str, ...]:
    if split not in data.splits:
        raise DataError(f"there is no split {split!r} in {data.folder}: allowed are {', '.join(data.splits)}")
    if not data.splits[split]:
        raise DataError(f"the split {split!r} of {data.folder} has no chromosome; choose another split")
    return data.splits[split]


def _wanted_tracks(data: PreparedDataset, names: Sequence[str] | None) -> list[TrackConfig]:
    unknown = [name for name in names or () if name not in data.track_names]
    if unknown:
        raise DataError(
            f"{data.folder} has no track {', '.join(unknown)}: it has {', '.join(data.track_names)}"
        )
    return [track for track in data.tracks if names is None or track.name in names]


def _compare(
    model: AccessibilityModel,
    data: PreparedDataset,
    tracks: Sequence[TrackConfig],
    allow_genome_mismatch: bool,
) -> None:
    """Refuse a model whose outputs are not what the dataset's targets are."""
    if model.assembly and model.assembly != data.assembly and not allow_genome_mismatch:
        raise DataError(
            f"the model was trained on {model.assembly} but {data.folder} is of {data.assembly}; "
            "pass --allow-genome-mismatch when that is what you want"
        )
    kinds = {track.name: track.kind for track in model.tracks}
    lacking = [track.name for track in tracks if track.name not in kinds]
    if lacking:
        raise DataError(
            f"the model predicts {', '.join(kinds)} but not {', '.join(lacking)} of {data.folder}; "
            "score only tracks that both have (--track), or give the dataset that the model was trained on"
        )
    for track in tracks:
        if kinds[track.name] != track.kind:
            raise DataError(
                f"track {track.name} is {track.kind} in {data.folder} but {kinds[track.name]} in the model; "
                "rename it in the dataset YAML, or leave it out (--track)"
            )
    if model.bin_bp != data.bin_bp:
        raise DataError(
            f"the model predicts {model.bin_bp}-bp bins but {data.folder} has {data.bin_bp}-bp bins; "
            f"prepare it with --set window.bin={model.bin_bp}"
        )


def _tell_trained(model: AccessibilityModel, chroms: Sequence[str]) -> None:
    trained = set(model.provenance.get("splits", {}).get("train", ()))
    seen = [chrom for chrom in chroms if chrom in trained]
    if seen:
        say(
            f"note: the model was trained on {', '.join(seen)}; these figures say nothing about unseen "
            "sequence"
        )


def _columns(model: AccessibilityModel, tracks: Sequence[TrackConfig]) -> list[int]:
    names = [track.name for track in model.tracks]
    return [names.index(track.name) for track in tracks]


def _name_of(model: Model) -> str:
    return "a model in memory" if isinstance(model, AccessibilityModel) else os.fspath(model)
