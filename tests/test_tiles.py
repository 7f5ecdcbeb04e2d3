"""The windows of a split: which have a bin that counts, and how much signal lies in each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genossm import tiles
from genossm.dataset import PreparedDataset
from genossm.errors import DataError
from genossm.tiles import Unmasked, signal_weights, tile_split
from tests.random_dataset import random_dataset


@pytest.fixture(scope="module", params=[0, 1, 2])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """A random dataset; of the second one all tracks have the same mask but for absent ones."""
    return random_dataset(tmp_path_factory.mktemp("random"), request.param, own_masks=request.param != 1)


@pytest.mark.parametrize("block", [7, 1 << 18])
def test_bins_that_count_are_found(
    data: PreparedDataset, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(tiles, "_BLOCK_BINS", block)
    unmasked = Unmasked(data)
    random = np.random.default_rng(4)
    answers = set()
    for chrom in data.lengths:
        counts = data.mask(chrom).any(axis=1)
        for _ in range(300):
            first = int(random.integers(-20, len(counts) + 20))
            stop = first + int(random.integers(0, 30))
            expected = bool(counts[max(first, 0) : max(stop, 0)].any())
            assert unmasked.any(chrom, first, stop) == expected
            answers.add(expected)
    assert answers == {True, False}


def test_a_dataset_of_tracks_with_gaps_alone_is_read_to_know(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genossm.pipelines.prepare import prepare

    text = (tiny_folder / "dataset.yaml").read_text()
    peaks = next(line for line in text.splitlines() if "kind: peaks" in line)
    text = text.replace(f"{peaks}\n", "").replace("aggregate: sum", "aggregate: sum, missing: mask")
    for name in ("genome.fa", "signal.bw"):
        text = text.replace(name, str(tiny_folder / name))
    (tmp_path / "dataset.yaml").write_text(text)
    data = prepare(tmp_path / "dataset.yaml", tmp_path / "out")
    monkeypatch.setattr(tiles, "_BLOCK_BINS", 100)
    unmasked = Unmasked(data)
    for chrom in data.lengths:
        counts = data.mask(chrom)[:, 0]
        assert [unmasked.any(chrom, at, at + 3) for at in range(len(counts))] == [
            bool(counts[at : at + 3].any()) for at in range(len(counts))
        ]
    assert not unmasked.any("chrC", 0, 99)


def test_weights_are_shares_of_the_signal_mean_over_the_tracks(data: PreparedDataset) -> None:
    windows = tile_split(data, "train", window_bp=512, margin_bp=64)
    weights = signal_weights(data, windows, margin_bp=64)
    sums = np.zeros((len(windows), 3))
    for row, window in zip(sums, windows, strict=True):
        for at in range((window.start + 64) // data.bin_bp, (window.end - 64) // data.bin_bp):
            if at < data.bins(window.chrom):
                values, mask = (
                    data.targets(window.chrom, at, at + 1)[0],
                    data.mask(window.chrom, at, at + 1)[0],
                )
                row += np.where(mask, np.maximum(values, 0), 0)
    np.testing.assert_allclose(weights, (sums / sums.sum(axis=0)).mean(axis=1), rtol=1e-6)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()


def test_no_signal_is_told(data: PreparedDataset) -> None:
    windows = [window for window in data.windows("train") if window.chrom == "c3"]  # excluded as a whole
    with pytest.raises(DataError, match="finds no signal: all targets of these windows are 0 or masked"):
        signal_weights(data, windows, margin_bp=data.margin_bp)
