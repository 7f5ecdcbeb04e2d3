"""Windows that overlap, against a plain loop over them; and all that must not change what comes of them."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from genossm.errors import ConfigError, DataError
from genossm.genome import Genome
from genossm.pipelines import plan as plan_module
from genossm.pipelines.merge import merge
from genossm.pipelines.parts import Parts
from genossm.pipelines.plan import read_plan
from genossm.pipelines.predict import predict, predict_chromosome
from genossm.pipelines.predict_compare import compare_modes
from genossm.pipelines.predict_estimate import estimate
from tests.test_predict import BIN_BP, CountingModel, expected, tiny_model

WINDOW_BP, MARGIN_BP, TARGET_BP = 2048, 512, 1024  # of tiny_model
OVERLAP_BP, STRIDE_BP = 256, 768
LENGTHS = {
    "chrStrides": 8 * STRIDE_BP,
    "chrTargets": 4 * STRIDE_BP + TARGET_BP,  # the last target ends with it
    "chrOneMore": 2 * STRIDE_BP + TARGET_BP + 1,
    "chrLong": 20_005,
    "chrWindow": TARGET_BP,
    "chrTwo": TARGET_BP + 1,
    "chrShort": 100,
    "chrOne": 3,
}
SHORT = ("chrWindow", "chrShort", "chrOne")
Values = dict[str, npt.NDArray[np.float32]]


class PlaceModel(CountingModel):
    """`CountingModel` that falls towards the end of a window, so that each window gives a bin another value."""

    seconds = 0.0

    def predict(self, tokens: Tensor) -> Tensor:
        time.sleep(self.seconds)
        values = super().predict(tokens)
        return values * torch.linspace(1.0, 0.5, values.shape[1])[:, None]


class BatchModel(PlaceModel):
    """`PlaceModel` whose values depend on the batch as rounding may, only more."""

    def predict(self, tokens: Tensor) -> Tensor:
        values = super().predict(tokens)
        return values * (1 + 0.01 * len(tokens) + 0.001 * torch.arange(len(tokens)))[:, None, None]


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    """Lengths that are and are no multiples, and N over whole windows, in overlaps and in parts of bins."""
    folder, dice = tmp_path_factory.mktemp("genome"), np.random.default_rng(31)
    with (folder / "g.fa").open("w") as handle:
        for chrom, length_bp in LENGTHS.items():
            bases = dice.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
            if chrom == "chrLong":
                bases[790:880] = b"N"  # from within an overlap, 768 to 1,024
                bases[5_000:9_000] = b"N"
                bases[10_000:10_017] = b"N"
            handle.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    return Genome(folder / "g.fa")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan_module.SMALLEST_PART_WINDOWS, "cpu", 4)


Run = Callable[..., Any]


@pytest.fixture
def run(genome: Genome, tmp_path: Path) -> Run:
    def call(name: str, model: Any = None, **options: Any) -> Any:
        options = {"hdf5": True, "hdf5_dtype": "float32", "batch_size": 2, "overlap_bp": OVERLAP_BP} | options
        return predict(model or tiny_model(), genome, tmp_path / name, device="cpu", **options)

    return call


def values_of(folder: Path) -> Values:
    with h5py.File(folder / "predictions.h5") as arrays:
        return {chrom: arrays[chrom]["predictions"][:] for chrom in arrays}


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but run.json, which tells the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


@torch.inference_mode()
def by_hand(model: Any, genome: Genome, chrom: str, overlap_bp: int) -> npt.NDArray[np.float64]:
    """Every window of the grid by itself, and each bin from those that have it: float64 (bins, tracks)."""
    length_bp, margin_bp = genome.lengths[chrom], model.margin_bp
    target_bp = model.window_bp - 2 * margin_bp
    found: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(-(-length_bp // BIN_BP))]
    start = 0
    while True:
        codes = genome.window(chrom, start - margin_bp, start - margin_bp + model.window_bp)
        values = model.predict(torch.from_numpy(codes)[None])[0].double().numpy()
        for place in range(target_bp // BIN_BP):
            number = start // BIN_BP + place
            if number < len(found):
                found[number].append(values[margin_bp // BIN_BP + place])
        if start + target_bp >= length_bp:
            break
        start += target_bp - overlap_bp
    blended, bins, step = [], overlap_bp // BIN_BP, 0
    for candidates in found:
        if len(candidates) == 1:
            blended.append(candidates[0])
            step = 0
            continue
        earlier, later = candidates
        weight = (step % bins + 0.5) / bins
        blended.append((1 - weight) * earlier + weight * later)
        step += 1
    values = np.array(blended)
    values[np.isnan(expected(genome, chrom)[:, 0])] = np.nan
    return values


@pytest.mark.parametrize("overlap_bp", [BIN_BP, OVERLAP_BP, TARGET_BP // 2])
@pytest.mark.parametrize("make", [tiny_model, PlaceModel])
def test_values_are_those_of_a_plain_loop(
    run: Run, genome: Genome, overlap_bp: int, make: Callable[[], Any]
) -> None:
    model = make().eval()
    if make is PlaceModel:
        overlap_bp = min(overlap_bp, 320)  # half of its target of 640 bp
    plain = values_of(run("plain", model, overlap_bp=0).folder)
    blended = values_of(run("blended", model, overlap_bp=overlap_bp).folder)
    for chrom in genome.names:
        np.testing.assert_allclose(
            blended[chrom], by_hand(model, genome, chrom, overlap_bp), rtol=1e-6, atol=1e-6
        )
        in_memory = predict_chromosome(model, genome, chrom, batch_size=3, overlap_bp=overlap_bp)
        np.testing.assert_allclose(in_memory, blended[chrom], rtol=1e-6, atol=1e-5)
    assert np.nanmax(np.abs(blended["chrLong"] - plain["chrLong"])) > 1e-4  # far above the tolerance
    assert np.isnan(blended["chrLong"]).sum() == np.isnan(plain["chrLong"]).sum() > 200


def test_weights_are_a_straight_line(genome: Genome) -> None:
    """In numbers: of 64 bp of overlap the first bin is three quarters of the earlier window's, the second one quarter."""
    model = PlaceModel()  # targets of 640 bp, 20 of 32 bins
    values = predict_chromosome(model, genome, "chrStrides", overlap_bp=64)[:, 1]
    slope = np.linspace(1.0, 0.5, 32)
    a_count = expected(genome, "chrStrides")[:, 1]
    second = 18  # the first bin of the second window, and the last but one of the first
    places = [slope[6 + 17], 0.75 * slope[6 + 18] + 0.25 * slope[6], 0.25 * slope[6 + 19] + 0.75 * slope[7]]
    np.testing.assert_allclose(
        values[second - 1 : second + 2] / a_count[second - 1 : second + 2], places, rtol=1e-6
    )


def test_no_overlap_is_what_it_was(run: Run, genome: Genome, tmp_path: Path) -> None:
    options = {"hdf5": True, "hdf5_dtype": "float32", "batch_size": 2, "device": "cpu"}
    predict(tiny_model(), genome, tmp_path / "without", shard="1/1", **options)
    plan = read_plan(tmp_path / "without")
    assert plan is not None and "overlap_bp" not in plan.identity and "--overlap" not in plan.command
    assert plan.part_bp == 4 * WINDOW_BP
    stored = json.loads((tmp_path / "without" / ".parts" / "plan.json").read_text())
    del stored["overlap_bp"]  # as it was written before
    (tmp_path / "without" / ".parts" / "plan.json").write_text(json.dumps(stored))
    merge(tmp_path / "without")
    assert files_of(run("zero", overlap_bp=0).folder) == files_of(tmp_path / "without")


@pytest.mark.parametrize("overlap_bp", [BIN_BP, TARGET_BP // 2])
def test_contigs_of_one_window_do_not_change(run: Run, overlap_bp: int) -> None:
    options = {"chroms": SHORT, "batch_size": 1}
    plain = run("plain", overlap_bp=0, **options)
    assert files_of(run("blended", overlap_bp=overlap_bp, **options).folder) == files_of(plain.folder)


@pytest.mark.parametrize(
    "region", ["chrLong:12000-13500", "chrLong:770-800", "chrLong:19990-20005", "chrTargets:1100-1101"]
)
def test_regions_are_bins_of_the_whole(run: Run, region: str) -> None:
    chrom, _, ends = region.partition(":")
    first, stop = (int(end) // BIN_BP for end in ends.split("-"))
    part = values_of(run("region", regions=region).folder)[chrom]
    whole = values_of(run("whole").folder)[chrom]
    there = slice(first, stop + 1)
    np.testing.assert_allclose(part[there], whole[there], rtol=0, atol=1e-6)
    assert (np.isfinite(part[there]) == np.isfinite(whole[there])).all()
    assert np.isnan(part[:first]).all() and np.isnan(part[stop + 1 :]).all()


def test_batches_change_rounding_only(run: Run) -> None:
    one = values_of(run("one", batch_size=1).folder)
    for batch_size in (3, 64):
        many = values_of(run(f"many{batch_size}", batch_size=batch_size).folder)
        for chrom, values in one.items():
            np.testing.assert_allclose(many[chrom], values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_model, BatchModel])
def test_three_shards_are_one_process_byte_for_byte(
    run: Run, tmp_path: Path, make: Callable[[], Any]
) -> None:
    options = {"call_peaks": True, "threshold": 0.5, "batch_size": 3}
    for text in ("2/3", "3/3", "1/3"):
        summary = run("shards", make(), shard=text, **options).summary
        assert summary["parts"] > 1
    merge(tmp_path / "shards")
    whole = run("whole", make(), **options)
    assert files_of(tmp_path / "shards") == files_of(whole.folder)
    merged, alone = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("shards", "whole"))
    assert merged["identity"] == alone["identity"] and merged["identity"]["overlap_bp"] == OVERLAP_BP
    assert merged["overlap_bp"] == OVERLAP_BP
    assert merged["summary"]["bases"] == sum(LENGTHS.values())


def test_a_part_by_itself_is_the_part_of_a_whole_run(run: Run, tmp_path: Path) -> None:
    """A part that is made again on its own has the bytes it had."""
    run("out", BatchModel(), shard="1/1")
    parts = sorted((tmp_path / "out" / ".parts").glob("*.safetensors"))
    plan = read_plan(tmp_path / "out")
    assert plan is not None
    read_bp = Parts(tmp_path / "out", plan).bases_read  # by which shards are shared out
    assert len(read_bp) == len(parts) > 5
    # 3 windows of 1,024 bp and the one before; less where a chromosome begins
    assert set(read_bp[1:4]) >= {4 * 1024} and max(read_bp) == 4 * 1024
    for path in parts[1], parts[-2]:
        before = path.read_bytes()
        path.unlink()
        run("out", BatchModel(), shard="1/1")
        assert path.read_bytes() == before
    parts[3].unlink()
    with pytest.raises(DataError, match=rf"--mode windows --overlap {OVERLAP_BP} --batch-size 2"):
        merge(tmp_path / "out")


KILLED = """
import sys, time, torch
from torch import Tensor
sys.path.insert(0, {tests!r})
from test_predict import CountingModel, plan_module, predict
plan_module.SMALLEST_PART_WINDOWS["cpu"] = 4
{model}
PlaceModel.seconds = 0.05
options = {{"overlap_bp": {overlap_bp}, "hdf5": True, "hdf5_dtype": "float32"}}
predict(PlaceModel(), {genome!r}, {out!r}, device="cpu", batch_size=2, **options)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(run: Run, genome: Genome, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    program = KILLED.format(
        tests=str(Path(__file__).parent),
        model=inspect.getsource(PlaceModel),
        overlap_bp=OVERLAP_BP,
        genome=str(genome.path),
        out=str(out),
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob(".parts/*.safetensors"))) < 3 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    rest, whole = PlaceModel(), PlaceModel()
    resumed, unbroken = run("killed", rest), run("unbroken", whole)
    assert rest.windows < whole.windows
    assert files_of(resumed.folder) == files_of(unbroken.folder)


def test_another_overlap_is_another_prediction(run: Run) -> None:
    run("out", chroms="chrTwo")
    for overlap_bp in (0, 128):
        with pytest.raises(DataError, match="another model, genome or selection"):
            run("out", chroms="chrTwo", overlap_bp=overlap_bp)
    run("begun", chroms="chrLong", shard="1/2")
    with pytest.raises(DataError, match="unfinished prediction of another"):
        run("begun", chroms="chrLong", shard="2/2", overlap_bp=0)


def test_of_several_models_the_mean(run: Run) -> None:
    models, chroms = [tiny_model(1), tiny_model(2)], ["chrLong", "chrTwo"]
    together = values_of(run("together", models, chroms=chroms).folder)
    single = [
        values_of(run(f"one{number}", model, chroms=chroms).folder) for number, model in enumerate(models)
    ]
    for chrom in chroms:
        mean = np.mean([values[chrom] for values in single], axis=0)
        np.testing.assert_allclose(together[chrom], mean, rtol=1e-6)


def test_sequences_overlap_too(genome: Genome, tmp_path: Path) -> None:
    options: dict[str, Any] = {"hdf5_dtype": "float32", "overlap_bp": OVERLAP_BP, "device": "cpu"}
    model = tiny_model()
    result = predict(model, None, tmp_path / "out", sequences=genome.path, **options)
    with h5py.File(result.folder / "sequences.h5") as arrays:
        for name in ("chrOneMore", "chrOne"):
            found = arrays[name]["predictions"][:]
            np.testing.assert_allclose(found, by_hand(model, genome, name, OVERLAP_BP), rtol=1e-6, atol=1e-6)


def test_progress_counts_bases_once(genome: Genome) -> None:
    for overlap_bp in (0, OVERLAP_BP):
        done: list[int] = []
        predict_chromosome(
            tiny_model(), genome, "chrLong", batch_size=4, overlap_bp=overlap_bp, progress=done.append
        )
        assert sum(done) == LENGTHS["chrLong"]


def test_a_run_tells_each_base_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from genossm.pipelines import predict as predict_module

    told: list[int] = []
    totals: list[int] = []

    class Bar:
        update = staticmethod(told.append)

    @contextmanager
    def counted(*, total: int, **_: Any) -> Any:
        totals.append(total)
        yield Bar

    monkeypatch.setattr(predict_module, "progress", counted)
    run("out", [tiny_model(1), tiny_model(2)])
    assert totals == [sum(told)] == [sum(LENGTHS.values())]


def windows_of(chroms: Sequence[str], overlap_bp: int) -> int:
    return sum(max(1, -(-(LENGTHS[chrom] - overlap_bp) // (TARGET_BP - overlap_bp))) for chrom in chroms)


def test_the_estimate_counts_the_windows_that_are_computed(genome: Genome, tmp_path: Path) -> None:
    chroms = [chrom for chrom in genome.names if chrom != "chrLong"]  # which has windows that are not
    options: dict[str, Any] = {"device": "cpu", "batch_size": 2, "chroms": chroms}
    model = PlaceModel(WINDOW_BP, MARGIN_BP)
    assert estimate(model, genome, tmp_path, **options).windows == windows_of(chroms, 0)
    options["overlap_bp"] = 512
    blended, model = estimate(model, genome, tmp_path, **options), PlaceModel(WINDOW_BP, MARGIN_BP)
    predict(model, genome, tmp_path / "out", **options)
    assert blended.windows == model.windows
    assert 0 < blended.windows - windows_of(chroms, 512) < blended.parts  # those that two parts need
    bases = sum(genome.lengths[chrom] for chrom in chroms)
    assert blended.bases == bases and blended.parts_bytes == 8 * sum(
        -(-genome.lengths[chrom] // BIN_BP) for chrom in chroms
    )
    shards = [estimate(model, genome, tmp_path, shard=f"{number}/3", **options) for number in (1, 2, 3)]
    assert sum(shard.windows for shard in shards) == blended.windows
    assert sum(shard.bases for shard in shards) == bases


def test_the_estimate_times_windows_and_not_their_neighbours(genome: Genome, tmp_path: Path) -> None:
    class Slow(PlaceModel):
        seconds = 0.02

    model = Slow()
    expected = estimate(model, genome, tmp_path / "out", device="cpu", batch_size=4, overlap_bp=320)
    assert model.batches == [4]
    assert 0.9 < expected.compute_seconds / (expected.windows / 4 * 0.02) < 10
    assert "measured on a batch of 4 windows" in expected.text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("windows", "batch"), [(10, 4), (31_500, 4), (65_536, 1), (100_000, 6), (3, 64)])
def test_parts_and_the_window_before_fill_batches(windows: int, batch: int, device: str) -> None:
    size = plan_module.part_size(windows, 1000, 0, whole=False, device=device, batch_size=batch, overlap=True)
    assert (size // 1000 + 1) % batch == 0 and size > 0
    assert -(-windows * 1000 // size) <= plan_module.MOST_PARTS


def test_differences_from_the_mode_chromosome(run: Run, genome: Genome, tmp_path: Path) -> None:
    chroms = ["chrLong", "chrTwo", "chrShort"]
    options: dict[str, Any] = {"chroms": chroms, "device": "cpu"}
    report = compare_modes(tiny_model(), genome, tmp_path / "compare", overlap_bp=OVERLAP_BP, **options)
    assert report.overlap_bp == OVERLAP_BP and "256 bp of overlap" in report.text()
    by_windows = values_of(run("windows", chroms=chroms).folder)
    whole = values_of(run("whole", chroms=chroms, mode="chromosome", overlap_bp=0).folder)
    differences = np.concatenate([np.abs(by_windows[chrom] - whole[chrom]) for chrom in chroms])[:, 0]
    rows = [row for row in report.rows if row.track == "peaks"]
    assert rows[-1].bins == np.isfinite(differences).sum()
    assert rows[-1].mean == pytest.approx(np.nanmean(differences), rel=1e-2, abs=1e-7)
    # no bin is held as badly as the last one of a target without overlap; half of the overlap farther inside at least
    nearest = min(row.from_bp for row in rows if row.from_bp is not None)
    assert nearest >= MARGIN_BP + OVERLAP_BP // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"overlap_bp": 100},
            r"overlap of 100 bp: it must be a multiple of the bin \(32 bp\) from 0 to 512 bp",
        ),
        ({"overlap_bp": 544}, r"overlap of 544 bp: .*512 bp, half of the target of a window \(1024 bp\)"),
        ({"overlap_bp": -32}, r"overlap of -32 bp: "),
        ({"mode": "chromosome"}, "overlap_bp is 256, which the mode chromosome does not use"),
    ],
)
def test_overlaps_that_do_not_fit(run: Run, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("out", **options)
    assert not (tmp_path / "out").exists()
