"""bigWig files: what two independent readers find in them, gaps, partial bins, refusals, and a full disk."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pybigtools
import pyBigWig
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.errors import DataError, FileError
from genossm.outputs.bigwig import write_bigwig

LENGTHS = {"chrB": 1000, "chrA": 320, "chrC": 40}


def read_bins(path: Path, chrom: str, length_bp: int, bin_bp: int) -> npt.NDArray[np.float32]:
    """Per-bin values by pyBigWig, NaN = gap; fails unless records are sorted, disjoint and one bin each."""
    values = np.full(-(-length_bp // bin_bp), np.nan, dtype=np.float32)
    with pyBigWig.open(str(path)) as handle:
        records = handle.intervals(chrom) or ()
    last = 0
    for start, end, value in records:
        assert start >= last
        assert start % bin_bp == 0
        assert end == min(start + bin_bp, length_bp)
        assert np.isfinite(value)
        values[start // bin_bp] = value
        last = end
    assert records == tuple(pybigtools.open(str(path)).records(chrom))
    return values


def test_two_readers_see_the_same_bins_gaps_and_header(tmp_path: Path) -> None:
    path = tmp_path / "x.bw"
    random = np.random.default_rng(3)
    values_b = random.random(32).astype(np.float32)  # 1000 bp: 31 bins of 32 and one of 8
    values_b[4:9] = np.nan
    values_a = random.random(10).astype(np.float32)
    values_a[0] = np.nan
    write_bigwig(path, LENGTHS, [("chrB", values_b, 0), ("chrA", values_a, 0)], 32)
    with pyBigWig.open(str(path)) as handle:
        assert list(handle.chroms().items()) == list(LENGTHS.items())
        assert handle.header()["nBasesCovered"] == 1000 - 5 * 32 + 9 * 32
    assert pybigtools.open(str(path)).chroms() == LENGTHS
    np.testing.assert_array_equal(read_bins(path, "chrB", 1000, 32), values_b)
    np.testing.assert_array_equal(read_bins(path, "chrA", 320, 32), values_a)
    assert np.isnan(read_bins(path, "chrC", 40, 32)).all()
    bases = pybigtools.open(str(path)).values("chrB", fillna=None)
    np.testing.assert_array_equal(bases.astype(np.float32), np.repeat(values_b, 32)[:1000])


@given(
    length_bp=st.integers(1, 5000),
    bin_bp=st.sampled_from([1, 7, 32, 128]),
    gap_fraction=st.sampled_from([0.0, 0.02, 0.5, 0.95]),
    pieces=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_pattern_of_gaps_and_slices_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    length_bp: int,
    bin_bp: int,
    gap_fraction: float,
    pieces: int,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal(-(-length_bp // bin_bp)).astype(np.float32)
    values[random.random(values.size) < gap_fraction] = np.nan
    values[0] = 1.0
    cuts = np.linspace(0, values.size, pieces + 1).astype(int)
    slices = [("one", values[low:high], int(low) * bin_bp) for low, high in pairwise(cuts)]
    path = tmp_path_factory.mktemp("bw") / "x.bw"
    write_bigwig(path, {"one": length_bp}, slices, bin_bp)
    np.testing.assert_array_equal(read_bins(path, "one", length_bp, bin_bp), values)


def test_many_short_regions_and_one_long_run(tmp_path: Path) -> None:
    values = np.full(100_000, np.nan, dtype=np.float32)
    values[::7] = np.arange(values[::7].size)
    run = np.arange(50_000, dtype=np.float32)
    path = tmp_path / "x.bw"
    lengths = {"a": 3_200_000, "b": 1_600_000}
    write_bigwig(path, lengths, [("a", values, 0), ("b", run, 0)], 32)
    np.testing.assert_array_equal(read_bins(path, "a", lengths["a"], 32), values)
    np.testing.assert_array_equal(read_bins(path, "b", lengths["b"], 32), run)


def test_zoom_levels_hold_the_sums_of_the_full_data(tmp_path: Path) -> None:
    path = tmp_path / "x.bw"
    random = np.random.default_rng(8)
    lengths = {"b": 2_000_011, "empty": 500, "a": 700_000}
    stored = {chrom: random.random(-(-lengths[chrom] // 32)).astype(np.float32) + 1 for chrom in ("b", "a")}
    stored["b"][20_000:21_003] = np.nan
    write_bigwig(path, lengths, [(chrom, values, 0) for chrom, values in stored.items()], 32)
    reader = pybigtools.open(str(path))
    assert len(reader.zooms()) >= 3
    for chrom, values in stored.items():
        bases = np.repeat(values.astype(np.float64), 32)[: lengths[chrom]]
        for level in reader.zooms():
            for start, end, summary in reader.zoom_records(level, chrom):
                part = bases[start:end]
                assert summary["bases_covered"] == np.count_nonzero(~np.isnan(part))
                assert summary["sum"] == pytest.approx(np.nansum(part), rel=1e-4)
                assert summary["sum_squares"] == pytest.approx(np.nansum(part**2), rel=1e-4)
                assert summary["max_val"] == pytest.approx(np.nanmax(part))
    with pyBigWig.open(str(path)) as handle:
        found = handle.stats("b", 0, 2_000_011, nBins=50, type="mean")
        exact = handle.stats("b", 0, 2_000_011, nBins=50, type="mean", exact=True)
    np.testing.assert_allclose(found, exact, rtol=0.02)
    assert path.read_bytes()[-4:] == path.read_bytes()[:4]


ONES = np.ones(2, dtype=np.float32)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([("chrX", ONES, 0)], "chromosome 'chrX', which is not in the header"),
        ([("chrA", ONES, 0), ("chrB", ONES, 0)], "genome order"),
        ([("chrB", ONES, 0), ("chrB", ONES, 32)], "without overlap"),
        ([("chrB", ONES, 64), ("chrB", ONES, 0)], "genome order"),
        ([("chrC", np.ones(3, dtype=np.float32), 0)], "up to the end at 40"),
        ([("chrB", ONES, 5)], "from a multiple of 32"),
        ([("chrB", np.array([np.inf], dtype=np.float32), 0)], "infinite"),
        ([("chrB", ONES * np.nan, 0)], "every bin is a gap"),
        ([], "every bin is a gap"),
    ],
)
def test_refusals_leave_nothing_behind(
    tmp_path: Path, slices: list[tuple[str, npt.NDArray[np.float32], int]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_bigwig(tmp_path / "x.bw", LENGTHS, slices, 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("free_bytes", [100_000, 600_000])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int
) -> None:
    # pyBigWig aborts when a write fails, so the space is asked for beforehand.
    usage = SimpleNamespace(total=free_bytes, used=0, free=free_bytes)
    monkeypatch.setattr("genossm.outputs.bigwig.shutil.disk_usage", lambda folder: usage)
    values = np.random.default_rng(1).random(400_000).astype(np.float32)
    with pytest.raises(FileError, match=r"no space left on the disk .* MB are free"):
        write_bigwig(tmp_path / "x.bw", {"a": 400_000 * 32}, [("a", values, 0)], 32)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_bigwig(tmp_path / "file" / "x.bw", LENGTHS, [("chrB", ONES, 0)], 32)
