"""`check`: the files of a dataset agree, or every one that does not is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyBigWig
import pytest

from genossm.cli import main
from genossm.dataset_config import TrackConfig
from genossm.errors import DataError, FileError
from genossm.pipelines.check import Statistics, Tally, check

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def genossm(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line: (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def bigwig(
    path: Path, lengths: dict[str, int], entries: list[tuple[str, int, int, float]] | None = None
) -> None:
    """Write a bigWig with a header of `lengths`, and one value everywhere unless `entries` are given."""
    file = pyBigWig.open(str(path), "w")
    file.addHeader(list(lengths.items()))
    for chrom, start, end, value in entries or [(chrom, 0, length, 1.0) for chrom, length in lengths.items()]:
        file.addEntries([chrom], [start], ends=[end], values=[value])
    file.close()


def edit(path: Path, old: str, new: str) -> None:
    """Replace a piece of a text file that must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_report_of_the_tiny_dataset(folder: Path, tiny_lengths: dict[str, int]) -> None:
    report = check(folder / "dataset.yaml")
    chromosomes = report.chromosomes.set_index("chromosome")
    assert chromosomes["length"].to_dict() == tiny_lengths
    assert chromosomes["split"].to_dict() == {"chrA": "train", "chrB": "valid", "chrC": "test"}
    assert chromosomes["excluded"].to_dict() == pytest.approx({"chrA": 500 / 40_000, "chrB": 0, "chrC": 0})
    files = report.files.set_index("track")
    assert files.loc["peaks", "rows"] == 20 + 10 + 1
    assert files.loc["peaks", "bases"] == 31 * 200
    assert files.loc["signal", "missing"] == "chrC"
    tracks = report.tracks.set_index(["track", "split"])
    # chrA: 1,250 bins of 32 bp, the 500 N bases mask 15 whole bins and the 16th (20 of 32 bases).
    assert tracks.loc[("peaks", "train"), "bins"] == 1_250
    assert tracks.loc[("peaks", "train"), "unmasked"] == 1_234
    positive = 0
    for start in range(1_000, 40_000 - 200, 2_000):
        covered = [min(start + 200, left + 32) - max(start, left) for left in range(0, 40_000, 32)]
        positive += sum(bases >= 16 for bases in covered)
    assert tracks.loc[("peaks", "train"), "mean"] == pytest.approx(positive / 1_234)
    assert tracks.loc[("signal", "train"), "mean"] == pytest.approx(20 * 200 * 2.0 / 1_234)
    assert tracks.loc[("signal", "train"), "max"] == 64
    assert tracks.loc[("signal", "test"), "unmasked"] == 0
    assert report.notes == (
        "signal.bw (track signal) lacks chrC: masked there",
        "track signal: every bin of the test split is masked",
    )


def test_check_prints_tables_and_exits_0(folder: Path, genossm: Command) -> None:
    status, out, _ = genossm("check", folder / "dataset.yaml")
    assert status == 0
    assert "chrA        40,000  train" in " ".join(out.split(" "))
    assert "- signal.bw (track signal) lacks chrC: masked there" in out
    assert out.startswith(f"tiny: {folder / 'genome.fa'}")


def test_check_gives_the_same_as_json(folder: Path, genossm: Command) -> None:
    status, out, _ = genossm("check", folder / "dataset.yaml", "--json")
    assert status == 0
    report = json.loads(out)
    assert {row["chromosome"]: row["length"] for row in report["chromosomes"]} == {
        "chrA": 40_000,
        "chrB": 20_011,
        "chrC": 1_234,
    }
    masked = [row for row in report["tracks"] if row["unmasked"] == 0]
    assert [(row["track"], row["split"], row["mean"]) for row in masked] == [("signal", "test", None)]
    assert check(folder / "dataset.yaml").to_mapping()["notes"] == report["notes"]


def test_oddities_are_counted_and_reported(folder: Path, genossm: Command) -> None:
    peaks = folder / "peaks.narrowPeak"
    rows = peaks.read_text().splitlines()
    extra = ["track type=narrowPeak", "", rows[0], rows[1].replace("3000\t3200", "3100\t3100")]
    extra += [rows[-1].replace("chrC\t1000\t1200", "chrC\t1200\t1300"), rows[0].replace("chrA", "chrUn_1")]
    peaks.write_text("\r\n".join([*extra, *rows]) + "\r\n")
    status, out, _ = genossm("check", folder / "dataset.yaml")
    assert status == 0
    for oddity in (
        "header lines 1",
        "blank lines 1",
        "duplicates 1",
        "zero length 1",
        "past end 1",
        "skipped unplaced 1",
    ):
        assert oddity in out


# Each case spoils the tiny dataset: the spoiler's name, and what the one-sentence error must say.


def peak_past_the_end(folder: Path) -> None:
    with (folder / "peaks.narrowPeak").open("a") as file:
        file.write("chrB\t30000\t30200\tp\t1\t.\t1\t1\t1\t5\n")


def unknown_chromosome(folder: Path) -> None:
    with (folder / "peaks.narrowPeak").open("a") as file:
        file.write("chrZ\t100\t200\tp\t1\t.\t1\t1\t1\t5\n")


def other_names(folder: Path) -> None:
    edit(folder / "peaks.narrowPeak", "chr", "")


def bigwig_of_other_names(folder: Path) -> None:
    bigwig(folder / "signal.bw", {"A": 40_000, "B": 20_011})


def empty_peaks(folder: Path) -> None:
    (folder / "peaks.narrowPeak").write_text("")


def peaks_of_header_only(folder: Path) -> None:
    (folder / "peaks.narrowPeak").write_text("track name=peaks\n# nothing called\n")


def peaks_of_length_zero(folder: Path) -> None:
    (folder / "peaks.narrowPeak").write_text("chrA\t100\t100\nchrB\t7\t7\n")


def malformed_peak(folder: Path) -> None:
    edit(folder / "peaks.narrowPeak", "chrA\t1000\t1200", "chrA\t1000\ttwelve")


def missing_peaks(folder: Path) -> None:
    (folder / "peaks.narrowPeak").unlink()


def truncated_gzip_peaks(folder: Path) -> None:
    whole = gzip.compress((folder / "peaks.narrowPeak").read_bytes())
    (folder / "peaks.narrowPeak").write_bytes(whole[: len(whole) // 2])


def missing_genome(folder: Path) -> None:
    (folder / "genome.fa").unlink()


def truncated_bgzip(folder: Path) -> None:
    from Bio import bgzf

    with bgzf.BgzfWriter(str(folder / "genome.fa.gz")) as file:
        file.write((folder / "genome.fa").read_bytes())
    whole = (folder / "genome.fa.gz").read_bytes()
    (folder / "genome.fa.gz").write_bytes(whole[: len(whole) * 2 // 3])
    edit(folder / "dataset.yaml", "genome: genome.fa", "genome: genome.fa.gz")


def empty_genome(folder: Path) -> None:
    (folder / "genome.fa").write_text("")


def bigwig_of_another_assembly(folder: Path) -> None:
    bigwig(folder / "signal.bw", {"chrA": 40_001, "chrB": 20_011})


def bigwig_of_another_genome(folder: Path) -> None:
    bigwig(folder / "signal.bw", {"chrA": 40_000, "2L": 1_000, "2R": 1_000})


def bigwig_without_our_chromosomes(folder: Path) -> None:
    bigwig(folder / "signal.bw", {"chrUn_1": 5_000})


def no_bigwig(folder: Path) -> None:
    (folder / "signal.bw").write_text("chrA 0 10 1\n")


def truncated_bigwig(folder: Path) -> None:
    whole = (folder / "signal.bw").read_bytes()
    (folder / "signal.bw").write_bytes(whole[: len(whole) // 2])


def negative_signal(folder: Path) -> None:
    bigwig(folder / "signal.bw", {"chrA": 40_000}, [("chrA", 3_200, 3_232, -1.5)])


def split_of_an_absent_chromosome(folder: Path) -> None:
    edit(folder / "dataset.yaml", "valid: [chrB]", "valid: [B, chrQ]")


def overlapping_splits(folder: Path) -> None:
    edit(folder / "dataset.yaml", "test: [chrC]", "test: [chrC, chrB]")


def nothing_left_for_training(folder: Path) -> None:
    edit(folder / "dataset.yaml", "valid: [chrB]", "valid: [chrB, chrA]")


def empty_split(folder: Path) -> None:
    edit(folder / "dataset.yaml", "{valid: [chrB], test: [chrC]}", "{train: [], valid: [], test: []}")


def split_outside_chroms(folder: Path) -> None:
    edit(folder / "dataset.yaml", "window:", "chroms: [chrA, chrB]\nwindow:")


def absent_chroms(folder: Path) -> None:
    edit(folder / "dataset.yaml", "window:", "chroms: [chrA, chrB, chrC, chrD]\nwindow:")


def misspelled_key(folder: Path) -> None:
    edit(folder / "dataset.yaml", "aggregate: sum", "agregate: sum")


def too_long_a_window(folder: Path) -> None:
    edit(folder / "dataset.yaml", "length: 4096", "length: 40032")


def unset_variable(folder: Path) -> None:
    edit(folder / "dataset.yaml", "genome: genome.fa", "genome: $GENOSSM_NOT_SET/genome.fa")


SPOILERS: list[tuple[Callable[[Path], None], str]] = [
    (peak_past_the_end, "chrB:30000-30200 lies wholly past the end of chrB, which has 20,011 bp"),
    (unknown_chromosome, "names chromosomes that the genome lacks: chrZ (1 rows)"),
    (other_names, "A looks like the genome's chrA: set `chrom_names: repair` in the dataset YAML"),
    (bigwig_of_other_names, "A looks like the genome's chrA: set `chrom_names: repair` in the dataset YAML"),
    (empty_peaks, "peaks.narrowPeak (track peaks) has no peak on the 3 chromosomes in use"),
    (peaks_of_header_only, "peaks.narrowPeak (track peaks) has no peak on the 3 chromosomes in use"),
    (peaks_of_length_zero, "peaks.narrowPeak (track peaks) has no peak on the 3 chromosomes in use"),
    (malformed_peak, "line 1: the end 'twelve' is no whole number"),
    (missing_peaks, "peaks.narrowPeak does not exist"),
    (truncated_gzip_peaks, "peaks.narrowPeak is cut off"),
    (missing_genome, "genome.fa does not exist"),
    (truncated_bgzip, "genome.fa.gz is cut off"),
    (empty_genome, "genome.fa is empty"),
    (
        bigwig_of_another_assembly,
        "another assembly than tiny: chrA has 40001 bp there and 40000 in the genome",
    ),
    (bigwig_of_another_genome, "signal.bw (track signal) lists 2L, 2R, which the genome does not have"),
    (bigwig_without_our_chromosomes, "signal.bw (track signal) has none of the 3 chromosomes in use"),
    (no_bigwig, "signal.bw is no bigWig file"),
    (truncated_bigwig, "signal.bw is cut off"),
    (negative_signal, "track signal has values below 0 on chrA (down to -48 in a bin)"),
    (split_of_an_absent_chromosome, "split valid names B, chrQ, which the genome"),
    (overlapping_splits, "chromosome 'chrB' is in valid and test"),
    (nothing_left_for_training, "no chromosome is left for training"),
    (empty_split, "the split names no chromosome at all"),
    (split_outside_chroms, "the split names chrC, which `chroms` leaves out"),
    (absent_chroms, "chroms names chrD, which the genome"),
    (misspelled_key, "unknown key 'agregate'"),
    (
        too_long_a_window,
        "the window of 40032 bp is longer than every chromosome in use (the longest, chrA, has 40000 bp)",
    ),
    (unset_variable, "needs the environment variable GENOSSM_NOT_SET, which is not set"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILERS, ids=[spoil.__name__ for spoil, _ in SPOILERS])
def test_bad_input_is_one_sentence_and_status_1(
    folder: Path, private_cache: Path, genossm: Command, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    yaml, out_folder = folder / "dataset.yaml", folder / "prepared"
    before = sorted(folder.iterdir())
    for arguments in (["check", yaml], ["prepare", yaml, "-o", out_folder]):
        status, out, err = genossm(*arguments)
        assert status == 1
        assert out == ""
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]
        assert "Traceback" not in err
    assert sorted(folder.iterdir()) == before


def test_what_is_close_to_an_absent_chromosome_is_offered(folder: Path, genossm: Command) -> None:
    split_of_an_absent_chromosome(folder)
    _, _, err = genossm("check", folder / "dataset.yaml")
    assert "for 'B', did you mean chrB?" in err
    misspelled_key(folder)
    _, _, err = genossm("check", folder / "dataset.yaml")
    assert "did you mean 'aggregate'?" in err


def test_errors_as_json(folder: Path, genossm: Command) -> None:
    empty_peaks(folder)
    status, out, _ = genossm("check", folder / "dataset.yaml", "--json")
    assert status == 1
    error = json.loads(out)["error"]
    assert error["type"] == "DataError"
    assert "has no peak" in error["message"]


def test_the_offered_repair_works(folder: Path, genossm: Command) -> None:
    expected = check(folder / "dataset.yaml")
    other_names(folder)
    entries = [
        (chrom, start, start + 200, 2.0)
        for chrom, length in (("A", 40_000), ("B", 20_011))
        for start in range(1_000, length - 200, 2_000)
    ]
    bigwig(folder / "signal.bw", {"A": 40_000, "B": 20_011, "Un_7": 50}, entries)
    status, _, err = genossm("check", folder / "dataset.yaml")
    assert status == 1
    assert err.count("set `chrom_names: repair`") == 2
    status, _, _ = genossm("check", folder / "dataset.yaml", "--set", "chrom_names=repair")
    assert status == 0
    repaired = check(folder / "dataset.yaml", ["chrom_names=repair"])
    assert repaired.tracks.equals(expected.tracks)
    assert "peaks.narrowPeak: renamed 31" in repaired.notes
    assert "signal.bw: left out Un_7, not in the genome" in repaired.notes


def test_unknown_chromosomes_can_be_skipped(folder: Path) -> None:
    expected = check(folder / "dataset.yaml")
    unknown_chromosome(folder)
    report = check(folder / "dataset.yaml", ["unknown=skip"])
    assert report.tracks.equals(expected.tracks)
    assert "peaks.narrowPeak: skipped unknown 1" in report.notes


def test_all_problems_are_listed_at_once(folder: Path) -> None:
    peak_past_the_end(folder)
    no_bigwig(folder)
    split_of_an_absent_chromosome(folder)
    edit(folder / "dataset.yaml", "window:", "exclude: [none.bed]\nwindow:")
    with pytest.raises(DataError) as caught:
        check(folder / "dataset.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in the dataset:"
    for number, part in enumerate(
        ["split valid names", "none.bed does not exist", "past the end", "no bigWig"], 1
    ):
        assert lines[number].startswith(f"  {number}. ")
        assert part in lines[number]


def test_one_problem_keeps_its_kind(folder: Path) -> None:
    missing_genome(folder)
    with pytest.raises(FileError, match=r"genome\.fa does not exist"):
        check(folder / "dataset.yaml")


def test_exclusions_mask_bins(folder: Path) -> None:
    (folder / "mask.bed").write_text("chrB\t0\t10000\nchrA\t0\t500\nchrB\t20000\t20050\n")
    report = check(folder / "dataset.yaml", ["exclude=mask.bed"])
    tracks = report.tracks.set_index(["track", "split"])
    # chrB: 626 bins; [0, 10000) masks 312 whole ones and the next (16 of 32); the last bin has 11 bases, all
    # masked.
    assert tracks.loc[("peaks", "valid"), "unmasked"] == 626 - 313 - 1
    assert tracks.loc[("peaks", "train"), "unmasked"] == 1_234
    excluded = report.chromosomes.set_index("chromosome")["excluded"]
    assert excluded["chrB"] == pytest.approx((10_000 + 11) / 20_011)
    (folder / "mask.bed").write_text("")
    assert (
        "mask.bed excludes nothing on the chromosomes in use"
        in check(folder / "dataset.yaml", ["exclude=mask.bed"]).notes
    )


def test_mitochondria_are_out_unless_the_split_names_them(folder: Path) -> None:
    with (folder / "genome.fa").open("a") as file:
        file.write(">chrM\n" + "ACGT" * 100 + "\n>chr1_random\nACGTACGT\n")
    assert "chrM" not in set(check(folder / "dataset.yaml").chromosomes["chromosome"])
    report = check(folder / "dataset.yaml", ["split.test=[chrC, chrM]"])
    assert report.chromosomes.set_index("chromosome")["split"].to_dict() == {
        "chrA": "train",
        "chrB": "valid",
        "chrC": "test",
        "chrM": "test",
    }
    report = check(folder / "dataset.yaml", ["split.train=[chrA]"])
    assert list(report.chromosomes["chromosome"]) == ["chrA", "chrB", "chrC"]
    report = check(folder / "dataset.yaml", ["split.train=[]"])
    assert list(report.chromosomes["chromosome"]) == ["chrB", "chrC"]


def test_a_length_that_differs_off_the_chromosomes_in_use_is_only_noted(folder: Path) -> None:
    with (folder / "genome.fa").open("a") as file:
        file.write(">chrM\n" + "ACGT" * 100 + "\n")
    bigwig(folder / "signal.bw", {"chrA": 40_000, "chrB": 20_011, "chrC": 1_234, "chrM": 399})
    assert "signal.bw: another length of chrM, not in use" in check(folder / "dataset.yaml").notes


def test_negative_values_are_fine_with_squared_error(folder: Path) -> None:
    negative_signal(folder)
    edit(folder / "dataset.yaml", "aggregate: sum", "aggregate: sum, loss: mse")
    tracks = check(folder / "dataset.yaml").tracks.set_index(["track", "split"])
    assert tracks.loc[("signal", "train"), "mean"] == pytest.approx(-48 / 1_234)


def test_tallies_agree_with_numpy() -> None:
    random = np.random.default_rng(3)
    parts: list[tuple[Any, Any]] = [
        (random.random(size).astype(np.float32), random.random(size) < 0.7) for size in (5, 1, 100, 0)
    ]
    tally = Tally()
    for values, mask in parts:
        tally.add(values, mask)
    kept = np.concatenate([values[mask] for values, mask in parts]).astype(np.float64)
    assert tally.summary() == pytest.approx(
        {"bins": 106, "unmasked": kept.size, "mean": kept.mean(), "std": kept.std(), "max": kept.max()}
    )
    empty = {"bins": 0, "unmasked": 0, "mean": None, "std": None, "max": None}
    assert Tally().summary() == empty
    statistics = Statistics()
    statistics.add(TrackConfig("p", "p.bed", "peaks"), "valid", *parts[0])
    mapping = statistics.to_mapping()["p"]
    assert list(mapping) == ["all", "train", "valid", "test"]
    assert mapping["train"] == empty
    assert mapping["valid"] == mapping["all"]


def test_a_split_without_positives_is_noted(folder: Path) -> None:
    peaks = folder / "peaks.narrowPeak"
    rows = peaks.read_text().splitlines(keepends=True)
    peaks.write_text("".join(row for row in rows if not row.startswith("chrB")))
    notes = check(folder / "dataset.yaml").notes
    assert "peaks.narrowPeak (track peaks) has no peak on chrB: bins there are negatives" in notes
    assert "track peaks: no positive bin in the valid split" in notes
