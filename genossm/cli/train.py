"""`genossm train`: train a model on a prepared dataset."""

from __future__ import annotations

from pathlib import Path

import click

from genossm.cli.console import show
from genossm.cli.options import device_option, out_option, seed_option, set_option


@click.command("train", short_help="Train a model on a prepared dataset.")
@click.argument("config", metavar="CONFIG")
@click.option(
    "--dataset", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Prepared dataset."
)
@click.option(
    "--genome",
    metavar="FASTA",
    type=click.Path(path_type=Path),
    help="The dataset's genome, where it has moved since `genossm prepare`.",
)
@out_option(help="Run folder: model, metrics, logs and the state to resume from.")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder from its last saved step.")
@seed_option(default=None)
@set_option(help="Replace a key of CONFIG, for example train.epochs=10; may be given often.")
@device_option()
def command(
    config: str,
    dataset: Path,
    genome: Path | None,
    out: Path,
    resume: bool,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Train a model and keep the weights that score best on the validation chromosomes.

    CONFIG is a YAML file or the name of a shipped configuration, such as yeast-100kb. The test chromosomes
    are never looked at.
    """
    from genossm.dataset import PreparedDataset
    from genossm.pipelines.device import pick_device

    pick_device(device)  # told at once: the trainer takes seconds to import
    from genossm.pipelines.train import train

    data = PreparedDataset(dataset, genome=genome)
    run = train(config, data, out, device=device, seed=seed, resume=resume, overrides=overrides)
    show(
        {"run": run.path, "best_epoch": run.best_epoch, "score": run.best_score, "seconds": run.seconds},
        f"{run.path}: best epoch {run.best_epoch}, validation score {run.best_score:.4f}, {run.seconds:.0f} s",
    )
