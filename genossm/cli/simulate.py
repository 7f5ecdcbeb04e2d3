"""`genossm simulate`: write a small genome whose regulatory grammar is known."""

from __future__ import annotations

from pathlib import Path

import click

from genossm.cli.console import show
from genossm.cli.options import out_option, seed_option


@click.command("simulate", short_help="Write a small genome with planted, known regulatory grammar.")
@out_option()
@seed_option()
@click.option(
    "--chromosomes", type=int, default=6, show_default=True, metavar="N", help="How many; at least 3."
)
@click.option(
    "--chromosome-bp", type=int, default=1_000_000, show_default=True, metavar="BP", help="Length of each."
)
@click.option("--window", "window_bp", type=int, default=131_072, show_default=True, metavar="BP",
              help="Window length written to dataset.yaml.")  # fmt: skip
@click.option("--margin", "margin_bp", type=int, default=32_768, show_default=True, metavar="BP",
              help="Window margin written to dataset.yaml.")  # fmt: skip
@click.option(
    "--signal/--no-signal",
    default=True,
    help="Whether to write signal.bw, a track of cuts, which takes about half of the time.",
)
@click.option("--force", is_flag=True, help="Replace an earlier simulation in DIR.")
def command(
    out: Path,
    seed: int,
    chromosomes: int,
    chromosome_bp: int,
    window_bp: int,
    margin_bp: int,
    signal: bool,
    force: bool,
) -> None:
    """Write genome.fa, peaks.narrowPeak, signal.bw, truth.tsv and dataset.yaml into DIR.

    A pair of motifs within 60 bp is open, each motif alone is closed; a promoter motif is open only where
    an enhancer motif stands 10-60 kb away, on either side. The same options give byte-identical files.
    """
    import json

    from genossm.pipelines.simulate import simulate

    folder = simulate(
        out,
        seed=seed,
        chromosomes=chromosomes,
        chromosome_bp=chromosome_bp,
        window_bp=window_bp,
        margin_bp=margin_bp,
        signal=signal,
        force=force,
    )
    summary = json.loads((folder / "simulation.json").read_text(encoding="utf-8"))
    rows = [f"{kind:10} {n['open']:6} open {n['closed']:6} closed" for kind, n in summary["sites"].items()]
    lines = [f"{folder}: {100 * summary['open_fraction']:.1f} % of the genome is open", *rows]
    show({"out": folder, **summary}, "\n".join(lines))
