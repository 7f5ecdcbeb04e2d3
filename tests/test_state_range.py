"""States of recurrent mixers beyond what windows show: which bins are noted, by whomever the parts were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from genossm.code_reader import CodeReader
from genossm.errors import DataError
from genossm.genome import Genome
from genossm.models.accessibility import AccessibilityModel, reverse_complement
from genossm.pipelines import chromosome as chromosome_module
from genossm.pipelines import plan as plan_module
from genossm.pipelines import predict_estimate, state_range
from genossm.pipelines.merge import merge
from genossm.pipelines.part_file import PartFile, write_part
from genossm.pipelines.parts import Parts
from genossm.pipelines.plan import read_plan
from genossm.pipelines.predict import predict
from genossm.pipelines.state_range import StateSizes, measured_bp, measured_windows, state_limits
from tests.test_chromosome import PATTERNS, TRUNK_BP, tiny_model

WINDOW_BP, CHUNK_BP = 2_048, 1_024
LENGTHS = {"chrLong": 40_007, "chrN": 3_000, "chrMid": 9_000, "chrShort": 700}


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    dice, path = np.random.default_rng(12), tmp_path_factory.mktemp("genome") / "g.fa"
    with path.open("w") as handle:
        for chrom, length_bp in LENGTHS.items():
            bases = dice.choice(np.frombuffer(b"ACGT", "S1"), length_bp)
            if chrom == "chrLong":
                bases[20_000:22_000] = b"N"
            if chrom == "chrN":
                bases[:] = b"N"
            handle.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    return Genome(path)


def growing(strands: str = "none", layer: int = 0, **options: Any) -> AccessibilityModel:
    """A model whose states of one layer forget nothing on their way to the right, and all others as usual."""
    model = tiny_model(strands, **options)
    mixer: Any = model.encoder.mixers()[layer]
    with torch.no_grad():
        mixer.A_log[:, 0] = -20
    return model


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, genome: Genome, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name, value in {"SMALLEST_PART_BP": 1, "MOST_PARTS": 10**9}.items():  # a part for each chromosome
        monkeypatch.setattr(plan_module, name, value)

    def call(name: str, model: Any, **options: Any) -> Any:
        given = {"mode": "chromosome", "device": "cpu", "chunk_bp": CHUNK_BP} | options
        return predict(model, genome, tmp_path / name, **given)

    return call


def rows_of(result: Any, note: str = "out_of_range:state:") -> list[tuple[str, int, int, str]]:
    fields = [line.split("\t") for line in (result.folder / "qc.bed").read_text().splitlines()]
    return [
        (chrom, int(start), int(end), what) for chrom, start, end, what in fields if what.startswith(note)
    ]


def bins_of(rows: Collection[tuple[str, int, int, str]]) -> set[tuple[str, int, str]]:
    return {
        (chrom, number, what)
        for chrom, start, end, what in rows
        for number in range(start // TRUNK_BP, -(-end // TRUNK_BP))
    }


def size(state: Any) -> float:
    return float(state[0].double().square().mean().sqrt())


@torch.no_grad()
def edge_states(model: AccessibilityModel, tokens: Tensor, chunk_bins: int) -> list[tuple[int, float]]:
    """(chunk, size) of each state that leaves a chunk of the only layer, from all bins on its side at once."""
    layer: Any = model.encoder.layers[0]
    x = layer.mixer_norm(model.encoder.stem(tokens))
    left, right = layer.mixer.halo
    found, bins = [], x.shape[1]
    for chunk in range(-(-bins // chunk_bins)):
        start, stop = chunk * chunk_bins, min(bins, (chunk + 1) * chunk_bins)
        beyond = min(right, bins - stop)
        found.append((chunk, size(layer.mixer.mix(x[:, : stop + beyond], 0, beyond)[1])))
        if chunk:
            before = min(left, start)
            found.append((chunk, size(layer.mixer.leftward(x[:, start - before :], before, 0))))
    return found


def test_chunks_whose_states_are_larger_than_in_windows_are_noted(run: Run, genome: Genome) -> None:
    model = growing()

    def tokens(chrom: str, start: int, end: int) -> Tensor:
        return torch.from_numpy(genome.window(chrom, start, end))[None]

    # 19 windows of chrLong, 1 of chrN and 4 of chrMid in eight shares of 3: the middle ones, or the next where that is N
    windows = [("chrLong", number * WINDOW_BP) for number in (1, 4, 7, 11, 13, 16)]
    windows += [("chrMid", 0), ("chrMid", 2 * WINDOW_BP)]
    largest = max(
        measured
        for chrom, start in windows
        for _, measured in edge_states(model, tokens(chrom, start, start + WINDOW_BP), 16)
    )
    expected = set()
    for chrom, length_bp in LENGTHS.items():
        padded = -(-length_bp // TRUNK_BP) * TRUNK_BP
        for chunk, found in edge_states(model, tokens(chrom, 0, padded), CHUNK_BP // TRUNK_BP):
            if found > 2 * largest and chrom != "chrN":
                expected.add((chrom, chunk))
    result = run("out", model)
    noted = {
        (chrom, chunk)
        for chrom, start, end, _ in rows_of(result)
        for chunk in range(start // CHUNK_BP, -(-end // CHUNK_BP))
    }
    assert noted == expected
    rows = rows_of(result)
    assert ("chrLong", 39) in noted and ("chrLong", 1) not in noted and ("chrShort", 0) not in noted
    assert {what for *_, what in rows} == {"out_of_range:state:layer1"}
    assert result.summary["state_out_of_range"] == len(bins_of(rows)) > 900
    assert max(end for chrom, _, end, _ in rows if chrom == "chrLong") == 40_007
    assert result.summary["gap_bins"] > 0 and rows_of(result, "gap")


@pytest.mark.parametrize("strands", ["none", "augment", "parity"])
@pytest.mark.parametrize("pattern", ["mamba2", "mamba3", "lstm"])
def test_usual_states_are_in_range(pattern: str, strands: str, run: Run) -> None:
    if (pattern, strands) == ("lstm", "parity"):  # whose weights cannot be tied
        return
    result = run("out", tiny_model(strands, **PATTERNS[pattern]))
    assert rows_of(result) == [] and result.summary["state_out_of_range"] == 0


def test_the_layer_and_the_output_bins_are_told(run: Run) -> None:
    pattern = {**PATTERNS["decoder"], "pattern": ("conv", "mamba2", "mamba2")}
    rows = rows_of(run("out", growing(layer=1, **pattern), chroms="chrLong"))
    assert {what for *_, what in rows} == {"out_of_range:state:layer2"}
    assert rows[-1][2] == 40_007 and rows[-1][1] % CHUNK_BP == 0


def test_regions_have_notes_of_their_bins_only(run: Run) -> None:
    whole = run("whole", growing())
    cut = run("cut", growing(), regions=["chrLong:100-200", "chrLong:30000-30100", "chrLong:39000-40007"])
    assert rows_of(whole)[0][1] < 30_000
    assert rows_of(cut) == [
        ("chrLong", 29_984, 30_112, "out_of_range:state:layer1"),
        ("chrLong", 38_976, 40_007, "out_of_range:state:layer1"),
    ]
    assert cut.summary["state_out_of_range"] == 4 + 33


def test_both_strands_are_watched(run: Run) -> None:
    one, both = rows_of(run("one", growing())), rows_of(run("both", growing("augment")))
    assert one[0][1] > 2_000  # the other strand begins at the other end
    assert both[0][1] == 0 and both[0][2] > 30_000
    assert {chrom for chrom, *_ in both} == {"chrLong", "chrMid"}


@pytest.mark.parametrize("strands", ["none", "augment", "shared", "parity"])
def test_a_model_tells_states_in_the_bins_of_the_strand_itself(strands: str) -> None:
    model = tiny_model(strands, torch.float64)
    tokens = torch.randint(0, 5, (2, 21 * TRUNK_BP), generator=torch.Generator().manual_seed(3)).to(
        torch.int8
    )

    def told(stream: Any, tokens: Tensor) -> list[tuple[int, int, int, Tensor]]:
        found: list[tuple[int, int, int, Tensor]] = []
        for _ in stream(
            tokens,
            chunk_bp=8 * TRUNK_BP,
            watch=lambda layer, first, stop, state: found.append((layer, first, stop, state[0].clone())),
        ):
            pass
        return found

    plain = tiny_model("parity" if strands == "parity" else "none", torch.float64)
    plain.load_state_dict(model.state_dict())
    expected = told(plain.stream, tokens)
    assert len(expected) == 5
    if strands in ("augment", "shared"):
        other = told(plain.stream, reverse_complement(tokens))
        expected = [(layer, 21 - stop, 21 - first, state) for layer, first, stop, state in other] + expected
    found = told(model.stream, tokens)
    assert [place for *place, _ in found] == [place for *place, _ in expected]
    for (*_, state), (*_, truth) in zip(found, expected, strict=True):
        torch.testing.assert_close(state, truth, rtol=1e-12, atol=1e-12)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def test_shards_resumed_and_merged_note_what_one_run_notes(run: Run, tmp_path: Path) -> None:
    model, options = growing("augment"), {"hdf5": True}
    whole = run("whole", model, **options)
    assert rows_of(whole)
    for text in ("4/4", "1/4", "3/4", "2/4"):
        run("shards", model, shard=text, **options)
    merged = merge(tmp_path / "shards")
    run("resumed", model, shard="2/2", **options)
    resumed = run("resumed", model, **options)
    for other in (merged, resumed):
        assert files_of(other.folder) == files_of(whole.folder)
        assert other.summary == whole.summary
    said = json.loads((whole.folder / "run.json").read_text())["summary"]
    assert said["state_out_of_range"] == whole.summary["state_out_of_range"] > 0


def test_of_several_models_each_ones_notes_are_there(run: Run) -> None:
    pattern: dict[str, Any] = {"pattern": ("mamba2", "mamba2")}
    models = [growing(layer=1, **pattern), tiny_model("none"), growing("augment", layer=0, **pattern)]
    alone = [set(rows_of(run(f"{number}", model))) for number, model in enumerate(models)]
    together = run("together", models)
    assert len(set.union(*alone)) >= 4
    assert bins_of(rows_of(together)) == bins_of(set.union(*alone))
    assert together.summary["state_out_of_range"] == len({place[:2] for place in bins_of(rows_of(together))})
    twice = run("twice", [models[0], growing(layer=1, **pattern)])
    assert rows_of(twice) == sorted(alone[0])


def test_parts_of_before_and_damaged_notes_are_made_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run("whole", growing())
    run("out", growing(), shard="1/1")
    plan = read_plan(tmp_path / "out")
    assert plan is not None
    path = Parts(tmp_path / "out", plan).path(0)
    values, said = load_file(path)["values"], PartFile(path).said
    write_part(path, values, {name: text for name, text in said.items() if name != "notes"})
    with pytest.raises(DataError, match="is of an earlier version of genossm, without notes on states"):
        merge(tmp_path / "out")
    run("out", growing(), shard="1/1")
    assert "without notes on states; computing it again" in capsys.readouterr().err
    path.write_bytes(path.read_bytes().replace(b"state:layer1", b"state:layer2"))
    with pytest.raises(DataError, match="has a wrong checksum"):
        merge(tmp_path / "out")
    assert files_of(run("out", growing()).folder) == files_of(whole.folder)


def test_states_that_are_not_finite_are_noted_without_limits() -> None:
    sizes = StateSizes()
    sizes(0, 0, 4, (torch.ones(1, 3), torch.tensor([[1.0, torch.nan]])))
    sizes(0, 4, 8, (torch.tensor([[1e30, 1.0]]), torch.ones(1, 2)))  # its square overflows
    sizes(0, 8, 10, (torch.ones(1, 3), torch.ones(1, 2)))
    sizes(2, 4, 8, (torch.full((1, 2), 3 + 4j),))
    assert sizes.beyond({}, 19, 2) == [("out_of_range:state:layer1", [[0, 16]])]
    assert sizes.beyond({(2, 0): 5.01, (0, 0): 0.5}, 19, 2) == [("out_of_range:state:layer1", [[0, 19]])]
    assert sizes.beyond({(2, 0): 4.99}, 19, 2)[1:] == [("out_of_range:state:layer3", [[8, 16]])]
    assert StateSizes().beyond({}, 5, 1) == []


def test_a_state_that_is_not_finite_reaches_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing could be measured, and values are numbers all the same."""
    model = tiny_model("none")
    mixer: Any = model.encoder.mixers()[0]
    mix, calls = mixer.mix, []

    def broken(*arguments: Any) -> Any:
        y, state = mix(*arguments)
        calls.append(1)
        return y, (state[0] * torch.inf,) if len(calls) == 40 else None

    monkeypatch.setattr(state_range, "WINDOWS", 0)
    monkeypatch.setattr(mixer, "mix", broken)
    rows = rows_of(run("out", model, chroms="chrLong"))
    assert rows == [("chrLong", 39 * CHUNK_BP, 40_007, "out_of_range:state:layer1")]


def test_without_recurrent_mixers_and_in_windows_nothing_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> object:
        raise AssertionError("states were measured")

    monkeypatch.setattr(chromosome_module, "state_limits", refused)
    result = run("conv", tiny_model("none", **PATTERNS["conv"]))
    assert result.summary["state_out_of_range"] == 0
    windows = run("windows", growing(), mode="windows", chunk_bp=None)
    assert "state_out_of_range" not in windows.summary and not rows_of(windows)
    with pytest.raises(AssertionError, match="states were measured"):
        run("mamba2", growing())


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_windows_are_measured_in_the_precision_of_the_prediction(
    run: Run, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    found: list[bool] = []

    def watched(*arguments: Any) -> Any:
        found.append(torch.is_autocast_enabled("cpu"))
        return state_limits(*arguments)

    monkeypatch.setattr(chromosome_module, "state_limits", watched)
    run("out", growing(), precision=precision)
    assert found == [precision == "bf16"]  # once for all chromosomes


def places(genome: Genome, lengths: dict[str, int], window_bp: int) -> list[tuple[str, int, int]]:
    windows = measured_windows(lengths, window_bp, CodeReader(genome))
    return [(window.chrom, window.start, window.end) for window in windows]


def test_windows_are_spread_over_the_genome_and_pass_by_what_is_n(
    genome: Genome, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = genome.lengths
    found = places(genome, lengths, 1_000)  # 40, 3, 9 and no windows
    assert found == [
        ("chrLong", 1_000 * start, 1_000 * start + 1_000) for start in (3, 9, 16, 22, 29, 35)
    ] + [
        ("chrMid", 0, 1_000),
        ("chrMid", 5_000, 6_000),
    ]
    assert measured_bp(lengths, 1_000) == 8_000
    # no chromosome is as long: the longest, but for the one of N
    assert places(genome, lengths, 50_000) == [
        (chrom, 0, lengths[chrom]) for chrom in ("chrLong", "chrMid", "chrShort")
    ]
    assert places(genome, {"chrN": 3_000}, 1_000) == []
    assert places(genome, lengths, 20_000) == [("chrLong", 0, 20_000), ("chrLong", 20_000, 40_000)]
    monkeypatch.setattr(state_range, "WINDOWS", 1)
    assert places(genome, lengths, 1_000) == [("chrLong", 26_000, 27_000)]


def test_limits_are_twice_the_largest_and_none_where_there_is_no_window(genome: Genome) -> None:
    model, reader = growing(), CodeReader(genome)
    once = state_limits(model, reader, {"chrShort": 700})
    tokens = torch.from_numpy(genome.window("chrShort", 0, 704))[None]
    truth = max(found for _, found in edge_states(model, tokens, 16))
    assert once == pytest.approx({(0, 0): 2 * truth}, rel=1e-5)
    assert state_limits(model, reader, {"chrN": 3_000}) == {}


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_windows_are_measured_together_or_one_by_one(
    genome: Genome, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Eight windows of one length, in batches: the limit is that of the window with the largest state."""
    model, reader = growing(), CodeReader(genome)
    model.window_bp = 1_024
    monkeypatch.setattr(state_range, "CHUNK_BP", at_once * 1_024 // state_range.CHUNKS)
    windows = list(measured_windows(genome.lengths, 1_024, reader))
    found = [
        max(found for _, found in edge_states(model, torch.from_numpy(codes)[None], 1_024 // 4 // TRUNK_BP))
        for codes in (genome.window(window.chrom, window.start, window.end) for window in windows)
    ]
    assert len(windows) == 8 and max(found) > 1.001 * min(found)
    assert state_limits(model, reader, genome.lengths) == pytest.approx({(0, 0): 2 * max(found)}, rel=1e-5)


def test_the_estimate_counts_what_is_measured(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_estimate, "_seconds_a_base", lambda job: (1.0, "nothing"))
    for name, mode, measured in (
        ("mamba2", "chromosome", 8),
        ("conv", "chromosome", 0),
        ("mamba2", "windows", 0),
    ):
        model = tiny_model("none", **PATTERNS[name])
        found = predict_estimate.estimate(
            model, genome, tmp_path / "out", mode=mode, device="cpu", chroms="chrShort"
        )
        read_bp = 700 if mode == "chromosome" else WINDOW_BP
        assert found.compute_seconds == read_bp + measured * WINDOW_BP
