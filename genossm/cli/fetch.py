"""`genossm fetch`: files of the ENCODE portal, a genome of UCSC, an ENCODE blacklist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from genossm.cli.bench import Benches as Sources  # a group whose commands share its options
from genossm.cli.console import show
from genossm.cli.options import Decorated, Decorator, TextType, out_option

if TYPE_CHECKING:
    from genossm.pipelines.fetch import FetchResult


class Filter(TextType):
    """One `property=value` of the portal's search."""

    name = "property=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """(property, value); bad usage when there is no `=`."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not (key and equals and text):
            self.fail(
                f"{value!r} is no filter: write property=value, for example target.label=CTCF", param, ctx
            )
        return key, text


def fetch_options(*, server: str) -> Decorator[Any]:
    """`-o`, `--jobs`, `--dry-run` and `--base-url`, given to the command as out, jobs, dry_run and base_url."""

    def decorate(command: Decorated) -> Decorated:
        for option in (
            click.option("--base-url", metavar="URL", help=f"Another server in the place of {server}."),
            click.option("--dry-run", is_flag=True, help="Only list the files and their size."),
            click.option(
                "--jobs",
                type=click.IntRange(1, 8),
                default=2,
                show_default=True,
                metavar="N",
                help="Downloads at a time.",
            ),
            out_option(help="Folder to write into; made when missing. Fetches may share one."),
        ):
            command = option(command)
        return command

    return decorate


@click.group(
    "fetch", cls=Sources, short_help="Fetch ENCODE files, a genome or a blacklist from their servers."
)
def command() -> None:
    """Fetch ENCODE files, a genome or a blacklist from their servers.

    Every file is checked by its md5 where the server tells it; what is there already is not fetched again. An
    interrupted fetch goes on where it stopped: run it again. manifest.json says where each file came from.
    """


@command.command("encode", short_help="Files of the ENCODE portal, with tracks.tsv and dataset.yaml.")
@click.option("--assay", "assays", multiple=True, required=True, metavar="NAME", help="Such as ATAC-seq.")
@click.option("--biosample", "biosamples", multiple=True, metavar="NAME", help="Such as K562. [default: all]")
@click.option("--assembly", required=True, metavar="NAME", help="The portal's name: GRCh38, mm10, ...")
@click.option(
    "--output-type",
    "output_types",
    multiple=True,
    required=True,
    metavar="NAME",
    help='Such as "IDR thresholded peaks" or "fold change over control".',
)
@click.option("--status", "statuses", multiple=True, default=("released",), show_default=True, metavar="NAME")
@click.option(
    "--file-format",
    "formats",
    multiple=True,
    default=("bed", "bigWig"),
    show_default=True,
    metavar="NAME",
    help="Only bed and bigWig files become tracks.",
)
@click.option(
    "--where",
    type=Filter(),
    multiple=True,
    metavar="PROPERTY=VALUE",
    help="A further filter of the portal, such as target.label=CTCF.",
)
@click.option(
    "--preferred-default/--all-files",
    default=True,
    show_default=True,
    help="Only the files that the portal recommends of each experiment, or each replicate's too.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many files.")
@click.option(
    "--genome",
    metavar="FILE",
    help="Genome that dataset.yaml names. [default: that of `genossm fetch genome` in the same folder]",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="FILE",
    help="Regions that dataset.yaml excludes. [default: those of `genossm fetch blacklist` in the same folder]",
)
@click.option("--valid", multiple=True, metavar="CHROM", help="[default: chr10 for human and mouse]")
@click.option("--test", multiple=True, metavar="CHROM", help="[default: chr8 and chr9 for human and mouse]")
@fetch_options(server="https://www.encodeproject.org")
def encode(
    assays: tuple[str, ...],
    biosamples: tuple[str, ...],
    assembly: str,
    output_types: tuple[str, ...],
    statuses: tuple[str, ...],
    formats: tuple[str, ...],
    where: tuple[tuple[str, str], ...],
    preferred_default: bool,
    limit: int | None,
    genome: str | None,
    exclude: tuple[str, ...],
    valid: tuple[str, ...],
    test: tuple[str, ...],
    out: Path,
    jobs: int,
    dry_run: bool,
    base_url: str | None,
) -> None:
    """Search the ENCODE portal and fetch what matches, with a tracks.tsv and a dataset.yaml for it.

    Names are spelled as on the portal. Options given several times mean any of the values.
    """
    from genossm.pipelines.fetch import fetch

    result = fetch(
        "encode",
        out,
        assembly=assembly,
        assays=assays,
        output_types=output_types,
        biosamples=biosamples,
        statuses=statuses,
        formats=formats,
        preferred_default=preferred_default,
        where=where,
        limit=limit,
        genome=genome,
        exclude=exclude or None,
        valid=valid,
        test=test,
        base_url=base_url,
        jobs=jobs,
        dry_run=dry_run,
    )
    _show(result, ("biosample", "assay", "target", "output_type"))


@command.command("genome", short_help="Sequence and chrom.sizes of an assembly, from UCSC.")
@click.argument("assembly")
@click.option(
    "--format",
    "genome_format",
    type=click.Choice(["fasta", "2bit"]),
    default="fasta",
    show_default=True,
)
@fetch_options(server="https://hgdownload.soe.ucsc.edu")
def genome(
    assembly: str,
    genome_format: Literal["fasta", "2bit"],
    out: Path,
    jobs: int,
    dry_run: bool,
    base_url: str | None,
) -> None:
    """Fetch sequence and chrom.sizes of ASSEMBLY (UCSC's name, such as hg38, or GRCh38) from UCSC."""
    from genossm.pipelines.fetch import fetch

    result = fetch(
        "genome",
        out,
        assembly=assembly,
        genome_format=genome_format,
        base_url=base_url,
        jobs=jobs,
        dry_run=dry_run,
    )
    _show(result, ("kind",))


@command.command("blacklist", short_help="The ENCODE blacklist of an assembly, version 2.")
@click.argument("assembly")
@fetch_options(server="https://raw.githubusercontent.com/Boyle-Lab/Blacklist/master/lists")
def blacklist(assembly: str, out: Path, jobs: int, dry_run: bool, base_url: str | None) -> None:
    """Fetch the ENCODE blacklist, version 2, of ASSEMBLY (UCSC's name, such as hg38, or GRCh38)."""
    from genossm.pipelines.fetch import fetch

    result = fetch("blacklist", out, assembly=assembly, base_url=base_url, jobs=jobs, dry_run=dry_run)
    _show(result, ("kind",))


def _show(result: FetchResult, columns: tuple[str, ...]) -> None:
    """Print a fetch: a line for each file, the sum, and what to do next."""
    from tqdm import tqdm

    states = [file.state for file in result.files]
    lines = []
    for file in result.files:
        size = "?" if file.size is None else tqdm.format_sizeof(file.size, "B")
        told = [file.about[column] for column in columns if file.about.get(column)]
        lines.append("\t".join([file.state, size, file.name, *told]))
    unknown = " and those of unknown size" if any(file.size is None for file in result.files) else ""
    total = f"{len(states)} file{'s' if len(states) != 1 else ''}, {tqdm.format_sizeof(result.size, 'B')}{unknown}"
    if "planned" in states:
        lines.append(f"{total}; nothing was fetched (--dry-run)")
    else:
        lines.append(
            f"{result.folder}: {total}; {states.count('fetched')} fetched, {states.count('present')} already there"
        )
    if result.written:
        lines.append(f"written: {', '.join(result.written)}")
    if result.missing:
        lines.append(
            f"dataset.yaml also names {', '.join(result.missing)}, not there yet: see `genossm fetch genome` and "
            "`genossm fetch blacklist`"
        )
    data = {
        "folder": result.folder,
        "asked": result.asked,
        "files": result.files,
        "bytes": result.size,
        "written": result.written,
        "missing": result.missing,
    }
    show(data, "\n".join(lines))
