"""The estimate before the work: what it says of sizes holds, and it knows what is done already."""

from __future__ import annotations

from pathlib import Path

import pytest

import genossm.pipelines.prepare_estimate as module
import genossm.pipelines.prepare_work as work
from genossm.dataset_config import load_dataset_config
from genossm.dataset_inputs import DatasetInputs, open_inputs
from genossm.pipelines.prepare import estimate, prepare
from genossm.pipelines.prepare_estimate import Estimate, estimate_work
from genossm.pipelines.simulate_genome import simulate_sparse


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated genome of 10 Mb with 8 tracks, two of them signal."""
    return simulate_sparse(tmp_path_factory.mktemp("sparse") / "s", genome_bp=10_000_000, tracks=8, signals=2)


def opened(sparse: Path, *overrides: str) -> DatasetInputs:
    return open_inputs(load_dataset_config(sparse / "dataset.yaml", overrides))


@pytest.mark.parametrize("compress", ["none", "gzip"])
def test_the_size_is_about_right(sparse: Path, tmp_path: Path, compress: str) -> None:
    overrides = [f"compress={compress}"]
    expected = estimate(sparse / "dataset.yaml", tmp_path / "out", overrides=overrides)
    assert list(tmp_path.iterdir()) == []
    prepared = prepare(sparse / "dataset.yaml", tmp_path / "out", overrides=overrides)
    assert (expected.dtype, expected.compressed) == (str(prepared.storage.dtype), compress == "gzip")
    assert (expected.tracks, expected.jobs, expected.finished, expected.fits) == (8, 1, 0, True)
    assert expected.bins == sum(prepared.bins(chrom) for chrom in prepared.lengths)
    assert expected.windows == sum(len(prepared.windows(split)) for split in prepared.splits)
    size = (tmp_path / "out" / "targets.h5").stat().st_size
    # 8 tracks x 24 chromosomes make a file of many small parts, which a larger genome does not notice.
    assert 0.5 * size - 200_000 < expected.dataset_bytes < 1.5 * size
    assert 0 < expected.seconds < 60


def test_every_kind_of_track_is_sampled_and_finished_ones_cost_nothing(sparse: Path, tmp_path: Path) -> None:
    inputs = opened(sparse)
    names = [track.name for track in inputs.config.tracks]
    fresh = estimate_work(inputs, tmp_path, windows=1, jobs=2)
    assert fresh.sample == "peaks001, peaks003, peaks006, signal007, signal008 on chr21"
    done = estimate_work(inputs, tmp_path, windows=1, jobs=2, finished=names)
    assert done.seconds < fresh.seconds and done.finished == 8
    assert done.dataset_bytes == fresh.dataset_bytes


def test_a_killed_prepare_is_taken_into_account(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "write_targets", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(sparse / "dataset.yaml", tmp_path / "out")
    assert estimate(sparse / "dataset.yaml", tmp_path / "out").finished == 8
    assert estimate(sparse / "dataset.yaml", tmp_path / "out", overrides=["window.bin=64"]).finished == 0


def test_a_scrap_of_a_chromosome_is_no_sample(folder: Path) -> None:
    inputs = open_inputs(load_dataset_config(folder / "dataset.yaml"))
    assert module._sample_chromosome(inputs) == "chrC"  # 2 % of the genome
    inputs.lengths["chrC"] = 300
    assert module._sample_chromosome(inputs) == "chrB"


def test_what_it_says() -> None:
    expected = Estimate(
        tracks=161,
        bins=96_875_000,
        windows=31_000,
        dtype="uint8",
        compressed=True,
        dataset_bytes=600_000_000,
        working_bytes=2_000_000_000,
        free_bytes=2_500_000_000,
        seconds=600,
        jobs=2,
        finished=3,
        sample="a, b on chr21",
    )
    assert not expected.fits
    assert expected.text() == (
        "161 tracks x 96,875,000 bins in 31,000 windows: about 600.0 MB on the disk (uint8, compressed), 2.0 GB more "
        "while it is made; 2.5 GB are free\n"
        "about 10 min with 2 processes (3 of the tracks are there already), measured on a, b on chr21"
    )
