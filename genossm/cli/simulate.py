"""`genossm simulate`: write a genome whose regulatory grammar is known, or a large one to measure on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from genossm.cli.console import show
from genossm.cli.options import out_option, seed_option

_GRAMMAR_ONLY = ("chromosomes", "chromosome_bp", "signal")
_SPARSE_ONLY = ("genome_bp", "tracks", "signals")


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
@click.option("--sparse", is_flag=True, help="Random bases and many sparse tracks instead of a grammar.")
@click.option("--genome-bp", type=float, default=3.1e9, show_default=True, metavar="BP",
              help="With --sparse: length of the genome, 24 chromosomes as large, relatively, as human ones.")  # fmt: skip
@click.option(
    "--tracks", type=int, default=161, show_default=True, metavar="N", help="With --sparse: how many."
)
@click.option("--signals", type=int, default=0, show_default=True, metavar="N",
              help="With --sparse: how many of the tracks are bigWigs, not peaks.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an earlier simulation in DIR.")
@click.pass_context
def command(context: click.Context, /, out: Path, sparse: bool, genome_bp: float, **options: Any) -> None:
    """Write genome.fa, peaks.narrowPeak, signal.bw, truth.tsv and dataset.yaml into DIR.

    A pair of motifs within 60 bp is open, each motif alone is closed; a promoter motif is open only where
    an enhancer motif stands 10-60 kb away, on either side. The same options give byte-identical files.

    With --sparse: a genome of any size with many tracks, to measure time, memory and disk on; it has nothing to learn.
    """
    import json

    for name in _GRAMMAR_ONLY if sparse else _SPARSE_ONLY:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = "--no-signal" if name == "signal" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} has no meaning {'with' if sparse else 'without'} --sparse")
    kept = {
        name: value
        for name, value in options.items()
        if name not in (_GRAMMAR_ONLY if sparse else _SPARSE_ONLY)
    }
    if sparse:
        from genossm.pipelines.simulate_genome import simulate_sparse

        folder = simulate_sparse(out, genome_bp=round(genome_bp), **kept)
    else:
        from genossm.pipelines.simulate import simulate

        folder = simulate(out, **kept)
    summary = json.loads((folder / "simulation.json").read_text(encoding="utf-8"))
    show({"out": folder, **summary}, "\n".join(_lines(folder, summary)))


def _lines(folder: Path, summary: dict[str, Any]) -> list[str]:
    if "sites" not in summary:
        return [
            f"{folder}: {summary['bases']:,} bp, {summary['parameters']['tracks']} tracks, "
            f"{summary['peaks_per_track']:,} peaks on {100 * summary['peak_fraction']:.1f} % of the genome in each"
        ]
    rows = [f"{kind:10} {n['open']:6} open {n['closed']:6} closed" for kind, n in summary["sites"].items()]
    return [f"{folder}: {100 * summary['open_fraction']:.1f} % of the genome is open", *rows]
