"""`genossm bench`: measure the building blocks on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from genossm.cli.console import show, to_json
from genossm.cli.options import device_option


@click.command("bench", short_help="Check the scan kernels, then time them on this machine.")
@click.argument("what", type=click.Choice(["kernels"]))
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="NAME",
    help="On a GPU: only the cases whose name begins so, such as ssd or ssd-both-128; may be given often.",
)
@click.option("--quick", is_flag=True, help="On a GPU: fewer lengths and repetitions.")
@click.option(
    "--peers/--no-peers",
    default=True,
    help="On a GPU: also time mamba-ssm, flash-linear-attention and causal-conv1d, found in the folders of "
    "$PEER_PATH or installed; absent ones are quoted.",
)
@click.option(
    "--length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Positions of the main table. [default: 8192; on a GPU 8192, 131072 and 1048576]",
)
@click.option(
    "--heads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Heads of ssd, of 64 channels each. [default: 4; on a GPU 16]",
)
@click.option(
    "--json-out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the figures to this JSON file.",
)
@click.option(
    "--markdown",
    "markdown_out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="On a GPU: also write the tables as Markdown.",
)
@device_option()
def command(
    what: str,
    cases: tuple[str, ...],
    quick: bool,
    peers: bool,
    length: int | None,
    heads: int | None,
    json_out: Path | None,
    markdown_out: Path | None,
    device: str,
) -> None:
    """Check the scan kernels against the float64 reference, then print times and memory.

    On a GPU the Triton kernels are measured beside other people's and beside the least time that the card's own
    ceilings allow; on a CPU (--device cpu) the PyTorch backend beside a loop step by step, whose gradient needs
    some GB. Run it on a quiet machine.
    """
    from genossm.atomic import atomic_write_text
    from genossm.errors import GenossmError
    from genossm.pipelines.benchmark import measure_kernels

    if device == "cpu" and (cases or quick or markdown_out is not None):
        raise click.UsageError(
            "--case, --quick and --markdown are for a GPU; leave them out with --device cpu"
        )

    def save(result: object, markdown: str) -> None:
        if json_out is not None:
            atomic_write_text(json_out, to_json({"kernels": result}) + "\n")
        if markdown_out is not None:
            atomic_write_text(markdown_out, markdown)

    result, text, failures = measure_kernels(
        device=device, cases=cases, quick=quick, peers=peers, length=length, heads=heads, save=save
    )
    show({what: result}, text)
    if failures:
        raise GenossmError(f"these could not be measured: {'; '.join(failures)}")
