"""`genossm bench`: measure the building blocks on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from genossm.cli.console import show, to_json
from genossm.cli.options import device_option


@click.command("bench", short_help="Check the scan kernels, then time them on this machine.")
@click.argument("what", type=click.Choice(["kernels"]))
@click.option(
    "--length",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    metavar="N",
    help="Positions of the main table.",
)
@click.option(
    "--heads",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="Heads of ssd (of 64 channels and a state of 64).",
)
@click.option(
    "--json-out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the figures to this JSON file.",
)
@device_option()
def command(what: str, length: int, heads: int, json_out: Path | None, device: str) -> None:
    """Check the scan kernels against the float64 reference, then print times and memory.

    The ratio to a loop step by step is measured at the same length; that loop needs some GB for its gradient.
    Run it on a quiet machine.
    """
    from genossm.atomic import atomic_write_text
    from genossm.pipelines.benchmark import Sizes, benchmark_kernels, report

    result = benchmark_kernels(device=device, length=length, sizes=Sizes(heads=heads))
    if json_out is not None:
        atomic_write_text(json_out, to_json({"kernels": result}) + "\n")
    show({what: result}, report(result))
