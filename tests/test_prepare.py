"""`prepare`: the folder is right, complete or absent, and made again only when something changed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyBigWig
import pytest
import yaml

import genossm.pipelines.prepare as module
import genossm.pipelines.prepare_work as work
from genossm.dataset_config import load_dataset_config
from genossm.dataset_inputs import DatasetInputs, open_inputs
from genossm.errors import ConfigError, DataError
from genossm.pipelines.prepare import plan_windows, prepare
from genossm.pipelines.train import track_heads
from genossm.windows import Window, read_windows

NAMES = {"dataset.json", "targets.h5", "windows.tsv"}


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a folder is made again."""
    status = (path / "targets.h5").stat()
    return status.st_ino, status.st_mtime_ns


def test_the_folder_of_the_contract(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(folder / "dataset.yaml", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == NAMES
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}
    with h5py.File(tmp_path / "out" / "targets.h5") as file:
        assert sorted(file) == ["chrA", "chrB", "chrC"]
        assert file["chrA/targets"].shape == file["chrA/mask"].shape == (1_250, 2)
        assert (file["chrA/targets"].dtype, file["chrA/mask"].dtype) == (np.uint8, np.uint8)
        assert (
            file["chrA/mask"][:, 0].tolist() == [0] * 16 + [1] * 1_234
        )  # 500 N: 15 bins, and 20 of 32 bases
        assert file["chrA/masked"][:].tolist() == [[0, 16]]
        assert file["chrA/peaks/peaks"].shape == (20, 2)
        assert file["chrA/excluded"][:].tolist() == [[0, 500]]
        assert list(file.attrs["tracks"]) == ["peaks", "signal"]
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["format"] == "genossm-dataset"
    assert content["genossm_version"] == content["provenance"]["genossm"]
    assert [track["name"] for track in content["tracks"]] == ["peaks", "signal"]
    for entry in content["provenance"]["inputs"]:
        assert entry["sha256"] == hashlib.sha256(Path(entry["path"]).read_bytes()).hexdigest()
    windows = read_windows(tmp_path / "out" / "windows.tsv")
    assert windows == [window for split in ("train", "valid", "test") for window in prepared.windows(split)]
    assert content["split_check"] == {"windows": 22, "leaks": 0, "shared_chromosomes": 0, "nearest_bp": None}
    for name, entry in content["files"].items():
        assert entry["bytes"] == (tmp_path / "out" / name).stat().st_size
    prepared.verify()
    notes = content["provenance"]["notes"]
    assert "signal.bw (track signal) lacks chrC: masked there" in notes


def test_many_tracks_in_small_blocks_give_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(folder / "dataset.yaml", tmp_path / "first")
    monkeypatch.setattr("genossm.pipelines.prepare_targets._BLOCK_BYTES", 1_000)
    monkeypatch.setattr("genossm.pipelines.prepare_targets._CHUNK_BYTES", 200)
    monkeypatch.setattr("genossm.pipelines.prepare_targets._TILE_BINS", 7)
    monkeypatch.setattr("genossm.pipelines.prepare_targets.CHUNK_BINS", 128)
    monkeypatch.setattr("genossm.pipelines.prepare_columns.CHUNK_BINS", 128)
    for number, compress in enumerate(("none", "gzip")):
        second = prepare(
            folder / "dataset.yaml", tmp_path / f"other{number}", overrides=[f"compress={compress}"]
        )
        assert second.compressed == (compress == "gzip")
        for chrom in first.lengths:
            assert np.array_equal(first.targets(chrom), second.targets(chrom))
            assert np.array_equal(first.mask(chrom), second.mask(chrom))


def test_a_dataset_made_before_a_key_existed_is_not_made_again(folder: Path, tmp_path: Path) -> None:
    source, out = folder / "dataset.yaml", tmp_path / "out"
    prepare(source, out)
    first = stamp(out)
    record = json.loads((out / "dataset.json").read_text())
    for track in [*record["tracks"], *record["config"]["tracks"]]:
        assert (track.pop("strand"), track.pop("partner")) == (".", None)
    (out / "dataset.json").write_text(json.dumps(record))
    assert prepare(source, out).tracks[0].strand == "."
    assert stamp(out) == first
    record["config"]["tracks"][0]["kind"] = "scribble"
    (out / "dataset.json").write_text(json.dumps(record))
    prepare(source, out)
    assert stamp(out) != first


def test_done_again_only_when_something_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = folder / "dataset.yaml", tmp_path / "out"
    prepare(source, out)
    first = stamp(out)
    prepare(source, out)
    assert stamp(out) == first
    assert "is up to date" in capsys.readouterr().err
    # A new time with the old content is no change.
    os.utime(folder / "peaks.narrowPeak", ns=(1, 1))
    prepare(source, out)
    assert stamp(out) == first
    # Comments are no change of the configuration; a key is.
    source.write_text("# a comment\n" + source.read_text())
    prepare(source, out)
    assert stamp(out) == first
    wider = prepare(source, out, overrides=["window.bin=64"])
    second = stamp(out)
    assert (second != first, wider.bin_bp) == (True, 64)
    prepare(source, out)
    third = stamp(out)
    assert third != second
    # Other content of the same size is a change, as is a file that grew.
    peaks = folder / "peaks.narrowPeak"
    peaks.write_text(peaks.read_text().replace("chrC\t1000\t1200", "chrC\t1000\t1100"))
    fewer = prepare(source, out)
    fourth = stamp(out)
    assert fourth != third
    assert fewer.targets("chrC")[:, 0].sum() == 3
    with peaks.open("a") as file:
        file.write("chrC\t0\t320\tnew\t1\t.\t1\t1\t1\t5\n")
    assert prepare(source, out).targets("chrC")[:10, 0].all()
    fifth = stamp(out)
    assert fifth != fourth
    prepare(source, out, force=True)
    assert stamp(out) != fifth
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}


def test_an_incomplete_or_older_dataset_is_replaced(folder: Path, tmp_path: Path) -> None:
    source, out = folder / "dataset.yaml", tmp_path / "out"
    prepare(source, out)
    (out / "targets.h5").unlink()
    assert prepare(source, out).bins("chrA") == 1_250
    content = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({**content, "format_version": 0}))
    assert prepare(source, out).bins("chrA") == 1_250


def test_a_folder_that_holds_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    source, out = folder / "dataset.yaml", tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(
        DataError, match=r"holds other files \(thesis.txt\), which prepare would have to delete"
    ):
        prepare(source, out, force=True)
    (out / "thesis.txt").unlink()
    (out / "dataset.json").write_text('{"mine": true}')
    with pytest.raises(DataError, match="is not of genossm"):
        prepare(source, out, force=True)
    assert (out / "dataset.json").read_text() == '{"mine": true}'
    (out / "dataset.json").unlink()
    prepare(source, out)  # an empty folder is fine
    (out / "runs").mkdir()
    with pytest.raises(DataError, match=r"holds other files \(runs\)"):
        prepare(source, out, force=True)
    with pytest.raises(DataError, match="is a file: choose a folder"):
        prepare(source, source)


def test_a_link_to_a_folder_stays_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for force in (False, True):
        prepare(folder / "dataset.yaml", tmp_path / "link", force=force)
        assert (tmp_path / "link").is_symlink()
        assert {path.name for path in (tmp_path / "disk").iterdir()} == NAMES


def test_an_input_that_changes_meanwhile_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_targets = work.write_targets

    def and_meanwhile(*arguments: Any, **options: Any) -> None:
        with (folder / "peaks.narrowPeak").open("a") as file:
            file.write("chrC\t0\t320\tnew\t1\t.\t1\t1\t1\t5\n")
        write_targets(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(work, "write_targets", and_meanwhile)
        with pytest.raises(DataError, match=r"peaks\.narrowPeak was changed while it was being read"):
            prepare(folder / "dataset.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert prepare(folder / "dataset.yaml", tmp_path / "out").targets("chrC")[:10, 0].all()


def test_the_number_of_processes_is_at_least_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs is 0: give the number of processes"):
        prepare(folder / "dataset.yaml", tmp_path / "out", jobs=0)


def test_large_work_is_estimated_first_and_done_in_other_processes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    excluded = DatasetInputs.excluded

    def only_the_sample(inputs: DatasetInputs, chrom: str) -> Any:
        assert chrom == "chrC", "this process is to do nothing but the estimate"
        return excluded(inputs, chrom)

    small = prepare(folder / "dataset.yaml", tmp_path / "small")
    assert "measured on" not in capsys.readouterr().err
    monkeypatch.setattr(work, "LARGE_WORK", 1)
    monkeypatch.setattr(DatasetInputs, "excluded", only_the_sample)
    large = prepare(folder / "dataset.yaml", tmp_path / "large", jobs=1)
    assert "with 1 process, measured on peaks, signal on chrC" in capsys.readouterr().err
    assert np.array_equal(small.targets("chrA"), large.targets("chrA"))


def test_scaled_targets(folder: Path, tmp_path: Path) -> None:
    scale = "{clip: 40, squash: sqrt, mean: 2}"
    text = (folder / "dataset.yaml").read_text().replace("aggregate: sum", f"aggregate: sum, scale: {scale}")
    (folder / "dataset.yaml").write_text(text)
    prepared = prepare(folder / "dataset.yaml", tmp_path / "out")
    assert set(prepared.scaling) == {"signal"}
    plain, scaled = prepared.targets("chrA"), prepared.targets("chrA", scaled=True)
    assert plain[:, 1].max() == 64  # the unit is kept
    assert np.array_equal(scaled[:, 0], plain[:, 0])
    kept = prepared.mask("chrA")[:, 1]
    assert scaled[kept, 1].mean() == pytest.approx(2, rel=0.01)
    squashed = np.sqrt(np.minimum(plain[:, 1], 40))
    np.testing.assert_allclose(scaled[:, 1], squashed * prepared.scaling["signal"].factor, rtol=1e-6)
    assert prepared.scaled_statistics["signal"]["mean"] == pytest.approx(scaled[kept, 1].mean(), rel=1e-3)
    assert prepared.scaled_statistics["signal"]["std"] == pytest.approx(scaled[kept, 1].std(), rel=1e-3)
    back = prepared.scaling["signal"].inverse(scaled[:, 1])
    np.testing.assert_allclose(back, np.minimum(plain[:, 1], 40), rtol=1e-5)


def test_partners_share_a_scale(stranded_prepared: Path, tmp_path: Path) -> None:
    source = stranded_prepared.parent / "dataset.yaml"
    config = yaml.safe_load(source.read_text())
    for track in config["tracks"]:
        if track["kind"] == "signal":
            track["scale"] = {"clip": "90%", "mean": 1}
        track["file"] = str(source.parent / track["file"])
    config["genome"] = str(source.parent / config["genome"])
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(config))
    prepared = prepare(tmp_path / "dataset.yaml", tmp_path / "out")
    assert prepared.scaling["plus"] == prepared.scaling["minus"]
    mask = prepared.mask("chrA")[:, [0, 2]]
    scaled = prepared.targets("chrA", scaled=True)[:, [0, 2]][mask]
    assert scaled.mean() == pytest.approx(1, rel=0.01)
    assert prepared.scaled_statistics["plus"] == prepared.scaled_statistics["minus"]
    minus, _, plus = track_heads(prepared)
    assert minus.scaling == plus.scaling and (minus.mean, minus.std) == (plus.mean, plus.std)
    assert plus.std == pytest.approx(scaled.std(), rel=0.01)
    clip = np.percentile(prepared.targets("chrA")[:, [0, 2]][mask], 90)
    assert prepared.scaling["plus"].clip == pytest.approx(clip, rel=0.02)


def test_windows_that_leak_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = open_inputs(load_dataset_config(folder / "dataset.yaml"))
    assert len(plan_windows(inputs)) == 14 + 7 + 1

    def leaking(chrom: str, length_bp: int, *, split: str, **_: int) -> list[Window]:
        start = {"train": 0, "valid": 3_000, "test": 9_000}[split]
        return [Window("chrA", start, start + 4_096, split)]

    monkeypatch.setattr(module, "tile", leaking)
    with pytest.raises(
        DataError, match=r"2 windows leak into another split: chrA:0-4096 \(train\) holds 584 target"
    ):
        plan_windows(inputs)


def test_signal_options(folder: Path, tmp_path: Path) -> None:
    """mean, max, and `missing: mask`, where the bigWig has gaps and NaN."""
    bigwig = pyBigWig.open(str(folder / "signal.bw"), "w")
    bigwig.addHeader([("chrA", 40_000), ("chrB", 20_011), ("chrC", 1_234)])
    bigwig.addEntries(["chrA"] * 2, [3_200, 3_296], ends=[3_225, 3_319], values=[4.0, 8.0])
    bigwig.addEntries(["chrC"], [1_216], ends=[1_234], values=[3.0])
    bigwig.close()
    text = (folder / "dataset.yaml").read_text()
    content = yaml.safe_load(text)
    content["tracks"] = [
        {
            "name": f"{how}_{missing}",
            "file": "signal.bw",
            "kind": "signal",
            "aggregate": how,
            "missing": missing,
        }
        for how in ("mean", "sum", "max")
        for missing in ("zero", "mask")
    ]
    (folder / "dataset.yaml").write_text(yaml.safe_dump(content))
    prepared = prepare(folder / "dataset.yaml", tmp_path / "out")
    rows, valid = prepared.targets("chrA", 99, 104), prepared.mask("chrA", 99, 104)
    # Bin 100 has 25 bases of 4 (7 absent: under a quarter), bin 103 has 23 of 8 (9 absent: masked).
    assert rows[:, 0].tolist() == [0, 100 / 32, 0, 0, 184 / 32]
    assert rows[1].tolist() == [100 / 32, 4, 100, 100, 4, 4]
    assert rows[4].tolist() == [184 / 32, 0, 184, 0, 8, 0]
    assert valid.tolist() == [[True, row in (1,)] * 3 for row in range(5)]
    # The last bin of chrC has 18 bases, all of them present.
    assert prepared.targets("chrC", 38).tolist() == [[3, 3, 54, 54, 3, 3]]


def independent(path: Path, lengths: dict[str, int]) -> dict[str, npt.NDArray[np.bool_]]:
    """Base by base, whether a BED file covers it; read without genossm."""
    covered = {chrom: np.zeros(length, dtype=bool) for chrom, length in lengths.items()}
    for line in path.read_text().splitlines():
        if line.startswith("chr"):
            chrom, start, end = line.split("\t")[:3]
            covered[chrom][int(start) : int(end)] = True
    return covered


@pytest.mark.realdata
def test_yeast_agrees_with_an_independent_computation(
    realdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GENOSSM_REALDATA", str(realdata))
    source = Path(__file__).resolve().parents[1] / "configs" / "yeast-dataset.yaml"
    prepared = prepare(source, tmp_path / "yeast")
    assert "note: atac_hmmratac_accessible_regions.narrowPeak: header lines 1" in capsys.readouterr().err
    data = realdata / "sacCer3"
    sizes = dict(line.split() for line in (data / "sacCer3.chrom.sizes").read_text().splitlines())
    lengths = {chrom: int(size) for chrom, size in sizes.items()}
    assert {**prepared.lengths, "chrM": 85_779} == lengths  # chrM is out
    assert [len(prepared.windows(split)) for split in ("train", "valid", "test")] == [80, 12, 38]

    assert prepared.storage.dtype == np.float16
    assert [coding.largest_error for coding in prepared.storage.codings[:3]] == [0, 0, 0]
    stated = prepared.storage.codings[3].largest_error
    assert 0 < stated < 5e-4

    excluded = independent(data / "mask_repeats.bed", lengths)
    peaks = [
        independent(data / "atac_macs2_peaks.narrowPeak", lengths),
        independent(data / "atac_hmmratac_accessible_regions.narrowPeak", lengths),
    ]
    with (
        pyBigWig.open(str(data / "atac_tn5_cutsites.bw")) as cuts,
        pyBigWig.open(str(data / "mnase_AGH01-1_occupancy147_10bp.bw")) as mnase,
    ):
        for chrom, length in prepared.lengths.items():
            edges = np.arange(0, length, 32)
            size = np.diff(np.append(edges, length))
            columns = [np.add.reduceat(track[chrom], edges, dtype=float) >= size / 2 for track in peaks]
            for bigwig, divisor in ((cuts, 1), (mnase, size)):
                values = np.nan_to_num(bigwig.values(chrom, 0, length, numpy=True)).astype(float)
                columns.append(np.add.reduceat(values, edges) / divisor)
            mask = np.add.reduceat(excluded[chrom], edges, dtype=float) < size / 4
            # Peaks and counts are exact in 16 bits; the means are so to the error that is stated.
            found, true = prepared.targets(chrom), np.stack(columns, axis=1)
            assert np.array_equal(found[:, :3], true[:, :3])
            np.testing.assert_allclose(found[:, 3], true[:, 3], rtol=1.001 * stated, atol=1e-6)
            assert np.array_equal(prepared.mask(chrom), np.repeat(mask[:, None], 4, axis=1))

    # The figures of the data's README: 16,663 test bins of 200 bp, positive rates 0.0632 and 0.0268.
    for track, covered, rate in (("atac_peaks", peaks[0], 0.0632), ("atac_regions", peaks[1], 0.0268)):
        bins = positive = 0
        for chrom in prepared.splits["test"]:
            starts, ends = prepared.peaks(chrom, track)
            stored = np.zeros(lengths[chrom], dtype=bool)
            for start, end in zip(starts, ends, strict=True):
                stored[start:end] = True
            assert np.array_equal(stored, covered[chrom])
            edges = np.arange(0, lengths[chrom], 200)
            size = np.diff(np.append(edges, lengths[chrom]))
            kept = np.add.reduceat(excluded[chrom], edges, dtype=float) < size / 4
            bins += int(kept.sum())
            positive += int((kept & (np.add.reduceat(stored, edges, dtype=float) >= size / 2)).sum())
        assert bins == 16_663
        assert positive / bins == pytest.approx(rate, abs=5e-5)


@pytest.mark.realdata
def test_memory_stays_bounded(realdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENOSSM_REALDATA", str(realdata))
    source = Path(__file__).resolve().parents[1] / "configs" / "yeast-dataset.yaml"
    code = (
        "import resource, sys\n"
        "from genossm.pipelines.prepare import prepare\n"
        "prepare(sys.argv[1], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "yeast")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    unit = 1024 if sys.platform == "darwin" else 1  # kilobytes, but bytes on a Mac
    assert int(done.stdout) / unit / 1024 < 1_000
