"""Tests of genossm.annotations: oddities are counted and mended, malformed rows named by file and line."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import numpy as np
import pytest
from Bio import bgzf
from hypothesis import given
from hypothesis import strategies as st

import genossm.annotations as module
from genossm.annotations import Annotations, read_annotations
from genossm.errors import DataError, FileError

LENGTHS = {"chr1": 1000, "chr2": 500, "chrM": 160}


def write(folder: Path, text: str, name: str = "rows.bed") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def rows_of(annotations: Annotations) -> list[tuple[str, int, int]]:
    return list(
        zip(annotations.chroms.tolist(), annotations.starts.tolist(), annotations.ends.tolist(), strict=True)
    )


def test_narrowpeak_columns(tmp_path: Path) -> None:
    text = (
        "chr1\t100\t200\tp1\t500\t+\t5.5\t3.0\t2.0\t30\n"
        "chr2\t10\t21\tp2\t7.5\t.\t5.5\t3.0\t2.0\t-1\n"
        "chr1\t300\t310\tp3\t0\t-\t5.5\t-1\t-1\t10\n"
    )
    peaks = read_annotations(write(tmp_path, text, "a.narrowPeak"))
    assert rows_of(peaks) == [("chr1", 100, 200), ("chr2", 10, 21), ("chr1", 300, 310)]
    assert peaks.summits.tolist() == [130, 15, 305]  # called; midpoint of none; midpoint as 10 lies outside
    assert peaks.scores.tolist() == [500.0, 7.5, 0.0]
    assert peaks.strands.tolist() == ["+", ".", "-"]
    assert peaks.oddities == {"summit_outside": 1}
    assert peaks.chrom_names() == ("chr1", "chr2")
    assert (peaks.count("chr1"), peaks.count("chr2"), peaks.count("chr3"), len(peaks)) == (2, 1, 0, 3)
    assert peaks.starts.dtype == peaks.ends.dtype == peaks.summits.dtype == np.int64
    assert peaks.scores.dtype == np.float64


def test_columns_of_other_tables(tmp_path: Path) -> None:
    broad = read_annotations(write(tmp_path, "chr1\t100\t200\tp1\t50\t.\t5.5\t3.0\t2.0\n", "a.broadPeak"))
    assert (broad.summits.tolist(), broad.scores.tolist()) == ([150], [50.0])
    three = read_annotations(write(tmp_path, "chr1\t100\t201\n"))
    assert (three.summits.tolist(), three.strands.tolist()) == ([150], ["."])
    assert np.isnan(three.scores).all()
    named = read_annotations(write(tmp_path, "chr10\t0\t45700\tLow Mappability\n"))
    assert rows_of(named) == [("chr10", 0, 45700)]
    twelve = read_annotations(write(tmp_path, "chr1\t5\t90\tx\t1\t+\t5\t90\t0\t2\t10,10\t0,75\n"))
    assert twelve.summits.tolist() == [47]  # column 10 is a block count here
    ten = read_annotations(write(tmp_path, "chr1\t5\t90\tx\t1\t+\ta\tb\tc\tgene\n"))
    assert ten.summits.tolist() == [47]
    with pytest.raises(DataError, match=r"line 1: the summit 'gene'"):
        read_annotations(write(tmp_path, "chr1\t5\t90\tx\t1\t+\ta\tb\tc\tgene\n", "a.narrowPeak"))


GAPPED = "chr1\t100\t900\tp\t50\t.\t150\t260\t0\t3\t1,110,1\t0,50,799\t5.5\t3.0\t2.0\n"


@pytest.mark.parametrize("kind", ["plain", "gzip", "bgzip"])
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.narrowPeak", ["chr1\t100\t900\tp\t50\t.\t5.5\t3.0\t2.0\t30\n"]),
        ("a.broadPeak", ["chr1\t100\t900\tp\t50\t.\t5.5\t3.0\t2.0\n"]),
        ("a.gappedPeak", [GAPPED]),  # the whole broad region, as UCSC draws it
        ("a.bed", ["chr1\t100\t900\n"]),
        ("a.bed", ["chr1\t100\t900\tname with words\t.\t.\tx\ty\tz\t\t1e5\t{}\n"]),
    ],
)
def test_kinds_of_peaks_in_any_compression(tmp_path: Path, kind: str, name: str, rows: list[str]) -> None:
    content = ("track name=x\n" + "".join(rows) + "chr2\t5\t7" + rows[0][len("chr1\t100\t900") :]).encode()
    path = tmp_path / {"plain": name, "gzip": f"{name}.gz", "bgzip": f"{name}.bgz"}[kind]
    if kind == "bgzip":
        with bgzf.BgzfWriter(str(path)) as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    peaks = read_annotations(path)
    assert rows_of(peaks) == [("chr1", 100, 900), ("chr2", 5, 7)]
    assert peaks.summits[0] == (130 if name == "a.narrowPeak" else 500)
    assert peaks.oddities["header_lines"] == 1


def test_summits_are_the_whole_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", 2)
    row = "chr1\t{0}\t{1}\tp\t0\t.\t1\t1\t1\t3\n"
    text = "".join(row.format(at, at + 20) for at in range(0, 250, 50))
    assert read_annotations(write(tmp_path, text)).summits.tolist() == [3, 53, 103, 153, 203]
    mixed = read_annotations(write(tmp_path, text + "chr1\t300\t320\n"))
    assert mixed.summits.tolist() == [10, 60, 110, 160, 210, 310]
    with pytest.raises(DataError, match="line 6: the start 'x'"):
        read_annotations(write(tmp_path, text + "chr1\tx\t320\n"))


def test_the_oddities_of_real_files(tmp_path: Path) -> None:
    text = (
        '\ufefftrack type=bed name="a track"\r\n'
        "browser position chr1:1-100\r\n"
        "# a remark\r\n"
        "\r\n"
        "chr1\t10\t20\tx\r\n"
        "chr1\t10\t20\tx\r\n"
        "chr1\t10\t20\ty\r\n"
        "chr1 30 40\r\n"
        "  \r\n"
        "chr1\t50\t50\tz\r\n"
        "chr1\t-5\t8\tw\r\n"
        "chr1\t1e+02\t2e+02\tv"
    )
    rows = read_annotations(write(tmp_path, text))
    assert rows_of(rows) == [
        *[("chr1", 10, 20), ("chr1", 10, 20), ("chr1", 30, 40)],
        *[("chr1", 0, 8), ("chr1", 100, 200)],
    ]
    assert rows.oddities == {
        "header_lines": 3,
        "blank_lines": 2,
        "duplicates": 1,
        "zero_length": 1,
        "before_start": 1,
    }
    assert rows.on("chr1")[0].tolist() == [0, 10, 30, 100]


def test_a_line_of_column_names_is_a_header(tmp_path: Path) -> None:
    rows = read_annotations(write(tmp_path, "chrom\tchromStart\tchromEnd\nchr1\t1\t5\n"))
    assert (rows_of(rows), rows.oddities) == ([("chr1", 1, 5)], {"header_lines": 1})
    with pytest.raises(DataError, match="line 2: the start 'start'"):
        read_annotations(write(tmp_path, "chr1\t1\t5\nchrom\tstart\tend\n"))


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "track name=x\n", "chr1\t7\t7\n"])
def test_a_file_without_rows_is_empty(tmp_path: Path, text: str) -> None:
    rows = read_annotations(write(tmp_path, text))
    assert len(rows) == 0 and rows.chrom_names() == ()
    starts, ends = rows.on("chr1")
    assert starts.shape == ends.shape == (0,) and starts.dtype == np.int64
    assert len(rows.fit(LENGTHS, chrom_names="repair")) == 0
    assert len(Annotations.from_pyranges(rows.to_pyranges())) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("chr1\t5", r"'chr1\\t5' is no BED row"),
        ("chr1", "is no BED row"),
        ("\t5\t9", "is no BED row"),
        ("chr1\tfive\t9", "the start 'five' is no whole number"),
        ("chr1\t5\t", "the end '' is no whole number"),
        ("chr1\t5.5\t9", r"the start '5\.5' is no whole number"),
        ("chr1\t5\tnan", "the end 'nan'"),
        ("chr1\t5\tinf", "the end 'inf'"),
        ("chr1\t5\t1_000", "the end '1_000'"),
        ("chr1\t5\t1,000", "the end '1,000'"),
        ("chr1\t0\t99999999999999999999", "is no whole number"),
        ("chr1\t9\t5", "chr1:9-5 is impossible"),
        ("chr1\t-9\t-5", "chr1:-9--5 is impossible"),
        ("<!DOCTYPE html>", "is no BED row"),
        ("chr1:5-9", "is no BED row"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path, f"# header\nchr1\t1\t2\n\n{row}\nchr1\t3\t4\n")
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(path)
    assert f"{path}, line 4: " in str(caught.value)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.bed"
    path.write_bytes(b"\x88\x8f\xfc\x26\0\0\0\0")
    with pytest.raises(DataError, match="binary"):
        read_annotations(path)


def test_compressed_files_read_alike_and_cut_ones_are_refused(tmp_path: Path) -> None:
    text = "".join(f"chr1\t{at}\t{at + 5}\n" for at in range(0, 90_000, 10)).encode()
    plain = read_annotations(write(tmp_path, text.decode()))
    (tmp_path / "rows.bed.gz").write_bytes(gzip.compress(text))
    with bgzf.BgzfWriter(str(tmp_path / "rows.bgz"), "wb") as stream:
        stream.write(text)
    for name in ("rows.bed.gz", "rows.bgz"):
        assert rows_of(read_annotations(tmp_path / name)) == rows_of(plain)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(FileError, match="cut off"):
            read_annotations(tmp_path / name)
    with pytest.raises(FileError, match="does not exist"):
        read_annotations(tmp_path / "none.bed")


rows = st.lists(
    st.tuples(
        st.sampled_from(["chr1", "chr2", "7"]),
        st.integers(0, 300),
        st.integers(0, 40),
        st.sampled_from(["", "\tname", "\ta name\t5\t+"]),
    ),
    max_size=30,
)


@given(rows, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.integers(1, 20))
def test_any_rows_read_back(
    table: list[tuple[str, int, int, str]], newline: str, last: bool, block_rows: int
) -> None:
    lines = [f"{chrom}\t{start}\t{start + length}{rest}" for chrom, start, length, rest in table]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ROWS", block_rows)
        path = Path(folder) / "rows.bed"
        path.write_bytes((newline.join(lines) + (newline if last and lines else "")).encode())
        read = read_annotations(path)
    unique = {line: row for line, row in zip(lines, table, strict=True)}
    kept = [(chrom, start, start + length) for chrom, start, length, _ in unique.values() if length]
    assert rows_of(read) == kept
    assert read.oddities.get("duplicates", 0) == len(table) - len(unique)
    assert read.oddities.get("zero_length", 0) == len(unique) - len(kept)
    for chrom in ("chr1", "chr2", "7"):
        bases = {base for name, start, end in kept if name == chrom for base in range(start, end)}
        starts, ends = read.on(chrom)
        merged = [base for start, end in zip(starts, ends, strict=True) for base in range(start, end)]
        assert merged == sorted(bases)


@given(st.text(st.sampled_from("chr1\t\n0189 -.+#ex\r")))
def test_any_text_is_read_or_refused(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.bed"
        path.write_bytes(text.encode())
        try:
            read = read_annotations(path)
        except DataError as error:
            assert f"{path}, line " in str(error)
        else:
            assert np.all((read.starts >= 0) & (read.starts < read.ends))
            assert np.all((read.starts <= read.summits) & (read.summits < read.ends))


def test_pyranges_there_and_back(tmp_path: Path) -> None:
    text = "".join(
        f"chr{1 + at % 2}\t{at}\t{at + 9}\tp\t{at}\t+\t1\t1\t1\t{at % 9}\n" for at in range(0, 200, 4)
    )
    peaks = read_annotations(write(tmp_path, text))
    ranges = peaks.to_pyranges()
    back = Annotations.from_pyranges(ranges, "again")
    order = np.lexsort((peaks.starts, peaks.chroms))
    assert sorted(rows_of(back)) == sorted(rows_of(peaks))
    assert sorted(back.summits.tolist()) == sorted(peaks.summits[order].tolist())
    assert set(back.strands.tolist()) == {"+"}
    merged = ranges.merge(strand=False).df
    for chrom in ("chr1", "chr2"):
        starts, ends = peaks.on(chrom)
        expected = merged[merged["Chromosome"] == chrom]
        assert starts.tolist() == expected["Start"].tolist()
        assert ends.tolist() == expected["End"].tolist()


def test_rows_over_an_end_are_clipped_and_counted(tmp_path: Path) -> None:
    text = "chr1\t990\t1010\tp\t1\t.\t1\t1\t1\t15\nchr2\t0\t500\tq\t1\t.\t1\t1\t1\t7\n"
    fitted = read_annotations(write(tmp_path, text)).fit(LENGTHS)
    assert rows_of(fitted) == [("chr1", 990, 1000), ("chr2", 0, 500)]
    assert fitted.summits.tolist() == [999, 7]
    assert fitted.oddities == {"past_end": 1}


def test_rows_wholly_past_an_end_are_another_assembly(tmp_path: Path) -> None:
    path = write(tmp_path, "chr1\t1\t9\nchr2\t500\t600\nchr2\t700\t800\n")
    with pytest.raises(DataError, match=r"chr2:500-600 and 1 more rows .* 500 bp: .*another assembly"):
        read_annotations(path).fit(LENGTHS)


def test_unknown_chromosomes(tmp_path: Path) -> None:
    text = "chr1\t1\t9\nchrUn_GL000220v1\t1\t9\nchr1_random\t1\t2\nchr7\t1\t9\nchr7\t2\t9\nchr8\t1\t9\n"
    annotations = read_annotations(write(tmp_path, text))
    with pytest.raises(
        DataError, match=r"lacks: chr7 \(2 rows\), chr8 \(1 rows\); .*`unknown: skip`"
    ) as caught:
        annotations.fit(LENGTHS)
    assert "chrUn" not in str(caught.value) and "repair" not in str(caught.value)
    fitted = annotations.fit(LENGTHS, unknown="skip")
    assert rows_of(fitted) == [("chr1", 1, 9)]
    assert fitted.oddities == {"skipped_unplaced": 2, "skipped_unknown": 3}
    assert annotations.oddities == {}  # the file's own counts stay as they were
    many = write(tmp_path, "".join(f"contig{at}\t1\t2\n" for at in range(9)))
    with pytest.raises(DataError, match=r"contig4 \(1 rows\) and 4 more; the genome has chr1, chr2, chrM;"):
        read_annotations(many).fit(LENGTHS)


def test_a_naming_habit_can_be_repaired(tmp_path: Path) -> None:
    annotations = read_annotations(write(tmp_path, "1\t1\t9\n2\t5\t8\nMT\t100\t170\nKI270728.1\t1\t2\n"))
    with pytest.raises(DataError, match=r"1 looks like the genome's chr1: set `chrom_names: repair`"):
        annotations.fit(LENGTHS)
    fitted = annotations.fit(LENGTHS, chrom_names="repair")
    assert rows_of(fitted) == [("chr1", 1, 9), ("chr2", 5, 8), ("chrM", 100, 160)]
    assert fitted.oddities == {"renamed": 3, "skipped_unplaced": 1, "past_end": 1}
    back = read_annotations(write(tmp_path, "chr1\t1\t9\n")).fit({"1": 10}, chrom_names="repair")
    assert rows_of(back) == [("1", 1, 9)]


@pytest.mark.realdata
def test_real_files_with_oddities(realdata: Path) -> None:
    sizes = (realdata / "sacCer3" / "sacCer3.chrom.sizes").read_text().split()
    yeast = dict(zip(sizes[::2], map(int, sizes[1::2]), strict=True))

    promoters = read_annotations(realdata / "sacCer3" / "promoter_NFR_YEP.bed")
    fitted = promoters.fit(yeast)
    assert len(fitted) == 5378 and fitted.oddities == {"past_end": 1}
    assert 576_982 in promoters.ends.tolist() and 576_982 not in fitted.ends.tolist()

    regions = read_annotations(realdata / "sacCer3" / "atac_hmmratac_accessible_regions.narrowPeak")
    assert len(regions) == 1605 and regions.fit(yeast).oddities == {"header_lines": 1}

    sites = read_annotations(realdata / "hg38_chr1_1m" / "CTCF_bound_motif_sites.bed")
    assert len(sites) == 0 and sites.oddities == {"duplicates": 1, "zero_length": 4}

    peaks = read_annotations(realdata / "sacCer3" / "atac_macs2_peaks.narrowPeak")
    assert len(peaks) == 1975 and peaks.fit(yeast).oddities == {}
    assert peaks.summits[:2].tolist() == [167, 28_731]
    covered = sum(int((ends - starts).sum()) for starts, ends in map(peaks.on, peaks.chrom_names()))
    assert 690_000 < covered < 700_000  # README: 695 kb

    blacklist = read_annotations(realdata / "hg38_chr1_1m" / "hg38-blacklist.v2.bed.gz")
    assert len(blacklist) == 636 and blacklist.oddities == {}
    with pytest.raises(DataError, match="another assembly"):
        blacklist.fit({"chr1": 1_000_000}, unknown="skip")
    with pytest.raises(DataError, match="names chromosomes that the genome lacks: chr10"):
        blacklist.fit(yeast)


def test_rows_past_the_end_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "blacklist.bed"
    path.write_text("chr1\t10\t20\nchr1\t95\t120\nchr1\t500\t600\nchr1\t700\t800\n")
    fitted = read_annotations(path).fit({"chr1": 100}, beyond="skip")
    assert list(zip(fitted.starts.tolist(), fitted.ends.tolist(), strict=True)) == [(10, 20), (95, 100)]
    assert fitted.oddities == {"past_end": 1, "skipped_past_end": 2}
    with pytest.raises(DataError, match="chr1:500-600 and 1 more rows lie wholly past the end"):
        read_annotations(path).fit({"chr1": 100})
