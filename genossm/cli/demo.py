"""`genossm demo`: the whole path on a simulated genome, with one report page at its end."""

from __future__ import annotations

from pathlib import Path

import click

from genossm.cli.console import show
from genossm.cli.options import batch_size_option, device_option, out_option, seed_option


@click.command("demo", short_help="Run the whole path on a simulated genome and write one report page.")
@out_option()
@seed_option()
@click.option(
    "--quick", is_flag=True, help="A tiny genome and two short epochs: tries the machinery, learns nothing."
)
@batch_size_option()
@device_option(default="cpu")
def command(out: Path, seed: int, quick: bool, batch_size: int, device: str) -> None:
    """Simulate a genome, prepare, train, evaluate and predict on it, and write DIR/report.html.

    The page shows the test metrics beside the positive rate, each planted rule on its own, a locus, and how
    everything was made; it opens offline. Interrupted, the same command goes on where it stopped.
    """
    from genossm.pipelines.demo import demo

    result = demo(out, seed=seed, device=device, quick=quick, batch_size=batch_size)
    rows = result.table.to_dict(orient="records")
    mean = result.table.set_index("track").loc["mean"]
    text = (
        f"{result.report}\ntest AUPRC {mean['auprc']:.3f} at a positive rate of {mean['positive_rate']:.3f}"
    )
    show({"report": result.report, "rows": rows, "seconds": result.seconds}, text)
