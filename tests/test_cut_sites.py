"""Tests of genossm.cut_sites: counts equal plain Python and the real cut-site bigWig; one cache for many processes."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyBigWig
import pytest
from hypothesis import given
from hypothesis import strategies as st

import genossm.cut_sites as module
import genossm.external_sort as sort_module
from genossm.cut_sites import SHIFTED_BEFORE, CutOptions, CutSites, read_groups
from genossm.errors import DataError, FileError

BEDPE = Path("sacCer3") / "atac_SRR1822137_500k.bedpe.gz"
BIGWIG = Path("sacCer3") / "atac_tn5_cutsites.bw"
ROWS = "chr1\t10\t60\tA\t3\nchr1\t20\t30\tB\t1\nchr2\t0\t12\tA\t1\nchr1\t10\t60\tC\t2\n"


@pytest.fixture(autouse=True)
def _cache(private_cache: Path) -> None:
    """Each test has its own caches."""


def write(folder: Path, text: str, name: str = "a.tsv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def sites_of(cuts: CutSites) -> dict[str, list[int]]:
    return {chrom: cuts.positions(chrom).tolist() for chrom in cuts.lengths}


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ((4, -5), {"chr1": [14, 14, 24, 25, 55, 55], "chr2": [4, 7]}),
        ((4, -4), {"chr1": [14, 14, 24, 26, 56, 56], "chr2": [4, 8]}),
        ((0, 0), {"chr1": [10, 10, 20, 29, 59, 59], "chr2": [0, 11]}),
        ((0, -1), {"chr1": [10, 10, 20, 29, 59, 59], "chr2": [0, 11]}),
        ((0, 1), {"chr1": [10, 10, 20, 30, 60, 60], "chr2": [0, 12]}),
        ((-1, -13), {"chr1": [9, 9, 17, 19, 47, 47], "chr2": []}),
    ],
)
def test_the_shift_says_which_bases(tmp_path: Path, shift: tuple[int, int], expected: Any) -> None:
    cuts = CutSites(write(tmp_path, ROWS), CutOptions(shift))
    assert sites_of(cuts) == expected
    assert cuts.left_out == ({"sites_before_start": 2} if shift[0] < 0 else {})
    assert (cuts.rows, cuts.unit, cuts.shifted_before, cuts.knows_lengths) == (4, "fragments", True, False)
    assert cuts.lengths == {"chr1": 21, "chr2": 1}  # as far as rows begin


def test_shifted_files_give_the_sites_of_those_that_are_not(tmp_path: Path) -> None:
    fragments = [(10, 60), (20, 31), (5, 300)]
    raw = write(tmp_path, "".join(f"chr1\t{start}\t{end}\n" for start, end in fragments), "raw.bedpe")
    shifted = "".join(f"chr1\t{start + 4}\t{end - 5}\tA\t1\n" for start, end in fragments)
    cuts = CutSites(write(tmp_path, shifted), CutOptions(SHIFTED_BEFORE))
    assert sites_of(cuts) == sites_of(CutSites(raw))
    assert cuts.shifted_before and not CutSites(raw).shifted_before


def test_a_row_counts_once_unless_its_duplicates_shall_count(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    assert Counter(CutSites(path).positions("chr1").tolist())[14] == 2
    assert Counter(CutSites(path, CutOptions(deduplicate=False)).positions("chr1").tolist())[14] == 5
    assert len(CutSites(path, CutOptions(deduplicate=False)).positions("chr2")) == 2


def test_groups_of_cells_are_counted_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = write(tmp_path, "cell\tgroup\tbarcode\nx\tT\tA\ny\tB\tC\nz\tT\tD\n", "groups.tsv")
    options = CutOptions(barcodes=str(groups))
    path = write(tmp_path, ROWS)
    t_cells = CutSites(path, options, group="T")
    monkeypatch.setattr(module, "read_ends", lambda *_: pytest.fail("read again"))
    b_cells = CutSites(path, options, group="B")
    assert sites_of(t_cells) == {"chr1": [14, 55], "chr2": [4, 7]}
    assert sites_of(b_cells) == {"chr1": [14, 55], "chr2": []}  # no fragment there is a count, not a gap
    assert b_cells.binned("chr2", 20, 10, "sum")[0].tolist() == [0, 0]
    assert b_cells.left_out == {"other_barcodes": 1}
    assert sites_of(pickle.loads(pickle.dumps(b_cells))) == sites_of(b_cells)
    with pytest.raises(DataError, match=r"groups\.tsv has no group 'b'; did you mean B\?"):
        CutSites(path, options, group="b")


def test_a_changed_table_of_barcodes_is_read_again(tmp_path: Path) -> None:
    groups = write(tmp_path, "barcode,group\nA,T\n", "groups.csv")
    path = write(tmp_path, ROWS)
    options = CutOptions(barcodes=str(groups))
    assert len(CutSites(path, options, group="T").positions("chr1")) == 2
    groups.write_text("barcode,group\nB,T\nA,U\nC,U\n")
    assert CutSites(path, options, group="T").positions("chr1").tolist() == [24, 25]
    assert len(CutSites(path, options, group="U").positions("chr1")) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns of an empty file"),
        (
            "barcode\tcluster\nA\t1\n",
            "has the columns barcode, cluster: its first line must name barcode and group",
        ),
        ("barcode\tgroup\n", "has no barcodes"),
        ("barcode\tgroup\nA\tT\n\t\n", "line 3: a barcode and a group are needed"),
        ("barcode\tgroup\nA\tT\nB\n", "line 3: a barcode and a group are needed"),
        ("barcode\tgroup\nA\tT\nA\tT\nA\tU\n", "line 4: the barcode A is in the groups T and U"),
    ],
)
def test_a_bad_table_of_barcodes_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_groups(write(tmp_path, text, "groups.tsv"))


def test_barcodes_that_are_not_there(tmp_path: Path) -> None:
    groups = write(tmp_path, "barcode\tgroup\nA-1\tT\n", "groups.tsv")
    options = CutOptions(barcodes=str(groups))
    with pytest.raises(DataError, match=r"none of the barcodes of .* \(such as A-1\) is in .* \(such as A\)"):
        CutSites(write(tmp_path, ROWS), options, group="T")
    with pytest.raises(DataError, match=r"a\.bedpe has no barcodes \(column 4\)"):
        CutSites(write(tmp_path, "chr1\t5\t50\n", "a.bedpe"), options, group="T")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": (4,)}, r"shift is \[4\]: give two whole numbers"),
        ({"shift": (4, -5000)}, "shift is"),
        ({"min_mapq": 256}, "min_mapq is 256"),
        ({"min_mapq": -1}, "min_mapq is -1"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CutOptions(**options)


FRAGMENTS = st.lists(
    st.tuples(st.sampled_from(["chr1", "chr2"]), st.integers(0, 900), st.integers(1, 300)),
    min_size=1,
    max_size=60,
)


@given(
    FRAGMENTS,
    st.integers(1, 70),
    st.sampled_from(["mean", "sum", "max"]),
    st.tuples(st.integers(-20, 20), st.integers(-20, 20)),
    st.integers(1, 20),
    st.integers(1, 300),
)
def test_counts_agree_with_plain_python(
    fragments: list[tuple[str, int, int]],
    bin_bp: int,
    aggregate: Any,
    shift: tuple[int, int],
    memory: int,
    slice_bp: int,
) -> None:
    length_bp = 1_000
    counts = {chrom: [0] * length_bp for chrom, _, _ in fragments}
    for chrom, start, size in fragments:
        end = start + size
        second = end + shift[1] if shift[1] < 0 else end - 1 + shift[1]
        for site in (start + shift[0], second):
            if 0 <= site < length_bp:
                counts[chrom][site] += 1
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sort_module, "_BUFFERED", memory)
        patch.setattr(sort_module, "_MERGED", memory)
        patch.setattr(module, "_SLICE_BP", slice_bp)
        text = "".join(f"{chrom}\t{start}\t{start + size}\n" for chrom, start, size in fragments)
        cuts = CutSites(write(Path(folder), text, "a.bedpe"), CutOptions(shift), cache_dir=folder)
        for chrom, expected in counts.items():
            assert cuts.values(chrom, -7, length_bp).tolist() == [0] * 7 + expected
            values, valid = cuts.binned(chrom, length_bp, bin_bp, aggregate)
            rows = [expected[at : at + bin_bp] for at in range(0, length_bp, bin_bp)]
            function = {"sum": sum, "max": max, "mean": lambda row: sum(row) / len(row)}[aggregate]
            assert valid.all() and values.dtype == np.float32
            np.testing.assert_allclose(values, [function(row) for row in rows], rtol=1e-6)


def test_impossible_questions_are_refused(tmp_path: Path) -> None:
    cuts = CutSites(write(tmp_path, ROWS))
    with pytest.raises(DataError, match=r"no chromosome '1'; did you mean chr1\?"):
        cuts.values("1", 0, 5)
    with pytest.raises(DataError, match="ends before it starts"):
        cuts.values("chr1", 5, 4)
    with pytest.raises(DataError, match="'median': allowed are mean, sum and max"):
        cuts.binned("chr1", 100, 10, "median")  # type: ignore[arg-type]


def test_the_cache_belongs_to_the_file_and_the_options(
    tmp_path: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, ROWS)
    first = CutSites(path)
    assert CutSites(path, CutOptions((0, 0))).positions("chr1").tolist() != first.positions("chr1").tolist()
    caches = sorted(private_cache.iterdir())
    assert len(caches) == 2 and all(cache.name.endswith(".cuts.genossm") for cache in caches)
    assert len(pickle.dumps(first)) < 1_000
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_ends", lambda *_: pytest.fail("read again"))
        assert sites_of(CutSites(path)) == sites_of(pickle.loads(pickle.dumps(first))) == sites_of(first)
    path.write_text(ROWS.replace("chr1\t20", "chr1\t21"))
    assert CutSites(path).positions("chr1").tolist() == [14, 14, 25, 25, 55, 55]
    assert first.positions("chr1").tolist() == [14, 14, 24, 25, 55, 55]  # who has it open keeps it
    with pytest.raises(DataError, match="was changed while it was in use"):
        pickle.loads(pickle.dumps(first))
    assert len(list(private_cache.iterdir())) == 2


def test_a_malformed_file_leaves_no_cache(tmp_path: Path, private_cache: Path) -> None:
    with pytest.raises(DataError, match="line 5"):
        CutSites(write(tmp_path, ROWS + "chr1\t9\t8\tA\t1\n"))
    with pytest.raises(FileError, match="does not exist"):
        CutSites(tmp_path / "none.tsv")
    with pytest.raises(FileError, match="does not exist"):
        CutSites(write(tmp_path, ROWS), CutOptions(barcodes=str(tmp_path / "none.tsv")), group="T")
    assert list(private_cache.iterdir()) == []


TOGETHER = """
import sys, time
from pathlib import Path
import genossm.cut_sites as module
folder = Path(sys.argv[1])
build = module._build
def counted(*arguments):
    with (folder / "builds").open("a") as stream:
        stream.write("built\\n")
    time.sleep(0.2)
    build(*arguments)
module._build = counted
(folder / f"ready-{sys.argv[2]}").touch()
while not (folder / "go").exists():
    time.sleep(0.005)
cuts = module.CutSites(folder / "a.bedpe.gz")
print(len(cuts.positions("chr1")), int(cuts.positions("chr1").sum()))
"""


def test_ten_processes_start_together(tmp_path: Path, private_cache: Path) -> None:
    rows = [(at, at + 50) for at in range(0, 99_999, 3)]
    with gzip.open(tmp_path / "a.bedpe.gz", "wt") as stream:
        stream.writelines(f"chr1\t{start}\t{end}\n" for start, end in rows)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for number in range(10)
    ]
    while len(list(tmp_path.glob("ready-*"))) < len(processes) and all(
        item.poll() is None for item in processes
    ):
        pass
    (tmp_path / "go").touch()
    answers = [process.communicate(timeout=60) for process in processes]
    expected = sum(start + 4 + end - 5 for start, end in rows)
    assert {answer for answer, _ in answers} == {f"{2 * len(rows)} {expected}\n"}, answers
    assert (tmp_path / "builds").read_text().count("built") == 1
    assert len(list(private_cache.iterdir())) == 1


def test_progress_is_shown_for_large_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    CutSites(write(tmp_path, ROWS))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(module, "_LARGE_BYTES", 10)
    CutSites(write(tmp_path, ROWS, "large.tsv"))
    output = capsys.readouterr()
    assert output.out == "" and "counting the cut sites of large.tsv" in output.err and "B/s" in output.err


def bigwig_counts(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with pyBigWig.open(str(path)) as bigwig:
        return {
            chrom: np.nan_to_num(np.array(bigwig.values(chrom, 0, length)))
            for chrom, length in bigwig.chroms().items()
        }


@pytest.mark.realdata
def test_the_bedpe_gives_the_bigwig_of_cut_sites_exactly(realdata: Path) -> None:
    cuts = CutSites(realdata / BEDPE)
    expected = bigwig_counts(realdata / BIGWIG)
    assert cuts.lengths.keys() == expected.keys() and cuts.rows == 467_908
    for chrom, counts in expected.items():
        assert np.array_equal(cuts.values(chrom, 0, counts.size), counts)
        sums, _ = cuts.binned(chrom, counts.size, 32, "sum")
        assert np.array_equal(sums, np.add.reduceat(counts, np.arange(0, counts.size, 32)))
    assert sum(int(counts.sum()) for counts in expected.values()) == 2 * cuts.rows


@pytest.mark.realdata
def test_groups_of_cells_sum_up_to_the_bigwig(realdata: Path, tmp_path: Path) -> None:
    with gzip.open(realdata / BEDPE, "rt") as rows, gzip.open(tmp_path / "fragments.tsv.gz", "wt") as out:
        out.writelines(f"{row.strip()}\tcell{number % 7}\t1\n" for number, row in enumerate(rows))
    cells = "".join(f"cell{number}\tgroup{number % 3}\n" for number in range(7))
    groups = write(tmp_path, "barcode\tgroup\n" + cells, "groups.tsv")
    options = CutOptions(barcodes=str(groups))
    parts = [CutSites(tmp_path / "fragments.tsv.gz", options, group=f"group{number}") for number in range(3)]
    for chrom, counts in bigwig_counts(realdata / BIGWIG).items():
        assert np.array_equal(sum(part.values(chrom, 0, counts.size) for part in parts), counts)


@pytest.mark.realdata
def test_a_bam_of_the_same_fragments_gives_the_bigwig(realdata: Path, tmp_path: Path) -> None:
    pysam = pytest.importorskip("pysam", reason="pysam, which writes and reads BAM, is not installed")
    expected = bigwig_counts(realdata / BIGWIG)
    names = list(expected)
    header = {"SQ": [{"SN": name, "LN": counts.size} for name, counts in expected.items()]}
    with (
        gzip.open(realdata / BEDPE, "rt") as rows,
        pysam.AlignmentFile(tmp_path / "a.bam", "wb", header=header) as bam,
    ):
        for number, row in enumerate(rows):
            chrom, start, end = row.split()
            if chrom not in ("chrI", "chrIX"):
                continue
            size = min(36, int(end) - int(start))
            for flag, position in ((99, int(start)), (147, int(end) - size)):
                read = pysam.AlignedSegment()
                read.query_name, read.flag, read.mapping_quality = f"r{number}", flag, 42
                read.reference_id, read.reference_start = names.index(chrom), position
                read.cigartuples = [(0, size)]
                bam.write(read)
    cuts = CutSites(tmp_path / "a.bam")
    assert cuts.knows_lengths and cuts.lengths == {name: counts.size for name, counts in expected.items()}
    for chrom in ("chrI", "chrIX"):
        assert np.array_equal(cuts.values(chrom, 0, expected[chrom].size), expected[chrom])
    assert len(cuts.positions("chrII")) == 0
