"""Where `fetch` finds things: searches and addresses become lists of files, each with what is known of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from genossm.download import RemoteFile
from genossm.encode_portal import PORTAL, PortalFile, PortalQuery, search_files
from genossm.errors import ConfigError, DataError
from genossm.progress import say
from genossm.web import RefusedError, Web

Source = Literal["encode", "genome", "blacklist"]
BASE_URLS: dict[Source, str] = {
    "encode": PORTAL,
    "genome": "https://hgdownload.soe.ucsc.edu",
    "blacklist": "https://raw.githubusercontent.com/Boyle-Lab/Blacklist/master/lists",
}
# What UCSC and the blacklists call an assembly of the Genome Reference Consortium.
UCSC_NAMES = {"GRCh37": "hg19", "GRCh38": "hg38", "GRCm38": "mm10", "GRCm39": "mm39"}
# The lists of version 2 in the repository of the blacklists.
BLACKLISTED = ("ce10", "ce11", "dm3", "dm6", "hg19", "hg38", "mm10")
# Kinds of BED on the portal whose rows are intervals; others (bedMethyl, bedRnaElements, ...) are no peaks.
_PEAK_FORMATS = re.compile(r"(narrow|broad|gapped)Peak|idr_peak|idr_ranked_peak|tss_peak|bed\d+\+?")


@dataclass(frozen=True, slots=True)
class Plan:
    """The address that was asked, and the files to fetch with what is known about each."""

    asked: str
    files: tuple[tuple[RemoteFile, dict[str, str]], ...]


def encode_plan(query: PortalQuery, limit: int | None, base: str, web: Web) -> Plan:
    """The portal's files that match, the first `limit` of them; what was asked for and is not there is told.

    Raises:
        DataError: nothing matches, or the answer is not that of a portal.
        FileError: the portal cannot be reached.
    """
    found = search_files(query, web, base)
    files = found.files
    if found.left_out:
        say(f"note: {len(found.left_out)} files that match are not for everybody: left out")
    for what, asked, got in (
        ("assay", query.assays, {file.assay for file in files}),
        ("biosample", query.biosamples, {file.biosample for file in files}),
        ("output type", query.output_types, {file.output_type for file in files}),
    ):
        lacking = [value for value in asked if value not in got] if len(asked) > 1 else []
        if lacking:
            hint = (
                " among the preferred defaults (--all-files looks beyond)" if query.preferred_default else ""
            )
            say(f"note: no file of {what} {', '.join(map(repr, lacking))}{hint}")
    if limit is not None and limit < len(files):
        say(f"note: {limit} of {len(files)} files that match, by the limit")
        files = files[:limit]
    return Plan(
        found.url,
        tuple(
            (RemoteFile(file.url, f"tracks/{file.file_name}", file.md5, file.size), _about(file))
            for file in files
        ),
    )


def _about(file: PortalFile) -> dict[str, str]:
    """What tracks.tsv and the manifest tell of a file beside its name; `track` is empty where it is none."""
    is_peaks = file.file_format == "bed" and (
        not file.format_type or _PEAK_FORMATS.fullmatch(file.format_type)
    )
    kind = "peaks" if is_peaks else "signal" if file.file_format == "bigWig" else ""
    parts = [file.biosample, file.assay, file.target, file.accession]
    words = [re.sub(r"[^A-Za-z0-9.+-]+", "_", part).strip("_") for part in parts]
    return {
        "track": "_".join(word for word in words if word).lstrip(".+-") if kind else "",
        "kind": kind,
        "accession": file.accession,
        "experiment": file.experiment,
        "assay": file.assay,
        "target": file.target,
        "biosample": file.biosample,
        "output_type": file.output_type,
        "replicates": file.replicates,
        "file_format": f"{file.file_format} {file.format_type}".strip(),
    }


def genome_plan(name: str, genome_format: str, base: str, web: Web) -> Plan:
    """Sequence and chrom.sizes of UCSC's assembly `name`, in the layout goldenPath/<name>/bigZips.

    Raises:
        ConfigError: the format is neither fasta nor 2bit.
        DataError: the server has no such assembly, or not in that format.
        FileError: the server cannot be reached.
    """
    if genome_format not in ("fasta", "2bit"):
        raise ConfigError(f"the genome format {genome_format!r} is unknown: use fasta or 2bit")
    folder = f"{base}/goldenPath/{name}/bigZips"
    sequence = f"{name}.fa.gz" if genome_format == "fasta" else f"{name}.2bit"
    other = "2bit" if genome_format == "fasta" else "fasta"
    advice = f"UCSC's name of the assembly (such as hg38, sacCer3) is needed, and it may have the format {other} instead"
    sizes = {file: _size(f"{folder}/{file}", web, advice) for file in (sequence, f"{name}.chrom.sizes")}
    status, body = web.read(f"{folder}/md5sum.txt", also=(404,))
    md5s = _md5sums(body.decode("utf-8", errors="replace")) if status == 200 else {}
    lacking = [file for file in sizes if file not in md5s]
    if lacking:
        say(
            f"note: {folder}/md5sum.txt tells no md5 of {' and '.join(lacking)}: only the length can be checked"
        )
    return Plan(
        folder,
        tuple(
            (
                RemoteFile(
                    f"{folder}/{file}",
                    file,
                    md5s.get(file),
                    size,
                    check=_check_sizes if file.endswith(".sizes") else None,
                ),
                {"kind": "chrom.sizes" if file.endswith(".sizes") else "genome", "assembly": name},
            )
            for file, size in sizes.items()
        ),
    )


def blacklist_plan(name: str, base: str, web: Web) -> Plan:
    """The ENCODE blacklist, version 2, of UCSC's assembly `name`.

    Raises:
        DataError: there is none.
        FileError: the server cannot be reached.
    """
    file = blacklist_name(name)
    url = f"{base}/{file}"
    size = _size(url, web, f"blacklists of version 2 are known of {', '.join(BLACKLISTED)}")
    about = {"kind": "blacklist", "assembly": name}
    return Plan(url, ((RemoteFile(url, file, size=size, check=_check_regions), about),))


def blacklist_name(name: str) -> str:
    """The file name of an assembly's ENCODE blacklist, version 2."""
    return f"{name}-blacklist.v2.bed.gz"


def _size(url: str, web: Web, advice: str) -> int | None:
    try:
        return web.size(url)
    except RefusedError as error:
        raise DataError(f"{error}; {advice}") from error


def _md5sums(text: str) -> dict[str, str]:
    """File name to md5, of a file that md5sum wrote; lines of another form are passed over."""
    pattern = re.compile(r"([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S+)\s*")
    return {match[2]: match[1].lower() for line in text.splitlines() if (match := pattern.fullmatch(line))}


def _check_sizes(path: Path) -> None:
    """Refuse a file that is no chrom.sizes table."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines or [""]:
        if re.fullmatch(r"\S+\t[0-9]+", line) is None:
            raise DataError(f"a line of chrom.sizes is a name, a tab and a length, not {line[:60]!r}")


def _check_regions(path: Path) -> None:
    """Refuse a file that holds no BED intervals."""
    from genossm.annotations import read_annotations

    if not len(read_annotations(path).starts):
        raise DataError("it has no interval")
