"""Genomes and blacklists: what `fetch` finds on a server in UCSC's layout, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genossm.errors import DataError
from genossm.pipelines.fetch import FetchResult, fetch
from genossm.pipelines.fetch_sources import BASE_URLS, _md5sums
from genossm.web import RefusedError
from tests.portal_server import PortalServer, hasty, tree

REGIONS = gzip.compress(b"chr1\t100\t200\tHigh Signal Region\nchr1\t900\t1000\tLow Mappability\n", mtime=0)


@pytest.fixture
def portal() -> Iterator[PortalServer]:
    with PortalServer() as server:
        yield server


def run(portal: PortalServer, source: Any, out: Path, **options: Any) -> FetchResult:
    return fetch(source, out, base_url=portal.url, patience=hasty([]), **options)


@pytest.mark.parametrize("md5sums", [True, False])
def test_a_genome(
    portal: PortalServer, tmp_path: Path, md5sums: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    portal.add_genome("hg38", b">chr1\nACGT\n", b"chr1\t4\n", md5sums=md5sums)
    result = run(portal, "genome", tmp_path, assembly="GRCh38")
    assert tree(tmp_path) == {"hg38.fa.gz", "hg38.chrom.sizes", "manifest.json"}
    assert gzip.decompress((tmp_path / "hg38.fa.gz").read_bytes()) == b">chr1\nACGT\n"
    records = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert records["hg38.fa.gz"]["md5_checked"] is md5sums
    assert (records["hg38.fa.gz"]["kind"], records["hg38.fa.gz"]["assembly"]) == ("genome", "hg38")
    assert ("tells no md5 of hg38.fa.gz and hg38.chrom.sizes" in capsys.readouterr().err) is not md5sums
    assert [file.state for file in result.files] == ["fetched", "fetched"]
    again = run(portal, "genome", tmp_path, assembly="hg38")
    assert [file.state for file in again.files] == ["present", "present"]


def test_a_genome_that_is_not_there_is_a_sentence(portal: PortalServer, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"/hg39\.fa\.gz: the server answers 404 .*; UCSC's name of the assembly"
    ):
        run(portal, "genome", tmp_path, assembly="hg39")
    assert tree(tmp_path) == set()


def test_a_page_in_the_place_of_chrom_sizes_is_refused(portal: PortalServer, tmp_path: Path) -> None:
    portal.add_genome("hg38", b">chr1\nACGT\n", b"<html>maintenance</html>", md5sums=False)
    with pytest.raises(RefusedError, match="a name, a tab and a length, not '<html>maintenance</html>'"):
        run(portal, "genome", tmp_path, assembly="hg38")
    assert tree(tmp_path) == {"hg38.fa.gz", "manifest.json"}


def test_md5sums_are_read_in_all_their_forms() -> None:
    first, second = "a" * 32, "B" * 32
    text = f"{first}  hg38.fa.gz\n{second} *./hg38.2bit  \n\nMD5 (x) = {first}\n<html>\n{first}\n"
    assert _md5sums(text) == {"hg38.fa.gz": first, "hg38.2bit": second.lower()}


def test_a_blacklist(portal: PortalServer, tmp_path: Path) -> None:
    portal.files["/hg38-blacklist.v2.bed.gz"] = REGIONS
    result = run(portal, "blacklist", tmp_path, assembly="GRCh38")
    assert result.files[0].md5 == hashlib.md5(REGIONS).hexdigest()
    assert tree(tmp_path) == {"hg38-blacklist.v2.bed.gz", "manifest.json"}
    with pytest.raises(
        DataError, match=r"hg18-blacklist.* answers 404 .*version 2 are known of ce10, .* mm10"
    ):
        run(portal, "blacklist", tmp_path, assembly="hg18")


@pytest.mark.parametrize(
    "content",
    [
        b"<html>maintenance</html>",
        gzip.compress(b"", mtime=0),
        REGIONS[:-20],
        gzip.compress(b"chr1\tx\ty\n", mtime=0),
    ],
)
def test_what_is_no_blacklist_is_refused(portal: PortalServer, tmp_path: Path, content: bytes) -> None:
    portal.files["/hg38-blacklist.v2.bed.gz"] = content
    with pytest.raises(RefusedError, match="is not what it should be"):
        run(portal, "blacklist", tmp_path, assembly="hg38")
    assert tree(tmp_path) == set()


def test_the_servers_of_the_sources() -> None:
    assert BASE_URLS == {
        "encode": "https://www.encodeproject.org",
        "genome": "https://hgdownload.soe.ucsc.edu",
        "blacklist": "https://raw.githubusercontent.com/Boyle-Lab/Blacklist/master/lists",
    }
