"""`genossm predict`: every track along chromosomes, regions or sequences, as bigWig, narrowPeak and HDF5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from genossm.cli.console import show
from genossm.cli.options import batch_size_option, device_option, out_option

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("predict", short_help="Predict every track along chromosomes, regions or sequences.")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--genome", type=FILE, metavar="FASTA", help="The genome, plain or bgzip.")
@out_option()
@click.option(
    "--chrom",
    "chroms",
    multiple=True,
    metavar="NAME",
    help="A whole chromosome; may be given often. Default: all.",
)
@click.option(
    "--region",
    "regions",
    multiple=True,
    metavar="CHR:START-END",
    help="Only bins that overlap this region (0-based half-open, like BED); may be given often.",
)
@click.option("--bed", type=FILE, help="Only bins that overlap the rows of this BED file.")
@click.option(
    "--sequences",
    type=FILE,
    metavar="FASTA",
    help="Sequences without coordinates, in place of a genome; arrays out.",
)
@click.option("--mode", type=click.Choice(["windows", "chromosome"]), default="windows", show_default=True,
              help="windows: tiles of the training window, margins cropped. chromosome: each as one sequence.")  # fmt: skip
@click.option(
    "--chunk-bp",
    type=click.IntRange(min=1),
    metavar="N",
    help="Bases of a chromosome at once; changes speed and memory, and results by rounding only. "
    "Default: 2^20 on CUDA, 2^18 on a CPU.",
)
@click.option(
    "--spill",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep a chromosome's features between layers in a temporary file there. Default: in memory while it "
    "suffices, then in DIR.",
)
@click.option("--hdf5", is_flag=True, help="Write predictions.h5 (bins x tracks) as well.")
@click.option("--call-peaks", is_flag=True, help="Write called regions of each peaks track as narrowPeak.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Lowest probability in a called region. Default: the model's own.",
)
@batch_size_option()
@device_option()
@click.option("--force", is_flag=True, help="Replace what is in DIR, another prediction or a finished one.")
def command(run: Path, chroms: tuple[str, ...], regions: tuple[str, ...], **options: Any) -> None:
    """Predict all tracks of the model in RUN and write DIR/<track>.bw, a bigWig each, and DIR/run.json.

    Bins of mostly N are gaps. The two strands are averaged, unless the model is symmetric by itself or was
    trained on one. A killed command goes on where it stopped when it is run again.
    """
    _check_usage(options | {"chroms": chroms, "regions": regions})
    from genossm.pipelines.predict import predict

    result = predict(run, chroms=chroms or None, regions=regions or None, **options)
    lines = [f"{result.summary['bins']:,} bins ({result.summary['gap_bins']:,} gaps) in {result.folder}"]
    for name, track in result.summary["tracks"].items():
        values = " ".join(f"{key} {track[key]:.4g}" for key in ("mean", "max") if track[key] is not None)
        called = (
            f"; {track['regions']:,} regions at {track['threshold']:g} or more" if "regions" in track else ""
        )
        lines.append(f"{name}: {values}{called}")
    lines += [str(file) for file in result.files]
    show({"out": result.folder, "files": result.files, **result.summary}, "\n".join(lines))


def _check_usage(options: Mapping[str, Any]) -> None:
    """Options that need or exclude each other: bad usage, told before anything heavy is imported."""
    where = [name for name in ("chroms", "regions", "bed") if options[name]]
    if (options["genome"] is None) == (options["sequences"] is None):
        raise click.UsageError("give one of --genome FASTA and --sequences FASTA")
    if options["sequences"] is not None and where:
        raise click.UsageError("--sequences have no coordinates: leave out --chrom, --region and --bed")
    if options["chroms"] and len(where) > 1:
        raise click.UsageError("give either --chrom or --region and --bed, not both")
    if options["threshold"] is not None and not options["call_peaks"]:
        raise click.UsageError("--threshold needs --call-peaks")
    for name in ("chunk_bp", "spill"):
        if options[name] is not None and options["mode"] != "chromosome":
            raise click.UsageError(f"--{name.replace('_', '-')} needs --mode chromosome")
