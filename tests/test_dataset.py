"""A prepared dataset as its users see it: arrays, windows, the genome, and what is no dataset."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genossm.dataset import FORMAT_VERSION, PreparedDataset
from genossm.errors import DataError, FileError
from genossm.pipelines.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """The tiny dataset, prepared; read only."""
    return prepare(tiny_folder / "dataset.yaml", tmp_path_factory.mktemp("prepared") / "tiny")


@pytest.fixture
def copy(prepared: PreparedDataset, tmp_path: Path) -> Path:
    """A copy of the prepared folder that a test may spoil."""
    return Path(shutil.copytree(prepared.folder, tmp_path / "copy"))


def edit_json(folder: Path, **values: object) -> None:
    """Replace top-level values of dataset.json."""
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_it_says_of_itself(prepared: PreparedDataset, tiny_lengths: dict[str, int]) -> None:
    assert prepared.assembly == "tiny"
    assert prepared.track_names == ("peaks", "signal")
    assert [track.kind for track in prepared.tracks] == ["peaks", "signal"]
    assert (prepared.window_bp, prepared.margin_bp, prepared.bin_bp) == (4096, 512, 32)
    assert prepared.lengths == tiny_lengths
    assert prepared.splits == {"train": ("chrA",), "valid": ("chrB",), "test": ("chrC",)}
    assert (prepared.config["split"]["valid"], prepared.config["split"]["test"]) == (["chrB"], ["chrC"])
    assert "3 chromosomes, 2 tracks, 32-bp bins" in repr(prepared)
    assert set(prepared.positive_rate) == {"peaks"}
    assert prepared.positive_rate["peaks"] == prepared.statistics["peaks"]["all"]["mean"]
    assert np.isnan(prepared.statistics["signal"]["test"]["mean"])
    inputs = {Path(entry["path"]).name: entry for entry in prepared.provenance["inputs"]}
    assert set(inputs) == {"genome.fa", "peaks.narrowPeak", "signal.bw"}
    assert all(len(entry["sha256"]) == 64 for entry in inputs.values())


def test_targets_and_masks(prepared: PreparedDataset, tiny_lengths: dict[str, int]) -> None:
    for chrom, length_bp in tiny_lengths.items():
        bases = np.zeros(length_bp)
        for start in range(1_000, length_bp - 200, 2_000):
            bases[start : start + 200] = 1
        edges = np.arange(0, length_bp, 32)
        size = np.diff(np.append(edges, length_bp))
        covered = np.add.reduceat(bases, edges)
        targets, mask = prepared.targets(chrom), prepared.mask(chrom)
        assert targets.dtype == np.float32
        assert mask.dtype == np.bool_
        assert targets.shape == mask.shape == (prepared.bins(chrom), 2) == (edges.size, 2)
        assert np.array_equal(targets[:, 0], covered >= size / 2)
        assert np.array_equal(targets[:, 1], np.zeros(edges.size) if chrom == "chrC" else covered * 2)
        excluded = np.zeros(length_bp)
        excluded[: 500 if chrom == "chrA" else 0] = 1
        assert np.array_equal(mask[:, 0], np.add.reduceat(excluded, edges) < size / 4)
        assert np.array_equal(mask[:, 1], mask[:, 0] & (chrom != "chrC"))


def test_slices_of_bins(prepared: PreparedDataset) -> None:
    whole = prepared.targets("chrB")
    assert np.array_equal(prepared.targets("chrB", 100, 250), whole[100:250])
    assert np.array_equal(prepared.targets("chrB", 600), whole[600:])
    assert prepared.mask("chrB", 5, 5).shape == (0, 2)
    for start, stop in [(-1, 5), (6, 5), (0, 627)]:
        with pytest.raises(DataError, match=r"they must lie within \[0, 626\)"):
            prepared.targets("chrB", start, stop)
    with pytest.raises(DataError, match="has no chromosome 'chrb': did you mean chrB"):
        prepared.targets("chrb")
    with pytest.raises(DataError, match="has no chromosome '7': it has chrA, chrB, chrC"):
        prepared.mask("7")


def test_peaks_and_exclusions(prepared: PreparedDataset) -> None:
    starts, ends = prepared.peaks("chrC", "peaks")
    assert (starts.tolist(), ends.tolist()) == ([1_000], [1_200])
    assert (starts.dtype, ends.dtype) == (np.int64, np.int64)
    assert [part.tolist() for part in prepared.excluded("chrA")] == [[0], [500]]
    assert [part.tolist() for part in prepared.excluded("chrB")] == [[], []]
    with pytest.raises(DataError, match=r"'signal' is no peaks track of .*: it has peaks"):
        prepared.peaks("chrA", "signal")


def test_windows(prepared: PreparedDataset) -> None:
    windows = prepared.windows("train")
    assert [(window.start, window.end) for window in windows[:2]] == [(-512, 3_584), (2_560, 6_656)]
    assert len(windows) == -(-40_000 // 3_072)
    assert [len(prepared.windows(split)) for split in ("valid", "test")] == [7, 1]
    with pytest.raises(DataError, match="no split 'dev': allowed are train, valid, test"):
        prepared.windows("dev")


# In a process of its own: a fork of the tests' process, which has threads, is what newer Pythons warn of.
FORK = """
import os, sys
from genossm.dataset import PreparedDataset
dataset = PreparedDataset(sys.argv[1])
dataset.targets("chrA")
inherited = dataset._file
child = os.fork()
if child == 0:
    right = dataset.targets("chrC")[:, 0].sum() == 7 and dataset._file is not inherited
    os._exit(0 if right else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert dataset._file is inherited
assert dataset.targets("chrC")[:, 0].sum() == 7
"""


def test_a_forked_worker_opens_its_own_file(prepared: PreparedDataset) -> None:
    subprocess.run([sys.executable, "-c", FORK, str(prepared.folder)], check=True, timeout=60)


def test_a_fresh_process_reads_a_pickled_dataset(prepared: PreparedDataset, tmp_path: Path) -> None:
    expected = float(prepared.targets("chrB").sum()) + int(prepared.genome.window("chrB", 0, 100).sum())
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(prepared))
    code = (
        "import pickle, sys\n"
        "dataset = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(float(dataset.targets('chrB').sum()) + int(dataset.genome.window('chrB', 0, 100).sum()))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dataset.pickle")]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert float(found) == expected


def test_pickling(prepared: PreparedDataset) -> None:
    prepared.targets("chrA")
    assert prepared.genome.names == ("chrA", "chrB", "chrC")
    content = pickle.dumps(prepared)
    assert len(content) < 50_000
    again = pickle.loads(content)
    assert np.array_equal(again.targets("chrB"), prepared.targets("chrB"))
    assert again.genome.sha256 == prepared.genome.sha256


def test_a_relative_folder_outlives_a_change_of_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    dataset = PreparedDataset("copy")
    monkeypatch.chdir("/")
    assert dataset.targets("chrC").shape == (39, 2)
    assert len(pickle.loads(pickle.dumps(dataset)).windows("test")) == 1


def test_the_genome_is_found_again(prepared: PreparedDataset, tiny_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_folder, moved / "data")
    shutil.copytree(prepared.folder, moved / "prepared")
    record = json.loads((prepared.folder / "dataset.json").read_text())["genome"]
    gone = {**record, "path": "/gone/genome.fa", "relative_path": "../data/genome.fa"}
    edit_json(moved / "prepared", genome=gone)
    assert PreparedDataset(moved / "prepared").genome.path == moved / "prepared" / "../data/genome.fa"
    edit_json(moved / "prepared", genome={**gone, "relative_path": "../gone.fa"})
    with pytest.raises(FileError, match=r"is not at /gone/genome.fa, nor at genome.fa, nor at .*gone.fa"):
        _ = PreparedDataset(moved / "prepared").genome
    given = PreparedDataset(moved / "prepared", genome=tiny_folder / "genome.fa")
    assert given.genome.sha256 == prepared.genome.sha256


def test_the_genome_is_found_through_the_environment(
    copy: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((copy / "dataset.json").read_text())["genome"]
    gone = {"path": "/gone/genome.fa", "relative_path": "../gone.fa", "as_written": "$TINY_DATA/genome.fa"}
    edit_json(copy, genome={**record, **gone})
    with pytest.raises(FileError, match=r"nor at \$TINY_DATA/genome.fa"):
        _ = PreparedDataset(copy).genome
    monkeypatch.setenv("TINY_DATA", str(tiny_folder))
    assert PreparedDataset(copy).genome.path == tiny_folder / "genome.fa"


def test_another_genome_is_refused(prepared: PreparedDataset, tmp_path: Path) -> None:
    (tmp_path / "other.fa").write_text(">chrA\nACGT\n")
    with pytest.raises(DataError, match=r"is not the genome that .* was made from"):
        _ = PreparedDataset(prepared.folder, genome=tmp_path / "other.fa").genome


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; make it with `genossm prepare"):
        PreparedDataset(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no dataset.json"):
        PreparedDataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"name": "of another program"}')
    with pytest.raises(DataError, match=r"its dataset.json is not of genossm"):
        PreparedDataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"name": ')
    with pytest.raises(DataError, match="cannot be read as JSON"):
        PreparedDataset(tmp_path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, FORMAT_VERSION - 1])
def test_another_version_is_refused(copy: Path, version: int) -> None:
    edit_json(copy, format_version=version)
    message = f"of format version {version}, this genossm reads version {FORMAT_VERSION}: run prepare again"
    with pytest.raises(DataError, match=message):
        PreparedDataset(copy)


def test_half_a_dataset_is_refused(copy: Path) -> None:
    size = (copy / "targets.h5").stat().st_size
    os.truncate(copy / "targets.h5", size - 10)
    with pytest.raises(DataError, match=f"targets.h5 has {size - 10} bytes instead of {size}"):
        PreparedDataset(copy)
    (copy / "targets.h5").unlink()
    with pytest.raises(DataError, match=r"targets.h5 is missing"):
        PreparedDataset(copy)
    content = json.loads((copy / "dataset.json").read_text())
    del content["splits"]
    (copy / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="lacks splits"):
        PreparedDataset(copy)


def test_stored_numbers(prepared: PreparedDataset) -> None:
    stored = prepared.stored("chrA", 30, 500)
    assert stored.dtype == prepared.storage.dtype == np.uint8
    assert np.array_equal(prepared.storage.decode(stored), prepared.targets("chrA", 30, 500))
    out = np.empty((470, 2), dtype=np.uint8)
    assert prepared.stored("chrA", 30, 500, out=out) is out
    assert np.array_equal(out, stored)
    assert prepared.stored("chrA", 7, 7).shape == (0, 2)
    assert not prepared.compressed and prepared.split_check["leaks"] == 0
    assert prepared.scaling == {}
    assert np.array_equal(prepared.targets("chrA", scaled=True), prepared.targets("chrA"))


def test_a_file_that_is_cut_short_while_it_is_open_is_an_error(copy: Path) -> None:
    dataset = PreparedDataset(copy)
    dataset.targets("chrA")
    os.truncate(copy / "targets.h5", 3_000)
    with pytest.raises(FileError, match=r"targets\.h5 ends too early"):
        dataset.targets("chrA")


def test_a_damaged_table_of_targets_is_an_error(copy: Path) -> None:
    size = (copy / "targets.h5").stat().st_size
    (copy / "targets.h5").write_bytes(b"x" * size)
    with pytest.raises(FileError, match=r"cannot read .*targets.h5"):
        PreparedDataset(copy).targets("chrA")
