"""Tests of genossm.signal against pyBigWig, which reads the same files with other code."""

from __future__ import annotations

import math
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyBigWig
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genossm.signal as signal_module
from genossm.errors import DataError, FileError
from genossm.signal import Signal

LENGTH_BP = 10_007


def write_bigwig(path: Path, lengths: dict[str, int], entries: list[tuple[str, int, int, float]]) -> Path:
    bigwig = pyBigWig.open(str(path), "w")
    bigwig.addHeader(list(lengths.items()))
    for chrom, start, end, value in entries:
        bigwig.addEntries([chrom], [start], ends=[end], values=[value])
    bigwig.close()
    return path


def peer_values(path: Path, chrom: str) -> npt.NDArray[np.float64]:
    """Value per base as pyBigWig reads it, NaN where there is none or it is not finite."""
    with pyBigWig.open(str(path)) as bigwig:
        values = np.array(bigwig.values(chrom, 0, bigwig.chroms(chrom)), dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def expected_bins(values: npt.NDArray[np.float64], bin_bp: int, aggregate: str, missing: str) -> Any:
    """Bin after bin in plain Python: (value, valid)."""
    results = []
    for start in range(0, len(values), bin_bp):
        bases = [float(value) for value in values[start : start + bin_bp]]
        present = [value for value in bases if not math.isnan(value)]
        if missing == "zero":
            present = [0.0 if math.isnan(value) else value for value in bases]
        valid = len(bases) - len(present) < len(bases) / 4
        value = 0.0
        if valid:
            value = {"sum": math.fsum, "max": max, "mean": lambda row: math.fsum(row) / len(row)}[aggregate](
                present
            )
        results.append((value, valid))
    return zip(*results, strict=True)


@pytest.fixture(scope="module")
def bigwig_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random runs of values, gaps between them, NaN and infinite values, both signs; chr2 is empty."""
    random = np.random.default_rng(3)
    entries, at = [], 0
    while at < LENGTH_BP - 150:
        at += int(random.integers(0, 60)) * int(random.integers(0, 2))
        end = at + int(random.integers(1, 50))
        value = float(
            random.choice(
                [random.normal(), random.integers(0, 9), math.nan, math.inf], p=[0.5, 0.4, 0.05, 0.05]
            )
        )
        entries.append(("chr1", at, end, value))
        at = end
    entries.append(("chr1", LENGTH_BP - 3, LENGTH_BP, 2.5))
    folder = tmp_path_factory.mktemp("signal")
    return write_bigwig(folder / "signal.bw", {"chr1": LENGTH_BP, "chr2": 300}, entries)


def test_lengths_come_from_the_header(bigwig_path: Path) -> None:
    signal = Signal(bigwig_path)
    assert signal.path == bigwig_path
    assert signal.lengths == {"chr1": LENGTH_BP, "chr2": 300}
    assert list(signal.lengths) == ["chr1", "chr2"]
    signal.lengths.clear()
    assert len(signal.lengths) == 2
    assert "2 chromosomes" in repr(signal)


@given(st.integers(-50, LENGTH_BP + 50), st.integers(0, 400), st.sampled_from([0.0, -1.0, math.nan]))
def test_values_agree_with_pybigwig(bigwig_path: Path, start: int, length: int, missing: float) -> None:
    peer = peer_values(bigwig_path, "chr1")
    values = Signal(bigwig_path).values("chr1", start, start + length, missing=missing)
    expected = [peer[base] if 0 <= base < LENGTH_BP else math.nan for base in range(start, start + length)]
    expected = [missing if math.isnan(value) else value for value in expected]
    assert values.dtype == np.float32
    assert np.array_equal(values, np.array(expected, dtype=np.float32), equal_nan=True)


@settings(max_examples=40)
@given(
    st.integers(1, 700),
    st.sampled_from(["mean", "sum", "max"]),
    st.sampled_from(["zero", "mask"]),
    st.integers(1, 4000),
)
def test_bins_agree_with_plain_python(
    bigwig_path: Path, bin_bp: int, aggregate: Any, missing: Any, slice_bp: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal_module, "_SLICE_BP", slice_bp)
        values, valid = Signal(bigwig_path).binned("chr1", LENGTH_BP, bin_bp, aggregate, missing)
    expected, expected_valid = expected_bins(peer_values(bigwig_path, "chr1"), bin_bp, aggregate, missing)
    assert values.dtype == np.float32 and valid.dtype == np.bool_
    assert valid.tolist() == list(expected_valid)
    np.testing.assert_allclose(values, np.array(expected), rtol=2e-6, atol=1e-5)


def test_the_last_partial_bin_counts_the_bases_it_has(tmp_path: Path) -> None:
    path = write_bigwig(tmp_path / "a.bw", {"chr1": 70}, [("chr1", 0, 70, 3.0)])
    signal = Signal(path)
    assert signal.binned("chr1", 70, 32, "mean")[0].tolist() == [3.0, 3.0, 3.0]
    assert signal.binned("chr1", 70, 32, "sum")[0].tolist() == [96.0, 96.0, 18.0]


def test_a_quarter_absent_masks_a_bin(tmp_path: Path) -> None:
    entries = [("chr1", 0, 25, 1.0), ("chr1", 32, 56, 1.0), ("chr1", 64, 67, 4.0)]
    signal = Signal(write_bigwig(tmp_path / "a.bw", {"chr1": 68}, entries))
    values, valid = signal.binned("chr1", 68, 32, "mean", "mask")
    assert valid.tolist() == [True, False, False]  # 7 of 32, 8 of 32, 1 of 4 absent
    assert values.tolist() == [1.0, 0.0, 0.0]
    values, valid = signal.binned("chr1", 68, 32, "mean", "zero")
    assert valid.all()
    assert values.tolist() == [25 / 32, 24 / 32, 3.0]


def test_a_chromosome_without_values_is_zero_or_masked(bigwig_path: Path) -> None:
    signal = Signal(bigwig_path)
    assert not signal.binned("chr2", 300, 32, "max", "zero")[0].any()
    assert not signal.binned("chr2", 300, 32, "max", "mask")[1].any()


def test_impossible_questions_are_refused(bigwig_path: Path) -> None:
    signal = Signal(bigwig_path)
    with pytest.raises(DataError, match=r"no chromosome '1'; did you mean chr1\?"):
        signal.values("1", 0, 5)
    with pytest.raises(DataError, match="no chromosome 'chr3'"):
        signal.binned("chr3", 10, 5)
    with pytest.raises(DataError, match="ends before it starts"):
        signal.values("chr1", 5, 4)
    with pytest.raises(DataError, match=r"10,007 bp for chr1 but the genome has 99 bp: .*another assembly"):
        signal.binned("chr1", 99, 32)
    with pytest.raises(DataError, match=r"'median'.*allowed are mean, sum, max"):
        signal.binned("chr1", LENGTH_BP, 32, "median")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"'drop'"):
        signal.binned("chr1", LENGTH_BP, 32, "mean", "drop")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="bins of 0 bp"):
        signal.binned("chr1", LENGTH_BP, 0)


@pytest.mark.parametrize("name", ["a.bw", "a.bigWig", "a.bigwig", "a.BW", "a.BIGWIG", "a.dat", "a"])
def test_the_name_does_not_matter(bigwig_path: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(bigwig_path, tmp_path / name)
    signal = Signal(tmp_path / name)
    assert np.array_equal(signal.values("chr1", 0, 999), Signal(bigwig_path).values("chr1", 0, 999))
    assert pickle.loads(pickle.dumps(signal)).lengths == signal.lengths


@pytest.mark.parametrize("content", [b"", b"\x26", b"chr1\t0\t5\t1.0\n" * 9, b"\x1f\x8b" * 50, bytes(500)])
def test_what_is_no_bigwig_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.bw"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"a\.bw is no bigWig file"):
        Signal(path)


def test_a_bigbed_is_no_bigwig(tmp_path: Path) -> None:
    path = tmp_path / "a.bw"
    path.write_bytes(bytes.fromhex("ebf28987") + bytes(100))
    with pytest.raises(FileError, match="no bigWig"):
        Signal(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.bw does not exist"):
        Signal(tmp_path / "none.bw")
    with pytest.raises(FileError, match="is a folder"):
        Signal(tmp_path)


@pytest.mark.parametrize("kept", [0.003, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_cut_off_file_is_refused(bigwig_path: Path, tmp_path: Path, kept: float) -> None:
    content = bigwig_path.read_bytes()
    path = tmp_path / "cut.bw"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(FileError, match="cut off"):
        Signal(path)


def test_damaged_values_are_refused_when_read(bigwig_path: Path, tmp_path: Path) -> None:
    content = bytearray(bigwig_path.read_bytes())
    data_at = int.from_bytes(content[16:24], "little")
    content[data_at + 8 : data_at + 400] = bytes(392)
    path = tmp_path / "damaged.bw"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"cannot be read at chr1:0-\d+"):
        Signal(path).binned("chr1", LENGTH_BP, 32)


FORKED = """
import multiprocessing, os, pickle, sys
from genossm.signal import Signal
signal = Signal(sys.argv[1])
def total(at):
    values = signal.values("chr1", at * 40, at * 40 + 900).tobytes()
    assert signal._local.opened[0] == os.getpid()  # opened here, not inherited: a shared position would race
    return values
expected = [total(at) for at in range(200)]
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert pool.map(total, range(200), chunksize=1) == expected
copy = pickle.loads(pickle.dumps(signal))
signal = copy
assert [total(at) for at in range(200)] == expected
print("equal")
"""


@pytest.mark.parametrize("name", ["a.bw", "a.dat"])
def test_forked_and_pickled_readers_read_the_same(bigwig_path: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copy(bigwig_path, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKED, path], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


def test_threads_read_the_same(bigwig_path: Path) -> None:
    signal = Signal(bigwig_path)
    expected = [signal.values("chr1", at * 40, at * 40 + 900) for at in range(100)]
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(
            at
            for at in range(100)
            if not np.array_equal(signal.values("chr1", at * 40, at * 40 + 900), expected[at])
        )

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "aggregate"),
    [("atac_tn5_cutsites.bw", "sum"), ("mnase_AGH01-1_occupancy147_10bp.bw", "mean")],
)
def test_real_signal_agrees_with_pybigwig(realdata: Path, name: str, aggregate: Any) -> None:
    path = realdata / "sacCer3" / name
    signal = Signal(path)
    for chrom in ("chrI", "chrV", "chrIX"):
        length_bp = signal.lengths[chrom]
        peer = np.nan_to_num(peer_values(path, chrom))
        assert np.array_equal(signal.values(chrom, 0, length_bp), peer.astype(np.float32))
        padded = np.append(peer, np.zeros(-length_bp % 32)).reshape(-1, 32)
        bases = np.full(len(padded), 32)
        bases[-1] = length_bp - 32 * (len(padded) - 1)
        expected = padded.sum(1) / (bases if aggregate == "mean" else 1)
        values, valid = signal.binned(chrom, length_bp, 32, aggregate)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        assert valid.all()
    assert ("chrM" in signal.lengths) == (name == "atac_tn5_cutsites.bw")  # README: MNase lacks chrM
