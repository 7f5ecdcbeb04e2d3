"""A client of the ENCODE portal's search (its public JSON API): which files there are, with address, md5 and size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from genossm.errors import DataError
from genossm.web import Web

PORTAL = "https://www.encodeproject.org"
# What the portal calls each property of a file; asking for these only keeps its answers small.
_FIELDS = (
    "accession",
    "href",
    "cloud_metadata.url",
    "md5sum",
    "file_size",
    "file_format",
    "file_format_type",
    "output_type",
    "assembly",
    "status",
    "assay_title",
    "biosample_ontology.term_name",
    "target.label",
    "dataset",
    "biological_replicates",
    "no_file_available",
    "restricted",
)


@dataclass(frozen=True, slots=True)
class PortalQuery:
    """A search for files: several values of one property mean any of them, and all properties must hold.

    Values are spelled as on the portal. `where` holds further filters of the portal's own, (property, value).
    """

    assembly: str
    assays: tuple[str, ...]
    output_types: tuple[str, ...]
    biosamples: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ("released",)
    formats: tuple[str, ...] = ("bed", "bigWig")
    preferred_default: bool = True
    where: tuple[tuple[str, str], ...] = ()

    def filters(self) -> list[tuple[str, str]]:
        """(property, value) as the portal's search takes them."""
        return [
            ("assembly", self.assembly),
            *(("assay_title", value) for value in self.assays),
            *(("output_type", value) for value in self.output_types),
            *(("biosample_ontology.term_name", value) for value in self.biosamples),
            *(("status", value) for value in self.statuses),
            *(("file_format", value) for value in self.formats),
            *([("preferred_default", "true")] if self.preferred_default else []),
            *self.where,
        ]

    def url(self, base_url: str = PORTAL) -> str:
        """The address of this search, for a browser too."""
        return f"{base_url.rstrip('/')}/search/?{urlencode([('type', 'File'), *self.filters()])}"

    def __str__(self) -> str:
        return ", ".join(f"{name} {value!r}" for name, value in self.filters())


@dataclass(frozen=True, slots=True)
class PortalFile:
    """A file as the portal describes it; what it does not say of the sample is empty."""

    accession: str
    url: str
    file_name: str
    md5: str
    size: int
    file_format: str
    format_type: str
    output_type: str
    assembly: str
    assay: str
    biosample: str
    target: str
    experiment: str
    replicates: str


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The files that a search found, sorted by assay, biosample, target, output type and accession.

    `left_out`: accessions that match and cannot be downloaded by everybody.
    """

    url: str
    files: tuple[PortalFile, ...]
    left_out: tuple[str, ...]


def search_files(query: PortalQuery, web: Web, base_url: str = PORTAL) -> SearchResult:
    """Ask the portal for all files that match.

    Raises:
        DataError: nothing matches, or the answer is not what a portal answers; the address is named.
        FileError: the portal cannot be reached, stays busy, or refuses.
    """
    url = query.url(base_url)
    answer = _answer(url, web, _FIELDS, "all")
    entries = answer.get("@graph")
    if not isinstance(entries, list):
        raise DataError(f"{_not_a_portal(url)}: it has no list '@graph'")
    if not entries:
        raise DataError(
            f"the portal has no file with {query}; names are spelled as on the portal, upper and lower case "
            f"included{_alternatives(query, web, base_url)} (asked: {url})"
        )
    total = answer.get("total")
    if isinstance(total, int) and total > len(entries):
        raise DataError(
            f"{url} tells of {total} files and lists {len(entries)}; run again, or narrow the search"
        )
    found: dict[str, PortalFile] = {}
    left_out = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise DataError(f"{_not_a_portal(url)}: '@graph' has {entry!r} in it, which is no file")
        if entry.get("no_file_available") or entry.get("restricted"):
            left_out.append(_text(entry, "accession", url))
            continue
        file = _portal_file(entry, url, base_url)
        _check_match(file, query, url)
        if found.setdefault(file.accession, file) != file:
            raise DataError(f"{url} lists {file.accession} twice, differently; run again later")
    files = sorted(
        found.values(),
        key=lambda file: (file.assay, file.biosample, file.target, file.output_type, file.accession),
    )
    if not files:
        raise DataError(
            f"none of the {len(left_out)} files that match can be downloaded by everybody "
            f"({', '.join(left_out[:5])}{' ...' if len(left_out) > 5 else ''}); asked: {url}"
        )
    return SearchResult(url, tuple(files), tuple(left_out))


def _answer(url: str, web: Web, fields: Iterable[str], limit: str) -> dict[str, Any]:
    """The answer to a search as a JSON object: the portal gives one, with status 404, when it finds nothing."""
    shown = urlencode([*(("field", name) for name in fields), ("limit", limit), ("format", "json")])
    status, body = web.read(f"{url}&{shown}", accept="application/json", also=(404,))
    try:
        answer = json.loads(body)
    except ValueError as error:
        start = body[:60].decode("utf-8", errors="replace")
        raise DataError(
            f"{url} answers {status} with something that is no JSON (it begins {start!r}); check the address of the "
            "portal, or run again later"
        ) from error
    if not isinstance(answer, dict):
        raise DataError(f"{_not_a_portal(url)}: it is a {type(answer).__name__}, not an object")
    return answer


def _alternatives(query: PortalQuery, web: Web, base_url: str) -> str:
    """Which output types the portal has when neither they nor the preferred default are asked for; "" for none."""
    wider = replace(query, output_types=(), preferred_default=False)
    answer = _answer(wider.url(base_url), web, ("accession",), "1")
    facets = answer.get("facets")
    for facet in facets if isinstance(facets, list) else []:
        if isinstance(facet, Mapping) and facet.get("field") == "output_type":
            terms = facet.get("terms")
            known = [term for term in terms if isinstance(term, Mapping)] if isinstance(terms, list) else []
            counts = [f"{term.get('key')} ({term['doc_count']})" for term in known if term.get("doc_count")]
            if counts:
                aside = " and not only preferred defaults" if query.preferred_default else ""
                return f"; with the other filters alone there are, by output type{aside}: {', '.join(counts)}"
    return ""


def _portal_file(entry: Mapping[str, Any], url: str, base_url: str) -> PortalFile:
    """One checked entry of the portal's answer."""
    accession = _text(entry, "accession", url)
    cloud = entry.get("cloud_metadata")
    href = entry.get("href") or (cloud.get("url") if isinstance(cloud, Mapping) else None)
    if not isinstance(href, str) or not href:
        raise DataError(f"{url} gives {accession} neither 'href' nor 'cloud_metadata.url'; run again later")
    md5 = _text(entry, "md5sum", url).lower()
    if re.fullmatch(r"[0-9a-f]{32}", md5) is None:
        raise DataError(f"{url} gives {accession} the md5sum {md5!r}, which is none; run again later")
    size = entry.get("file_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise DataError(f"{url} gives {accession} the file_size {size!r}; a number of bytes is needed")
    replicates = entry.get("biological_replicates")
    return PortalFile(
        accession=accession,
        url=href if "://" in href else f"{base_url.rstrip('/')}/{href.lstrip('/')}",
        file_name=href.split("?")[0].rsplit("/", 1)[-1],
        md5=md5,
        size=size,
        file_format=_text(entry, "file_format", url),
        format_type=_word(entry.get("file_format_type")),
        output_type=_text(entry, "output_type", url),
        assembly=_text(entry, "assembly", url),
        assay=_word(entry.get("assay_title")),
        biosample=_word(entry.get("biosample_ontology"), "term_name"),
        target=_word(entry.get("target"), "label"),
        experiment=_word(entry.get("dataset")).strip("/").rsplit("/", 1)[-1],
        replicates=",".join(str(number) for number in replicates) if isinstance(replicates, list) else "",
    )


def _check_match(file: PortalFile, query: PortalQuery, url: str) -> None:
    """Refuse a file that was not asked for: a server that ignores filters is no portal."""
    for what, value, asked in (
        ("assembly", file.assembly, (query.assembly,)),
        ("output_type", file.output_type, query.output_types),
        ("file_format", file.file_format, query.formats),
        ("assay_title", file.assay, query.assays),
        ("biosample", file.biosample, query.biosamples),
    ):
        if value and asked and "*" not in asked and value not in asked:
            raise DataError(
                f"{_not_a_portal(url)}: {file.accession} has the {what} {value!r}, and {' or '.join(asked)} was asked for"
            )


def _not_a_portal(url: str) -> str:
    return f"the answer of {url} is not that of an ENCODE portal (check its address)"


def _text(entry: Mapping[str, Any], key: str, url: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        name = entry.get("accession") or entry.get("@id") or "a file"
        raise DataError(f"{url} gives {name} no {key!r}, which is needed; run again later")
    return value


def _word(value: Any, key: str | None = None) -> str:
    """A text, or that under `key` of a mapping, with single blanks; anything else is empty."""
    if key is not None:
        value = value.get(key) if isinstance(value, Mapping) else None
    return " ".join(value.split()) if isinstance(value, str) else ""
