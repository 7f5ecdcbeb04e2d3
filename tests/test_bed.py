"""Called regions: against a plain loop, at chromosome ends and gaps, and as narrowPeak that reads back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from genossm.annotations import read_annotations
from genossm.errors import DataError
from genossm.outputs.bed import call_regions, write_narrowpeak


def test_regions_by_hand() -> None:
    values = np.array([0.9, 0.1, 0.5, 0.8, 0.8, np.nan, 0.6, 0.49, 0.7], dtype=np.float32)
    regions = call_regions(values, 32, 8 * 32 + 10, 0.5)
    assert regions.starts.tolist() == [0, 64, 192, 256]
    assert regions.ends.tolist() == [32, 160, 224, 266]
    np.testing.assert_allclose(regions.maxima, [0.9, 0.8, 0.6, 0.7], rtol=1e-6)
    np.testing.assert_allclose(regions.means, [0.9, 0.7, 0.6, 0.7], rtol=1e-6)
    assert regions.summits.tolist() == [16, 112, 208, 261]
    assert len(regions) == 4


@given(
    values=arrays(
        np.float32, st.integers(1, 60), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, np.nan])
    ),
    bin_bp=st.integers(1, 40),
    data=st.data(),
)
def test_regions_hold_exactly_the_bases_at_or_above_the_threshold(
    values: npt.NDArray[np.float32], bin_bp: int, data: st.DataObject
) -> None:
    length_bp = (len(values) - 1) * bin_bp + data.draw(st.integers(1, bin_bp))
    regions = call_regions(values, bin_bp, length_bp, 0.5)
    covered = np.zeros(length_bp, dtype=bool)
    for start, end, summit in zip(regions.starts, regions.ends, regions.summits, strict=True):
        assert start <= summit < end
        assert not covered[max(0, start - 1) : end].any()
        covered[start:end] = True
    np.testing.assert_array_equal(covered, (np.repeat(values, bin_bp) >= 0.5)[:length_bp])


def test_narrowpeak_reads_back(tmp_path: Path) -> None:
    first = call_regions(np.array([0.0, 0.6, 0.9, 0.0], dtype=np.float32), 32, 128, 0.5)
    none = call_regions(np.zeros(4, dtype=np.float32), 32, 128, 0.5)
    last = call_regions(np.array([1.0, 1.7], dtype=np.float32), 32, 50, 0.5)
    path = tmp_path / "x.narrowPeak"
    assert write_narrowpeak(path, [("chr2", first), ("chr3", none), ("chr1", last)], name="atac") == 2
    assert path.read_text().splitlines() == [
        "chr2\t32\t96\tatac_1\t899\t.\t0.75\t-1\t-1\t48",
        "chr1\t0\t50\tatac_2\t1000\t.\t1.35\t-1\t-1\t41",
    ]
    back = read_annotations(path)
    assert back.oddities == {}
    assert back.summits.tolist() == [80, 41]


def test_no_regions_give_an_empty_file(tmp_path: Path) -> None:
    none = call_regions(np.zeros(4, dtype=np.float32), 32, 128, 0.5)
    assert write_narrowpeak(tmp_path / "x.narrowPeak", [("chr1", none)]) == 0
    assert (tmp_path / "x.narrowPeak").read_text() == ""


def test_refusals() -> None:
    values = np.zeros(4, dtype=np.float32)
    with pytest.raises(DataError, match="do not fit 129 bp"):
        call_regions(values, 32, 129, 0.5)
    with pytest.raises(DataError, match="NaN"):
        call_regions(values, 32, 128, float("nan"))
