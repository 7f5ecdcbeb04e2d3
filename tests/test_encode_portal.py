"""The client of the ENCODE portal, against a local server that answers in the same form, and in wrong ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.encode_portal import PortalFile, PortalQuery, search_files
from genossm.errors import DataError, FileError, GenossmError
from genossm.web import Web
from tests.portal_server import PortalServer, cut_off, hasty, instead, status

QUERY = PortalQuery("GRCh38", ("ATAC-seq",), ("IDR thresholded peaks", "fold change over control"), ("K562",))


_ENTRY: dict[str, Any] = {
    "accession": "ENCFF001AAA",
    "href": "/files/ENCFF001AAA/@@download/ENCFF001AAA.bed.gz",
    "cloud_metadata": {"url": "https://store/ENCFF001AAA.bed.gz"},
    "md5sum": "0" * 32,
    "file_size": 1,
    "file_format": "bed",
    "file_format_type": "narrowPeak",
    "output_type": "IDR thresholded peaks",
    "assembly": "GRCh38",
    "assay_title": "ATAC-seq",
    "biosample_ontology": {"term_name": "K562"},
    "target": {"label": "CTCF"},
    "dataset": "/experiments/ENCSR000AAA/",
    "biological_replicates": [1],
}


@pytest.fixture
def portal() -> Iterator[PortalServer]:
    with PortalServer() as server:
        yield server


def search(portal: PortalServer, query: PortalQuery = QUERY) -> tuple[PortalFile, ...]:
    return search_files(query, Web(hasty([])), portal.url).files


def answer(portal: PortalServer, content: Any) -> None:
    """Let the portal answer the next searches with something else."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    portal.faults["/search/"] = [instead(body)] * 2


def test_a_query_is_an_address() -> None:
    query = PortalQuery(
        "GRCh38",
        ("ATAC-seq", "DNase-seq"),
        ("peaks",),
        preferred_default=False,
        where=(("target.label", "CTCF"),),
    )
    address = urlsplit(query.url("https://host/portal/"))
    assert (address.scheme, address.netloc, address.path) == ("https", "host", "/portal/search/")
    assert parse_qsl(address.query) == [
        ("type", "File"),
        ("assembly", "GRCh38"),
        ("assay_title", "ATAC-seq"),
        ("assay_title", "DNase-seq"),
        ("output_type", "peaks"),
        ("status", "released"),
        ("file_format", "bed"),
        ("file_format", "bigWig"),
        ("target.label", "CTCF"),
    ]
    assert ("preferred_default", "true") in QUERY.filters()
    assert QUERY.url().startswith("https://www.encodeproject.org/search/?type=File&")


def test_files_come_as_the_portal_describes_them(portal: PortalServer) -> None:
    portal.add_file("ENCFF001AAA", b"peaks", target={"label": "CTCF"})
    (file,) = search(portal)
    assert file == PortalFile(
        accession="ENCFF001AAA",
        url=f"{portal.url}/files/ENCFF001AAA/@@download/ENCFF001AAA.bed.gz",
        file_name="ENCFF001AAA.bed.gz",
        md5=hashlib.md5(b"peaks").hexdigest(),
        size=5,
        file_format="bed",
        format_type="narrowPeak",
        output_type="IDR thresholded peaks",
        assembly="GRCh38",
        assay="ATAC-seq",
        biosample="K562",
        target="CTCF",
        experiment="ENCSR000AAA",
        replicates="1,2",
    )
    ((asked, headers),) = portal.requests
    assert headers["accept"] == "application/json"
    assert asked.startswith(QUERY.url(""))
    shown = parse_qsl(asked)
    assert shown[-2:] == [("limit", "all"), ("format", "json")]
    assert {"href", "md5sum", "file_size", "biosample_ontology.term_name"} <= {value for _, value in shown}


def test_only_what_matches_comes_sorted_and_once(portal: PortalServer) -> None:
    portal.add_file("ENCFF003AAA", b"3", file_format="bigWig")
    portal.add_file("ENCFF002AAA", b"2")
    entry = portal.add_file("ENCFF001AAA", b"1")
    portal.graph.append(dict(entry))
    portal.add_file("ENCFF004AAA", b"4", assembly="hg19")
    portal.add_file("ENCFF005AAA", b"5", preferred_default=None)
    portal.add_file("ENCFF006AAA", b"6", biosample_ontology={"term_name": "HepG2"})
    portal.add_file("ENCFF007AAA", b"7", status="archived")
    assert [file.accession for file in search(portal)] == ["ENCFF001AAA", "ENCFF002AAA", "ENCFF003AAA"]


def test_files_that_are_not_for_everybody_are_left_out(portal: PortalServer) -> None:
    portal.add_file("ENCFF001AAA", b"1", restricted=True)
    portal.add_file("ENCFF002AAA", b"2", no_file_available=True, md5sum=None)
    with pytest.raises(
        DataError, match=r"none of the 2 files that match can be .* \(ENCFF001AAA, ENCFF002AAA\)"
    ):
        search(portal)
    portal.add_file("ENCFF003AAA", b"3")
    result = search_files(QUERY, Web(hasty([])), portal.url)
    assert [file.accession for file in result.files] == ["ENCFF003AAA"]
    assert result.left_out == ("ENCFF001AAA", "ENCFF002AAA")
    assert result.url == QUERY.url(portal.url)


@pytest.mark.parametrize("missing", ["biosample_ontology", "target", "biological_replicates", "dataset"])
def test_what_is_not_needed_may_be_missing_or_odd(portal: PortalServer, missing: str) -> None:
    entry = portal.add_file("ENCFF001AAA", b"1")
    for value in (None, "/a/link/", 3, [None]):
        answer(portal, {"@graph": [{**entry, missing: value}], "total": 1})
        assert search(portal)[0].accession == "ENCFF001AAA"


def test_the_store_is_asked_where_the_portal_gives_no_link_of_its_own(portal: PortalServer) -> None:
    portal.add_file("ENCFF001AAA", b"1", href=None)
    assert search(portal)[0].url == f"{portal.url}/store/ENCFF001AAA.bed.gz"


@pytest.mark.parametrize(
    "missing", ["accession", "md5sum", "file_size", "file_format", "output_type", "assembly", "href"]
)
def test_a_missing_field_is_a_sentence_that_names_the_address(portal: PortalServer, missing: str) -> None:
    entry = portal.add_file("ENCFF001AAA", b"1")
    changes = {missing: None, "cloud_metadata": None} if missing == "href" else {missing: None}
    answer(portal, {"@graph": [{**entry, **changes}], "total": 1})
    with pytest.raises(DataError) as told:
        search(portal)
    assert QUERY.url(portal.url) in str(told.value)
    assert missing in str(told.value)
    assert "ENCFF001AAA" in str(told.value) or missing == "accession"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"md5sum": "abc"}, "the md5sum 'abc'"),
        ({"file_size": "12"}, "the file_size '12'"),
        ({"file_size": -1}, "the file_size -1"),
        ({"file_size": True}, "the file_size True"),
        ({"assembly": "hg19"}, "the assembly 'hg19', and GRCh38 was asked for"),
        ({"output_type": "peaks"}, "the output_type 'peaks', and IDR thresholded peaks or fold change"),
        ({"file_format": "bam"}, "the file_format 'bam'"),
        ({"assay_title": "DNase-seq"}, "the assay_title 'DNase-seq'"),
        ({"biosample_ontology": {"term_name": "HepG2"}}, "the biosample 'HepG2'"),
    ],
)
def test_an_odd_file_is_refused(portal: PortalServer, changes: dict[str, Any], message: str) -> None:
    entry = portal.add_file("ENCFF001AAA", b"1")
    answer(portal, {"@graph": [{**entry, **changes}], "total": 1})
    with pytest.raises(DataError, match=message):
        search(portal)


def test_one_accession_with_two_descriptions_is_refused(portal: PortalServer) -> None:
    portal.add_file("ENCFF001AAA", b"1")
    portal.add_file("ENCFF001AAA", b"2")
    with pytest.raises(DataError, match="lists ENCFF001AAA twice, differently"):
        search(portal)


def test_a_search_without_result_says_what_was_asked(portal: PortalServer) -> None:
    with pytest.raises(DataError) as told:
        search(portal)
    message = str(told.value)
    assert message.startswith(
        "the portal has no file with assembly 'GRCh38', assay_title 'ATAC-seq', output_type"
    )
    assert "biosample_ontology.term_name 'K562'" in message
    assert QUERY.url(portal.url) in message
    assert "with the other filters" not in message


def test_a_search_without_result_says_what_there_is_instead(portal: PortalServer) -> None:
    portal.add_file("ENCFF001AAA", b"1", output_type="pseudoreplicated peaks", preferred_default=None)
    portal.add_file("ENCFF002AAA", b"2", output_type="pseudoreplicated peaks")
    with pytest.raises(
        DataError, match=r"not only preferred defaults: pseudoreplicated peaks \(2\) \(asked: http"
    ):
        search(portal)
    portal.facets = False
    with pytest.raises(DataError, match=r"upper and lower case included \(asked: http"):
        search(portal)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "something that is no JSON (it begins '')"),
        (b"<html>maintenance</html>", "no JSON (it begins '<html>maintenance</html>')"),
        (b'{"@graph": [', "something that is no JSON"),
        (b"\xff\xfe\x00", "something that is no JSON"),
        ([], "it is a list, not an object"),
        ({}, "it has no list '@graph'"),
        ({"@graph": {}}, "it has no list '@graph'"),
        ({"@graph": ["x"]}, "has 'x' in it, which is no file"),
        ({"@graph": [{}], "total": 7}, "tells of 7 files and lists 1"),
    ],
)
def test_an_answer_that_is_none_is_a_sentence(portal: PortalServer, content: Any, message: str) -> None:
    answer(portal, content)
    with pytest.raises(DataError) as told:
        search(portal)
    assert message in str(told.value)
    assert portal.url in str(told.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["@graph", "total", "facets", "terms", "doc_count", "field", "accession", "href"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=10,
    )
)
def test_no_answer_makes_it_stumble(content: Any) -> None:
    class Canned(Web):
        def read(self, url: str, **options: Any) -> tuple[int, bytes]:
            return 200, json.dumps(content).encode()

    with pytest.raises(GenossmError):
        search_files(QUERY, Canned())


@given(
    st.dictionaries(
        st.sampled_from(sorted(_ENTRY)), st.none() | st.integers() | st.text() | st.lists(st.integers())
    )
)
def test_no_file_makes_it_stumble(changes: dict[str, Any]) -> None:
    class Canned(Web):
        def read(self, url: str, **options: Any) -> tuple[int, bytes]:
            return 200, json.dumps({"@graph": [_ENTRY | changes]}).encode()

    try:
        (file,) = search_files(QUERY, Canned()).files
    except GenossmError:
        return
    assert (file.assembly, file.accession != "") == ("GRCh38", True)


def test_a_busy_portal_is_asked_again(portal: PortalServer) -> None:
    portal.add_file("ENCFF001AAA", b"1")
    portal.faults["/search/"] = [status(500), status(429, retry_after="2"), cut_off(20)]
    slept: list[float] = []
    assert len(search_files(QUERY, Web(hasty(slept)), portal.url).files) == 1
    assert slept == [0.5, 2.0, 2.0]


def test_no_network_is_a_sentence() -> None:
    with PortalServer() as server:
        url = server.url
    with pytest.raises(FileError, match=r"search/.*no answer \(Connection refused\), 6 times in a row"):
        search_files(QUERY, Web(hasty([])), url)
