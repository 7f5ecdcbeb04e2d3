"""Tests of genossm.fragments: the layouts of tables, BAM, and a sentence for each malformed row."""

from __future__ import annotations

import gzip
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from Bio import bgzf
from hypothesis import given
from hypothesis import strategies as st

import genossm.fragments as module
from genossm.errors import DataError, FileError
from genossm.fragments import FragmentFile, is_fragment_file, open_fragments, read_ends

Row = tuple[str, int, int, str, int]


def write(folder: Path, text: str, name: str = "a.tsv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if not name.endswith("gz") else gzip.compress(text.encode()))
    return path


def rows_of(file: FragmentFile, left_out: Counter[str] | None = None, **options: Any) -> list[Row]:
    """(chromosome, start, end, barcode, weight) of each row that counts."""
    settings = {"barcodes": False, "min_mapq": 30, "deduplicate": True, **options}
    rows: list[Row] = []
    for ends, _ in read_ends(file, left_out=Counter() if left_out is None else left_out, **settings):
        for at in range(ends.chrom.size):
            barcode = ends.barcodes[ends.barcode[at]] if ends.barcodes and ends.barcode[at] >= 0 else ""
            weight = 1 if ends.weights is None else int(ends.weights[at])
            start, end = int(ends.starts[at]), int(ends.ends[at])
            rows.append((ends.chroms[ends.chrom[at]], start, end, barcode, weight))
    return rows


def test_fragments_with_barcodes_and_counts(tmp_path: Path) -> None:
    text = "# id=atac\n# primary_contig=chr1\nchr1\t5\t50\tAAAC-1\t2\nchr1\t7\t7\tAAAC-1\t1\nchr2\t8\t90\ts1#GG\t9\n"
    file = open_fragments(write(tmp_path, text, "fragments.tsv.gz"))
    assert (file.layout, file.skipped, file.has_barcodes, file.has_counts, file.lengths) == (
        *("fragments", 2, True, True),
        None,
    )
    left_out: Counter[str] = Counter()
    assert rows_of(file, left_out) == [("chr1", 5, 50, "", 1), ("chr2", 8, 90, "", 1)]
    assert left_out == {"zero_length": 1}
    assert rows_of(file, barcodes=True, deduplicate=False) == [
        ("chr1", 5, 50, "AAAC-1", 2),
        ("chr2", 8, 90, "s1#GG", 9),
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_bedpe_of_three_columns(tmp_path: Path, newline: str, last: str) -> None:
    text = newline.join(["chr1\t5\t50", "", "chr1\t5\t50", "chr2\t0\t1"]) + last.replace("\n", newline)
    file = open_fragments(write(tmp_path, text, "a.bedpe.gz"))
    assert (file.layout, file.has_barcodes, file.has_counts) == ("fragments", False, False)
    # Rows that stand there twice count twice, and there is no count to read.
    expected = [("chr1", 5, 50, "", 1), ("chr1", 5, 50, "", 1), ("chr2", 0, 1, "", 1)]
    assert rows_of(file) == rows_of(file, deduplicate=False) == expected


def test_bedpe_of_pairs(tmp_path: Path) -> None:
    rows = [
        ("chr1", 100, 150, "chr1", 220, 270, "cell1", 60, "+", "-"),
        ("chr1", 320, 370, "chr1", 200, 250, "cell2", 60, "-", "+"),
        ("chr1", 100, 150, "chr2", 220, 270, "cell1", 60, "+", "-"),
        ("chr1", 100, 150, ".", -1, -1, "cell1", 60, "+", "."),
    ]
    for columns in (6, 7, 10):
        text = "#chrom1\tstart1\n" + "".join("\t".join(map(str, row[:columns])) + "\n" for row in rows)
        file = open_fragments(write(tmp_path, text, "a.bedpe"))
        assert (file.layout, file.has_barcodes, file.has_counts) == ("pairs", columns > 6, False)
        left_out: Counter[str] = Counter()
        assert [row[:3] for row in rows_of(file, left_out)] == [("chr1", 100, 270), ("chr1", 200, 370)]
        assert +left_out == {"pairs_apart": 2}
    assert [row[3] for row in rows_of(file, barcodes=True)] == ["cell1", "cell2"]


def test_reads_have_one_end(tmp_path: Path) -> None:
    text = "chr1\t10\t46\tN\t1000\t+\nchr1\t90\t126\tN\t1000\t-\nchr1\t90\t126\tN\t1000\t.\n"
    file = open_fragments(write(tmp_path, text, "a.tagAlign.gz"))
    left_out: Counter[str] = Counter()
    assert [row[:3] for row in rows_of(file, left_out)] == [("chr1", 10, -1), ("chr1", -1, 126)]
    assert file.layout == "reads" and +left_out == {"no_strand": 1}


def test_other_forms_of_a_table(tmp_path: Path) -> None:
    spaces = open_fragments(write(tmp_path, "chrom start end\nchr1  5 50\nchr1 6  1e+05\n", "a.bed"))
    assert rows_of(spaces) == [("chr1", 5, 50, "", 1), ("chr1", 6, 100_000, "", 1)]
    quoted = open_fragments(write(tmp_path, 'chr1\t5\t50\tA"B\t1\nchr1\t6\t60\tNA\t1\n'))
    assert [row[3] for row in rows_of(quoted, barcodes=True)] == ['A"B', "NA"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["chr1", "chr2", "1"]),
            st.integers(0, 300),
            st.integers(1, 300),
            st.sampled_from(["a", "b"]),
            st.integers(1, 9),
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 7),
)
def test_any_rows_in_any_blocks(tmp_path_factory: Any, rows: list[Row], block: int) -> None:
    rows = [(chrom, start, start + size, barcode, count) for chrom, start, size, barcode, count in rows]
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    path = write(tmp_path_factory.mktemp("rows"), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ROWS", block)
        assert rows_of(open_fragments(path), barcodes=True, deduplicate=False) == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("chr1\tx\t9\ta\t1", r"line 4: 'chr1\\tx\\t9\\ta\\t1' is no row of fragments"),
        ("chr1\t5", "line 4: .* is no row of fragments"),
        ("chr1\t5\t", "line 4"),
        ("chr1\t5.5\t9\ta\t1", "line 4"),
        ("chr1\t9\t5\ta\t1", "line 4"),
        ("chr1\t-9\t5\ta\t1", "line 4"),
        ("chr1\t5\t99999999999999999999\ta\t1", "line 4"),
        ("chr1\t5\t4294967295\ta\t1", "line 4"),
        ("# a remark", "line 4"),
        ("chr1\t5\t9\ta\t0", "line 4"),
        ("chr1\t5\t9\ta\tx", "line 4"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path, f"# header\nchr1\t1\t2\ta\t1\n\n{row}\nchr1\t3\t4\ta\t1\n", "a.tsv.gz")
    with pytest.raises(DataError, match=message) as caught:
        rows_of(open_fragments(path), deduplicate=False)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_malformed_pairs_are_named(tmp_path: Path) -> None:
    good = "chr1\t1\t5\tchr1\t7\t9\n"
    path = write(tmp_path, f"{good}chr1\t1\t5\tchr2\t9\t7\nchr1\t8\t9\tchr1\t7\tnine\n", "a.bedpe")
    with pytest.raises(DataError, match=r"line 3: .* is no row of pairs"):
        rows_of(open_fragments(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no fragments"),
        ("# nothing\n\n", "has no fragments"),
        ("chr1\t5\n", r"line 1: 'chr1 5' is no fragment: give at least chromosome, start and end"),
        ("<!DOCTYPE html>\n", "is no fragment"),
        ("chr1\tfive\t9\n", "is no fragment"),
        ("chr1\t0\t50\t3.5\n", r"looks like bedGraph: make a bigWig of it"),
    ],
)
def test_what_is_no_table_of_fragments(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_fragments(write(tmp_path, text))


def test_a_cut_off_table_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"chr1\t%d\t%d\n" % (at, at + 50) for at in range(0, 99_999, 7)))
    path = tmp_path / "a.bedpe.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="is cut off"):
        rows_of(open_fragments(path))


def test_names_and_content_tell_what_a_file_is(tmp_path: Path) -> None:
    for name in ("a.bedpe", "fragments.tsv", "a.fragments.tsv.gz", "a.BED.gz", "a.tagAlign.gz", "a.bed.bgz"):
        assert is_fragment_file(write(tmp_path, "chr1\t1\t2\n", name))
    for name in ("a.bw", "a.bedGraph", "a.txt"):
        assert not is_fragment_file(write(tmp_path, "chr1\t1\t2\n", name))
    with pytest.raises(FileError, match=r"a\.cram is CRAM.*samtools view -b"):
        is_fragment_file(write(tmp_path, "CRAM\3", "a.cram"))


def flag_rows() -> list[tuple[int, int, int, str | None]]:
    """(flag, position, mapping quality, barcode) of reads of 30 bases, of which the first three count."""
    return [
        (0x1 | 0x2 | 0x40, 100, 60, "A"),
        (0x1 | 0x2 | 0x80 | 0x10, 200, 30, "A"),
        (0x10, 300, 60, None),
        (0x1 | 0x40, 110, 60, "A"),
        (0x4, 120, 0, "A"),
        (0x100, 130, 60, "A"),
        (0x800, 140, 60, "A"),
        (0x400, 150, 60, "B"),
        (0x200, 160, 60, "A"),
        (0, 170, 29, "A"),
    ]


def write_bam(path: Path, lengths: dict[str, int], rows: list[tuple[int, int, int, str | None]]) -> Path:
    pysam = pytest.importorskip("pysam", reason="pysam, which writes and reads BAM, is not installed")
    header = {"HD": {"VN": "1.6"}, "SQ": [{"SN": name, "LN": length} for name, length in lengths.items()]}
    with pysam.AlignmentFile(str(path), "wb", header=header) as bam:
        for number, (flag, position, quality, barcode) in enumerate(rows):
            read = pysam.AlignedSegment()
            read.query_name, read.flag, read.reference_id = f"r{number}", flag, 0
            read.reference_start, read.mapping_quality = position, quality
            read.query_sequence, read.cigartuples = "A" * 30, [(4, 2), (0, 20), (2, 5), (0, 8)]
            if barcode is not None:
                read.set_tag("CB", barcode)
            bam.write(read)
    return path


def test_reads_of_a_bam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bam(tmp_path / "a.bam", {"chr1": 1_000, "chr2": 500}, flag_rows())
    assert is_fragment_file(path)
    file = open_fragments(path)
    assert (file.layout, file.lengths, file.has_barcodes) == ("bam", {"chr1": 1_000, "chr2": 500}, True)
    left_out: Counter[str] = Counter()
    # A read covers 33 bases: the two that are soft-clipped lie outside, the deletion inside.
    expected = [("chr1", 100, -1, "A", 1), ("chr1", -1, 233, "A", 1), ("chr1", -1, 333, "", 1)]
    assert rows_of(file, left_out, barcodes=True) == expected
    assert left_out == {
        **{"no_proper_pair": 1, "unmapped": 1, "secondary": 1, "supplementary": 1, "duplicates": 1},
        **{"failed_quality": 1, "low_mapq": 1},
    }
    more = rows_of(file, barcodes=True, deduplicate=False, min_mapq=0)
    assert more == [*expected, ("chr1", 150, -1, "B", 1), ("chr1", 170, -1, "A", 1)]
    monkeypatch.setattr(module, "_BLOCK_ROWS", 2)
    assert rows_of(file, barcodes=True) == expected


def test_a_cut_off_bam_is_refused(tmp_path: Path) -> None:
    path = write_bam(tmp_path / "a.bam", {"chr1": 10**6}, [(0, at, 60, f"{at}") for at in range(9_999)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="cut off"):
        open_fragments(path)
    path.write_bytes(whole[: len(whole) // 2] + whole[-28:])  # with bgzip's end mark
    with pytest.raises(FileError, match="cut off or damaged"):
        rows_of(open_fragments(path))


def test_bam_without_pysam_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysam", None)
    with bgzf.BgzfWriter(str(tmp_path / "a.bam")) as stream:
        stream.write(b"BAM\1" + bytes(8))
    with pytest.raises(
        FileError, match=r"pysam, which reads it, is not installed: pip install 'genossm\[bam\]'"
    ):
        open_fragments(tmp_path / "a.bam")
