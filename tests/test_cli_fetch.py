"""`genossm fetch` as a command: what it prints, its options and exit statuses."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from genossm import web
from genossm.cli import group, main
from tests.portal_server import PortalServer, hasty, tree

SEARCH = [
    "--assay",
    "ATAC-seq",
    "--biosample",
    "K562",
    "--assembly",
    "GRCh38",
    "--output-type",
    "IDR thresholded peaks",
]
SEARCH += ["--output-type", "fold change over control"]


@pytest.fixture
def portal(monkeypatch: pytest.MonkeyPatch) -> Iterator[PortalServer]:
    """A server with two files of K562, and one of HepG2; nobody waits for it."""
    monkeypatch.setattr(web, "Patience", lambda: hasty([]))
    with PortalServer() as server:
        server.add_file("ENCFF001AAA", b"the peaks")
        server.add_file("ENCFF002AAA", bytes(1_500_000), file_format="bigWig")
        server.add_file(
            "ENCFF003AAA", b"3", biosample_ontology={"term_name": "HepG2"}, target={"label": "CTCF"}
        )
        yield server


def encode(portal: PortalServer, out: Path, *more: str) -> list[str]:
    return ["fetch", "encode", *SEARCH, "--base-url", portal.url, "-o", str(out), *more]


def test_encode_prints_what_it_did(portal: PortalServer, tmp_path: Path) -> None:
    result = CliRunner().invoke(group, encode(portal, tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "fetched\t9.00B\ttracks/ENCFF001AAA.bed.gz\tK562\tATAC-seq\tIDR thresholded peaks\n"
        "fetched\t1.50MB\ttracks/ENCFF002AAA.bigWig\tK562\tATAC-seq\tfold change over control\n"
        f"{tmp_path}: 2 files, 1.50MB; 2 fetched, 0 already there\n"
        "written: tracks.tsv, dataset.yaml\n"
        "dataset.yaml also names hg38.fa.gz, hg38-blacklist.v2.bed.gz, not there yet: see `genossm fetch genome` and "
        "`genossm fetch blacklist`\n"
    )
    assert "fetching" in result.stderr
    again = CliRunner().invoke(group, encode(portal, tmp_path))
    assert f"{tmp_path}: 2 files, 1.50MB; 0 fetched, 2 already there\n" in again.stdout


def test_a_dry_run(portal: PortalServer, tmp_path: Path) -> None:
    result = CliRunner().invoke(group, encode(portal, tmp_path / "new", "--dry-run", "--limit", "1"))
    assert result.stdout == (
        "planned\t9.00B\ttracks/ENCFF001AAA.bed.gz\tK562\tATAC-seq\tIDR thresholded peaks\n"
        "1 file, 9.00B; nothing was fetched (--dry-run)\n"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("first", [True, False])
def test_as_json(portal: PortalServer, tmp_path: Path, first: bool) -> None:
    arguments = encode(portal, tmp_path)
    result = CliRunner().invoke(group, ["--json", *arguments] if first else [*arguments, "--json"])
    printed = json.loads(result.stdout)
    assert printed["bytes"] == 1_500_009
    assert printed["folder"] == str(tmp_path)
    assert printed["asked"].startswith(f"{portal.url}/search/?type=File&assembly=GRCh38&")
    assert printed["written"] == ["tracks.tsv", "dataset.yaml"]
    assert printed["missing"] == ["hg38.fa.gz", "hg38-blacklist.v2.bed.gz"]
    assert printed["files"][0]["about"]["biosample"] == "K562"
    assert [file["state"] for file in printed["files"]] == ["fetched", "fetched"]


def test_every_option_of_the_search_arrives(portal: PortalServer, tmp_path: Path) -> None:
    more = [
        "--biosample",
        "HepG2",
        "--where",
        "target.label=CTCF",
        "--status",
        "released",
        "--status",
        "archived",
    ]
    more += ["--all-files", "--file-format", "bed", "--jobs", "1", "--valid", "chr1", "--test", "chr2"]
    more += ["--genome", "$HOME/g.fa", "--exclude", "$HOME/m.bed"]
    result = CliRunner().invoke(group, encode(portal, tmp_path, *more))
    assert result.exit_code == 0, result.output
    assert tree(tmp_path) == {"tracks/ENCFF003AAA.bed.gz", "tracks.tsv", "dataset.yaml", "manifest.json"}
    asked = portal.requests[0][0]
    for part in ("target.label=CTCF", "status=archived", "file_format=bed&", "term_name=HepG2"):
        assert part in asked
    assert "preferred_default" not in asked
    text = (tmp_path / "dataset.yaml").read_text()
    for part in ("genome: $HOME/g.fa", "exclude: [$HOME/m.bed]", "valid: [chr1]", "test: [chr2]"):
        assert part in text


def test_genome_and_blacklist(portal: PortalServer, tmp_path: Path) -> None:
    folder = "/goldenPath/hg38/bigZips"
    portal.files[f"{folder}/hg38.2bit"] = b"2bit"
    portal.files[f"{folder}/hg38.chrom.sizes"] = b"chr1\t4\n"
    portal.files["/hg38-blacklist.v2.bed.gz"] = gzip.compress(b"chr1\t0\t2\n", mtime=0)
    options = ["--base-url", portal.url, "-o", str(tmp_path)]
    result = CliRunner().invoke(group, ["fetch", "genome", "GRCh38", "--format", "2bit", *options])
    assert result.stdout == (
        f"fetched\t4.00B\thg38.2bit\tgenome\nfetched\t7.00B\thg38.chrom.sizes\tchrom.sizes\n"
        f"{tmp_path}: 2 files, 11.0B; 2 fetched, 0 already there\n"
    )
    result = CliRunner().invoke(group, ["fetch", "blacklist", "hg38", *options])
    assert result.exit_code == 0
    assert tree(tmp_path) == {"hg38.2bit", "hg38.chrom.sizes", "hg38-blacklist.v2.bed.gz", "manifest.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "encode", "-o", "x"], "Missing option '--assay'"),
        (["fetch", "encode", *SEARCH], "Missing option '-o'"),
        (["fetch", "genome", "-o", "x"], "Missing argument 'ASSEMBLY'"),
        (["fetch", "genome", "hg38", "-o", "x", "--format", "fa"], "'fa' is not one of 'fasta', '2bit'"),
        (
            ["fetch", "encode", *SEARCH, "-o", "x", "--where", "CTCF"],
            "'CTCF' is no filter: write property=value",
        ),
        (["fetch", "encode", *SEARCH, "-o", "x", "--limit", "0"], "--limit"),
        (["fetch", "blacklist", "hg38", "-o", "x", "--jobs", "9"], "--jobs"),
        (["fetch", "ensembl"], "No such command 'ensembl'"),
    ],
)
def test_bad_usage_exits_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_failure_exits_1_with_one_sentence(
    portal: PortalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "encode", *SEARCH, "--base-url", "nonsense", "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: 'nonsense/search/?type=File&")
    portal.graph.clear()
    assert main([*encode(portal, tmp_path), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "DataError"
    assert error["message"].startswith("the portal has no file with assembly 'GRCh38'")


def test_the_command_imports_little() -> None:
    code = (
        "import sys\n"
        "import genossm.cli.fetch\n"
        "assert not {'torch', 'pandas', 'numpy', 'urllib.request'} & set(sys.modules)\n"
        "import genossm.pipelines.fetch\n"
        "assert not {'torch', 'pandas', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
