"""`genossm info`: what a model is and what it costs, before it is trained."""

from __future__ import annotations

from typing import Literal

import click

from genossm.cli.console import show
from genossm.cli.options import set_option


@click.command("info", short_help="Tell a model's parameters, receptive field, FLOPs and memory.")
@click.argument("model", metavar="CONFIG|RUN")
@click.option(
    "--length-bp",
    type=click.IntRange(min=1),
    default=131_072,
    show_default=True,
    metavar="N",
    help="Base pairs of a sequence; a multiple of the model's bin.",
)
@click.option(
    "--batch",
    "batch_size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences at once.",
)
@click.option(
    "--mode",
    type=click.Choice(["train", "predict", "both"]),
    default="both",
    show_default=True,
    help="What to count.",
)
@click.option(
    "--tracks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Outputs of a configuration's model, which its dataset decides; a run has its own.",
)
@set_option(help="Replace a key of CONFIG, for example model.encoder.width=512; may be given often.")
@click.option(
    "--predict-in",
    type=click.Choice(["bf16", "float32"]),
    default="bf16",
    show_default=True,
    help="What predictions are computed in.",
)
@click.option(
    "--measure", is_flag=True, help="Also run real steps on a GPU, and print what memory they took."
)
def command(
    model: str,
    length_bp: int,
    batch_size: int,
    mode: Literal["train", "predict", "both"],
    tracks: int,
    overrides: tuple[str, ...],
    predict_in: Literal["bf16", "float32"],
    measure: bool,
) -> None:
    """Tell a model's parameters, receptive field, FLOPs and memory.

    CONFIG is a YAML file or the name of a shipped configuration, RUN a folder that `genossm train` wrote. FLOPs
    and memory are those of an H100 and the same on every machine; no GPU is needed, but for --measure. Training is
    one step with bfloat16 autocast, AdamW and the running average; prediction too is in bfloat16, as `genossm predict`
    is on a GPU unless told otherwise. Memory is the peak of what PyTorch allocates, kernel by kernel, and for training also
    with CUDA graphs; the CUDA context takes about 0.5 GiB more.
    """
    from genossm.pipelines.model_info import model_info

    info = model_info(
        model,
        length_bp=length_bp,
        batch_size=batch_size,
        mode=mode,
        tracks=tracks,
        overrides=overrides,
        predict_in=predict_in,
        measure=measure,
    )
    show(info.to_mapping(), info.text())
