"""`genossm prepare`: make the folder that training, evaluation and everything else reads."""

from __future__ import annotations

from pathlib import Path

import click

from genossm.cli.console import show
from genossm.cli.options import out_option, set_option


@click.command(short_help="Turn a genome, peaks and signal into a folder ready for training.")
@click.argument("dataset", type=click.Path(path_type=Path), metavar="DATASET.yaml")
@out_option(help="Folder to make; one that exists must be empty or a prepared dataset, which is replaced.")
@set_option()
@click.option("--force", is_flag=True, help="Make it again even if nothing has changed.")
def command(dataset: Path, out: Path, overrides: tuple[str, ...], force: bool) -> None:
    """Turn the genome, peaks and signal that DATASET.yaml names into a prepared dataset.

    Runs the comparisons of `genossm check` first. The folder appears complete or not at all, and is made
    again only when the YAML or an input file has changed.
    """
    from genossm.pipelines.prepare import prepare

    prepared = prepare(dataset, out, overrides=overrides, force=force)
    windows = {split: len(prepared.windows(split)) for split in prepared.splits}
    data = {
        "folder": out,
        "assembly": prepared.assembly,
        "tracks": prepared.track_names,
        "chromosomes": len(prepared.lengths),
        "windows": windows,
        "positive_rate": prepared.positive_rate,
    }
    counts = ", ".join(f"{count} {split}" for split, count in windows.items())
    rates = "".join(
        f"\n  {track}: {rate:.2%} of bins positive" for track, rate in prepared.positive_rate.items()
    )
    show(data, f"{out}: {prepared.assembly}, {len(prepared.tracks)} tracks, windows: {counts}{rates}")
