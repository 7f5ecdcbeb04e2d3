"""`genossm evaluate`: score trained models on held-out chromosomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from genossm.cli.console import show
from genossm.cli.options import batch_size_option, device_option, out_option

if TYPE_CHECKING:
    import pandas as pd


@click.command("evaluate", short_help="Score a trained model on held-out chromosomes.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--dataset", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Prepared dataset."
)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Whose chromosomes to score.",
)
@click.option(
    "--resolution",
    type=click.IntRange(min=1),
    metavar="BP",
    help="Score bins of this size instead of the dataset's own, to compare with figures of other tools.",
)
@click.option(
    "--track", "tracks", multiple=True, metavar="NAME", help="Score this track only; may be given often."
)
@click.option(
    "--sites",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="TSV",
    help="Also score whole sites, rule by rule: a table with the columns chrom, start, end, open (1 or 0), rule and, "
    "if they differ, region_start and region_end, such as truth.tsv of `genossm simulate`.",
)
@click.option(
    "--allow-genome-mismatch", is_flag=True, help="Score on another assembly than the model was trained on."
)
@out_option(help="Folder for metrics.tsv, metrics.json, sites.tsv and the plots.", required=False)
@batch_size_option()
@device_option()
def command(
    runs: tuple[Path, ...],
    dataset: Path,
    split: str,
    resolution: int | None,
    tracks: tuple[str, ...],
    sites: Path | None,
    allow_genome_mismatch: bool,
    out: Path | None,
    batch_size: int,
    device: str,
) -> None:
    """Score trained models on whole held-out chromosomes: a row per track and their mean.

    RUN is a folder that `genossm train` wrote. The predictions of several runs are averaged before they
    are scored. Peaks: AUROC and AUPRC beside the positive rate, which is the AUPRC of a random ranking.
    Signal: Pearson and Spearman correlation of log1p values. Only unmasked bins count. A site's score is the
    mean probability over its region.
    """
    from genossm.pipelines.evaluate import evaluate, evaluate_sites

    options: dict[str, Any] = {
        "split": split,
        "resolution": resolution,
        "out": out,
        "device": device,
        "batch_size": batch_size,
        "allow_genome_mismatch": allow_genome_mismatch,
        "tracks": tracks or None,
    }
    if sites is None:
        table, scores = evaluate(runs, dataset, **options), None
    else:
        table, scores = evaluate_sites(runs, dataset, sites, **options)
    data = {"split": split, "rows": table.to_dict(orient="records"), "out": out}
    text = _text(table, first=3)
    if scores is not None:
        data["sites"] = scores.to_dict(orient="records")
        text += "\n\n" + _text(scores, first=5)
    show(data, text)


def _text(table: pd.DataFrame, *, first: int) -> str:
    """A table for people; the columns from number `first` on are figures."""
    formats = {name: "{:.4f}".format for name in table.columns[first:]}
    return str(table.to_string(index=False, formatters=formats, na_rep="-"))
