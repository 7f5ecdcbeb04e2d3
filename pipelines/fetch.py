"""Fetch public data into a folder: files of the ENCODE portal, a genome from UCSC, an ENCODE blacklist."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from genossm.download import Downloaded, download_all
from genossm.encode_portal import PortalQuery
from genossm.errors import ConfigError
from genossm.pipelines.fetch_folder import Manifest, alone_in, dataset_description, tracks_table
from genossm.pipelines.fetch_sources import (
    BASE_URLS,
    BLACKLISTED,
    UCSC_NAMES,
    Plan,
    Source,
    blacklist_name,
    blacklist_plan,
    encode_plan,
    genome_plan,
)
from genossm.progress import say
from genossm.web import Patience, Web

# Held-out chromosomes that many models of the field share (DeepSEA's test chromosomes).
_SPLITS = {name: (("chr10",), ("chr8", "chr9")) for name in ("hg19", "hg38", "mm9", "mm10", "mm39")}


@dataclass(frozen=True, slots=True)
class FileSummary:
    """One file of a fetch. `state`: fetched now, present before, or only planned (`dry_run`).

    `size` in bytes and `md5` are None where a plan does not know them; `about` says what else is known of it.
    """

    name: str
    url: str
    size: int | None
    md5: str | None
    state: Literal["fetched", "present", "planned"]
    about: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What a fetch did: its files, the descriptions it wrote, and files that dataset.yaml names and are not there."""

    folder: Path
    asked: str
    files: tuple[FileSummary, ...]
    written: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files, as far as known."""
        return sum(file.size or 0 for file in self.files)


def fetch(
    source: Source,
    out: str | os.PathLike[str],
    *,
    assembly: str,
    assays: str | Sequence[str] = (),
    output_types: str | Sequence[str] = (),
    biosamples: str | Sequence[str] = (),
    statuses: str | Sequence[str] = "released",
    formats: str | Sequence[str] = ("bed", "bigWig"),
    preferred_default: bool = True,
    where: Sequence[tuple[str, str]] = (),
    limit: int | None = None,
    genome: str | os.PathLike[str] | None = None,
    exclude: Sequence[str | os.PathLike[str]] | None = None,
    valid: str | Sequence[str] = (),
    test: str | Sequence[str] = (),
    genome_format: Literal["fasta", "2bit"] = "fasta",
    base_url: str | None = None,
    jobs: int = 2,
    dry_run: bool = False,
    patience: Patience | None = None,
) -> FetchResult:
    """Fetch files into the folder `out`, each checked by md5 where the server tells it; what is there already stays.

    `source` "genome": the sequence (`genome_format`) and chrom.sizes of `assembly` from UCSC. "blacklist": its ENCODE
    blacklist. "encode": the files of the ENCODE portal that match, and a tracks.tsv and a dataset.yaml for them.
    An interrupted fetch goes on where it stopped when it is called again.

    Args:
        source: what to fetch.
        out: the folder; made when missing. Several fetches may share it, one after another.
        assembly: genome build; for "encode" as the portal calls it (GRCh38), else UCSC's name (hg38) or that one.
        assays, output_types, biosamples, statuses, formats: "encode": the portal's names, any of each; `biosamples`
            empty means all.
        preferred_default: "encode": only the files that the portal recommends of each experiment.
        where: "encode": further filters of the portal, such as ("target.label", "CTCF").
        limit: "encode": at most so many files, the first by assay, biosample, target, output type and accession.
        genome, exclude: "encode": files that dataset.yaml names, instead of those that the other two sources fetch.
        valid, test: "encode": chromosomes that dataset.yaml holds out; a usual choice for human and mouse.
        genome_format: "genome": fasta or 2bit.
        base_url: another server that speaks as the source's own (`BASE_URLS`).
        jobs: downloads at a time, 1 to 8.
        dry_run: only ask which files there are; nothing is written.
        patience: how often and how fast to ask.

    Raises:
        ConfigError: an argument is impossible or missing.
        DataError: nothing matches, or an answer is not what such a server answers.
        RefusedError: some files cannot be had; the others are complete.
        FileError: a server cannot be reached, or the disk is full.
    """
    if source not in BASE_URLS:
        raise ConfigError(f"the source {source!r} is unknown: use {', '.join(BASE_URLS)}")
    if not 1 <= jobs <= 8:
        raise ConfigError(f"jobs is {jobs}: from 1 to 8 downloads at a time are polite")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", assembly) is None:
        raise ConfigError(f"the assembly {assembly!r} is no name of a genome build, such as hg38")
    folder, web = Path(out), Web(patience)
    base = (base_url or BASE_URLS[source]).rstrip("/")
    if source != "encode":
        if assays or output_types or biosamples or where or limit or genome or exclude or valid or test:
            raise ConfigError(
                f"a search and what dataset.yaml holds are for the source encode; leave them out for {source}"
            )
        name = UCSC_NAMES.get(assembly, assembly)
        if source == "genome":
            plan = genome_plan(name, genome_format, base, web)
        else:
            plan = blacklist_plan(name, base, web)
        if dry_run:
            return _planned(folder, plan)
        with alone_in(folder):
            return FetchResult(folder, plan.asked, _bring(plan, folder, Manifest(folder), web, jobs))

    query = PortalQuery(
        assembly=assembly,
        assays=_needed("assays", assays),
        output_types=_needed("output_types", output_types),
        biosamples=_names(biosamples),
        statuses=_needed("statuses", statuses),
        formats=_needed("formats", formats),
        preferred_default=preferred_default,
        where=tuple(where),
    )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: at least 1 file, or None for all")
    plan = encode_plan(query, limit, base, web)
    if dry_run:
        return _planned(folder, plan)
    held_out = _split(assembly, _names(valid), _names(test))
    with alone_in(folder):
        manifest = Manifest(folder)
        files = _bring(plan, folder, manifest, web, jobs)
        written, missing = _describe(plan, manifest, folder, assembly, genome, exclude, held_out)
        return FetchResult(folder, plan.asked, files, written, missing)


def _bring(plan: Plan, folder: Path, manifest: Manifest, web: Web, jobs: int) -> tuple[FileSummary, ...]:
    """Download what is missing, and note each file in the manifest as soon as it is complete."""
    about = {remote.name: told for remote, told in plan.files}
    remotes = [
        replace(remote, local_md5=manifest.local_md5(remote.name, remote.url)) for remote, _ in plan.files
    ]

    def done(downloaded: Downloaded) -> None:
        told = {key: value for key, value in about[downloaded.file.name].items() if value}
        manifest.record(downloaded, told)

    downloads = download_all(remotes, folder, web=web, jobs=jobs, done=done)
    return tuple(
        FileSummary(
            item.file.name,
            item.file.url,
            item.size,
            item.md5,
            "fetched" if item.fetched else "present",
            about[item.file.name],
        )
        for item in downloads
    )


def _planned(folder: Path, plan: Plan) -> FetchResult:
    files = (
        FileSummary(remote.name, remote.url, remote.size, remote.md5, "planned", told)
        for remote, told in plan.files
    )
    return FetchResult(folder, plan.asked, tuple(files))


def _describe(
    plan: Plan,
    manifest: Manifest,
    folder: Path,
    assembly: str,
    genome: str | os.PathLike[str] | None,
    exclude: Sequence[str | os.PathLike[str]] | None,
    held_out: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write tracks.tsv and dataset.yaml: (names of those written, files that dataset.yaml names and are missing)."""
    rows = []
    for remote, told in plan.files:
        if told["track"]:
            columns = {key: value for key, value in told.items() if key not in ("track", "kind")}
            head = {"name": told["track"], "file": remote.name, "kind": told["kind"]}
            rows.append({**head, **columns, "md5": remote.md5 or ""})
    others = len(plan.files) - len(rows)
    if others:
        say(f"note: {others} files are neither peaks nor bigWigs: fetched, and not among the tracks")
    if not rows:
        return (), ()
    name = UCSC_NAMES.get(assembly, assembly)
    if genome is None:
        fetched = [file for file in (f"{name}.fa.gz", f"{name}.2bit") if file in manifest.files]
        genome = folder / (fetched[0] if fetched else f"{name}.fa.gz")
    if exclude is None:
        exclude = [folder / blacklist_name(name)] if name in BLACKLISTED else []
    inputs = [_beside(path, folder) for path in (genome, *exclude)]
    texts = {
        "tracks.tsv": tracks_table(rows),
        "dataset.yaml": dataset_description(
            assembly=assembly, genome=inputs[0], exclude=inputs[1:], valid=held_out[0], test=held_out[1]
        ),
    }
    written = tuple(file for file, text in texts.items() if manifest.write(file, text))
    return written, tuple(path for path in inputs if "$" not in path and not (folder / path).exists())


def _beside(path: str | os.PathLike[str], folder: Path) -> str:
    """A path as dataset.yaml in `folder` names it: relative to it when below it, else absolute; $NAME stays."""
    if "$" in os.fspath(path):
        return os.fspath(path)
    absolute = Path(path).absolute()
    return os.fspath(
        absolute.relative_to(folder.absolute()) if absolute.is_relative_to(folder.absolute()) else absolute
    )


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _needed(what: str, value: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name for name in _names(value) if name)
    if not names:
        raise ConfigError(f"{what} is empty: a search of the portal needs it, spelled as there")
    return names


def _split(
    assembly: str, valid: tuple[str, ...], test: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The held-out chromosomes (valid, test) of dataset.yaml."""
    if valid and test:
        return valid, test
    usual = _SPLITS.get(UCSC_NAMES.get(assembly, assembly))
    if usual is None or valid or test:
        raise ConfigError(
            f"no usual split of {assembly} is known: name the held-out chromosomes, valid and test"
            if usual is None
            else "valid and test go together: name the chromosomes of both, or of neither for the usual split"
        )
    return usual
