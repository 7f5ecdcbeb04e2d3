"""Whole chromosomes: the values of one pass, whatever the chunks; files, resuming, spilling and refusals."""

from __future__ import annotations

import json
import os
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
import pyBigWig
import pytest
import torch
from torch import nn

from genossm.code_reader import CodeReader
from genossm.errors import ConfigError, DataError, DeviceError, FileError
from genossm.genome import Genome
from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.decoder import DecoderConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.heads import TrackHead
from genossm.models.stem import StemConfig
from genossm.models.stream import ChunkStore, FileStore
from genossm.pipelines import chromosome as chromosome_module
from genossm.pipelines import plan as plan_module
from genossm.pipelines import state_range
from genossm.pipelines.chromosome import chosen_chunk_bp, predict_chromosomes
from genossm.pipelines.predict import predict
from genossm.windows import Window

TRUNK_BP = 32
CPU = torch.device("cpu")
TRACKS = (
    TrackHead("peaks", "peaks", "bce"),
    TrackHead("plus", "signal", "poisson", "sum", mean=2.0, strand="+", partner="minus"),
    TrackHead("minus", "signal", "poisson", "sum", mean=2.0, strand="-", partner="plus"),
)
PATTERNS: dict[str, dict[str, Any]] = {
    "mamba2": {"pattern": ("mamba2", "mamba2")},
    "hybrid": {"pattern": ("mamba2", "attention", "conv"), "mlp_ratio": 1.0},
    "lstm": {"pattern": ("lstm",)},
    "mamba3": {"pattern": ("mamba3",)},
    "conv": {"pattern": ("conv", "conv")},
    "decoder": {"pattern": ("mamba2",), "decoder": DecoderConfig(8)},
}
STRANDS = ("none", "augment", "shared", "parity")


def tiny_model(
    strands: str = "augment", dtype: torch.dtype = torch.float32, **options: Any
) -> AccessibilityModel:
    """Random weights and statistics, large enough for predictions that differ from bin to bin."""
    torch.manual_seed(0)
    stem = StemConfig(channels=(8, 8, 8, 8))
    sizes = {"width": 16, "stem": stem, "state": 8, "head_dim": 8, "window": 9, "pattern": ("mamba2",)}
    model = AccessibilityModel(
        ModelConfig(EncoderConfig(**{**sizes, **options}), head_hidden=16, reverse_complement=strands),  # type: ignore[arg-type]
        TRACKS,
        window_bp=2048,
        margin_bp=512,
        assembly="tiny",
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.heads.output.weight.mul_(10)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    """N runs longer than chunks and inside bins, ends that are no multiple of anything, and one of nothing but N."""
    random = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("genome")
    with (folder / "g.fa").open("w") as handle:
        for chrom, length_bp in {"chrLong": 10_007, "chrN": 70, "chrOne": 3, "chrTail": 1_301}.items():
            bases = random.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
            if chrom == "chrLong":
                bases[3_000:5_000] = b"N"
                bases[6_400:6_416] = b"N"  # half of a bin: no gap
                bases[6_432:6_449] = b"N"  # one more: a gap
            if chrom == "chrTail":
                bases[1_290:] = b"N"  # 11 of the last bin's 21
            if chrom == "chrN":
                bases[:] = b"N"
            handle.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    return Genome(folder / "g.fa")


def in_one_pass(model: AccessibilityModel, genome: Genome, chrom: str) -> npt.NDArray[np.float32]:
    """`model.predict` on the whole, gaps counted bin by bin."""
    codes, bin_bp = np.array(genome.chromosome(chrom)), model.bin_bp
    padded = genome.window(chrom, 0, -(-len(codes) // TRUNK_BP) * TRUNK_BP)
    values = model.predict(torch.from_numpy(padded)[None])[0].numpy()[: -(-len(codes) // bin_bp)]
    for index in range(len(values)):
        bases = codes[index * bin_bp : (index + 1) * bin_bp]
        if 2 * (bases == 4).sum() > len(bases):
            values[index] = np.nan
    return values


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, genome: Genome) -> Run:
    def call(name: str, model: AccessibilityModel, **options: Any) -> Any:
        given = {
            "mode": "chromosome",
            "hdf5": True,
            "hdf5_dtype": "float32",
            "device": "cpu",
            "genome": genome,
        } | options
        return predict(model, given.pop("genome"), tmp_path / name, **given)

    return call


def arrays_of(result: Any, name: str = "predictions.h5") -> dict[str, npt.NDArray[np.float32]]:
    with h5py.File(result.folder / name) as arrays:
        return {chrom: arrays[chrom]["predictions"][:] for chrom in arrays}


CASES = [
    (pattern, strands)
    for pattern in PATTERNS
    for strands in STRANDS
    if (pattern, strands) != ("lstm", "parity")  # whose weights cannot be tied
]


@pytest.mark.parametrize(("pattern", "strands"), CASES)
def test_a_model_streams_what_it_predicts_from_the_whole(pattern: str, strands: str) -> None:
    model = tiny_model(strands, torch.float64, **PATTERNS[pattern])
    bins = 21
    tokens = torch.randint(0, 5, (2, bins * TRUNK_BP), generator=torch.Generator().manual_seed(1)).to(
        torch.int8
    )
    whole = model.predict(tokens)
    assert whole.std(1).min() > 1e-3
    for chunk in (1, 8, 64):
        shares: list[float] = []
        at, parts = 0, []
        for first, values in model.stream(tokens, chunk_bp=chunk * TRUNK_BP, advance=shares.append):
            assert first == at and not values.requires_grad
            at += values.shape[1]
            parts.append(values)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
        assert sum(shares) == pytest.approx(1) and len(shares) >= len(parts)


@pytest.mark.parametrize(
    ("pattern", "strands"), [("hybrid", "augment"), ("lstm", "shared"), ("decoder", "parity")]
)
def test_tokens_from_a_function_and_features_in_a_file(pattern: str, strands: str, tmp_path: Path) -> None:
    model = tiny_model(strands, torch.float64, **PATTERNS[pattern])
    tokens = torch.randint(0, 5, (2, 20 * TRUNK_BP), generator=torch.Generator().manual_seed(2)).to(
        torch.int8
    )
    chunks = model.stream(
        lambda start, end: tokens[:, start:end],
        length=tokens.shape[1],
        chunk_bp=6 * TRUNK_BP,
        keep=tmp_path,
    )
    got = torch.cat([values for _, values in chunks], 1)
    torch.testing.assert_close(got, model.predict(tokens), rtol=1e-10, atol=1e-10)
    assert not list(tmp_path.iterdir())


def test_a_store_in_a_file_hands_out_what_one_in_memory_does(tmp_path: Path) -> None:
    stores = [ChunkStore(23, 5, kept_on=CPU, used_on=CPU), FileStore(23, 5, folder=tmp_path, used_on=CPU)]
    x = torch.randn(2, 23, 3)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):  # a layer may change it
        for index in range(5):
            for store in stores:
                store.put(index, x[:, slice(*store.bounds(index))].to(dtype))
        for start in range(23):
            for stop in range(start + 1, 24):
                assert torch.equal(stores[0].read(start, stop), stores[1].read(start, stop))
    assert torch.equal(stores[1].get(4), x[:, 20:].double())
    assert not list(tmp_path.iterdir())  # it has no name
    stores[1].close()


@pytest.mark.parametrize("strands", STRANDS)
def test_values_of_one_pass_whatever_the_chunks(strands: str, run: Run, genome: Genome) -> None:
    pattern = "decoder" if strands == "none" else "hybrid"
    model = tiny_model(strands, **PATTERNS[pattern])
    truth = {chrom: in_one_pass(model, genome, chrom) for chrom in genome.names}
    assert np.isnan(truth["chrN"]).all() and np.isnan(truth["chrTail"][-1]).all()
    assert np.nanstd(truth["chrLong"], axis=0).min() > 1e-3
    for chunk_bp in (1_024, 4_096, None):
        result = run(f"{chunk_bp}", model, chunk_bp=chunk_bp)
        found = arrays_of(result)
        for chrom, values in truth.items():
            np.testing.assert_allclose(found[chrom], values, rtol=1e-4, atol=1e-4)
        assert result.summary["gap_bins"] == sum(
            int(np.isnan(values[:, 0]).sum()) for values in truth.values()
        )
        assert result.summary["bases"] == sum(genome.lengths.values())


def test_files_and_regions_are_those_of_the_whole_cut(run: Run, genome: Genome) -> None:
    model = tiny_model(**PATTERNS["hybrid"])
    whole = arrays_of(run("whole", model))["chrLong"]
    regions = ["chrLong:100-200", "chrLong:10000-10007"]
    result = run("cut", model, regions=regions, call_peaks=True, threshold=0.0, chunk_bp=2_048)
    wanted = np.zeros(len(whole), dtype=bool)
    wanted[[3, 4, 5, 6, 312]] = True
    expected = np.where(wanted[:, None], whole, np.nan)
    np.testing.assert_allclose(arrays_of(result)["chrLong"], expected, rtol=1e-4)
    with pyBigWig.open(str(result.folder / "peaks.bw")) as handle:
        records = handle.intervals("chrLong")
        assert handle.chroms() == genome.lengths
    assert [(start, end) for start, end, _ in records] == [
        *((32 * index, 32 * index + 32) for index in (3, 4, 5, 6)),
        (9_984, 10_007),
    ]
    np.testing.assert_allclose([value for _, _, value in records], whole[wanted, 0], rtol=1e-4)
    rows = [line.split("\t")[:3] for line in (result.folder / "peaks.narrowPeak").read_text().splitlines()]
    assert rows == [["chrLong", "96", "224"], ["chrLong", "9984", "10007"]]
    record = json.loads((result.folder / "run.json").read_text())
    assert (record["mode"], record["chunk_bp"]) == ("chromosome", 2_048)
    assert json.loads((result.folder.parent / "whole" / "run.json").read_text())["chunk_bp"] == 1 << 18


def test_sequences(run: Run, genome: Genome) -> None:
    model = tiny_model()
    found = arrays_of(run("out", model, genome=None, sequences=genome.path, hdf5=False), "sequences.h5")
    for chrom in genome.names:
        np.testing.assert_allclose(found[chrom], in_one_pass(model, genome, chrom), rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_with_the_next_chromosome(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SMALLEST_PART_BP": 1, "MOST_PARTS": 10**9}.items():  # a part for each chromosome
        monkeypatch.setattr(plan_module, name, value)
    monkeypatch.setattr(state_range, "WINDOWS", 0)  # else chrLong is read again, to measure states
    model = tiny_model()
    unbroken = run("unbroken", model, chunk_bp=1_024)
    asked: list[str] = []
    fill = CodeReader.fill

    def counted(self: CodeReader, out: npt.NDArray[np.int8], chrom: str, start: int) -> None:
        asked.append(chrom)
        if chrom == stop_at:
            raise KeyboardInterrupt
        fill(self, out, chrom, start)

    monkeypatch.setattr(CodeReader, "fill", counted)
    stop_at = "chrTail"
    with pytest.raises(KeyboardInterrupt):
        run("broken", model, chunk_bp=1_024)
    parts = sorted((tmp_path / "broken" / ".parts").iterdir())
    assert [path.name for path in parts] == [
        "000000.safetensors",
        "000001.safetensors",
        "000002.safetensors",
        "plan.json",
    ]
    with pytest.raises(DataError, match="unfinished prediction of another model"):
        run("broken", tiny_model(**PATTERNS["conv"]))
    stop_at = ""
    asked.clear()
    resumed = run("broken", model, chunk_bp=1_024)
    assert set(asked) == {"chrTail"}
    assert "used 3 finished parts" in capsys.readouterr().err
    assert not (tmp_path / "broken" / ".parts").exists()
    for file in unbroken.files:
        if file.suffix == ".bw":
            assert (resumed.folder / file.name).read_bytes() == file.read_bytes()
    for chrom, values in arrays_of(unbroken).items():
        np.testing.assert_array_equal(arrays_of(resumed)[chrom], values)
    replaced = run("broken", tiny_model(**PATTERNS["conv"]), force=True)
    assert not np.array_equal(arrays_of(replaced)["chrTail"], arrays_of(unbroken)["chrTail"], equal_nan=True)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_chromosome import CodeReader, plan_module, predict, tiny_model
plan_module.SMALLEST_PART_BP, plan_module.MOST_PARTS = 1, 10**9
fill = CodeReader.fill
def slow(self, out, chrom, start):
    if chrom == "chrTail":
        time.sleep(60)
    fill(self, out, chrom, start)
CodeReader.fill = slow
predict(tiny_model(), {genome!r}, {out!r}, device="cpu", mode="chromosome", chunk_bp=1024, spill={spill!r})
"""


def test_progress_is_told_in_bases_as_they_are_done(genome: Genome, tmp_path: Path) -> None:
    windows = [Window(chrom, 0, length_bp) for chrom, length_bp in genome.lengths.items()]
    told: list[int] = []
    values = predict_chromosomes(
        tiny_model(), genome, windows, chunk_bp=1_024, device=CPU, overflow=tmp_path, progress=told.append
    )
    for window, _ in zip(windows, values, strict=True):
        assert sum(told) == sum(genome.lengths[done.chrom] for done in windows[: windows.index(window) + 1])
    assert 0 < max(told) < 500  # of 10,007 bases, on two strands


def test_a_killed_process_leaves_chromosomes_and_no_features(
    run: Run, genome: Genome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, spill = tmp_path / "killed", tmp_path / "spill"
    spill.mkdir()
    names = {"tests": Path(__file__).parent, "genome": genome.path, "out": out, "spill": spill}
    program = KILLED.format(**{name: str(path) for name, path in names.items()})
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob(".parts/*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    assert not list(spill.iterdir())
    resumed = run("killed", tiny_model(), chunk_bp=1_024)
    assert "used 3 finished parts" in capsys.readouterr().err
    whole = arrays_of(run("unbroken", tiny_model(), chunk_bp=1_024))
    for chrom, values in arrays_of(resumed).items():
        np.testing.assert_array_equal(values, whole[chrom])


def test_features_go_to_the_parts_when_memory_is_short(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    class Watched(FileStore):
        def __init__(self, *sizes: int, folder: Path, **options: Any) -> None:
            folders.append(folder)
            super().__init__(*sizes, folder=folder, **options)

    monkeypatch.setattr("genossm.models.stream.FileStore", Watched)
    model = tiny_model()
    in_memory = arrays_of(run("memory", model, chunk_bp=1_024))
    assert not folders
    longest = 313 * 16 * 4  # bins, width and bytes of chrLong
    monkeypatch.setattr(chromosome_module, "MOST_IN_MEMORY", longest - 1)
    spilled = arrays_of(run("spilled", model, chunk_bp=1_024))
    assert folders == [tmp_path / "spilled" / ".parts"] * 2  # chrLong alone, both strands
    for chrom, values in in_memory.items():
        np.testing.assert_array_equal(spilled[chrom], values)
    assert not (tmp_path / "spilled" / ".parts").exists()


def test_features_wait_on_the_gpu_where_they_take_little_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bases = tiny_model(), 100 * TRUNK_BP
    needed = 100 * 16 * 4
    cuda = torch.device("cuda")
    for free, place in ((4 * needed, "device"), (4 * needed - 1, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert chromosome_module._place(model, bases, cuda, tmp_path) == place
    monkeypatch.setattr(chromosome_module, "MOST_IN_MEMORY", needed - 1)
    assert chromosome_module._place(model, bases, cuda, tmp_path) == tmp_path
    assert chromosome_module._place(model, bases - TRUNK_BP, CPU, tmp_path) == "cpu"


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FileStore, index: int, x_BLD: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileStore, "put", full)
    (tmp_path / "spill").mkdir()
    with pytest.raises(FileError, match=r"the features of chrLong cannot be kept in .*spill: .*No space"):
        run("out", tiny_model(), spill=tmp_path / "spill")
    assert not list((tmp_path / "spill").iterdir())


def test_a_device_that_is_too_small_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: AccessibilityModel, *arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AccessibilityModel, "stream", full)
    with pytest.raises(DeviceError, match=r"chunks of 4,096 bp; make them shorter \(--chunk-bp\)"):
        run("out", tiny_model(), chunk_bp=4_096)


def test_a_model_that_gives_nan_is_an_error(run: Run) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.heads.output.bias.fill_(torch.nan)
    with pytest.raises(DataError, match="NaN or infinity on chrLong"):
        run("out", model)


def test_the_chunk_suits_the_device_and_the_bin() -> None:
    model = tiny_model()
    assert chosen_chunk_bp(model, None, CPU) == 1 << 18
    assert chosen_chunk_bp(model, None, torch.device("cuda")) == 1 << 20
    odd = tiny_model(stem=StemConfig(channels=(8, 8), pool=(3, 5)))
    assert chosen_chunk_bp(odd, None, CPU) == (1 << 18) // 15 * 15
    assert chosen_chunk_bp(model, 64, CPU) == 64


@pytest.mark.realdata
def test_yeast_chromosome(realdata: Path, tmp_path: Path) -> None:
    genome = Genome(realdata / "sacCer3" / "sacCer3.fa.gz", cache_dir=tmp_path)
    model = tiny_model(**PATTERNS["hybrid"])
    whole = in_one_pass(model, genome, "chrIV")
    windows = [Window("chrIV", 0, genome.lengths["chrIV"])]
    for chunk_bp in (1 << 16, 1 << 18):
        (values,) = predict_chromosomes(
            model, genome, windows, chunk_bp=chunk_bp, device=CPU, spill=tmp_path, overflow=tmp_path
        )
        np.testing.assert_allclose(values, whole, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    everywhere = tiny_model(pattern=("attention",), window=None)
    with pytest.raises(
        ConfigError, match="mode chromosome does not suit this model: attention with window None"
    ):
        run("out", everywhere)
    for chunk_bp in (0, 100):
        with pytest.raises(
            ConfigError, match=f"chunk_bp is {chunk_bp}; it must be a multiple of the model's bin"
        ):
            run("out", tiny_model(), chunk_bp=chunk_bp)
    with pytest.raises(FileError, match=r"the folder .*none for features between layers is not there"):
        run("out", tiny_model(), spill=tmp_path / "none")
    with pytest.raises(ValueError, match="which is no folder"):
        tiny_model().stream(torch.zeros(1, 64, dtype=torch.int8), chunk_bp=32, keep=tmp_path / "none")
    assert not (tmp_path / "out").exists()
