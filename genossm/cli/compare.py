"""`genossm compare`: several configurations on one dataset, in one table."""

from __future__ import annotations

import re
from pathlib import Path

import click

from genossm.cli.console import show
from genossm.cli.options import device_option, out_option, set_option

SEEDS = r"\d{1,10}(,\d{1,10})*"


def _seeds(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    if re.fullmatch(SEEDS, value) is None:
        raise click.BadParameter(
            f"{value!r} is no list of seeds: write whole numbers with commas, such as 1,2,3"
        )
    return tuple(int(word) for word in value.split(","))


@click.command("compare", short_help="Train several configurations with several seeds, in one table.")
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG...")
@click.option(
    "--dataset", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Prepared dataset."
)
@out_option(help="Folder for the runs and for compare.tsv, compare.json and compare.md.")
@click.option(
    "--seeds", default="1", show_default=True, callback=_seeds, metavar="N,N,...", help="Seeds to train with."
)
@click.option(
    "--sites",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="TSV",
    help="Also score whole sites, as `genossm evaluate --sites`.",
)
@click.option(
    "--resolution",
    type=click.IntRange(min=1),
    metavar="BP",
    help="Score bins of this size instead of the dataset's own.",
)
@set_option(help="Replace a key of every CONFIG, for example train.epochs=10; may be given often.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Trainings at once; they share the device.",
)
@click.option(
    "--ensembles/--no-ensembles",
    default=True,
    help="Also score the averaged predictions of each configuration's seeds.",
)
@device_option()
def command(
    configs: tuple[str, ...],
    dataset: Path,
    out: Path,
    seeds: tuple[int, ...],
    sites: Path | None,
    resolution: int | None,
    overrides: tuple[str, ...],
    jobs: int,
    ensembles: bool,
    device: str,
) -> int:
    """Train every CONFIG with every seed on one dataset, score all alike, and print a table.

    Each run is a folder DIR/CONFIG-seedN as `genossm train` writes it, with its scores in test/ and valid/.
    The same command again keeps what is finished and goes on with the rest. A run that fails is told in its
    row, the others go on, and the exit status is 1.
    """
    from genossm.pipelines.device import pick_device

    pick_device(device)  # told at once: the trainer takes seconds to import
    from genossm.pipelines.compare import compare

    comparison = compare(
        configs,
        dataset,
        out,
        seeds=seeds,
        overrides=overrides,
        sites=sites,
        resolution=resolution,
        jobs=jobs,
        device=device,
        ensembles=ensembles,
    )
    show({"out": out, **comparison.to_mapping()}, comparison.text())
    if comparison.failures:
        click.echo(
            f"error: {len(comparison.failures)} failed, see the table; the log is in {out / 'logs'}", err=True
        )
        return 1
    return 0
