"""`genossm predict`: every track along chromosomes, regions or sequences, as bigWig, narrowPeak and HDF5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from genossm.cli.console import show
from genossm.cli.options import batch_size_option, device_option, out_option

if TYPE_CHECKING:
    from genossm.pipelines.collect import PredictionResult

COMPARED = ("genome", "out", "chroms", "overlap_bp", "chunk_bp", "spill", "batch_size", "precision", "device")
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("predict", short_help="Predict every track along chromosomes, regions or sequences.")
@click.argument("runs", type=click.Path(path_type=Path), metavar="RUN...", nargs=-1, required=True)
@click.option("--genome", type=FILE, metavar="FASTA", help="The genome: FASTA, plain or bgzip, or 2bit.")
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
              help="windows: tiles of the training window, margins cropped. chromosome: each as one sequence; "
              "a killed run then loses the chromosome in hand.")  # fmt: skip
@click.option(
    "--overlap",
    "overlap_bp",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="BP",
    help="Bases of target that neighbouring windows share, where values fade from one to the other: a multiple of the "
    "bin, at most half of the target. Costs target/(target - BP) times the compute.",
)
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
    help="Keep a chromosome's features between layers in a temporary file there: memory then does not grow with "
    "its length. Default: on the device up to a quarter of what is free, in memory while it suffices, then in DIR.",
)
@click.option("--hdf5", is_flag=True, help="Write predictions.h5 (bins x tracks) as well.")
@click.option("--hdf5-dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
              help="Type of the numbers in predictions.h5 or sequences.h5.")  # fmt: skip
@click.option("--call-peaks", is_flag=True, help="Write called regions of each peaks track as narrowPeak.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Lowest probability in a called region. Default: the model's own.",
)
@batch_size_option()
@click.option("--precision", type=click.Choice(["auto", "bf16", "float32"]), default="auto", show_default=True,
              help="What the model computes in. auto: bf16 on CUDA, float32 on a CPU.")  # fmt: skip
@device_option()
@click.option(
    "--devices", metavar="A,B,...", help="Several of this machine, such as cuda:0,cuda:1, in its place."
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Only share I (from 1) of N alike in bases; `genossm merge DIR` then writes the files.",
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    metavar="[TRACK=]FILE.bw",
    help="Print the correlation with this bigWig per chromosome; may be given often.",
)
@click.option("--dry-run", is_flag=True, help="Print the time, memory and disk that it needs, and stop.")
@click.option("--compare", is_flag=True, help="Instead, tell how far the mode windows is from chromosome, by the "
              "distance from the windows' edges (DIR/compare.json).")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what is in DIR, another prediction or a finished one.")
def command(
    runs: tuple[Path, ...],
    chroms: tuple[str, ...],
    regions: tuple[str, ...],
    references: tuple[str, ...],
    dry_run: bool,
    compare: bool,
    **options: Any,
) -> int:
    """Predict all tracks of the model in RUN and write DIR/<track>.bw, a bigWig each, and DIR/run.json.

    Bins of mostly N are gaps. The two strands are averaged, unless the model is symmetric by itself or was
    trained on one. Of several RUNs (folds, say) the mean is written. A killed command goes on where it stopped when it
    is run again; SIGTERM ends it after the part in hand, with exit status 143.
    """
    switches = {"dry_run": dry_run, "compare": compare, "references": references}
    _check_usage(options | switches | {"chroms": chroms, "regions": regions})
    devices = options.pop("devices")
    options |= {"chroms": chroms or None, "regions": regions or None}
    if dry_run:
        from genossm.pipelines.predict_estimate import estimate

        expected = estimate(runs, **_without(options, "force"))
        show({"out": options["out"], "estimate": expected, "fits": expected.fits}, expected.text())
        return 0
    if compare:
        from genossm.pipelines.predict_compare import compare_modes

        report = compare_modes(runs, **{name: options[name] for name in COMPARED})
        show({"out": options["out"], **report.to_mapping()}, report.text())
        return 0
    from genossm.pipelines.correlate import correlate
    from genossm.pipelines.parts import PredictionStopped
    from genossm.pipelines.predict import predict
    from genossm.pipelines.stop import STOPPED_STATUS
    from genossm.progress import say

    try:
        result = predict(runs, devices=devices.split(",") if devices else None, **options)
    except PredictionStopped as error:
        say(str(error))
        return STOPPED_STATUS
    data = {"out": result.folder, "files": result.files, **result.summary}
    text = prediction_text(result)
    if references:
        found = correlate(result.folder, references)
        data, text = data | {"reference": found.rows}, f"{text}\n{found.text()}"
    show(data, text)
    return 0


def prediction_text(result: PredictionResult) -> str:
    """What a prediction, or a shard of one, wrote, in lines for people."""
    summary = result.summary
    if "shard" in summary:
        return (
            f"shard {summary['shard']}: {summary['parts']:,} parts of {summary['bases']:,} bp are in {result.folder}\n"
            f"when all shards are done: genossm merge {result.folder}"
        )
    lines = [f"{summary['bins']:,} bins ({summary['gap_bins']:,} gaps) in {result.folder}"]
    if summary.get("state_out_of_range"):
        lines.append(f"{summary['state_out_of_range']:,} bins with states out of range (qc.bed)")
    for name, track in summary["tracks"].items():
        values = " ".join(f"{key} {track[key]:.4g}" for key in ("mean", "max") if track[key] is not None)
        called = (
            f"; {track['regions']:,} regions at {track['threshold']:g} or more" if "regions" in track else ""
        )
        beyond = f"; {track['out_of_range']:,} bins out of range" if track["out_of_range"] else ""
        lines.append(f"{name}: {values}{called}{beyond}")
    return "\n".join([*lines, *map(str, result.files)])


def _without(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


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
        if options[name] is not None and options["mode"] != "chromosome" and not options["compare"]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --mode chromosome")
    if options["overlap_bp"] and options["mode"] != "windows":
        raise click.UsageError("--overlap needs --mode windows")
    if options["shard"] is not None:
        from genossm.errors import ConfigError
        from genossm.pipelines.shards import Shard

        try:
            Shard.parse(options["shard"])
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
    if options["shard"] is not None and (options["references"] or options["compare"]):
        raise click.UsageError(
            "a shard writes no files: give --reference to genossm merge, and leave out --compare"
        )
    if options["devices"] is not None and (options["compare"] or options["dry_run"]):
        raise click.UsageError("--compare and --dry-run use one device: give --device in place of --devices")
    if options["sequences"] is not None and (options["references"] or options["compare"]):
        raise click.UsageError("--sequences have no coordinates: leave out --reference and --compare")
    if options["compare"] and (
        options["dry_run"] or options["references"] or options["regions"] or options["bed"]
    ):
        raise click.UsageError("--compare takes --chrom, and no --region, --bed, --reference and --dry-run")
