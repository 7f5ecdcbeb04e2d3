"""Tests of genossm.samples: several files of a track are read as one, peaks by how many samples have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyBigWig
import pytest
from hypothesis import given
from hypothesis import strategies as st

import genossm.samples as module
from genossm.cut_sites import CutOptions, CutSites
from genossm.errors import DataError, FileError
from genossm.samples import binned_together, open_signal, shared_intervals
from genossm.signal import Signal

LENGTH_BP = 1_003


def write_bigwig(path: Path, values: npt.NDArray[np.float64], chrom: str = "chr1") -> Path:
    """A bigWig with the values that are no NaN, base by base."""
    bigwig = pyBigWig.open(str(path), "w")
    bigwig.addHeader([(chrom, values.size)])
    present = np.flatnonzero(~np.isnan(values))
    bigwig.addEntries(
        [chrom] * present.size,
        present.tolist(),
        ends=(present + 1).tolist(),
        values=values[present].tolist(),
    )
    bigwig.close()
    return path


@pytest.fixture
def samples(tmp_path: Path) -> tuple[list[npt.NDArray[np.float64]], list[Signal]]:
    """Three samples with gaps: values per base and readers; the third calls the chromosome 1."""
    random = np.random.default_rng(5)
    values = []
    for _ in range(3):
        sample = random.integers(0, 50, LENGTH_BP).astype(np.float64)
        sample[random.random(LENGTH_BP) < 0.1] = np.nan
        values.append(sample)
    names = ["chr1", "chr1", "1"]
    readers = [
        Signal(write_bigwig(tmp_path / f"{at}.bw", sample, names[at])) for at, sample in enumerate(values)
    ]
    return values, readers


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
@pytest.mark.parametrize("bin_bp", [1, 10, 64])
def test_samples_are_combined_base_by_base(
    samples: Any, combine: Any, aggregate: Any, bin_bp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, readers = samples
    monkeypatch.setattr(module, "_SLICE_BP", 100)
    together = np.nan_to_num(np.stack(values)).sum(0) / (3 if combine == "mean" else 1)
    pieces = [together[at : at + bin_bp] for at in range(0, LENGTH_BP, bin_bp)]
    function: Any = {"mean": np.mean, "sum": np.sum, "max": np.max}[aggregate]
    names = ["chr1", "chr1", "1"]
    got, valid = binned_together(readers, names, LENGTH_BP, bin_bp, aggregate, "zero", combine)
    assert got.dtype == np.float32 and valid.all()
    np.testing.assert_allclose(got, [function(piece) for piece in pieces], rtol=1e-6)


@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_a_bin_counts_where_it_does_in_every_sample(samples: Any, aggregate: Any) -> None:
    values, readers = samples
    got, valid = binned_together(readers, ["chr1", "chr1", "1"], LENGTH_BP, 1, aggregate, "mask", "sum")
    whole = np.stack(values).sum(0)
    assert np.array_equal(valid, ~np.isnan(whole))
    assert np.array_equal(got, np.nan_to_num(whole))


def test_one_sample_is_itself(samples: Any) -> None:
    _, readers = samples
    for missing in ("zero", "mask"):
        alone = readers[0].binned("chr1", LENGTH_BP, 32, "mean", missing)
        same = binned_together(readers[:1], ["chr1"], LENGTH_BP, 32, "mean", missing, "sum")
        assert all(map(np.array_equal, alone, same))


def test_bigwigs_and_cut_sites_can_be_summed(tmp_path: Path, private_cache: Path) -> None:
    table = tmp_path / "a.bedpe"
    table.write_text("chr1\t0\t100\nchr1\t0\t200\n")
    values = np.zeros(300)
    values[4] = 7
    options = CutOptions()
    readers = [open_signal(write_bigwig(tmp_path / "a.bw", values), options), open_signal(table, options)]
    assert [type(reader) for reader in readers] == [Signal, CutSites]
    got, _ = binned_together(readers, ["chr1"] * 2, 300, 100, "max", "zero", "sum")
    assert got.tolist() == [9, 1, 0]


def test_what_no_reader_takes_is_refused(tmp_path: Path, private_cache: Path) -> None:
    (tmp_path / "a.bedGraph").write_text("chr1\t0\t10\t5\n")
    with pytest.raises(FileError, match="is no bigWig file"):
        open_signal(tmp_path / "a.bedGraph", CutOptions())
    bigwig = write_bigwig(tmp_path / "a.bw", np.ones(9))
    for options, key in (
        (CutOptions(shift=(0, 0)), "shift"),
        (CutOptions(min_mapq=10), "min_mapq"),
        (CutOptions(deduplicate=False), "deduplicate"),
        (CutOptions(barcodes="groups.tsv"), "barcodes"),
    ):
        with pytest.raises(DataError, match=f"is a bigWig, for which '{key}' has no meaning: remove `{key}"):
            open_signal(bigwig, options)


INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=8)


@given(st.lists(INTERVALS, min_size=1, max_size=5), st.integers(1, 5))
def test_shared_intervals_agree_with_counting_bases(samples: list[list[tuple[int, int]]], least: int) -> None:
    depth = np.zeros(80, dtype=int)
    arrays = []
    for sample in samples:
        covered = np.zeros(80, dtype=bool)
        for start, size in sample:
            covered[start : start + size] = True
        depth += covered
        starts = np.array([start for start, _ in sample], dtype=np.int64)
        arrays.append((starts, starts + np.array([size for _, size in sample], dtype=np.int64)))
    starts, ends = shared_intervals(arrays, least)
    found = np.zeros(80, dtype=bool)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        assert not found[max(start - 1, 0) : end].any() and start < end  # sorted, disjoint, not touching
        found[start:end] = True
    assert np.array_equal(found, depth >= least)
