"""`genossm prepare`: make the folder that training, evaluation and everything else reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from genossm.cli.console import show
from genossm.cli.options import out_option, set_option

if TYPE_CHECKING:
    from genossm.dataset import PreparedDataset

_LISTED = 10


@click.command(short_help="Turn a genome, peaks and signal into a folder ready for training.")
@click.argument("dataset", type=click.Path(path_type=Path), metavar="DATASET.yaml")
@out_option(help="Folder to make; one that exists must be empty or a prepared dataset, which is replaced.")
@set_option()
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Processes that convert tracks. Default: all cores, at most 8; none extra for little work.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print how large it will be and how long it takes, and stop.")
@click.option("--force", is_flag=True, help="Make it again even if nothing has changed.")
def command(
    dataset: Path, out: Path, overrides: tuple[str, ...], jobs: int | None, dry_run: bool, force: bool
) -> None:
    """Turn the genome, peaks and signal that DATASET.yaml names into a prepared dataset.

    Runs the comparisons of `genossm check` first. The folder appears complete or not at all, and is made
    again only when the YAML or an input file has changed. Killed, it goes on where it was with the next call.
    """
    from genossm.pipelines.prepare import estimate, prepare

    if dry_run:
        expected = estimate(dataset, out, overrides=overrides, jobs=jobs)
        show({"folder": out, "estimate": expected, "fits": expected.fits}, expected.text())
        return
    prepared = prepare(dataset, out, overrides=overrides, force=force, jobs=jobs)
    windows = {split: len(prepared.windows(split)) for split in prepared.splits}
    data = {
        "folder": out,
        "assembly": prepared.assembly,
        "tracks": prepared.track_names,
        "chromosomes": len(prepared.lengths),
        "windows": windows,
        "positive_rate": prepared.positive_rate,
        "dtype": str(prepared.storage.dtype),
        "storage_error": {
            track: {"largest": coding.largest_error, "rms": coding.rms_error}
            for track, coding in zip(prepared.track_names, prepared.storage.codings, strict=True)
        },
        "split_check": prepared.split_check,
    }
    counts = ", ".join(f"{count} {split}" for split, count in windows.items())
    first = f"{out}: {prepared.assembly}, {len(prepared.tracks)} tracks, windows: {counts}"
    show(data, "\n".join([first, *_lines(prepared)]))


def _lines(prepared: PreparedDataset) -> list[str]:
    """What is positive, and what storing costs, for a few tracks each."""
    rates = [f"  {track}: {rate:.2%} of bins positive" for track, rate in prepared.positive_rate.items()]
    inexact = sorted(
        (coding.largest_error, coding.rms_error, track)
        for track, coding in zip(prepared.track_names, prepared.storage.codings, strict=True)
        if coding.largest_error
    )
    errors = [
        f"  {track}: stored as {prepared.storage.dtype}, relative error {largest:.2g} at most, {rms:.2g} rms"
        for largest, rms, track in reversed(inexact)
    ]
    lines = []
    for found, what in ((rates, "peaks tracks"), (errors, "tracks, with smaller errors")):
        lines += found[:_LISTED]
        if len(found) > _LISTED:
            lines.append(f"  and {len(found) - _LISTED} more {what}: see {prepared.folder / 'dataset.json'}")
    return lines
