"""`fetch` as a whole: what lies in the folder afterwards, and that check and prepare can follow."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import genossm
from genossm.dataset_config import load_dataset_config
from genossm.errors import ConfigError, DataError, FileError
from genossm.lock import only_one
from genossm.pipelines.fetch import FetchResult, fetch
from genossm.web import RefusedError
from tests.portal_server import PortalServer, hasty, instead, status, tree

SEARCH: dict[str, Any] = {
    "assembly": "GRCh38",
    "assays": "ATAC-seq",
    "output_types": ["IDR thresholded peaks", "fold change over control"],
}


@pytest.fixture
def portal() -> Iterator[PortalServer]:
    with PortalServer() as server:
        server.add_file("ENCFF001AAA", b"the peaks")
        server.add_file("ENCFF002AAA", b"the signal", file_format="bigWig")
        yield server


def run(portal: PortalServer, source: Any, out: Path, **options: Any) -> FetchResult:
    return fetch(source, out, base_url=portal.url, patience=hasty([]), **options)


def test_encode_files_come_with_tracks_and_a_dataset(portal: PortalServer, tmp_path: Path) -> None:
    result = run(portal, "encode", tmp_path, **SEARCH)
    assert tree(tmp_path) == {
        "tracks/ENCFF001AAA.bed.gz",
        "tracks/ENCFF002AAA.bigWig",
        "tracks.tsv",
        "dataset.yaml",
        "manifest.json",
    }
    assert (tmp_path / "tracks/ENCFF001AAA.bed.gz").read_bytes() == b"the peaks"
    assert result.size == 19
    assert [file.state for file in result.files] == ["fetched", "fetched"]
    assert result.written == ("tracks.tsv", "dataset.yaml")
    assert result.missing == ("hg38.fa.gz", "hg38-blacklist.v2.bed.gz")

    lines = [line.split("\t") for line in (tmp_path / "tracks.tsv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert lines[0][:3] == ["name", "file", "kind"]
    assert [row["name"] for row in rows] == ["K562_ATAC-seq_ENCFF001AAA", "K562_ATAC-seq_ENCFF002AAA"]
    assert [row["kind"] for row in rows] == ["peaks", "signal"]
    assert rows[0]["md5"] == hashlib.md5(b"the peaks").hexdigest()
    assert (rows[0]["output_type"], rows[0]["experiment"], rows[0]["replicates"]) == (
        "IDR thresholded peaks",
        "ENCSR000AAA",
        "1,2",
    )


def test_the_written_dataset_is_one_that_genossm_reads(portal: PortalServer, tmp_path: Path) -> None:
    portal.add_file(
        "ENCFF003AAA",
        b"3",
        biosample_ontology={"term_name": 'naive thymus-derived CD4-positive, "alpha-beta" T cell'},
        target={"label": "H3K4me3/x"},
    )
    run(portal, "encode", tmp_path, **SEARCH)
    config = load_dataset_config(tmp_path / "dataset.yaml")
    assert config.assembly == "GRCh38"
    assert config.genome == str(tmp_path / "hg38.fa.gz")
    assert config.exclude == (str(tmp_path / "hg38-blacklist.v2.bed.gz"),)
    assert (config.split.valid, config.split.test) == (("chr10",), ("chr8", "chr9"))
    assert [track.file for track in config.tracks] == [
        str(tmp_path / "tracks" / name)
        for name in ("ENCFF001AAA.bed.gz", "ENCFF002AAA.bigWig", "ENCFF003AAA.bed.gz")
    ]
    assert (
        config.tracks[2].name
        == "naive_thymus-derived_CD4-positive_alpha-beta_T_cell_ATAC-seq_H3K4me3_x_ENCFF003AAA"
    )


def test_manifest_says_where_everything_came_from(portal: PortalServer, tmp_path: Path) -> None:
    run(portal, "encode", tmp_path, **SEARCH)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["genossm"] == genossm.__version__
    assert set(manifest["written"]) == {"tracks.tsv", "dataset.yaml"}
    record = manifest["files"]["tracks/ENCFF002AAA.bigWig"]
    date = record.pop("date")
    assert len(date) == 25
    assert record == {
        "url": f"{portal.url}/files/ENCFF002AAA/@@download/ENCFF002AAA.bigWig",
        "md5": hashlib.md5(b"the signal").hexdigest(),
        "md5_checked": True,
        "size": 10,
        "track": "K562_ATAC-seq_ENCFF002AAA",
        "kind": "signal",
        "accession": "ENCFF002AAA",
        "experiment": "ENCSR000AAA",
        "assay": "ATAC-seq",
        "biosample": "K562",
        "output_type": "fold change over control",
        "replicates": "1,2",
        "file_format": "bigWig",
    }


def test_a_second_run_fetches_nothing_and_keeps_dates(portal: PortalServer, tmp_path: Path) -> None:
    run(portal, "encode", tmp_path, **SEARCH)
    before = json.loads((tmp_path / "manifest.json").read_text())["files"]
    for record in before.values():
        record["date"] = "2020-02-02T00:00:00+00:00"
    content = json.loads((tmp_path / "manifest.json").read_text()) | {"files": before}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    portal.requests.clear()
    result = run(portal, "encode", tmp_path, **SEARCH)
    assert [file.state for file in result.files] == ["present", "present"]
    assert [path.split("?")[0] for path, _ in portal.requests] == ["/search/"]
    assert json.loads((tmp_path / "manifest.json").read_text())["files"] == before


def test_a_dry_run_lists_and_writes_nothing(portal: PortalServer, tmp_path: Path) -> None:
    result = run(portal, "encode", tmp_path / "new", dry_run=True, **SEARCH)
    assert [(file.state, file.size) for file in result.files] == [("planned", 9), ("planned", 10)]
    assert result.size == 19
    assert not (tmp_path / "new").exists()
    portal.add_genome("hg38", b">chr1\nACGT\n", b"chr1\t4\n")
    result = run(portal, "genome", tmp_path / "new", assembly="hg38", dry_run=True)
    assert [file.size for file in result.files] == [
        len(portal.files["/goldenPath/hg38/bigZips/hg38.fa.gz"]),
        len(b"chr1\t4\n"),
    ]
    assert not (tmp_path / "new").exists()
    assert not portal.asked("/store/ENCFF001AAA.bed.gz")


def test_edited_descriptions_are_left_alone(
    portal: PortalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(portal, "encode", tmp_path, **SEARCH)
    path = tmp_path / "dataset.yaml"
    path.write_text(path.read_text().replace("bin: 32", "bin: 64"))
    portal.add_file("ENCFF003AAA", b"3")
    result = run(portal, "encode", tmp_path, **SEARCH)
    assert result.written == ("tracks.tsv",)
    assert "bin: 64" in path.read_text()
    assert "ENCFF003AAA" in (tmp_path / "tracks.tsv").read_text()
    assert f"{path} was made or edited by hand and stays as it is" in capsys.readouterr().err
    path.unlink()
    (tmp_path / "manifest.json").unlink()
    assert run(portal, "encode", tmp_path, **SEARCH).written == ("tracks.tsv", "dataset.yaml")


def test_what_was_asked_for_and_is_not_there_is_told(
    portal: PortalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    portal.add_file("ENCFF003AAA", b"3", restricted=True)
    search = SEARCH | {"biosamples": ["K562", "k562"], "output_types": ["IDR thresholded peaks", "peaks"]}
    run(portal, "encode", tmp_path, dry_run=True, **search)
    told = capsys.readouterr().err
    assert "note: no file of biosample 'k562' among the preferred defaults (--all-files looks beyond)" in told
    assert "note: no file of output type 'peaks' among" in told
    assert "note: 1 files that match are not for everybody: left out" in told
    assert "assay" not in told


def test_a_limit_takes_the_first(
    portal: PortalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    portal.add_file("ENCFF000AAA", b"0")
    result = run(portal, "encode", tmp_path, limit=2, **SEARCH)
    assert [file.about["accession"] for file in result.files] == ["ENCFF000AAA", "ENCFF001AAA"]
    assert "note: 2 of 3 files that match, by the limit" in capsys.readouterr().err


def test_files_that_are_no_tracks_are_fetched_and_told(
    portal: PortalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    portal.add_file("ENCFF003AAA", b"3", file_format="bam", output_type="alignments")
    portal.add_file("ENCFF004AAA", b"4", file_format_type="bedMethyl", output_type="alignments")
    search = SEARCH | {"output_types": "alignments", "formats": ["bam", "bed"]}
    result = run(portal, "encode", tmp_path, **search)
    assert result.written == ()
    assert tree(tmp_path) == {"tracks/ENCFF003AAA.bam", "tracks/ENCFF004AAA.bed.gz", "manifest.json"}
    assert "note: 2 files are neither peaks nor bigWigs" in capsys.readouterr().err


def test_genome_exclude_and_split_of_the_users_own(portal: PortalServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "own.fa").write_text("")
    run(
        portal,
        "encode",
        out,
        genome=tmp_path / "own.fa",
        exclude=[out / "deep" / "mask.bed", "$HOME/mask.bed"],
        valid="chr1",
        test=["chr2", "chr3"],
        **SEARCH,
    )
    config = load_dataset_config(out / "dataset.yaml")
    assert config.genome == str(tmp_path / "own.fa")
    assert config.exclude == (str(out / "deep" / "mask.bed"), str(Path("~/mask.bed").expanduser()))
    assert (config.split.valid, config.split.test) == (("chr1",), ("chr2", "chr3"))
    assert "deep/mask.bed" in (out / "dataset.yaml").read_text()
    assert str(out) not in (out / "dataset.yaml").read_text()


def test_one_missing_file_is_an_error_and_the_others_stay(portal: PortalServer, tmp_path: Path) -> None:
    del portal.files["/store/ENCFF001AAA.bed.gz"]
    with pytest.raises(
        RefusedError, match=r"1 of 2 files cannot be had; the others are complete: .*ENCFF001AAA"
    ):
        run(portal, "encode", tmp_path, **SEARCH)
    assert tree(tmp_path) == {"tracks/ENCFF002AAA.bigWig", "manifest.json"}


def test_a_wrong_md5_is_an_error(portal: PortalServer, tmp_path: Path) -> None:
    portal.files["/store/ENCFF001AAA.bed.gz"] = b"the pears"
    with pytest.raises(RefusedError, match="has the md5"):
        run(portal, "encode", tmp_path, **SEARCH)


def test_one_name_for_two_files_is_an_error(portal: PortalServer, tmp_path: Path) -> None:
    portal.add_file("ENCFF003AAA", b"3", href="/files/ENCFF003AAA/@@download/ENCFF001AAA.bed.gz")
    with pytest.raises(DataError, match=r"two files would be written to tracks/ENCFF001AAA\.bed\.gz"):
        run(portal, "encode", tmp_path, **SEARCH)


def test_a_file_name_that_leads_elsewhere_is_refused(portal: PortalServer, tmp_path: Path) -> None:
    portal.add_file("ENCFF003AAA", b"3", href="/files/ENCFF003AAA/..")
    with pytest.raises(DataError, match=r"would be written to 'tracks/\.\.'"):
        run(portal, "encode", tmp_path, **SEARCH)


def test_a_2bit_genome_is_the_one_that_the_dataset_names(portal: PortalServer, tmp_path: Path) -> None:
    portal.add_genome("hg38", b">chr1\nACGT\n", b"chr1\t4\n")
    portal.files["/hg38-blacklist.v2.bed.gz"] = gzip.compress(b"chr1\t100\t200\n")
    run(portal, "genome", tmp_path, assembly="hg38", genome_format="2bit")
    run(portal, "blacklist", tmp_path, assembly="hg38")
    assert run(portal, "encode", tmp_path, **SEARCH).missing == ()
    assert load_dataset_config(tmp_path / "dataset.yaml").genome == str(tmp_path / "hg38.2bit")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("ensembl", {"assembly": "hg38"}, "the source 'ensembl' is unknown: use encode, genome, blacklist"),
        ("genome", {"assembly": "../x"}, "the assembly '../x' is no name of a genome build"),
        (
            "genome",
            {"assembly": "hg38", "assays": "ATAC-seq"},
            "for the source encode; leave them out for genome",
        ),
        ("genome", {"assembly": "hg38", "genome_format": "fa"}, "the genome format 'fa' is unknown"),
        ("blacklist", {"assembly": "hg38", "jobs": 9}, "jobs is 9: from 1 to 8"),
        ("encode", SEARCH | {"assays": ()}, "assays is empty"),
        ("encode", SEARCH | {"output_types": ""}, "output_types is empty"),
        ("encode", SEARCH | {"limit": 0}, "limit is 0"),
        ("encode", SEARCH | {"valid": "chr1"}, "valid and test go together"),
    ],
)
def test_an_impossible_request_is_a_sentence(
    portal: PortalServer, tmp_path: Path, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(portal, source, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_an_assembly_without_a_usual_split_needs_one(portal: PortalServer, tmp_path: Path) -> None:
    portal.add_file("ENCFF009AAA", b"9", assembly="ce11")
    search = SEARCH | {"assembly": "ce11"}
    assert run(portal, "encode", tmp_path, dry_run=True, **search).files
    with pytest.raises(ConfigError, match="no usual split of ce11 is known: name the held-out chromosomes"):
        run(portal, "encode", tmp_path, **search)
    run(portal, "encode", tmp_path, valid="chrI", test="chrII", **search)
    assert load_dataset_config(tmp_path / "dataset.yaml").split.test == ("chrII",)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": [], "written": {}}', '{"files": {"a": 1}, "written": {}}']
)
def test_a_damaged_manifest_is_a_sentence(portal: PortalServer, tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(
        FileError, match=r"manifest\.json is no manifest of `genossm fetch`, or is damaged; move it"
    ):
        run(portal, "encode", tmp_path, **SEARCH)


def test_a_folder_that_is_a_file_is_a_sentence(portal: PortalServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot make the folder .*/file"):
        run(portal, "encode", tmp_path / "file", **SEARCH)


def test_a_second_fetch_into_the_folder_waits(
    portal: PortalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    with only_one(tmp_path / ".fetch.lock"):
        second = threading.Thread(target=lambda: results.append(run(portal, "encode", tmp_path, **SEARCH)))
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive()
        assert tree(tmp_path) == {".fetch.lock"}
    second.join(timeout=20)
    assert results[0].written == ("tracks.tsv", "dataset.yaml")
    assert f"waiting for another `genossm fetch` in {tmp_path} to end" in capsys.readouterr().err


def test_no_network_is_a_sentence(tmp_path: Path) -> None:
    with PortalServer() as server:
        pass
    for source, options in (
        ("encode", SEARCH),
        ("genome", {"assembly": "hg38"}),
        ("blacklist", {"assembly": "hg38"}),
    ):
        with pytest.raises(
            FileError, match=r"no answer \(Connection refused\), 6 times in a row; check the network"
        ):
            run(server, source, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_from_servers_to_a_prepared_dataset(
    portal: PortalServer, tiny_folder: Path, tiny_lengths: dict[str, int], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    sizes = "".join(f"{chrom}\t{length}\n" for chrom, length in tiny_lengths.items()).encode()
    portal.add_genome("tiny", (tiny_folder / "genome.fa").read_bytes(), sizes)
    portal.files["/tiny-blacklist.v2.bed.gz"] = gzip.compress(b"chrA\t2000\t4000\tHigh Signal Region\n")
    peaks = gzip.compress((tiny_folder / "peaks.narrowPeak").read_bytes())
    portal.add_file("ENCFF011AAA", peaks, assembly="tiny")
    portal.add_file(
        "ENCFF012AAA", (tiny_folder / "signal.bw").read_bytes(), assembly="tiny", file_format="bigWig"
    )
    portal.faults["/store/ENCFF011AAA.bed.gz"] = [
        status(503),
        instead(b"an error page"),
        status(429, retry_after="1"),
    ]
    run(portal, "genome", out, assembly="tiny")
    run(portal, "blacklist", out, assembly="tiny")
    search = SEARCH | {"assembly": "tiny", "valid": "chrB", "test": "chrC"}
    result = run(portal, "encode", out, exclude=[out / "tiny-blacklist.v2.bed.gz"], **search)
    assert result.missing == ()
    windows = ["window.length=4096", "window.margin=512"]
    assert genossm.check(out / "dataset.yaml", windows).text()
    prepared = genossm.prepare(out / "dataset.yaml", tmp_path / "prepared", overrides=windows)
    assert prepared.track_names == ("K562_ATAC-seq_ENCFF011AAA", "K562_ATAC-seq_ENCFF012AAA")
    own = genossm.prepare(tiny_folder / "dataset.yaml", tmp_path / "own")
    assert prepared.positive_rate["K562_ATAC-seq_ENCFF011AAA"] == pytest.approx(
        own.positive_rate["peaks"], abs=0.02
    )
