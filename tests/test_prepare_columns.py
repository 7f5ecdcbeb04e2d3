"""One track's column: what its name depends on, and what is in its file."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyBigWig
import pytest

import genossm.pipelines.prepare_columns as module
from genossm.dataset_config import load_dataset_config
from genossm.dataset_inputs import DatasetInputs, open_inputs
from genossm.errors import DataError, FileError
from genossm.pipelines.check import Statistics
from genossm.pipelines.prepare_columns import (
    ChromosomeTask,
    Column,
    ColumnTask,
    column_key,
    convert_column,
    is_finished,
    measure_chromosome,
    of_tracks,
    read_usable,
    stamps_of,
)
from genossm.scaling import ScaleConfig


def opened(folder: Path, *overrides: str) -> DatasetInputs:
    return open_inputs(load_dataset_config(folder / "dataset.yaml", overrides))


def convert(inputs: DatasetInputs, name: str, tmp_path: Path) -> Column:
    """The column of one track, through the files and calls of `prepare`."""
    usable = []
    for number, chrom in enumerate(inputs.lengths):
        usable.append(tmp_path / f"usable-{number}")
        measure_chromosome(ChromosomeTask(of_tracks(inputs, ()), chrom, usable[-1]), lambda _: None)
    track = next(track for track in inputs.config.tracks if track.name == name)
    steps: list[int] = []
    path = tmp_path / "column.h5"
    task = ColumnTask(of_tracks(inputs, [name]), track, tuple(usable), path, stamps_of(track.input_files))
    convert_column(task, steps.append)
    assert steps == list(inputs.lengths.values())
    assert not list(tmp_path.glob("column.[!h]*"))
    return Column(path)


def write_signal(path: Path, values: dict[str, npt.NDArray[np.float32]], lengths: dict[str, int]) -> None:
    """Values of bins of 32 bp, absent where 0."""
    bigwig = pyBigWig.open(str(path), "w")
    bigwig.addHeader([(chrom, lengths[chrom]) for chrom in values])
    for chrom, column in values.items():
        bins = np.flatnonzero(column)
        bigwig.addEntries(chrom, (32 * bins).astype(np.int64), values=column[bins].astype(float), span=32)
    bigwig.close()


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_a_column_is_what_the_inputs_say(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_BINS", block)
    random = np.random.default_rng(1)
    lengths = {"chrA": 40_000, "chrB": 20_011, "chrC": 1_234}
    values = {
        c: random.gamma(1, 5, n // 32).astype(np.float32) * (random.random(n // 32) < 0.6)
        for c, n in lengths.items()
    }
    del values["chrC"]
    write_signal(folder / "signal.bw", values, lengths)
    inputs = opened(folder, "storage=float16")
    for name in ("peaks", "signal"):
        column = convert(inputs, name, tmp_path)
        track = next(track for track in inputs.config.tracks if track.name == name)
        expected = Statistics()
        for chrom in lengths:
            true, valid = inputs.column(chrom, track)
            found = column.coding.decode(column.values(chrom, 0, true.size))
            np.testing.assert_allclose(found, true, rtol=column.coding.largest_error * 1.001)
            assert column.validity(chrom) == ("all" if valid.all() else "none")
            expected.add(track, inputs.split_of(chrom), true, inputs.usable(chrom) & valid)
        for split, tally in expected.tallies[name].items():
            own = column.tallies[split]
            assert (own.bins, own.unmasked, own.highest) == (tally.bins, tally.unmasked, tally.highest)
            assert own.total == pytest.approx(tally.total, rel=1e-12)
            assert own.squares == pytest.approx(tally.squares, rel=1e-12)
        assert column.coding.dtype == ("uint8" if name == "peaks" else "float16")
        assert (column.coding.largest_error > 0) == (name == "signal")
        assert [entry["path"] for entry in column.files] == list(track.input_files)
        column.close()


def test_bins_without_a_value_and_the_values_that_a_scale_is_fitted_on(folder: Path, tmp_path: Path) -> None:
    inputs = opened(folder)
    tracks = tuple(
        track if track.kind == "peaks" else replace(track, missing="mask", scale=ScaleConfig(mean=1.0))
        for track in inputs.config.tracks
    )
    inputs = replace(inputs, config=replace(inputs.config, tracks=tracks))
    column = convert(inputs, "signal", tmp_path)
    kept = []
    for chrom, bins in (("chrA", 1_250), ("chrB", 626)):
        values, valid = inputs.column(chrom, tracks[1])
        assert column.validity(chrom) == "some"
        assert np.array_equal(column.valid(chrom, 0, bins), valid)
        assert np.array_equal(column.valid(chrom, 90, 300), valid[90:300])
        kept.append(values[valid & inputs.usable(chrom)])
    assert column.validity("chrC") == "none"
    assert column.counts.counts.sum() == kept[0].size  # chrA trains
    assert column.counts.sums.sum() == pytest.approx(kept[0].sum())
    column.close()


def test_usable_bins(folder: Path, tmp_path: Path) -> None:
    inputs = opened(folder)
    excluded = measure_chromosome(ChromosomeTask(inputs, "chrA", tmp_path / "u"), lambda _: None)
    assert [part.tolist() for part in excluded] == [[0], [500]]
    assert np.array_equal(read_usable(tmp_path / "u"), inputs.usable("chrA"))


def test_the_key_changes_with_what_the_column_depends_on(folder: Path, tmp_path: Path) -> None:
    def keys(*overrides: str) -> dict[str, str]:
        inputs = opened(folder, *overrides)
        config = inputs.config
        stamps = stamps_of(
            [*config.exclude, *(path for track in config.tracks for path in track.input_files)]
        )
        return {track.name: column_key(inputs, track, stamps) for track in config.tracks}

    first = keys()
    assert first == keys() == keys("window.length=8192", "compress=gzip", "assembly=other")
    assert len(set(first.values())) == 2
    for overrides in (
        ["window.bin=64"],
        ["storage=float32"],
        ["split.test=[]"],
        ["chroms=[chrA,chrB,chrC]", "split.test=[chrB]", "split.valid=[chrC]"],
    ):
        other = keys(*overrides)
        assert other["peaks"] != first["peaks"] and other["signal"] != first["signal"], overrides
    (folder / "out.bed").write_text("chrA\t0\t100\n")
    assert keys(f"exclude=[{folder / 'out.bed'}]")["peaks"] != first["peaks"]
    # Another track's options and files are its own.
    text = (folder / "dataset.yaml").read_text()
    (folder / "dataset.yaml").write_text(text.replace("aggregate: sum", "aggregate: mean"))
    other = keys()
    assert other["peaks"] == first["peaks"] and other["signal"] != first["signal"]
    (folder / "dataset.yaml").write_text(text)
    os.utime(folder / "peaks.narrowPeak", ns=(1, 1))
    other = keys()
    assert other["peaks"] != first["peaks"] and other["signal"] == first["signal"]
    genome = folder / "genome.fa"
    genome.write_text(genome.read_text().replace("ACG", "ACT", 1))
    assert keys()["signal"] != first["signal"]


def test_a_file_that_changed_meanwhile_leaves_no_column(folder: Path, tmp_path: Path) -> None:
    inputs = opened(folder)
    os.utime(folder / "signal.bw", ns=(1, 1))
    stamps: Any = stamps_of([str(folder / "signal.bw")])
    os.utime(folder / "signal.bw", ns=(2, 2))
    usable = []
    for number, chrom in enumerate(inputs.lengths):
        usable.append(tmp_path / f"usable-{number}")
        measure_chromosome(ChromosomeTask(inputs, chrom, usable[-1]), lambda _: None)
    task = ColumnTask(inputs, inputs.config.tracks[1], tuple(usable), tmp_path / "column.h5", stamps)
    with pytest.raises(DataError, match=r"signal\.bw was changed while it was being read"):
        convert_column(task, lambda _: None)
    assert not list(tmp_path.glob("column*"))


def test_a_damaged_column_is_removed(folder: Path, tmp_path: Path) -> None:
    convert(opened(folder), "peaks", tmp_path).close()
    path, copy = tmp_path / "column.h5", tmp_path / "copy.h5"
    assert is_finished(path) and not is_finished(tmp_path / "absent.h5")
    content = path.read_bytes()
    shutil.copy(path, copy)
    copy.write_bytes(content[: len(content) // 2])
    assert not is_finished(copy) and not copy.exists()
    # A flipped bit in the values is found when they are read.
    with Column(path)._file as file:
        place = file["chrA/values"].id.get_chunk_info(0).byte_offset
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    column = Column(path)
    with pytest.raises(
        FileError, match=r"the finished column .* is damaged at chrA/values .*; it was removed: run"
    ):
        column.values("chrA", 0, 100)
    assert not path.exists()
