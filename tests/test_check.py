"""`check`: the files of a dataset agree, or every one that does not is named."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import subprocess
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
    assert report.splits["split"].tolist() == ["train", "valid", "test"]
    assert report.splits["length"].tolist() == list(tiny_lengths.values())
    letters = {
        name: bases.replace("\n", "")
        for name, _, bases in (
            record.partition("\n") for record in (folder / "genome.fa").read_text().split(">")[1:]
        )
    }
    gc = {
        name: sum(map(bases.count, "GC")) / sum(map(bases.count, "ACGT")) for name, bases in letters.items()
    }
    assert chromosomes["gc"].to_dict() == pytest.approx(gc)
    assert report.splits["gc"].tolist() == pytest.approx(list(gc.values()))
    assert report.splits["in_train"].tolist()[1:] == [0, 0]
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
    assert tracks.loc[("peaks", "train"), "positives"] == positive
    assert tracks.loc[("signal", "train"), "total"] == pytest.approx(20 * 200 * 2.0)
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
    # Tracks that prepare had finished wait there for the next attempt.
    assert sorted(path for path in folder.iterdir() if path.name != ".prepared.preparing") == before


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


def test_copies_between_splits_are_noted(folder: Path) -> None:
    text = (folder / "genome.fa").read_text()
    start, end = text.index(">chrA"), text.index(">chrB")
    copied = "".join(text[start:end].split("\n")[1:])[10_000:14_000]
    chr_c = text.index(">chrC") + len(">chrC\n")
    (folder / "genome.fa").write_text(text[:chr_c] + f"{copied}\n" + text[chr_c:].replace("\n", ""))
    report = check(folder / "dataset.yaml", ["tracks=[{name: p, file: peaks.narrowPeak, kind: peaks}]"])
    share = report.splits.set_index("split")["in_train"]["test"]
    assert share == pytest.approx((4_000 - 49) / (5_234 - 49))
    assert (
        f"{share:.1%} of the 50-mers of the test split stand in the training chromosomes, too (1 in 1 looked at): "
        "copies, which a model can remember; add repeats and duplications to `exclude`"
    ) in report.notes
    (folder / "mask.bed").write_text("chrC\t0\t4000\n")
    masked = check(folder / "dataset.yaml", ["exclude=mask.bed"])
    assert masked.splits.set_index("split")["in_train"]["test"] == 0
    assert not any("50-mers" in note for note in masked.notes)


def test_a_fold_of_the_genome_is_printed(folder: Path, genossm: Command) -> None:
    edit(
        folder / "dataset.yaml",
        "{valid: [chrB], test: [chrC]}",
        "{n_folds: 3, fold: 0}\nchroms: [chrA, chrB, chrC]",
    )
    status, out, _ = genossm("check", folder / "dataset.yaml")
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(("train", "valid", "test"))] == [
        [split, "1"] for split in ("train", "valid", "test")
    ]


# The same figures on the real data, once in plain numpy and once by bedtools.

SPLITS = {"valid": ("chrIX", "chrXI"), "test": ("chrIV", "chrXIII", "chrXV")}
BIN_BP = 32


@pytest.fixture(scope="module")
def yeast(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of the real files, and what `check` says of peaks, and of cut sites from fragments."""
    source = realdata / "sacCer3"
    folder = tmp_path_factory.mktemp("yeast")
    (folder / "dataset.yaml").write_text(
        f"assembly: sacCer3\ngenome: {source}/sacCer3.fa.gz\nexclude: [{source}/mask_repeats.bed]\n"
        f"tracks:\n  - {{name: peaks, file: {source}/atac_macs2_peaks.narrowPeak, kind: peaks}}\n"
        f"  - {{name: cuts, file: {source}/atac_SRR1822137_500k.bedpe.gz, kind: signal, aggregate: sum}}\n"
        "split: {valid: [chrIX, chrXI], test: [chrIV, chrXIII, chrXV]}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENOSSM_CACHE", str(folder))
        return source, check(folder / "dataset.yaml")


def split_of(chrom: str) -> str:
    return next((split for split, names in SPLITS.items() if chrom in names), "train")


def bases_per_bin(covered: Any) -> Any:
    return np.add.reduceat(covered, np.arange(0, covered.size, BIN_BP), dtype=np.int64)


@pytest.mark.realdata
def test_real_figures_agree_with_numpy(yeast: tuple[Path, Any]) -> None:
    source, report = yeast
    letters: dict[str, Any] = {}
    for record in gzip.decompress((source / "sacCer3.fa.gz").read_bytes()).split(b">")[1:]:
        name, _, bases = record.partition(b"\n")
        if name != b"chrM":
            letters[name.decode()] = np.frombuffer(bases.replace(b"\n", b""), dtype="S1")
    covered = {}
    for file in ("mask_repeats.bed", "atac_macs2_peaks.narrowPeak"):
        covered[file] = {chrom: np.zeros(bases.size, dtype=bool) for chrom, bases in letters.items()}
        for row in (source / file).read_text().splitlines():
            chrom, start, end = row.split("\t")[:3]
            if chrom in letters:
                covered[file][chrom][int(start) : int(end)] = True
    cuts = {chrom: np.zeros(bases.size, dtype=np.int64) for chrom, bases in letters.items()}
    for row in gzip.decompress((source / "atac_SRR1822137_500k.bedpe.gz").read_bytes()).decode().splitlines():
        chrom, start, end = row.split("\t")
        if chrom in cuts:
            cuts[chrom][int(start) + 4] += 1
            cuts[chrom][int(end) - 5] += 1
    gc = {chrom: np.isin(bases, [b"G", b"C"]).mean() for chrom, bases in letters.items()}
    assert report.chromosomes.set_index("chromosome")["gc"].to_dict() == pytest.approx(gc)
    tracks = report.tracks.set_index(["track", "split"])
    for split in ("all", "train", "valid", "test"):
        bins = unmasked = positives = total = 0
        highest, squares = 0, 0
        for chrom, bases in letters.items():
            if split not in ("all", split_of(chrom)):
                continue
            sizes = bases_per_bin(np.ones(bases.size, dtype=bool))
            kept = bases_per_bin(covered["mask_repeats.bed"][chrom]) < sizes / 4
            peaks = bases_per_bin(covered["atac_macs2_peaks.narrowPeak"][chrom]) >= sizes / 2
            counts = bases_per_bin(cuts[chrom])[kept]
            bins, unmasked = bins + sizes.size, unmasked + int(kept.sum())
            positives, total = positives + int(peaks[kept].sum()), total + int(counts.sum())
            highest, squares = max(highest, int(counts.max())), squares + int((counts**2).sum())
        for track in ("peaks", "cuts"):
            assert tuple(tracks.loc[(track, split), ["bins", "unmasked"]]) == (bins, unmasked)
        assert tracks.loc[("peaks", split), "positives"] == positives
        assert tracks.loc[("peaks", split), "mean"] == pytest.approx(positives / unmasked)
        assert tracks.loc[("cuts", split), "total"] == total
        assert tracks.loc[("cuts", split), "max"] == highest
        assert tracks.loc[("cuts", split), "std"] == pytest.approx(
            math.sqrt(squares / unmasked - (total / unmasked) ** 2)
        )


@pytest.mark.realdata
def test_real_positives_agree_with_bedtools(yeast: tuple[Path, Any], tmp_path: Path) -> None:
    source, report = yeast
    if shutil.which("bedtools") is None:
        pytest.skip("bedtools is not installed")
    bins = tmp_path / "bins.bed"
    bins.write_text(
        "".join(
            f"{row['chromosome']}\t{start}\t{min(start + BIN_BP, row['length'])}\n"
            for row in report.chromosomes.to_dict("records")
            for start in range(0, row["length"], BIN_BP)
        )
    )

    def coverage(file: str) -> list[list[str]]:
        command = ["bedtools", "coverage", "-a", bins, "-b", source / file]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return [line.split("\t") for line in done.stdout.splitlines()]

    tracks = report.tracks.set_index(["track", "split"])
    positives = {"all": 0, "train": 0, "valid": 0, "test": 0}
    pairs = zip(coverage("mask_repeats.bed"), coverage("atac_macs2_peaks.narrowPeak"), strict=True)
    for (chrom, _, _, _, masked, size, _), (*_, peaks, _, _) in pairs:
        if int(masked) < int(size) / 4 and int(peaks) >= int(size) / 2:
            positives["all"] += 1
            positives[split_of(chrom)] += 1
    assert {split: tracks.loc[("peaks", split), "positives"] for split in positives} == positives
