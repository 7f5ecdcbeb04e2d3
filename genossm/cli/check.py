"""`genossm check`: compare all files of a dataset and print what they hold."""

from __future__ import annotations

from pathlib import Path

import click

from genossm.cli.console import show
from genossm.cli.options import set_option


@click.command(short_help="Compare names, lengths and coordinates of all files of a dataset.")
@click.argument("dataset", type=click.Path(path_type=Path), metavar="DATASET.yaml")
@set_option()
def command(dataset: Path, overrides: tuple[str, ...]) -> None:
    """Compare names, lengths and coordinates of all files that DATASET.yaml names.

    Prints the chromosomes with their split and GC share, how much of each split stands in the training
    chromosomes too, what each file holds and its oddities, and for each track the positive bins (peaks) or
    total and mean (signal) in each split. Anything that does not fit is listed, with the offenders, and the
    exit status is 1.
    """
    from genossm.pipelines.check import check

    report = check(dataset, overrides)
    show(report.to_mapping(), report.text())
