"""Tests of genossm.dataset_inputs: several samples, cut sites, folds; columns alike in every process."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyBigWig
import pytest

from genossm.dataset_config import DatasetConfig, load_dataset_config
from genossm.dataset_inputs import DatasetInputs, open_inputs, resolve_splits
from genossm.errors import DataError

LENGTHS = {"chrA": 40_000, "chrB": 20_011, "chrC": 1_234}
SPLIT = "{valid: [chrB], test: [chrC]}"


def described(folder: Path, *tracks: str, split: str = SPLIT, more: str = "") -> Path:
    """The dataset of `folder` with these tracks instead of its own."""
    path = folder / "dataset.yaml"
    lines = "".join(f"  - {{{track}}}\n" for track in tracks)
    path.write_text(
        f"assembly: tiny\ngenome: genome.fa\ntracks:\n{lines}"
        f"window: {{length: 4096, margin: 512, bin: 32}}\nsplit: {split}\n{more}"
    )
    return path


def opened(folder: Path, *tracks: str, **layout: str) -> DatasetInputs:
    return open_inputs(load_dataset_config(described(folder, *tracks, **layout)))


def columns(inputs: DatasetInputs, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """Values of a track by chromosome."""
    track = next(track for track in inputs.config.tracks if track.name == name)
    return {chrom: inputs.column(chrom, track)[0] for chrom in inputs.lengths}


def bigwig(path: Path, entries: list[tuple[str, int, int, float]], lengths: dict[str, int] = LENGTHS) -> None:
    file = pyBigWig.open(str(path), "w")
    file.addHeader(list(lengths.items()))
    for chrom, start, end, value in entries:
        file.addEntries([chrom], [start], ends=[end], values=[value])
    file.close()


FRAGMENTS = [
    *(("chrA", 100 + 50 * at, 180 + 50 * at) for at in range(700)),
    *(("chrB", 10 * at, 10 * at + 65) for at in range(500)),
    ("chrC", 0, 1_234),
]


@pytest.fixture
def fragments(folder: Path, private_cache: Path) -> Path:
    """fragments.tsv of 1,201 fragments in the cells c0, c1 and c2, and groups.tsv: c0 and c1 are group T."""
    rows = (f"{chrom}\t{start}\t{end}\tc{at % 3}\t1\n" for at, (chrom, start, end) in enumerate(FRAGMENTS))
    (folder / "fragments.tsv").write_text("".join(rows))
    (folder / "groups.tsv").write_text("barcode\tgroup\nc0\tT\nc1\tT\nc2\tB\n")
    return folder / "fragments.tsv"


def expected_sums(fragments: list[tuple[str, int, int]], right: int = -5) -> dict[str, np.ndarray[Any, Any]]:
    """Cut sites per bin of 32 bp."""
    sums = {chrom: np.zeros(-(-length // 32)) for chrom, length in LENGTHS.items()}
    for chrom, start, end in fragments:
        sums[chrom][(start + 4) // 32] += 1
        sums[chrom][(end + right) // 32] += 1
    return sums


def test_fragments_are_a_track_of_cut_sites(folder: Path, fragments: Path) -> None:
    inputs = opened(
        folder,
        "name: all, file: fragments.tsv, kind: signal, aggregate: sum",
        "name: t, file: fragments.tsv, kind: signal, aggregate: sum, barcodes: groups.tsv, group: T",
        "name: b, file: fragments.tsv, kind: signal, aggregate: sum, barcodes: groups.tsv, group: B",
    )
    parts = [
        [row for at, row in enumerate(FRAGMENTS) if at % 3 in cells] for cells in ((0, 1, 2), (0, 1), (2,))
    ]
    for name, part in zip(("all", "t", "b"), parts, strict=True):
        expected = expected_sums(part)
        assert all(np.array_equal(values, expected[chrom]) for chrom, values in columns(inputs, name).items())
    assert [item.rows for item in inputs.files] == [2 * len(part) for part in parts]
    assert inputs.notes[0] == "fragments.tsv (track all) 1,201 fragments counted, 2,402 cut sites in use"
    assert (
        "shifted already as a rule (10x, chromap, sinto): set `shift: [0, 1]` if these are" in inputs.notes[1]
    )


def test_a_chromosome_without_fragments_is_masked(folder: Path, fragments: Path) -> None:
    rows = fragments.read_text().splitlines(keepends=True)
    fragments.write_text("".join(row for row in rows if not row.startswith("chrB")))
    inputs = opened(folder, "name: a, file: fragments.tsv, kind: signal, aggregate: sum, shift: [0, 1]")
    (track,) = inputs.config.tracks
    assert not inputs.column("chrB", track)[1].any() and inputs.column("chrC", track)[1].all()
    assert inputs.files[0].missing == ("chrB",)
    assert "fragments.tsv (track a) lacks chrB: masked there" in inputs.notes
    assert not any("shifted already" in note for note in inputs.notes)


def test_sites_past_an_end_are_counted(folder: Path, fragments: Path) -> None:
    with fragments.open("a") as file:
        file.write("chrC\t1200\t1300\tc0\t1\nchrUn_1\t5\t90\tc0\t1\n")
    inputs = opened(folder, "name: a, file: fragments.tsv, kind: signal, aggregate: sum")
    assert inputs.files[0].oddities == {"sites_past_end": 1}
    assert "fragments.tsv: sites past end 1" in inputs.notes
    assert "fragments.tsv: left out chrUn_1, not in the genome" in inputs.notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "chrC\t1234\t1300",
            r"is of another assembly than tiny: chrC has at least 1235 bp there and 1234 in the genome; use the file",
        ),
        ("chrQ\t5\t90", r"fragments\.tsv \(track a\) lists chrQ, which the genome does not have"),
    ],
)
def test_fragments_of_another_assembly(folder: Path, fragments: Path, row: str, message: str) -> None:
    with fragments.open("a") as file:
        file.write(f"{row}\tc0\t1\n")
    with pytest.raises(DataError, match=message):
        opened(folder, "name: a, file: fragments.tsv, kind: signal")


def test_names_of_fragments_can_be_repaired(folder: Path, fragments: Path) -> None:
    fragments.write_text(fragments.read_text().replace("chr", ""))
    with pytest.raises(DataError, match="set `chrom_names: repair`"):
        opened(folder, "name: a, file: fragments.tsv, kind: signal, aggregate: sum")
    inputs = opened(
        folder, "name: a, file: fragments.tsv, kind: signal, aggregate: sum", more="chrom_names: repair\n"
    )
    expected = expected_sums(FRAGMENTS)
    assert all(np.array_equal(values, expected[chrom]) for chrom, values in columns(inputs, "a").items())


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ("missing: mask", r"is counted as cut sites, and each base has a count: remove `missing: mask`"),
        ("barcodes: groups.tsv, group: Q", r"groups\.tsv has no group 'Q'; it has T, B"),
        ("barcodes: none.tsv, group: Q", r"none\.tsv does not exist"),
    ],
)
def test_what_fragments_cannot_be(folder: Path, fragments: Path, track: str, message: str) -> None:
    with pytest.raises((DataError, OSError), match=message):
        opened(folder, f"name: a, file: fragments.tsv, kind: signal, {track}")


def test_a_group_without_a_site_is_an_error(folder: Path, fragments: Path) -> None:
    (folder / "groups.tsv").write_text("barcode\tgroup\nc0\tT\nc9\tQ\n")
    with pytest.raises(DataError, match="has no cut site of the group Q on the 3 chromosomes in use"):
        opened(folder, "name: a, file: fragments.tsv, kind: signal, barcodes: groups.tsv, group: Q")


def test_samples_are_summed_or_averaged(folder: Path, fragments: Path) -> None:
    bigwig(folder / "a.bw", [("chrA", 0, 1_000, 2.0), ("chrC", 0, 1_234, 1.0)])
    bigwig(folder / "b.bw", [("chrA", 500, 2_000, 4.0)], {"chrA": 40_000, "chrB": 20_011})
    files = "files: [a.bw, b.bw], kind: signal, aggregate: sum"
    inputs = opened(
        folder,
        f"name: mean, {files}",
        f"name: sum, {files}, combine: sum",
        f"name: highest, {files.replace('sum', 'max')}, combine: sum",
        "name: mixed, files: [a.bw, fragments.tsv], kind: signal, aggregate: sum, combine: sum",
    )
    assert columns(inputs, "mean")["chrA"][[0, 20, 40, 70]].tolist() == [32, 96, 64, 0]
    assert columns(inputs, "sum")["chrA"][[0, 20, 40, 70]].tolist() == [64, 192, 128, 0]
    assert columns(inputs, "highest")["chrA"][[0, 20, 40, 70]].tolist() == [2, 6, 4, 0]
    tracks = inputs.config.tracks
    assert not inputs.column("chrC", tracks[0])[1].any()  # which b.bw lacks
    assert inputs.column("chrC", tracks[3])[1].all()
    assert columns(inputs, "mixed")["chrA"][3] == 64 + expected_sums(FRAGMENTS)["chrA"][3]
    assert [item.file for item in inputs.files if item.track == "sum"] == [
        str(folder / name) for name in ("a.bw", "b.bw")
    ]
    assert "b.bw (track mean) lacks chrC: masked there" in inputs.notes


def test_peaks_of_several_samples(folder: Path) -> None:
    (folder / "a.bed").write_text("chrA\t0\t320\nchrA\t640\t960\nchrB\t0\t64\n")
    (folder / "b.bed").write_text("chrA\t160\t800\nchrC\t0\t32\n")
    inputs = opened(
        folder,
        "name: union, files: [a.bed, b.bed], kind: peaks",
        "name: both, files: [a.bed, b.bed], kind: peaks, min_samples: 2",
    )
    assert np.stack(inputs.peaks("chrA", "union")).tolist() == [[0], [960]]
    assert np.stack(inputs.peaks("chrA", "both")).tolist() == [[160, 640], [320, 800]]
    assert {chrom: values.sum() for chrom, values in columns(inputs, "union").items()} == {
        **{"chrA": 30, "chrB": 2, "chrC": 1}
    }
    assert inputs.peaks("chrB", "both")[0].size == 0
    assert inputs.peaks("chrA", "both")[0].dtype == np.int64
    (folder / "b.bed").write_text("chrC\t0\t32\n")
    with pytest.raises(DataError, match="track both: no base is in a peak of 2 of its 2 files"):
        opened(folder, "name: both, files: [a.bed, b.bed], kind: peaks, min_samples: 2")


TRACKS = (
    "name: peaks, files: [peaks.narrowPeak, other.bed], kind: peaks",
    "name: cuts, file: fragments.tsv, kind: signal, aggregate: sum, barcodes: groups.tsv, group: T",
    "name: highest, files: [signal.bw, fragments.tsv], kind: signal, aggregate: max, combine: sum",
    "name: signal, file: signal.bw, kind: signal, missing: mask",
)


def as_bytes(column: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> bytes:
    return column[0].tobytes() + column[1].tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_every_process_reads_the_same(folder: Path, fragments: Path, method: Any) -> None:
    (folder / "other.bed").write_text("chrB\t0\t640\n")
    inputs = opened(folder, *TRACKS, more="exclude: [other.bed]\n")
    tasks = [(inputs, chrom, track) for chrom in inputs.lengths for track in inputs.config.tracks]
    # Opened, and used, before processes start.
    expected = [as_bytes(inputs.column(chrom, track)) for _, chrom, track in tasks]
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.starmap_async(DatasetInputs.column, tasks, chunksize=1).get(timeout=60)
        usable = pool.starmap_async(DatasetInputs.usable, [(inputs, "chrB")]).get(timeout=60)
    assert list(map(as_bytes, found)) == expected
    assert np.array_equal(usable[0], inputs.usable("chrB"))
    assert len(pickle.dumps(inputs)) < 20_000


def test_folds_of_the_genome(folder: Path) -> None:
    track = "name: peaks, file: peaks.narrowPeak, kind: peaks"
    seen = []
    for fold in range(3):
        inputs = opened(
            folder, track, split=f"{{n_folds: 3, fold: {fold}}}", more="chroms: [chrC, chrA, chrB]\n"
        )
        assert sorted(chrom for names in inputs.splits.values() for chrom in names) == sorted(LENGTHS)
        assert list(inputs.lengths) == list(LENGTHS) and inputs.splits["train"]
        seen += inputs.splits["test"]
    assert sorted(seen) == sorted(LENGTHS)
    # chrC is called like a chloroplast, and so is not in use unless it is named.
    with pytest.raises(DataError, match="2 chromosomes cannot be spread over 4 folds"):
        opened(folder, track, split="{n_folds: 4, fold: 0}")
    with pytest.raises(DataError, match="chroms names chrQ, which the genome"):
        opened(folder, track, split="{n_folds: 3, fold: 1}", more="chroms: [chrC, chrA, chrQ]\n")


def test_folds_that_are_balanced_by_positives(folder: Path) -> None:
    lengths = {f"chr{number}": 6_000 for number in range(6)}
    (folder / "genome.fa").write_text("".join(f">{name}\n{'ACGT' * 1_500}\n" for name in lengths))
    (folder / "a.bed").write_text("chr1\t0\t4000\nchr4\t0\t4000\nchr5\t0\t4000\nchr0\t0\t10\n")
    track = "name: peaks, file: a.bed, kind: peaks"
    for seed in range(4):
        split = f"{{n_folds: 3, fold: 0, seed: {seed}, balance: positives}}"
        splits = opened(folder, track, split=split).splits
        assert all(len({"chr1", "chr4", "chr5"} & set(splits[name])) == 1 for name in ("valid", "test"))
    bigwig(folder / "a.bw", [("chr1", 0, 9, 1.0)], lengths)
    with pytest.raises(DataError, match="`balance: positives` needs a peaks track"):
        opened(folder, "name: a, file: a.bw, kind: signal", split=split)


def test_a_fold_file_names_the_splits(folder: Path) -> None:
    folds = {"folds": [{"valid": ["chrA"], "test": ["chrB"]}, {"valid": ["chrC"], "test": ["chrB"]}]}
    (folder / "folds.json").write_text(json.dumps(folds))
    inputs = opened(
        folder, "name: peaks, file: peaks.narrowPeak, kind: peaks", split="{folds: folds.json, fold: 1}"
    )
    assert inputs.splits == {"train": ("chrA",), "valid": ("chrC",), "test": ("chrB",)}


def test_splits_are_resolved_without_files(folder: Path) -> None:
    config: DatasetConfig = load_dataset_config(
        described(folder, "name: peaks, file: peaks.narrowPeak, kind: peaks", split="{n_folds: 3, fold: 2}")
    )
    lengths = {"chr1": 90, "chrM": 10, "chr2": 80, "chr3": 70, "chr4": 20}
    splits = resolve_splits(config, lengths)
    assert sorted(chrom for names in splits.values() for chrom in names) == ["chr1", "chr2", "chr3", "chr4"]


def test_progress_is_shown_for_many_tracks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracks = [f"name: p{at}, file: peaks.narrowPeak, kind: peaks" for at in range(3)]
    opened(folder, *tracks)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("genossm.dataset_inputs._MANY_TRACKS", 3)
    opened(folder, *tracks)
    assert "track/s" in capsys.readouterr().err
