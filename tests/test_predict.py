"""Prediction against an independent per-bin computation, and its promises: grid, gaps, resume, refusals."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pybigtools
import pyBigWig
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from genossm.errors import ConfigError, DataError, DeviceError
from genossm.genome import Genome
from genossm.interval import Interval
from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.heads import TrackHead
from genossm.models.stem import StemConfig
from genossm.pipelines import merge as merge_module
from genossm.pipelines import plan as plan_module
from genossm.pipelines.parts import Parts
from genossm.pipelines.plan import OutputOptions, Plan, PlannedTrack, settle
from genossm.pipelines.predict import predict, predict_chromosome
from genossm.pipelines.selection import select

BIN_BP, REACH_BINS = 32, 5
TRACKS = (TrackHead("gc", "peaks", "bce"), TrackHead("a_count", "signal", "poisson", "sum"))


class CountingModel(nn.Module):
    """GC fraction of the 11 bins around a bin (no further than the margin), and its number of A."""

    def __init__(self, window_bp: int = 1024, margin_bp: int = 192, fail_after: int | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.tracks, self.bin_bp, self.window_bp, self.margin_bp = TRACKS, BIN_BP, window_bp, margin_bp
        self.strands, self.assembly, self.provenance = "equivariant", "tiny", {"seed": 1}
        self.threshold = {"gc": 0.55}
        self.windows, self.fail_after = 0, fail_after
        self.batches: list[int] = []

    def predict(self, tokens: Tensor) -> Tensor:
        assert tokens.dtype == torch.int8
        assert tokens.shape[1] == self.window_bp
        assert not self.training
        self.windows += len(tokens)
        self.batches.append(len(tokens))
        if self.fail_after is not None and self.windows > self.fail_after:
            raise KeyboardInterrupt
        bins = tokens.reshape(len(tokens), -1, BIN_BP)
        gc = ((bins == 1) | (bins == 2)).double().mean(2)
        gc = functional.avg_pool1d(gc[:, None], 2 * REACH_BINS + 1, 1, REACH_BINS, count_include_pad=True)[
            :, 0
        ]
        a_count = (bins == 0).double().sum(2)
        return (torch.stack([gc, a_count], 2) * self.scale).float()


def expected(genome: Genome, chrom: str) -> npt.NDArray[np.float32]:
    """The same by plain numpy over the whole chromosome, without windows."""
    codes = np.array(genome.chromosome(chrom))
    bins = -(-len(codes) // BIN_BP)
    real = np.minimum(BIN_BP, len(codes) - np.arange(bins) * BIN_BP)
    padded = np.full(bins * BIN_BP, 4)
    padded[: len(codes)] = codes
    table = padded.reshape(bins, BIN_BP)
    gc = np.pad(np.isin(table, (1, 2)).mean(1), REACH_BINS)
    smooth = np.array([gc[i : i + 2 * REACH_BINS + 1].mean() for i in range(bins)])
    values = np.stack([smooth, (table == 0).sum(1)], 1).astype(np.float32)
    absent = np.array([(codes[i * BIN_BP : (i + 1) * BIN_BP] == 4).sum() for i in range(bins)])
    values[2 * absent > real] = np.nan
    return values


def from_bigwig(path: Path, chrom: str, length_bp: int) -> npt.NDArray[np.float32]:
    """Per-bin values, NaN = gap, by two readers; fails unless records are sorted, disjoint, one bin each."""
    values = np.full(-(-length_bp // BIN_BP), np.nan, dtype=np.float32)
    with pyBigWig.open(str(path)) as handle:
        records = handle.intervals(chrom) or ()
    assert records == tuple(pybigtools.open(str(path)).records(chrom))
    starts = np.array([start for start, _, _ in records], dtype=np.int64)
    ends = np.array([end for _, end, _ in records], dtype=np.int64)
    assert (starts[1:] >= ends[:-1]).all()
    assert (starts % BIN_BP == 0).all()
    np.testing.assert_array_equal(ends, np.minimum(starts + BIN_BP, length_bp))
    values[starts // BIN_BP] = [value for _, _, value in records]
    return values


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    """long: N runs that end inside bins, a last bin of 5 bp; short: less than a window; tail: ends in N."""
    folder = tmp_path_factory.mktemp("genome")
    random = np.random.default_rng(11)
    lengths = {"chrLong": 20_005, "chrShort": 100, "chrOne": 3, "chrTail": 3_000}
    with (folder / "g.fa").open("w") as handle:
        for chrom, length_bp in lengths.items():
            bases = random.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
            if chrom == "chrLong":
                bases[5_000:9_000] = b"N"  # more than whole windows
                bases[10_000:10_016] = b"N"
                bases[10_240:10_256] = b"N"  # exactly half of a bin: no gap
                bases[10_304:10_321] = b"N"  # one more than half: a gap
            if chrom == "chrTail":
                bases[2_500:] = b"N"
            handle.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    return Genome(folder / "g.fa")


def tiny_model(seed: int = 0, window_bp: int = 2048, margin_bp: int = 512) -> AccessibilityModel:
    """A real model with random weights, large enough for predictions that differ from bin to bin."""
    torch.manual_seed(seed)
    stem = StemConfig(channels=(8, 8, 8, 8))
    encoder = EncoderConfig(width=16, pattern=("mamba2",), stem=stem, state=8, head_dim=8)
    tracks = [TrackHead("peaks", "peaks", "bce"), TrackHead("cuts", "signal", "poisson", "sum", mean=2.0)]
    model = AccessibilityModel(
        ModelConfig(encoder, head_hidden=16),
        tracks,
        window_bp=window_bp,
        margin_bp=margin_bp,
        assembly="tiny",
    )
    with torch.no_grad():
        model.heads.output.weight.mul_(50)
    return model.eval()


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, genome: Genome) -> Run:
    def call(name: str = "out", model: Any = None, **options: Any) -> Any:
        return predict(
            model or CountingModel(), options.pop("genome", genome), tmp_path / name, device="cpu", **options
        )

    return call


def test_whole_genome_equals_a_computation_without_windows(run: Run, genome: Genome) -> None:
    result = run(hdf5=True, hdf5_dtype="float32")
    assert [file.name for file in result.files] == ["gc.bw", "a_count.bw", "predictions.h5", "qc.bed"]
    gaps = 0
    with h5py.File(result.folder / "predictions.h5") as arrays:
        assert list(arrays.attrs["tracks"]) == ["gc", "a_count"]
        for chrom, length_bp in genome.lengths.items():
            truth = expected(genome, chrom)
            gaps += int(np.isnan(truth[:, 0]).sum())
            np.testing.assert_allclose(arrays[chrom]["predictions"][:], truth, rtol=1e-6)
            for track, name in enumerate(("gc", "a_count")):
                found = from_bigwig(result.folder / f"{name}.bw", chrom, length_bp)
                np.testing.assert_allclose(found, truth[:, track], rtol=1e-6)
    with pyBigWig.open(str(result.folder / "gc.bw")) as handle:
        assert list(handle.chroms().items()) == list(genome.lengths.items())
    assert gaps > 100
    assert result.summary["gap_bins"] == gaps
    assert result.summary["bases"] == sum(genome.lengths.values())
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "a_count.bw",
        "gc.bw",
        "predictions.h5",
        "qc.bed",
        "run.json",
    ]


def test_run_json_says_what_was_run(run: Run, genome: Genome) -> None:
    record = json.loads((run().folder / "run.json").read_text())
    assert record["genome"]["sha256"] == genome.sha256
    assert len(record["identity"]["weights_sha256"]) == 64
    assert (record["mode"], record["bin_bp"], record["strands"]) == ("windows", 32, "equivariant")
    assert {"genossm", "torch", "numpy"} <= set(record["versions"])
    assert record["device"].startswith("CPU")
    assert record["model"]["provenance"] == {"seed": 1}


def test_windows_of_n_never_reach_the_model(genome: Genome) -> None:
    model = CountingModel(window_bp=1024, margin_bp=192)
    predict_chromosome(model, genome, "chrLong", batch_size=3)
    assert 0 < model.windows < -(-20_005 // 640)


@pytest.mark.parametrize(("start", "end"), [(0, None), (0, 1), (4_000, 9_500), (20_000, 20_005), (33, 640)])
def test_a_range_equals_the_same_bins_of_the_chromosome(genome: Genome, start: int, end: int | None) -> None:
    done: list[int] = []
    values = predict_chromosome(
        CountingModel(), genome, "chrLong", batch_size=5, start=start, end=end, progress=done.append
    )
    stop = -(-(20_005 if end is None else end) // BIN_BP)
    np.testing.assert_allclose(values, expected(genome, "chrLong")[start // BIN_BP : stop], rtol=1e-6)
    assert sum(done) >= (20_005 if end is None else end) - start


def test_a_real_model_does_not_depend_on_the_batch_size(genome: Genome) -> None:
    model = tiny_model()
    one = predict_chromosome(model, genome, "chrLong", batch_size=1)
    assert np.nanstd(one[:, 0]) > 5e-4  # far above the tolerance
    for batch_size in (2, 7, 64):
        many = predict_chromosome(model, genome, "chrLong", batch_size=batch_size)
        np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


def test_batches_end_with_a_part_and_are_full_within_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 2)
    model, parts = CountingModel(), CountingModel()
    result = run("whole", model, batch_size=7)  # 7 windows a part, of which some are N
    assert len(model.batches) > 3
    assert model.batches.count(7) >= 3 and max(model.batches) == 7
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 1000)
    other = run("other", parts, batch_size=3)
    assert set(parts.batches[:-1]) == {3}  # one part: across all chromosomes
    for name in ("gc.bw", "a_count.bw"):
        assert (other.folder / name).read_bytes() == (result.folder / name).read_bytes()


def plan_of(genome: Genome, part_windows: int = 8, **where: Any) -> Plan:
    """A plan of two tracks in windows of 1,024 bp, without a model."""
    selection = select(genome.lengths, window_bp=1024, margin_bp=192, bin_bp=BIN_BP, **where)
    return Plan(
        identity={"test": 1},
        tracks=(PlannedTrack("a", "peaks", "mean", 0.0, 1.0), PlannedTrack("b", "signal", "sum", 0.0, None)),
        lengths=genome.lengths,
        bins={chrom: rows.tolist() for chrom, rows in selection.bins.items()},
        window_bp=1024,
        margin_bp=192,
        bin_bp=BIN_BP,
        whole=False,
        part_bp=1024 * part_windows,
        options=OutputOptions(None, False, {}),
        assembly="tiny",
        record={},
        command=("genossm", "predict", "RUN"),
    )


def test_finished_parts_are_found_with_all_their_bases(genome: Genome, tmp_path: Path) -> None:
    regions = ["chrLong:3000-9999", "chrLong:19990-20005", "chrTail"]
    plan = plan_of(genome, regions=regions)
    selection = plan.selection
    settle(tmp_path, plan, shard=False, force=False)

    def compute(groups: Any) -> Any:
        for window in (window for group in groups for window in group):
            first, stop = selection.target_bins(window)
            yield np.full((stop - first, 2), float(first), dtype=np.float32)

    done: list[int] = []
    assert Parts(tmp_path, plan).complete(compute, done.append) == 0
    assert done == []
    found = Parts(tmp_path, plan).complete(lambda groups: iter(()), done.append)
    assert found == -(-len(selection.windows) // 8)
    # whole targets of 640 bp: 2560-10240 and 19840-20005 of chrLong, all of chrTail
    assert sum(done) == selection.target_bp == 7_680 + 165 + 3_000


def test_the_model_is_left_where_and_how_it_was(run: Run) -> None:
    model = CountingModel().train()
    run(model=model)
    assert model.training


def test_a_device_that_is_too_small_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: CountingModel, tokens: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CountingModel, "predict", full)
    with pytest.raises(DeviceError, match=r"batches of 4 windows of 1,024 bp; lower the batch size"):
        run()


def test_a_real_model_sees_its_window_and_both_strands(genome: Genome) -> None:
    model = tiny_model()
    values = predict_chromosome(model, genome, "chrTail", batch_size=2)
    tokens = torch.from_numpy(genome.window("chrTail", 1024 - 512, 1024 - 512 + 2048))[None]
    direct = model.predict(tokens)[0, 16:48].numpy()
    np.testing.assert_allclose(values[32:64], direct, rtol=0, atol=1e-5)


def test_regions_and_bed_are_bins_of_the_whole(run: Run, genome: Genome, tmp_path: Path) -> None:
    whole = expected(genome, "chrLong")[:, 0]
    bed = tmp_path / "x.bed"
    bed.write_text("track name=x\nchrLong\t100\t200\nchrLong\t15000\t15001\nchrTail\t0\t64\nchrUn_1\t5\t9\n")
    by_bed = run("bed", bed=bed)
    same = ["chrTail:0-64", Interval("chrLong", 100, 200), "chrLong:15,000-15,001"]
    by_region = run("regions", regions=same)
    assert (by_bed.folder / "gc.bw").read_bytes() == (by_region.folder / "gc.bw").read_bytes()
    wanted = np.zeros(whole.size, dtype=bool)
    wanted[[3, 4, 5, 6, 468]] = True
    found = from_bigwig(by_bed.folder / "gc.bw", "chrLong", 20_005)
    np.testing.assert_allclose(found, np.where(wanted, whole, np.nan), rtol=1e-6)
    assert by_bed.summary["bins"] == 7
    with pyBigWig.open(str(by_bed.folder / "gc.bw")) as handle:
        assert handle.chroms() == genome.lengths
        assert handle.intervals("chrShort") is None


def test_chromosomes_by_name(run: Run, genome: Genome) -> None:
    result = run(chroms=["chrTail", "chrShort"])
    for chrom in ("chrShort", "chrTail"):
        found = from_bigwig(result.folder / "a_count.bw", chrom, genome.lengths[chrom])
        np.testing.assert_allclose(found, expected(genome, chrom)[:, 1])
    assert np.isnan(from_bigwig(result.folder / "a_count.bw", "chrLong", 20_005)).all()


def test_a_lone_name_is_a_list_of_one(run: Run) -> None:
    by_name, by_list = run("name", chroms="chrTail"), run("list", chroms=["chrTail"])
    assert (by_name.folder / "gc.bw").read_bytes() == (by_list.folder / "gc.bw").read_bytes()
    region = run("region", regions="chrTail:0-3000")
    assert (region.folder / "gc.bw").read_bytes() == (by_list.folder / "gc.bw").read_bytes()
    assert run("interval", regions=Interval("chrTail", 0, 64)).summary["bins"] == 2


def test_sequences_give_arrays(run: Run, tmp_path: Path) -> None:
    fasta = tmp_path / "s.fa"
    fasta.write_text(">first insert\n" + "ACGT" * 25 + "\n>second\n" + "GGCC" * 900 + "\n")
    result = run("sequences", genome=None, sequences=fasta, hdf5_dtype="float32")
    assert [file.name for file in result.files] == ["sequences.h5"]
    records = Genome(fasta)
    with h5py.File(result.folder / "sequences.h5") as arrays:
        assert sorted(arrays) == ["first", "second"]
        for name in records.names:
            np.testing.assert_allclose(arrays[name]["predictions"][:], expected(records, name), rtol=1e-6)


def test_called_regions(run: Run, genome: Genome) -> None:
    result = run(call_peaks=True)
    assert result.summary["tracks"]["gc"]["threshold"] == 0.55
    lower = run("lower", call_peaks=True, threshold=0.5)
    rows = [line.split("\t") for line in (lower.folder / "gc.narrowPeak").read_text().splitlines()]
    assert len(rows) == lower.summary["tracks"]["gc"]["regions"] > result.summary["tracks"]["gc"]["regions"]
    covered = np.zeros(20_005, dtype=bool)
    for chrom, start, end, *_ in rows:
        if chrom == "chrLong":
            covered[int(start) : int(end)] = True
    above = np.repeat(expected(genome, "chrLong")[:, 0] >= np.float32(0.5), BIN_BP)[:20_005]
    np.testing.assert_array_equal(covered, above)


def test_an_interrupted_run_goes_on_and_equals_an_unbroken_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 4)
    whole = CountingModel()
    unbroken = run("unbroken", whole, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run("broken", CountingModel(fail_after=14), batch_size=2)
    parts = list((tmp_path / "broken" / ".parts").glob("*.safetensors"))
    assert parts
    assert not list((tmp_path / "broken").glob("*.bw"))
    with pytest.raises(DataError, match="unfinished prediction of another model"):
        run("broken", CountingModel(window_bp=2048))
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 9)  # the run keeps the parts it has
    rest = CountingModel()
    resumed = run("broken", rest, batch_size=3)
    assert "is truncated or damaged; computing it again" in capsys.readouterr().err
    assert rest.windows < whole.windows
    assert not (tmp_path / "broken" / ".parts").exists()
    for name in ("gc.bw", "a_count.bw"):
        assert (resumed.folder / name).read_bytes() == (unbroken.folder / name).read_bytes()


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_predict import CountingModel, plan_module, predict
plan_module.SMALLEST_PART_WINDOWS["cpu"] = 2
class Slow(CountingModel):
    def predict(self, tokens):
        time.sleep(0.05)
        return super().predict(tokens)
predict(Slow(), {genome!r}, {out!r}, device="cpu", batch_size=1)
"""


def test_a_killed_process_leaves_parts_that_the_next_one_uses(
    run: Run, genome: Genome, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    program = KILLED.format(tests=str(Path(__file__).parent), genome=str(genome.path), out=str(out))
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob(".parts/*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    assert len(list(out.glob(".parts/*.safetensors"))) >= 3
    rest = CountingModel()
    resumed = run("killed", rest)
    whole = CountingModel()
    unbroken = run("unbroken", whole)
    assert rest.windows < whole.windows
    for name in ("gc.bw", "a_count.bw"):
        assert (resumed.folder / name).read_bytes() == (unbroken.folder / name).read_bytes()


def interrupted(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_a_folder_of_another_run_is_refused_and_force_replaces_it(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(call_peaks=True)
    again = CountingModel()
    assert run(model=again, call_peaks=True) == first
    assert again.windows == 0
    assert "already holds this prediction" in capsys.readouterr().err
    more = run(hdf5=True)  # same values, other files
    assert sorted(path.name for path in more.folder.iterdir()) == [
        "a_count.bw",
        "gc.bw",
        "predictions.h5",
        "qc.bed",
        "run.json",
    ]
    other = CountingModel()
    with torch.no_grad():
        other.scale.mul_(2)
    before = (first.folder / "gc.bw").read_bytes()
    for options in ({"model": other}, {"chroms": ["chrShort"]}, {"model": CountingModel(window_bp=2048)}):
        with pytest.raises(DataError, match="another model, genome or selection: choose another folder"):
            run(**options)
    assert (first.folder / "gc.bw").read_bytes() == before
    replaced = run(model=other, force=True)
    assert (first.folder / "gc.bw").read_bytes() != before
    assert sorted(path.name for path in replaced.folder.iterdir()) == [
        "a_count.bw",
        "gc.bw",
        "qc.bed",
        "run.json",
    ]
    run(call_peaks=True, model=other)
    monkeypatch.setattr(merge_module, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(force=True)
    monkeypatch.undo()
    assert not (
        first.folder / "gc.narrowPeak"
    ).exists()  # nothing of the replaced one stays, whenever it is killed
    assert sorted(path.name for path in run(force=True).folder.iterdir()) == [
        "a_count.bw",
        "gc.bw",
        "qc.bed",
        "run.json",
    ]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "gc.bw").write_text("mine")
    with pytest.raises(DataError, match=r"already has gc\.bw"):
        run("foreign")
    assert (tmp_path / "foreign" / "gc.bw").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": ["Long:0-100"]}, r"the region 'Long:0-100' names Long, .*: write chrLong for Long"),
        ({"regions": ["chr9:0-100"]}, r"names chr9, which the genome does not have"),
        ({"regions": [Interval("Long", 0, 5)]}, r"write chrLong for Long"),
        ({"regions": ["chrShort:0-101"]}, r"past the end of chrShort"),
        ({"regions": [Interval("chrShort", -5, 5)]}, r"does not lie inside chrShort \(0-100\)"),
        ({"regions": ["nonsense"]}, r"'nonsense' is no region"),
        ({"regions": ["chrShort:7-7"]}, r"nothing to predict"),
        ({"chroms": ["chrLong", "tail"]}, r"names tail, which the genome does not have"),
        ({"chroms": ["chrOne"], "regions": None, "bed": None, "genome": "all_n"}, r"every bin is a gap"),
    ],
)
def test_names_and_regions_that_do_not_fit(
    run: Run, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if options.get("genome") == "all_n":
        (tmp_path / "n.fa").write_text(">chrOne\nNNNNNNNN\n")
        options = options | {"genome": tmp_path / "n.fa"}
    with pytest.raises(DataError, match=message):
        run(**options)
    assert not list((tmp_path / "out").glob("*.bw"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Long\t0\t50", "write chrLong for Long"),
        ("chrShort\t200\t300", "another assembly"),
        ("chrOne\t2\t2", "zero|0 bp|no "),
    ],
)
def test_bed_rows_that_do_not_fit(run: Run, tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "x.bed").write_text(row + "\n")
    with pytest.raises(DataError, match=message):
        run(bed=tmp_path / "x.bed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiles"}, "allowed are windows and chromosome"),
        ({"chunk_bp": 4096}, "chunk_bp is 4096, which the mode windows does not use"),
        ({"spill": "."}, r"spill is \., which the mode windows does not use"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"threshold": 0.5}, "no regions are called"),
        ({"threshold": 7.0, "call_peaks": True}, "between 0 and 1"),
        ({"genome": None}, "neither a genome nor sequences"),
        ({"sequences": "x.fa"}, "no coordinates"),
        ({"chroms": ["chrOne"], "regions": ["chrTail"]}, "either whole chromosomes or regions"),
    ],
)
def test_options_that_contradict_each_other(run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_no_silent_cpu(genome: Genome, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(DeviceError, match="--device cpu"):
        predict(CountingModel(), genome, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_gives_nan_or_infinity_is_an_error(run: Run, value: float) -> None:
    model = CountingModel()
    with torch.no_grad():
        model.scale.fill_(value)
    with pytest.raises(DataError, match="the model gave NaN or infinity"):
        run(model=model)


@pytest.mark.realdata
def test_yeast_chromosome(realdata: Path, tmp_path: Path) -> None:
    genome = Genome(realdata / "sacCer3" / "sacCer3.fa.gz", cache_dir=tmp_path)
    model = tiny_model(window_bp=131_072, margin_bp=16_384)
    result = predict(model, genome, tmp_path / "out", chroms=["chrIV"], device="cpu", batch_size=2)
    sizes = dict(
        line.split("\t") for line in (realdata / "sacCer3" / "sacCer3.chrom.sizes").read_text().splitlines()
    )
    lengths = {chrom: int(size) for chrom, size in sizes.items()}
    values = predict_chromosome(model, genome, "chrIV", batch_size=3)
    assert not np.isnan(values).any()
    assert lengths["chrIV"] % BIN_BP != 0
    for index, name in enumerate(("peaks", "cuts")):
        with pyBigWig.open(str(result.folder / f"{name}.bw")) as handle:
            assert handle.chroms() == lengths
            assert handle.header()["nBasesCovered"] == lengths["chrIV"]
        assert pybigtools.open(str(result.folder / f"{name}.bw")).chroms() == lengths
        found = from_bigwig(result.folder / f"{name}.bw", "chrIV", lengths["chrIV"])
        np.testing.assert_allclose(found, values[:, index], rtol=0, atol=1e-5)


@pytest.mark.realdata
def test_human_slice_with_its_n_runs(realdata: Path, tmp_path: Path) -> None:
    genome = Genome(realdata / "hg38_chr1_1m" / "hg38_chr1_0-1000000.fa.gz", cache_dir=tmp_path)
    model = tiny_model(window_bp=65_536, margin_bp=8_192)
    result = predict(model, genome, tmp_path / "out", device="cpu", batch_size=2)
    found = from_bigwig(result.folder / "peaks.bw", "chr1", 1_000_000)
    absent = (np.array(genome.chromosome("chr1")) == 4).reshape(-1, BIN_BP).sum(1) * 2 > BIN_BP
    assert 0.15 < absent.mean() < 0.18
    np.testing.assert_array_equal(np.isnan(found), absent)
    assert result.summary["gap_bins"] == absent.sum()


def test_several_models_are_averaged_in_one_pass(run: Run, genome: Genome) -> None:
    models = [tiny_model(seed) for seed in (1, 2, 3)]
    options = {"hdf5": True, "hdf5_dtype": "float32", "call_peaks": True, "chroms": ["chrTail", "chrOne"]}
    models[0].threshold, models[1].threshold = {"peaks": 0.2}, {"peaks": 0.3}
    together = run("together", models, **options)
    single = [run(f"single{index}", model, **options) for index, model in enumerate(models)]
    for chrom in ("chrOne", "chrTail"):
        arrays = []
        for result in (together, *single):
            with h5py.File(result.folder / "predictions.h5") as file:
                arrays.append(file[chrom]["predictions"][:])
        np.testing.assert_allclose(arrays[0], np.mean(arrays[1:], axis=0), rtol=1e-6)
        assert not np.allclose(arrays[0], arrays[1], equal_nan=True)
    assert together.summary["tracks"]["peaks"]["threshold"] == pytest.approx((0.2 + 0.3 + 0.5) / 3)
    record = json.loads((together.folder / "run.json").read_text())
    assert len(record["models"]) == len(record["identity"]["weights_sha256"]) == 3
    with pytest.raises(DataError, match="another model"):
        run("together", models[:2], **options)
    by_chromosome = run("whole", models[:2], mode="chromosome", chroms="chrOne", hdf5=True)
    assert by_chromosome.summary["bins"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin_bp": 256}, "the first has a margin of 512 and number 2 has 256"),
        ({"window_bp": 4096}, "windows of 2048 and number 2 has 4096"),
    ],
)
def test_models_that_cannot_be_averaged(run: Run, change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(model=[tiny_model(), tiny_model(**change)])
    with pytest.raises(ConfigError, match=r"the first has tracks .*give runs of the same tracks"):
        run(model=[CountingModel(), tiny_model()])
    with pytest.raises(ConfigError, match="there is no model"):
        predict([], "x.fa", "out", device="cpu")


@pytest.mark.parametrize("mode", ["windows", "chromosome"])
def test_precision(run: Run, mode: str) -> None:
    model, arrays = tiny_model(), {}
    for precision in ("auto", "float32", "bf16"):
        options = {"mode": mode, "chroms": "chrTail", "hdf5": True, "hdf5_dtype": "float32"}
        result = run(precision, model, precision=precision, **options)
        with h5py.File(result.folder / "predictions.h5") as file:
            arrays[precision] = file["chrTail"]["predictions"][:]
        record = json.loads((result.folder / "run.json").read_text())
        expected_precision = "bf16" if precision == "bf16" else "float32"  # auto is float32 on a CPU
        assert record["precision"] == record["identity"]["precision"] == expected_precision
    np.testing.assert_array_equal(arrays["auto"], arrays["float32"])
    differences = np.nanmax(np.abs(arrays["bf16"] - arrays["float32"]), axis=0)
    assert 1e-5 < differences[0] < 0.05
    with pytest.raises(DataError, match="another model, genome or selection"):
        run("float32", model, precision="bf16", mode=mode, chroms="chrTail")


def test_half_precision_arrays_are_the_default(run: Run, genome: Genome) -> None:
    result = run(hdf5=True)
    with h5py.File(result.folder / "predictions.h5") as arrays:
        for chrom in genome.names:
            assert arrays[chrom]["predictions"].dtype == np.float16
            np.testing.assert_allclose(arrays[chrom]["predictions"][:], expected(genome, chrom), rtol=1e-3)


def test_qc_tells_gaps_and_values_out_of_range(run: Run, genome: Genome) -> None:
    result = run(regions=["chrLong:4000-10400", "chrTail"])
    rows = [line.split("\t") for line in (result.folder / "qc.bed").read_text().splitlines()]
    # within the bins asked for: 5,000-9,000, a bin with 17 of 32 N, and the N at the end of chrTail
    assert rows == [
        ["chrLong", "4992", "8992", "gap"],
        ["chrLong", "10304", "10336", "gap"],
        ["chrTail", "2496", "3000", "gap"],
    ]
    assert (
        sum(-(-(int(end) - int(start)) // BIN_BP) for _, start, end, _ in rows) == result.summary["gap_bins"]
    )
    model = CountingModel()
    with torch.no_grad():
        model.scale.fill_(2)
    beyond = run("beyond", model, chroms="chrTail")
    notes = [line.split("\t") for line in (beyond.folder / "qc.bed").read_text().splitlines()]
    truth = expected(genome, "chrTail")[:, 0] * 2
    flagged = np.zeros(truth.size, dtype=bool)
    for _, start, end, note in notes:
        if note == "out_of_range:gc":
            flagged[int(start) // BIN_BP : -(-int(end) // BIN_BP)] = True
    np.testing.assert_array_equal(flagged, truth > 1)
    assert beyond.summary["tracks"]["gc"]["out_of_range"] == flagged.sum() > 10
    assert beyond.summary["tracks"]["a_count"]["out_of_range"] == 0


@pytest.fixture
def whole_bigwig(run: Run) -> Path:
    """A bigWig of some stretches and whole chromosomes."""
    return run(regions=["chrLong:333-12000", "chrTail", "chrOne"]).folder / "gc.bw"


def test_readers_agree(whole_bigwig: Path, genome: Genome) -> None:
    """Values, means over stretches and headers by pyBigWig and pybigtools."""
    one, two = pyBigWig.open(str(whole_bigwig)), pybigtools.open(str(whole_bigwig))
    assert one.chroms() == two.chroms() == genome.lengths
    dice = np.random.default_rng(3)
    for chrom, length_bp in genome.lengths.items():
        both = np.array(one.values(chrom, 0, length_bp)), two.values(chrom, 0, length_bp, fillna=None)
        np.testing.assert_array_equal(*both)
        for _ in range(20):
            start, end = sorted(dice.choice(length_bp + 1, 2, replace=False).tolist())
            mean = one.stats(chrom, start, end, exact=True)[0]
            found = two.values(chrom, start, end, bins=1, exact=True, fillna=None)[0]
            assert (mean is None and np.isnan(found)) or mean == pytest.approx(found, rel=1e-6)
    covered = sum(end - start for chrom in genome.lengths for start, end, _ in one.intervals(chrom) or ())
    assert one.header()["nBasesCovered"] == two.info()["summary"]["basesCovered"] == covered
    one.close()


def test_ucsc_readers_agree(whole_bigwig: Path, genome: Genome, tmp_path: Path) -> None:
    """UCSC's own library, as pybbi has it, and its program bigWigToBedGraph, whichever is there."""
    program = shutil.which("bigWigToBedGraph")
    bbi = importlib.import_module("bbi") if importlib.util.find_spec("bbi") else None
    if program is None and bbi is None:
        pytest.skip("neither pybbi nor bigWigToBedGraph is installed: pip install pybbi")
    with pyBigWig.open(str(whole_bigwig)) as bigwig:
        values = {
            chrom: np.array(bigwig.values(chrom, 0, length)) for chrom, length in genome.lengths.items()
        }
    if bbi is not None:
        assert bbi.chromsizes(str(whole_bigwig)) == genome.lengths
        summary = bbi.info(str(whole_bigwig))["summary"]
        assert summary["basesCovered"] == sum(np.isfinite(found).sum() for found in values.values())
        for chrom, found in values.items():
            theirs = bbi.fetch(str(whole_bigwig), chrom, 0, len(found), missing=np.nan)
            np.testing.assert_array_equal(theirs, found)
    if program is not None:
        subprocess.run([program, whole_bigwig, tmp_path / "x.bedGraph"], check=True)
        rows = [line.split() for line in (tmp_path / "x.bedGraph").read_text().splitlines()]
        for chrom, found in values.items():
            theirs = np.full(len(found), np.nan)
            for _, start, end, value in (row for row in rows if row[0] == chrom):
                theirs[int(start) : int(end)] = float(value)
            np.testing.assert_allclose(theirs, found, rtol=1e-5)


def test_deeptools_agrees(whole_bigwig: Path, genome: Genome, tmp_path: Path) -> None:
    program = shutil.which("multiBigwigSummary")
    if program is None:
        pytest.skip("deepTools is not installed: pip install deeptools")
    table = ["--outRawCounts", str(tmp_path / "x.tsv"), "-o", str(tmp_path / "x.npz"), "-bs", "320"]
    subprocess.run([program, "bins", "-b", str(whole_bigwig), *table], check=True)
    rows = [line.split("\t") for line in (tmp_path / "x.tsv").read_text().splitlines()[1:]]
    assert len(rows) >= sum(length // 320 for length in genome.lengths.values()) > 50
    with pyBigWig.open(str(whole_bigwig)) as bigwig:
        for chrom, start, end, mean in rows:
            expected = bigwig.stats(chrom, int(start), int(end), exact=True)[0]
            assert (
                np.isnan(float(mean))
                if expected is None
                else float(mean) == pytest.approx(expected, rel=1e-5)
            )
