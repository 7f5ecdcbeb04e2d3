"""The dataset YAML: relative paths, environment variables, and a sentence for every slip."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import pytest

from genossm.config import build, to_mapping
from genossm.cut_sites import CutOptions
from genossm.dataset_config import (
    DatasetConfig,
    SplitConfig,
    TrackConfig,
    WindowConfig,
    expand_variables,
    load_dataset_config,
)
from genossm.errors import ConfigError, FileError

DESIGN = """\
assembly: sacCer3
genome: sacCer3.fa.gz
exclude: [mask_repeats.bed]
tracks:
  - {name: atac_peaks, file: atac_macs2_peaks.narrowPeak, kind: peaks}
  - {name: atac_cuts, file: ../signal/atac_tn5_cutsites.bw, kind: signal, aggregate: sum}
window: {length: 131072, margin: 16384, bin: 32}
split: {valid: [chrIX, chrXI], test: [chrIV, chrXIII, chrXV]}
"""


def written(folder: Path, text: str) -> Path:
    """`text` as folder/dataset.yaml."""
    path = folder / "dataset.yaml"
    path.write_text(text)
    return path


def changed(old: str, new: str) -> str:
    """The YAML of the design with one piece replaced."""
    assert old in DESIGN
    return DESIGN.replace(old, new)


def test_the_yaml_of_the_design(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    written(tmp_path / "data", DESIGN)
    monkeypatch.chdir(tmp_path)  # paths are relative to the YAML, not to the working folder
    config = load_dataset_config("data/dataset.yaml")
    folder = tmp_path / "data"
    assert config == DatasetConfig(
        assembly="sacCer3",
        genome=str(folder / "sacCer3.fa.gz"),
        exclude=(str(folder / "mask_repeats.bed"),),
        tracks=(
            TrackConfig("atac_peaks", str(folder / "atac_macs2_peaks.narrowPeak"), "peaks"),
            TrackConfig(
                "atac_cuts", str(tmp_path / "signal/atac_tn5_cutsites.bw"), "signal", aggregate="sum"
            ),
        ),
        window=WindowConfig(131_072, 16_384, 32),
        split=SplitConfig(valid=("chrIX", "chrXI"), test=("chrIV", "chrXIII", "chrXV"), train=None),
    )
    assert (config.chrom_names, config.unknown, config.chroms) == ("exact", "error", None)
    assert (config.tracks[0].overlap, config.tracks[1].missing, config.tracks[0].loss) == (0.5, "zero", None)


def test_a_linked_folder_and_its_parent_are_those_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "disk" / "yeast").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "yeast")
    written(tmp_path / "link", changed("genome: sacCer3", "genome: ../sacCer3"))
    config = load_dataset_config(tmp_path / "link" / "dataset.yaml")
    assert config.genome == str(tmp_path / "disk" / "sacCer3.fa.gz")


def test_overrides_replace_keys(tmp_path: Path) -> None:
    path = written(tmp_path, DESIGN)
    overrides = ["window.bin=64", "split.valid=[chrI]", "genome=/data/other.fa", "chrom_names=repair"]
    config = load_dataset_config(path, overrides)
    assert (config.window.bin, config.split.valid, config.chrom_names) == (64, ("chrI",), "repair")
    assert config.genome == "/data/other.fa"


def test_a_single_exclude_file_needs_no_list(tmp_path: Path) -> None:
    config = load_dataset_config(written(tmp_path, changed("[mask_repeats.bed]", "mask.bed")))
    assert config.exclude == (str(tmp_path / "mask.bed"),)


def test_chromosomes_that_look_like_numbers_are_names(tmp_path: Path) -> None:
    text = changed("{valid: [chrIX, chrXI], test: [chrIV, chrXIII, chrXV]}", "{valid: [8, X], test: [9]}")
    config = load_dataset_config(written(tmp_path, text + "chroms: [1, 8, X, 9]\n"))
    assert (config.split.valid, config.split.test) == (("8", "X"), ("9",))
    assert config.chroms == ("1", "8", "X", "9")


def test_the_split_may_be_a_fold_file(tmp_path: Path) -> None:
    fold = {"train": ["chr2"], "valid": ["chr8", "chr20"], "test": ["chr1"]}
    (tmp_path / "fold_0.json").write_text(json.dumps(fold))
    text = changed("{valid: [chrIX, chrXI], test: [chrIV, chrXIII, chrXV]}", "fold_0.json")
    config = load_dataset_config(written(tmp_path, text))
    assert config.split == SplitConfig(train=("chr2",), valid=("chr8", "chr20"), test=("chr1",))


@pytest.mark.parametrize("form", ["$GENOMES/sacCer3.fa.gz", "${GENOMES}/sacCer3.fa.gz"])
def test_paths_expand_environment_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("GENOMES", "/data/genomes")
    config = load_dataset_config(written(tmp_path, changed("genome: sacCer3.fa.gz", f"genome: {form}")))
    assert config.genome == "/data/genomes/sacCer3.fa.gz"


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("genome: sacCer3.fa.gz", "genome: $GENOSSM_NO_SUCH/a.fa", "genome"),
        ("[mask_repeats.bed]", "[$GENOSSM_NO_SUCH/a.bed]", "exclude"),
        ("file: atac_macs2_peaks.narrowPeak", "file: $GENOSSM_NO_SUCH/a.bed", "track atac_peaks"),
        ("{valid: [chrIX, chrXI], test: [chrIV, chrXIII, chrXV]}", "$GENOSSM_NO_SUCH/fold.json", "split"),
    ],
)
def test_a_variable_that_is_not_set_is_named(tmp_path: Path, old: str, new: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_dataset_config(written(tmp_path, changed(old, new)))
    message = str(caught.value)
    assert f": {where}: '$GENOSSM_NO_SUCH/" in message
    assert "needs the environment variable GENOSSM_NO_SUCH, which is not set" in message
    assert "export GENOSSM_NO_SUCH=" in message


def test_an_empty_or_misspelled_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENOSSM_REALDATA", "")
    with pytest.raises(ConfigError, match="GENOSSM_REALDATA, which is empty"):
        expand_variables("$GENOSSM_REALDATA/a.fa", "here")
    monkeypatch.setenv("GENOSSM_REALDATA", "/data")
    with pytest.raises(ConfigError, match=r"did you mean \$GENOSSM_REALDATA\?"):
        expand_variables("$GENOSSM_REALDTA/a.fa", "here")
    assert expand_variables("$GENOSSM_REALDATA/${GENOSSM_REALDATA}/b", "here") == "/data//data/b"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("genome: sac", "gemome: sac", "unknown key 'gemome'.*did you mean 'genome'"),
        ("kind: peaks}", "kind: peaks, agregate: sum}", "unknown key 'agregate'.*did you mean 'aggregate'"),
        ("margin: 16384", "margins: 16384", "unknown key 'margins'.*did you mean 'margin'"),
        ("valid: [", "vaild: [", "unknown key 'vaild'.*did you mean 'valid'"),
        ("assembly: sacCer3\n", "", "lacks the key 'assembly'"),
        ("assembly: sacCer3", "assembly: ''", "assembly is empty"),
        ("valid: [chrIX, chrXI], ", "", "lacks the key 'valid'"),
        ("kind: peaks}", "kind: peak}", "is 'peak'; allowed are peaks, signal"),
        ("aggregate: sum", "aggregate: median", "is 'median'; allowed are mean, sum, max"),
        ("kind: peaks}", "kind: peaks, overlap: 0}", "overlap 0.0 of track 'atac_peaks'"),
        ("kind: peaks}", "kind: peaks, overlap: 1.5}", "overlap 1.5 of track 'atac_peaks'"),
        ("kind: peaks}", "kind: peaks, loss: mse}", "kind peaks, for which 'loss' has no meaning"),
        ("kind: peaks}", "kind: peaks, missing: mask}", "kind peaks, for which 'missing' has no meaning"),
        ("aggregate: sum", "overlap: 0.1", "kind signal, for which 'overlap' has no meaning"),
        ("name: atac_cuts", "name: atac/cuts", "track name 'atac/cuts': it becomes a file name"),
        ("name: atac_cuts", "name: .hidden", "track name '.hidden'"),
        ("name: atac_cuts", "name: atac_peaks", "two tracks are called 'atac_peaks'"),
        ("file: atac_macs2_peaks.narrowPeak", "file: ''", "track 'atac_peaks' has an empty file name"),
        ("length: 131072", "length: 131000", "must both be multiples of the bin"),
        ("margin: 16384", "margin: 65536", "leaves 0 bp of target"),
        ("bin: 32", "bin: 0", "bin of 0 bp"),
        ("bin: 32", "bin: wide", "is 'wide'; a whole number is needed"),
        ("test: [chrIV", "test: [chrIX, chrIV", "chromosome 'chrIX' is in valid and test"),
        ("valid: [chrIX", "valid: [chrIX, chrIX", "chromosome 'chrIX' is in valid twice"),
        ("valid: [chrIX", "train: [chrXV], valid: [chrIX", "chromosome 'chrXV' is in train and test"),
        ("valid: [chrIX, chrXI]", "valid: chrIX", "a list is needed"),
        ("window:", "chroms: []\nwindow:", "chroms is an empty list"),
        ("window:", "unknown: ignore\nwindow:", "is 'ignore'; allowed are error, skip"),
    ],
)
def test_a_slip_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, changed(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        load_dataset_config(path)
    assert str(path) in str(caught.value)


PAIR = """\
  - {name: cage_plus, file: plus.bw, kind: signal, aggregate: sum, strand: "+", partner: cage_minus}
  - {name: cage_minus, file: minus.bw, kind: signal, aggregate: sum, strand: "-", partner: cage_plus}
window"""


def test_the_two_tracks_of_a_stranded_assay_name_each_other(tmp_path: Path) -> None:
    config = load_dataset_config(written(tmp_path, changed("window", PAIR)))
    assert [(track.strand, track.partner) for track in config.tracks] == [
        (".", None),
        (".", None),
        ("+", "cage_minus"),
        ("-", "cage_plus"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('strand: "-"', "strand: minus", "is 'minus'; allowed are"),
        ('strand: "-", ', "", "'cage_minus' has the strand '.' and the partner 'cage_plus'"),
        ('strand: "-"', 'strand: "+"', "partners name each other, and are of opposite strands"),
        ("partner: cage_plus", "partner: atac_cuts", "partners name each other"),
        (
            'aggregate: sum, strand: "-"',
            'aggregate: max, strand: "-"',
            r"differ in 'aggregate' \(sum and max\); give both the same",
        ),
        (', strand: "-"', ', loss: mse, strand: "-"', r"differ in 'loss' \(None and mse\)"),
        (
            ', strand: "-"',
            ', scale: {squash: sqrt}, strand: "-"',
            r"differ in 'scale' \(None and ScaleConfig",
        ),
    ],
)
def test_partners_that_do_not_match_are_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PAIR
    with pytest.raises(ConfigError, match=message):
        load_dataset_config(written(tmp_path, changed("window", PAIR.replace(old, new))))


def test_no_tracks_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, DESIGN)
    with pytest.raises(ConfigError, match="tracks is empty"):
        load_dataset_config(path, ["tracks=[]"])
    with pytest.raises(ConfigError, match=r"tracks is 5; a list is needed"):
        load_dataset_config(path, ["tracks=5"])
    with pytest.raises(FileError, match=r"tracks\.tsv does not exist"):
        load_dataset_config(path, ["tracks=tracks.tsv"])


def test_a_missing_yaml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot read the configuration"):
        load_dataset_config(tmp_path / "none.yaml")


def test_the_shipped_yeast_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENOSSM_REALDATA", "/data")
    shipped = importlib.resources.files("genossm.configs") / "yeast-dataset.yaml"
    with importlib.resources.as_file(shipped) as path:
        config = load_dataset_config(path)
    assert config.genome == "/data/sacCer3/sacCer3.fa.gz"
    assert [(track.name, track.kind, track.aggregate, track.loss) for track in config.tracks] == [
        ("atac_peaks", "peaks", "mean", None),
        ("atac_regions", "peaks", "mean", None),
        ("atac_cuts", "signal", "sum", None),
        ("mnase_occupancy", "signal", "mean", "mse"),
    ]
    assert config.split == SplitConfig(valid=("chrIX", "chrXI"), test=("chrIV", "chrXIII", "chrXV"))


SPLIT = "{valid: [chrIX, chrXI], test: [chrIV, chrXIII, chrXV]}"


def test_several_files_of_a_track(tmp_path: Path) -> None:
    text = changed(
        "file: atac_macs2_peaks.narrowPeak, kind: peaks",
        "files: [a.bed, ../b.bed], kind: peaks, min_samples: 2",
    )
    track = load_dataset_config(written(tmp_path, text)).tracks[0]
    assert (track.file, track.min_samples) == ("", 2)
    assert (
        track.paths
        == track.input_files
        == track.files
        == (str(tmp_path / "a.bed"), str(tmp_path.parent / "b.bed"))
    )
    assert build(TrackConfig, to_mapping(track), where="dataset.json") == track
    assert TrackConfig("a", "a.bed", "peaks").paths == ("a.bed",)


def test_options_of_cut_sites(tmp_path: Path) -> None:
    options = "shift: [0, 0], min_mapq: 10, deduplicate: false, barcodes: groups.tsv, group: T cells"
    text = changed("kind: signal", f"kind: signal, {options}, metadata: {{biosample: K562}}")
    track = load_dataset_config(written(tmp_path, text)).tracks[1]
    assert track.cut_options() == CutOptions((0, 0), 10, False, str(tmp_path / "groups.tsv"))
    assert (track.group, track.metadata) == ("T cells", {"biosample": "K562"})
    assert track.input_files == (track.file, str(tmp_path / "groups.tsv"))
    assert build(TrackConfig, to_mapping(track), where="dataset.json") == track and hash(track)
    assert TrackConfig("a", "a.bam", "signal").cut_options() == CutOptions()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: peaks", "kind: peaks, files: [a.bed]", "track 'atac_peaks' has both `file` and `files`"),
        ("file: atac_macs2_peaks.narrowPeak,", "files: [],", "track 'atac_peaks' has an empty file name"),
        ("file: atac_macs2_peaks.narrowPeak,", "files: a.bed,", r"files is 'a\.bed'; a list is needed"),
        ("file: atac_macs2_peaks.narrowPeak,", "files: [a.bed, a.bed],", "names .*a.bed twice"),
        (
            "kind: peaks",
            "kind: peaks, min_samples: 2",
            "min_samples 2 of track 'atac_peaks': .* number of its files, 1",
        ),
        (
            "kind: peaks",
            "kind: peaks, combine: sum",
            "for which 'combine' has no meaning; remove `combine: sum`",
        ),
        ("kind: peaks", "kind: peaks, shift: [0, 0]", "for which 'shift' has no meaning"),
        ("kind: signal", "kind: signal, min_samples: 0", "min_samples 0 of track 'atac_cuts'"),
        ("kind: signal", "kind: signal, barcodes: a.tsv", "needs both `barcodes` .* and `group`"),
        ("kind: signal", "kind: signal, group: T", "needs both `barcodes` .* and `group`"),
        (
            "kind: signal",
            "kind: signal, shift: [4]",
            r"track 'atac_cuts': shift is \[4\]: give two whole numbers",
        ),
        ("kind: signal", "kind: signal, min_mapq: 300", "track 'atac_cuts': min_mapq is 300"),
        ("kind: signal", "kind: signal, combine: max", "is 'max'; allowed are mean, sum"),
        (SPLIT, "{n_folds: 5}", "fold is None: with `n_folds: 5` give the one for test, 0 to 4"),
        (SPLIT, "{n_folds: 5, fold: 5}", "fold is 5: with `n_folds: 5`"),
        (SPLIT, "{n_folds: 2, fold: 0}", "n_folds is 2: at least 3"),
        (SPLIT, "{n_folds: 5, fold: 0, test: [chrI]}", "`n_folds` makes the splits: remove"),
        (SPLIT, "{valid: [chrI], test: [chrII], fold: 1}", r"`fold` needs `folds` \(a file\) or `n_folds`"),
        (SPLIT, "{valid: [chrI], test: [chrII], seed: 1}", "`seed` needs `n_folds`"),
        (SPLIT, "{valid: [chrI], test: [chrII], balance: positives}", "`balance` needs `n_folds`"),
        (SPLIT, "{n_folds: 5, fold: 0, balance: peaks}", "is 'peaks'; allowed are bases, positives"),
    ],
)
def test_a_slip_in_the_newer_keys_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_dataset_config(written(tmp_path, changed(old, new)))


def test_a_fold_of_a_file_of_folds(tmp_path: Path) -> None:
    folds = [{"valid": [8, "X"], "test": [9]}, {"train": ["chr2"], "valid": ["chr8"], "test": ["chr1"]}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "folds.json").write_text(json.dumps({"folds": folds}))
    path = written(tmp_path, changed(SPLIT, "{folds: data/folds.json, fold: 1}"))
    split = load_dataset_config(path).split
    where = str(tmp_path / "data" / "folds.json")
    assert split == SplitConfig(valid=("chr8",), test=("chr1",), train=("chr2",), folds=where, fold=1)
    assert build(SplitConfig, to_mapping(split), where="dataset.json") == split
    assert load_dataset_config(path, ["split.fold=0"]).split.valid == ("8", "X")
    with pytest.raises(ConfigError, match=r"folds\.json has 2 folds, and fold is 7"):
        load_dataset_config(path, ["split.fold=7"])
    with pytest.raises(ConfigError, match="has both `folds` and `test`"):
        load_dataset_config(path, ["split.test=[chr5]"])
    with pytest.raises(FileError, match=r"none\.json"):
        load_dataset_config(path, ["split.folds=none.json"])


def test_folds_that_the_genome_gives(tmp_path: Path) -> None:
    split = load_dataset_config(
        written(tmp_path, changed(SPLIT, "{n_folds: 5, fold: 2, seed: 7, balance: positives}"))
    ).split
    assert split == SplitConfig((), (), None, n_folds=5, fold=2, seed=7, balance="positives")
    assert build(SplitConfig, to_mapping(split), where="dataset.json") == split


def test_tracks_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tables").mkdir()
    table = tmp_path / "tables" / "tracks.tsv"
    table.write_text(
        "name\tkind\tfiles\tbarcodes\tgroup\tbiosample\n"
        "a\tpeaks\ta.bed, $GENOSSM_SOME/b.bed\t\t\tK562\n"
        "b\tsignal\t../fragments.tsv.gz\tgroups.tsv\tT\t\n"
    )
    monkeypatch.setenv("GENOSSM_SOME", "/some")
    start = DESIGN.index("tracks:")
    text = DESIGN[:start] + "tracks: tables/tracks.tsv\n" + DESIGN[DESIGN.index("window:") :]
    config = load_dataset_config(written(tmp_path, text))
    assert config.tracks == (
        TrackConfig(
            "a",
            "",
            "peaks",
            files=(str(table.parent / "a.bed"), "/some/b.bed"),
            metadata={"biosample": "K562"},
        ),
        TrackConfig(
            *("b", "", "signal"),
            files=(str(tmp_path / "fragments.tsv.gz"),),
            barcodes=str(table.parent / "groups.tsv"),
            group="T",
        ),
    )
    assert build(DatasetConfig, to_mapping(config), where="dataset.json") == config
    table.write_text("name\tkind\tfile\taggregate\na\tsignal\ta.bw\t\nb\tsignal\tb.bw\tmedian\n")
    with pytest.raises(
        ConfigError, match=r"tracks\.tsv, line 3: aggregate is 'median'; allowed are mean, sum, max"
    ):
        load_dataset_config(tmp_path / "dataset.yaml")
    table.write_text("name\tkind\tfile\na\tsignal\t$GENOSSM_NONE/a.bw\n")
    with pytest.raises(ConfigError, match=r"tracks\.tsv, line 2: track a: .* GENOSSM_NONE, which is not set"):
        load_dataset_config(tmp_path / "dataset.yaml")


def test_partners_count_their_cut_sites_alike(tmp_path: Path) -> None:
    text = changed("window", PAIR.replace('sum, strand: "-"', 'sum, shift: [0, 0], strand: "-"'))
    with pytest.raises(ConfigError, match=r"differ in 'shift'"):
        load_dataset_config(written(tmp_path, text))
