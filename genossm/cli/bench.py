"""`genossm bench`: measure the building blocks, whole encoders, prediction, or the reading of data, on this machine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click

from genossm.cli.console import show, to_json
from genossm.cli.options import Decorated, Decorator, device_option


class Benches(click.Group):
    """The benchmarks; what the group was given (--json, --debug) may stand after their names as well."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, with the group's options."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            return None
        command = copy.copy(command)
        command.params = [*command.params, *ctx.command.params]
        return command


def file_options(*, markdown: str) -> Decorator[Any]:
    """`--json-out FILE` and `--markdown FILE`, given to the command as `json_out` and `markdown_out`."""
    path = click.Path(dir_okay=False, path_type=Path)

    def decorate(command: Decorated) -> Decorated:
        command = click.option("--markdown", "markdown_out", type=path, metavar="FILE", help=markdown)(
            command
        )
        return click.option(
            "--json-out", type=path, metavar="FILE", help="Also write the figures to this JSON file."
        )(command)

    return decorate


@click.group(
    "bench",
    cls=Benches,
    short_help="Check and time scan kernels, whole encoders, prediction, and the reading of data, on this machine.",
)
def command() -> None:
    """Measure scan kernels, whole encoders, prediction, or the reading of data, on this machine. Let nothing else run on it."""


@command.command("kernels", short_help="Check the scan kernels, then time them.")
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
@file_options(markdown="On a GPU: also write the tables as Markdown.")
@click.option("--cpu", is_flag=True, help="The same as --device cpu.")
@device_option()
def kernels(
    cases: tuple[str, ...],
    quick: bool,
    peers: bool,
    length: int | None,
    heads: int | None,
    json_out: Path | None,
    markdown_out: Path | None,
    cpu: bool,
    device: str,
) -> None:
    """Check the scan kernels against the float64 reference, then print times and memory.

    On a GPU the Triton kernels are measured beside other people's and beside the least time that the card's own
    ceilings allow; on a CPU (--cpu) the PyTorch backend beside a loop step by step, whose gradient needs
    some GB. Run it on a quiet machine.
    """
    from genossm.errors import GenossmError
    from genossm.pipelines.benchmark import measure_kernels

    device = "cpu" if cpu else device
    if device == "cpu" and (cases or quick or markdown_out is not None):
        raise click.UsageError("--case, --quick and --markdown are for a GPU; leave them out with --cpu")

    def save(result: object, markdown: str) -> None:
        _save({"kernels": result}, markdown, json_out, markdown_out)

    result, text, failures = measure_kernels(
        device=device, cases=cases, quick=quick, peers=peers, length=length, heads=heads, save=save
    )
    show({"kernels": result}, text)
    if failures:
        raise GenossmError(f"these could not be measured: {'; '.join(failures)}")


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names with commas between them; `none` for none."""
    if value is None:
        return None
    return tuple(name.strip() for name in value.split(",") if name.strip() not in ("", "none"))


@command.command("encoders", short_help="Time whole encoders: configurations, mixers and rivals.")
@click.option(
    "--config",
    "configs",
    multiple=True,
    metavar="NAME|FILE",
    help="Only this configuration, shipped or a YAML file; may be given often; none for none. [default: all shipped]",
)
@click.option(
    "--mixers",
    callback=_names,
    metavar="A,B,...",
    help="Only these mixers, with commas between; none for none. [default: all]",
)
@click.option(
    "--like",
    metavar="NAME|FILE",
    help="The configuration whose width, layers, stem and number of parameters mixers and rivals have. "
    "[default: accessibility-100kb]",
)
@click.option(
    "--length", type=click.IntRange(min=1), metavar="N", help="Base pairs of a window. [default: 131072]"
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows at once. [default: each configuration's batch_size]",
)
@click.option(
    "--growth/--no-growth", default=True, help="Also time one window of 16 kb to 1 Mb.", show_default=True
)
@click.option(
    "--rivals/--no-rivals",
    "with_rivals",
    default=True,
    show_default=True,
    help="Also time a Transformer, and Mamba-2 in Caduceus' form: two passes and flips, by our kernels and by "
    "mamba-ssm's where $PEER_PATH has them or they are installed.",
)
@click.option("--quick", is_flag=True, help="Fewer configurations, lengths and repetitions.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Begin no measurement later than this. [default: 240; with --quick 120]",
)
@file_options(markdown="Also write the tables as Markdown.")
@device_option()
def encoders(
    configs: tuple[str, ...],
    mixers: tuple[str, ...] | None,
    like: str | None,
    length: int | None,
    batch: int | None,
    growth: bool,
    with_rivals: bool,
    quick: bool,
    time_limit: float | None,
    json_out: Path | None,
    markdown_out: Path | None,
    device: str,
) -> None:
    """Time training steps and inference of whole encoders, in Mbp/s, with their memory.

    Configurations as they are; then each mixer in an encoder of one size; then rivals of that size. In bfloat16 on a
    GPU; on a CPU only with --quick, on a tiny encoder. Files are written again after each row.
    """
    from genossm.pipelines.benchmark_encoder_cases import EncoderBenchmark
    from genossm.pipelines.benchmark_encoder_tables import markdown, text
    from genossm.pipelines.benchmark_encoders import benchmark_encoders

    def save(result: EncoderBenchmark) -> None:
        _save({"encoders": result}, markdown(result), json_out, markdown_out)

    result = benchmark_encoders(
        device=device,
        configs=tuple(name for name in configs if name != "none") if configs else None,
        mixers=mixers,
        like=like,
        length=length,
        batch=batch,
        growth=growth,
        with_rivals=with_rivals,
        quick=quick,
        time_limit_s=time_limit,
        save=save,
    )
    show({"encoders": result}, text(result))


@command.command("data", short_help="Time the reading of windows, beside memcpy and other loaders.")
@click.option(
    "--genome-mb",
    type=click.FloatRange(min=10),
    default=20.0,
    show_default=True,
    metavar="N",
    help="Size of the simulated genomes.",
)
@click.option(
    "--window-bp",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    metavar="N",
    help="Windows with no or one track.",
)
@click.option(
    "--tracks", type=click.IntRange(min=1), default=161, show_default=True, metavar="N", help="Of many."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Windows at once.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="Threads or processes, where there are any.",
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="Passes timed."
)
@click.option(
    "--peers/--no-peers",
    default=True,
    show_default=True,
    help="Also time pyfaidx with pyBigWig, and tangermeme and GenVarLoader where they are installed.",
)
@click.option(
    "--dataset",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Read the training windows of this prepared dataset instead; without peers.",
)
@file_options(markdown="Also write the tables to this file.")
@device_option(default="cpu")
def data(
    genome_mb: float,
    window_bp: int,
    tracks: int,
    batch_size: int,
    workers: int,
    repeats: int,
    peers: bool,
    dataset: Path | None,
    json_out: Path | None,
    markdown_out: Path | None,
    device: str,
) -> None:
    """Time how fast windows are read, in windows/s and MB/s, and print Markdown.

    Codes alone beside memcpy; codes with one track at every base, beside other loaders; and many tracks at 32 bp. The
    data are simulated in a temporary folder. With --device cuda batches end on the GPU. Files are written again after
    each row.
    """
    from genossm.pipelines.benchmark_data import DataBenchmark, measure_data
    from genossm.pipelines.benchmark_data_tables import markdown

    def save(result: DataBenchmark) -> None:
        _save({"data": result}, markdown(result), json_out, markdown_out)

    result = measure_data(
        genome_bp=round(genome_mb * 1e6),
        window_bp=window_bp,
        tracks=tracks,
        batch_size=batch_size,
        workers=workers,
        repeats=repeats,
        peers=peers,
        device=device,
        dataset=dataset,
        save=save,
    )
    show({"data": result}, markdown(result))


@command.command("predict", short_help="Time the prediction of whole chromosomes, FASTA to bigWig.")
@click.option(
    "--config",
    default="accessibility-100kb",
    show_default=True,
    metavar="NAME|FILE",
    help="The model, with random weights.",
)
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="BP",
    help="Only chromosomes of this length; may be given often. [default: 1 Mb to human chromosome 1, 249 Mb]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="N",
    help="Windows at once.",
)
@click.option(
    "--rivals/--no-rivals",
    default=True,
    show_default=True,
    help="Also time a loop of pyfaidx, DataLoader, model and pyBigWig, and a Transformer of equal size.",
)
@click.option("--quick", is_flag=True, help="Short chromosomes; a CPU does no more than that.")
@file_options(markdown="Also write the table to this file.")
@device_option()
def predict(
    config: str,
    lengths: tuple[int, ...],
    batch_size: int,
    rivals: bool,
    quick: bool,
    json_out: Path | None,
    markdown_out: Path | None,
    device: str,
) -> None:
    """Time the prediction of whole random chromosomes, end to end, in both modes.

    Seconds and Mbp/s, the model's own share of the time, memory of device and host, and how time grows with the length.
    Files are written again after each row.
    """
    from genossm.pipelines.benchmark_predict import PredictBenchmark, benchmark_predict
    from genossm.pipelines.benchmark_predict_tables import markdown, text

    def save(result: PredictBenchmark) -> None:
        _save({"predict": result}, markdown(result), json_out, markdown_out)

    result = benchmark_predict(
        device=device,
        config=config,
        lengths=lengths or None,
        batch_size=batch_size,
        rivals=rivals,
        quick=quick,
        save=save,
    )
    show({"predict": result}, text(result))


def _save(data: dict[str, object], markdown: str, json_out: Path | None, markdown_out: Path | None) -> None:
    from genossm.atomic import atomic_write_text

    if json_out is not None:
        atomic_write_text(json_out, to_json(data) + "\n")
    if markdown_out is not None:
        atomic_write_text(markdown_out, markdown)
