"""The benchmark of encoders at tiny sizes on the CPU: what is measured and saved, sizes, rivals, limits and faults."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from genossm.cli import main
from genossm.cli.console import to_json
from genossm.errors import ConfigError, GenossmError
from genossm.models.accessibility import AccessibilityModel
from genossm.models.encoder import Encoder, MixerName
from genossm.models.mixers.conv import DilatedConv
from genossm.models.mixers.mamba2 import Mamba2
from genossm.pipelines import benchmark_encoders as encoders
from genossm.pipelines import benchmark_rivals
from genossm.pipelines.benchmark_encoder_cases import (
    Case,
    Cost,
    EncoderBenchmark,
    EncoderGrowth,
    Plan,
    find_cases,
    kb,
    row_of,
    strands,
)
from genossm.pipelines.benchmark_encoder_tables import markdown, text
from genossm.pipelines.benchmark_encoders import OVER, benchmark_encoders, estimate_mib
from genossm.pipelines.benchmark_rivals import (
    TwoPasses,
    WarmUp,
    compare_forms,
    compare_passes,
    layer_parameters,
    mamba_ssm_pass,
    one_pass,
    rivals,
    sized_like,
)
from genossm.pipelines.model_info import model_info
from genossm.run_config import RunConfig, load_run_config

CPU = torch.device("cpu")
MIXERS: tuple[MixerName, ...] = get_args(MixerName)
TINY = """
model:
  encoder:
    width: 16
    pattern: [mamba2, mamba2]
    stem: {channels: [8, 8], pool: [4, 2], first_kernel: 5, kernel: 3}
    state: 4
    head_dim: 8
  head_hidden: 8
train: {batch_size: 3}
"""
FAKE_BLOCK = """
import torch
import torch.nn.functional as F
from genossm.kernels.gated_norm import gated_rms_norm
from genossm.kernels.short_conv import short_conv
from genossm.kernels.ssd import ssd

causal_conv1d_fwd_function = True
calls = []

def mamba_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, activation,
                                     rmsnorm_weight, rmsnorm_eps, outproj_weight, headdim, ngroups, norm_before_gate):
    assert (chunk_size, rmsnorm_eps, norm_before_gate) == (256, 1e-5, False)
    calls.append(zxbcdt.shape)
    heads = len(A)
    inner = heads * headdim
    states = (conv1d_weight.shape[0] - inner) // 2
    z, xBC, dt = torch.split(zxbcdt, [inner, inner + 2 * states, heads], dim=-1)
    xBC = short_conv(xBC, conv1d_weight, conv1d_bias, activation=activation, padding="causal")
    x, B, C = torch.split(xBC, [inner, states, states], dim=-1)
    B, C = (part.unflatten(-1, (ngroups, -1)) for part in (B, C))
    y = ssd(x.unflatten(-1, (heads, headdim)), dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)
    return F.linear(gated_rms_norm(y.flatten(2), rmsnorm_weight, z, eps=rmsnorm_eps), outproj_weight)
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The path of a tiny configuration: bins of 8 bp, two layers of mamba2."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def plan(tiny: str) -> Plan:
    return Plan(
        configs=(),
        like=tiny,
        length=128,
        growth=(64, 128),
        probe_bp=64,
        budget_s=0.0,
        growth_budget_s=0.0,
    )


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A $PEER_PATH with a package called mamba_ssm, whose block is computed by our kernels; the file of that block."""
    folder = tmp_path / "peers" / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (folder.parents[1] / "__init__.py").write_text(
        '__version__ = "9.8"\nraise RuntimeError("not to be run")\n'
    )
    (folder / "ssd_combined.py").write_text(FAKE_BLOCK)
    monkeypatch.setenv("PEER_PATH", str(tmp_path / "peers"))
    yield folder / "ssd_combined.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def run(plan: Plan, **options: Any) -> EncoderBenchmark:
    return benchmark_encoders(device="cpu", quick=True, plan=plan, **options)


def tied(width: int = 16) -> Mamba2:
    mixer = Mamba2(width, state=4, head_dim=8, conv_width=4, bidirectional="tied").double()
    with torch.no_grad():
        for parameter in (mixer.conv_bias, mixer.D):
            parameter.add_(torch.randn_like(parameter))
    return mixer


# What is measured.


@pytest.mark.usefixtures("peers")
def test_the_whole_run(plan: Plan, tiny: str) -> None:
    seen: list[tuple[int, int]] = []
    result = run(
        plan,
        configs=(tiny,),
        mixers=("conv", "mamba2"),
        save=lambda partial: seen.append((len(partial.rows), len(partial.growth))),
    )
    assert [(row.group, row.name) for row in result.rows] == [
        ("configuration", tiny),
        ("mixer", "mamba2"),
        ("mixer", "conv"),
        ("rival", "mamba2"),
        ("rival", "Transformer"),
        ("rival", "mamba2, shared strands"),
        ("rival", "mamba2, tied weights (parity)"),
        ("rival", "mamba2, two passes + flips, shared strands"),
        ("rival", "the same with mamba-ssm's kernels"),
    ]
    for row in result.rows:
        for cost in (row.training, row.inference):
            assert cost.problem is None and cost.ms is not None and cost.repeats >= 3
            assert (cost.length, cost.batch) == (128, 3)
            assert cost.mbp_per_s == pytest.approx(3 * 128 / cost.ms / 1e3)
    assert sys.modules["mamba_ssm.ops.triton.ssd_combined"].calls.count((6, 16, 76)) > 20
    by_name = {row.name: row for row in result.rows}
    assert (by_name["conv"].training.strands, by_name["conv"].inference.strands) == (1, 2)
    assert by_name["mamba2, shared strands"].training.strands == 2
    assert by_name["mamba2, tied weights (parity)"].inference.strands == 1
    assert (by_name["mamba2"].trunk_bp, by_name["mamba2"].bin_bp) == (8, 8)
    # The same encoder is measured once.
    assert by_name["mamba2"].training == by_name[tiny].training
    assert result.precision == "float32" and set(result.versions) > {"torch", "peer mamba_ssm"}
    assert len(result.checks) == 3 and all(error < 1e-5 for error in result.checks.values())

    assert seen == sorted(seen) and {rows for rows, _ in seen} == set(range(1, 10))
    assert [growth.name for growth in result.growth[::2]] == [
        *("mamba2", "conv", "Transformer", "mamba2, shared strands", "mamba2, tied weights (parity)"),
        *("mamba2, two passes + flips, shared strands", tiny),
    ]
    for growth in result.growth:
        assert [(cost.length, cost.batch) for cost in growth.costs] == [(64, 1), (128, 1)]
        assert growth.exponent is not None and growth.long_exponent is None
    for shown in (text(result), markdown(result)):
        for words in (
            "CPU, ",
            torch.__version__,
            "windows of 128 random bp",
            "2 mamba2, 16 wide",
            "counted once",
        ):
            assert words in shown
    assert markdown(result).count("\n### ") == 5
    saved = json.loads(to_json(result))
    assert saved["rows"][0]["training"]["mbp_per_s"] > 0 and saved["growth"][0]["costs"][1]["ms"] > 0


def test_all_shipped_configurations_and_all_mixers_by_default() -> None:
    cases = find_cases(Plan(), None, None, True)
    names = {case.name for case in cases if case.group == "configuration"}
    assert {"accessibility-100kb", "base-resolution", "hybrid", "yeast-100kb"} <= names
    assert tuple(case.name for case in cases if case.group == "mixer") == MIXERS
    assert [case.passes for case in cases if case.group == "rival"] == ["", "", "", "", "ours", "mamba-ssm"]
    batches = {case.name: case.config.train.batch_size for case in cases}
    assert batches["accessibility-100kb"] == batches["lstm"] == batches["Transformer"] == 8
    few = find_cases(replace(Plan(), configs=("tiny",)), ("lstm",), 5, False)
    assert [(case.name, case.config.train.batch_size) for case in few] == [("tiny", 5), ("lstm", 5)]


def test_strands_that_are_computed() -> None:
    found = {}
    for both in ("none", "augment", "shared"):
        config = RunConfig()
        case = Case("a", "mixer", replace(config, model=replace(config.model, reverse_complement=both)))
        found[both] = (strands(case, "training"), strands(case, "inference"))
    assert found == {"none": (1, 1), "augment": (1, 2), "shared": (2, 2)}


def test_steps_train_and_predict(plan: Plan, tiny: str) -> None:
    made: list[AccessibilityModel] = []

    class Watched(AccessibilityModel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    result = EncoderBenchmark("CPU", {}, {}, "float32", 128, tiny, True)
    bench = encoders._Bench(CPU, plan, result, 0.0, lambda _: None)
    case = Case("a", "mixer", load_run_config(tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "AccessibilityModel", Watched)
        steps = bench._steps(case, "training")
        predict = bench._steps(case, "inference")(2, 64)
    before = [parameter.detach().clone() for parameter in made[0].parameters()]
    module = steps.args[0]  # type: ignore[attr-defined]
    average = [parameter.detach().clone() for parameter in module.average.parameters()]
    for _ in range(2):
        steps(2, 64)()
    assert made[0].training
    assert all((a != b).any() for a, b in zip(before, made[0].parameters(), strict=True))
    assert any((a != b).any() for a, b in zip(average, module.average.parameters(), strict=True))
    values = predict()
    assert isinstance(values, Tensor) and values.shape == (2, 8, 1) and values.is_inference()
    assert not made[1].training and (0 <= values).all() and (values <= 1).all()


def test_memory_is_all_that_was_allocated_beyond_what_was_held(
    plan: Plan, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = EncoderBenchmark("CPU", {}, {}, "float32", 128, tiny, True)
    bench = encoders._Bench(CPU, plan, result, 0.0, lambda _: None)
    bench.device = torch.device("cuda", 0)
    made: list[weakref.ref[Callable[[], None]]] = []

    def steps(batch: int, length: int) -> Callable[[], None]:
        def step() -> None:
            assert (batch, length) == (3, 128)

        made.append(weakref.ref(step))
        return step

    def allocated(device: torch.device) -> int:
        return 5 * 2**20 if made[0]() is not None else 0  # a CUDA graph's memory goes with the step

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated)
    cost = bench._timed(steps, Cost(128, 3, 2), bench.watch, 2 * 2**20)
    assert (cost.peak_mib, cost.length, cost.batch, cost.strands) == (3.0, 128, 3, 2)


def test_the_estimate_is_that_of_info(tiny: str) -> None:
    info = model_info(tiny, length_bp=4096, batch_size=3, mode="train")
    assert info.training is not None
    assert estimate_mib(load_run_config(tiny), 4096) == info.training.in_all / 2**20


# Sizes.


@pytest.mark.parametrize("like", ["accessibility-100kb", "yeast-100kb", "hybrid"])
def test_encoders_are_of_about_equal_size(like: str) -> None:
    config = load_run_config(like)
    wanted = layer_parameters(config.model.encoder)
    for mixer in MIXERS:
        sized = sized_like(config, mixer).model
        assert 0.94 <= layer_parameters(sized.encoder) / wanted <= 1.13, mixer
        assert set(sized.encoder.pattern) == {mixer}
        same = replace(sized, encoder=replace(sized.encoder, stem=config.model.encoder.stem))
        assert same == sized and sized.encoder.width == config.model.encoder.width
        assert sized.encoder.decoder == config.model.encoder.decoder
        layers = len(sized.encoder.pattern) * (len(sized.encoder.dilations) if mixer == "conv" else 1)
        missing = len(config.model.encoder.pattern) - layers
        assert missing == 0 or (like == "hybrid" and missing == 1)


def test_sizing_keeps_what_already_is_so() -> None:
    config = load_run_config("yeast-100kb")
    assert sized_like(config, "mamba2") is config
    both = replace(config.model.encoder, bidirectional="tied", mlp_ratio=2.0, experts=4)
    found = sized_like(replace(config, model=replace(config.model, encoder=both)), "attention").model.encoder
    assert (found.bidirectional, found.experts) == ("fused", 0)
    assert layer_parameters(found) == pytest.approx(layer_parameters(both), rel=0.01)


def test_the_rivals_are_alike_but_in_what_is_compared() -> None:
    like = load_run_config("accessibility-100kb")
    found = {rival.name: rival for rival in rivals(like)}
    ours, transformer, shared, parity, passes, theirs = found.values()
    assert ours.config is like
    encoder = transformer.config.model.encoder
    assert encoder.window is None and encoder.mlp_ratio > 0 and set(encoder.pattern) == {"attention"}
    assert {mixer.window for mixer in Encoder(encoder).mixers()} == {None}  # type: ignore[union-attr]
    assert layer_parameters(encoder) == pytest.approx(layer_parameters(like.model.encoder), rel=0.01)
    assert shared.config.model.reverse_complement == passes.config.model.reverse_complement == "shared"
    assert parity.config.model == replace(like.model, reverse_complement="parity")
    assert layer_parameters(passes.config.model.encoder) == pytest.approx(
        layer_parameters(like.model.encoder), rel=0.02
    )
    assert passes.config == theirs.config and (passes.passes, theirs.passes) == ("ours", "mamba-ssm")
    assert all(rival.beside is None or rival.beside in found for rival in found.values())


def test_weights_that_cannot_be_tied_are_no_rival() -> None:
    like = load_run_config("accessibility-100kb", ["model.encoder.conv_width=4"])  # not centred
    assert not [rival for rival in rivals(like) if "parity" in rival.name]


# Two passes and flips.


def test_a_pass_is_causal_and_the_second_is_its_mirror_image() -> None:
    torch.manual_seed(1)
    mixer = tied()
    x_BLD = torch.randn(2, 21, 16, dtype=torch.float64)
    changed = x_BLD.clone()
    changed[:, 12:] += 1
    for way in (0, 1):
        y, z = one_pass(mixer, x_BLD, way), one_pass(mixer, changed, way)
        assert (y[:, :12] - z[:, :12]).abs().max() < 1e-12 and (y[:, 12] - z[:, 12]).abs().min() > 1e-9
    assert (one_pass(mixer, x_BLD, 0) - one_pass(mixer, x_BLD, 1)).abs().max() > 1e-3
    both = TwoPasses(mixer)
    expected = one_pass(mixer, x_BLD, 0) + one_pass(mixer, x_BLD.flip(1), 1).flip(1)
    assert torch.equal(both(x_BLD), expected)
    with torch.no_grad():
        for parameter in (mixer.conv_weight, mixer.conv_bias):
            parameter[1] = parameter[0]
        for parameter in (mixer.A_log, mixer.dt_bias, mixer.D):
            parameter[:, 1] = parameter[:, 0]
    assert (both(x_BLD.flip(1)) - both(x_BLD).flip(1)).abs().max() < 1e-12
    assert {name for name, _ in both.named_parameters()} >= set(both.state_parameters)
    with pytest.raises(ValueError, match="tied Mamba2"):
        TwoPasses(Mamba2(16, state=4, head_dim=8))


def test_one_pass_and_two_with_flips_agree(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run_config(tiny).model.encoder
    for length in (1, 40):
        errors = compare_forms(config, length, CPU)
        assert len(errors) == 2 and all(error < 1e-5 for error in errors.values())
    true_scan = benchmark_rivals._scan

    def other_way(of: Any, mixed: Any, dt: Any, way: int, D: Any) -> Tensor:
        return true_scan(of, mixed, dt, 0, D)

    monkeypatch.setattr(benchmark_rivals, "_scan", other_way)
    assert all(error > 1e-3 for error in compare_forms(config, 40, CPU).values())


def test_forms_that_differ_are_not_timed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "compare_forms", lambda *_: {"fused": 0.02, "tied": 1e-6})
    saved: list[EncoderBenchmark] = []
    with pytest.raises(GenossmError, match=r"fused by 2\.0e-02 \(at most 1e-04\); nothing is timed"):
        run(plan, mixers=(), save=saved.append)
    assert saved == []


# mamba-ssm.


@pytest.mark.usefixtures("peers")
def test_the_pass_of_mamba_ssm(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = list(sys.path)
    theirs, version = mamba_ssm_pass()
    assert version == "9.8" and sys.path == path
    config = replace(load_run_config(tiny).model.encoder, bidirectional="tied", conv_width=4)
    assert compare_passes(config, 30, CPU, theirs) < 1e-5
    assert compare_passes(config, 30, CPU, lambda of, x, way: theirs(of, x, 1 - way)) > 1e-2
    # What a warm-up process does.
    shares: list[tuple[int, int]] = []
    monkeypatch.setattr(benchmark_rivals, "share_autotuning", lambda *share: shares.append(share))
    benchmark_rivals.main([to_json(config), "20", "cpu", "3", "1"])
    assert shares == [(1, 3)]


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (None, "no package 'mamba_ssm'"),
        ("causal_conv1d_fwd_function = None", "needs causal-conv1d"),
        (FAKE_BLOCK.replace("return F.linear(", "return 2 * F.linear("), "its pass differs from ours by "),
        (FAKE_BLOCK.replace("heads = len(A)", "raise KeyError('no kernel image')"), "no kernel image"),
    ],
)
def test_mamba_ssm_that_is_not_there_or_wrong(
    plan: Plan, tiny: str, peers: Path, block: str | None, why: str
) -> None:
    if block is None:
        peers.parents[2].rename(peers.parents[3] / "elsewhere")
    else:
        peers.write_text(block)
    result = EncoderBenchmark("CPU", {}, {}, "float32", 128, tiny, True)
    bench = encoders._Bench(CPU, plan, result, 0.0, lambda _: None)
    bench.run([case for case in find_cases(plan, (), None, True) if case.passes == "mamba-ssm"])
    assert result.rows == [] and why in result.absent["mamba-ssm"] and why in text(result)


def test_warm_up_processes_end(tiny: str) -> None:
    with WarmUp(1, CPU) as warm:
        warm.wait(0.1)
        warm.start(load_run_config(tiny).model.encoder, 16)
        (process,) = warm._running
        assert process.poll() is None
        warm.wait(0.01)
    assert process.poll() is not None


# What cannot be measured.


def fail_in_training(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Layers of conv raise an error in training."""
    forward: Callable[..., Tensor] = DilatedConv.forward

    def failing(self: DilatedConv, x_BLD: Tensor) -> Tensor:
        if self.training:
            raise error
        return forward(self, x_BLD)

    monkeypatch.setattr(DilatedConv, "forward", failing)


def test_a_row_without_memory_says_so_and_the_run_goes_on(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_training(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    result = run(plan, mixers=("conv", "attention"), with_rivals=False)
    attention, conv = result.rows
    assert conv.training.problem == "out of memory" and conv.training.ms is None
    assert conv.inference.ms is not None and attention.training.ms is not None
    training, inference = result.growth[2:]
    assert [(cost.length, cost.problem) for cost in training.costs] == [(64, "out of memory")]
    assert training.exponent is None and inference.exponent is not None
    shown = text(result)
    assert "out of memory" in shown and "conv, training, from 64 bp on: out of memory." in shown


def test_other_errors_are_not_hidden_and_rows_are_kept(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_training(monkeypatch, ValueError("no"))
    names: list[list[str]] = []
    with pytest.raises(ValueError, match="no"):
        run(
            plan,
            mixers=("attention", "conv"),
            with_rivals=False,
            save=lambda partial: names.append([row.name for row in partial.rows]),
        )
    assert names == [["attention"]]


def test_slow_steps_and_late_ones_are_left_out(plan: Plan) -> None:
    slow = replace(plan, step_limit_s=1e-6, growth_step_limit_s=1e-6)
    result = run(slow, mixers=("conv",), with_rivals=False)
    assert "left out: a step would take about" in (result.rows[0].training.problem or "")
    first, second = result.growth[0].costs
    assert first.ms is not None and "left out: a step would take" in (second.problem or "")

    late = run(plan, mixers=("conv",), with_rivals=False, time_limit_s=1e-9)
    assert (late.rows[0].training.problem, late.rows[0].inference.problem) == (OVER, OVER)
    assert [cost.problem for growth in late.growth for cost in growth.costs] == [OVER, OVER]
    assert f"conv, training, from 64 bp on; conv, inference, from 64 bp on: {OVER}." in text(late)


def test_tables_with_memory_and_growth() -> None:
    """As on a GPU: memory, its estimate, times over another row's, and powers."""
    like = load_run_config("tiny")
    training = Cost(131072, 8, 1, 10.0, 104.9, 9, peak_mib=2048, estimate_mib=2150.4)
    inference = Cost(131072, 8, 2, 2.5, 419.4, 9, peak_mib=512)
    one = row_of(Case("one", "rival", like), training, inference)
    slower = replace(training, ms=30.0, mbp_per_s=35.0, estimate_mib=None)
    other = replace(one, name="other", beside="one", training=slower, inference=replace(inference, ms=1234.5))
    costs = [Cost(length, 1, 1, length / 1e5, 1.0) for length in (2**14, 2**17, 2**20)]
    found = EncoderBenchmark("NVIDIA", {"memory": "140 GiB"}, {"torch": "2"}, "bf16", 131072, "tiny", False)
    found.rows = [one, other]
    found.growth = [EncoderGrowth("one", "training", costs, 1.0, 1.0)]
    lines = {line.split("|")[1].strip(): line for line in markdown(found).splitlines() if line[0:1] == "|"}
    cells = [cell.strip() for cell in lines["other"].split("|")[1:-1]]
    assert cells[-9:] == ["30.00", "35.0", "2.00", "", "3.00", "1,234", "419.4", "0.50", "493.80"]
    found.growth = []
    (row,) = [line for line in markdown(found).splitlines() if line.startswith("| one |")]
    assert "| 10.00 | 104.9 | 2.00 | 1.05 |" in row
    assert "bfloat16 autocast" in text(found) and "other: over one" in text(found)
    assert [kb(length) for length in (2**14, 2**17, 2**20)] == ["16 kb", "128 kb", "1 Mb"] and kb(
        1000
    ) == "1,000 bp"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"quick": False}, "on a CPU only a quick run"),
        ({"mixers": ("mamba2", "mamba9")}, "there is no mixer 'mamba9'; choose among s4, "),
        ({"configs": ("yeast",)}, "no shipped configuration 'yeast'"),
        ({"like": "nothing"}, "no shipped configuration 'nothing'"),
        ({"length": 129}, r"129 bp is no multiple of the bins of 8 bp"),
    ],
)
def test_what_cannot_be_asked(plan: Plan, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        benchmark_encoders(**{"device": "cpu", "quick": True, "plan": plan, "with_rivals": True, **options})


def test_a_size_that_a_mixer_cannot_have(plan: Plan, tiny: str) -> None:
    Path(tiny).write_text(TINY.replace("head_dim: 8", "head_dim: 32"))
    with pytest.raises(ConfigError, match=r"not every mixer can have: .*attention.*--like"):
        run(plan, mixers=("attention",))


# The command.


def test_the_command_prints_and_writes(
    plan: Plan, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoders, "CPU_QUICK", plan)
    files = tmp_path / "bench.json", tmp_path / "bench.md"
    words = ["bench", "encoders", "--quick", "--device", "cpu", "--no-rivals", "--mixers", "conv, hydra"]
    more = ["--json-out", str(files[0]), "--markdown", str(files[1])]
    assert main([*words, *more, "--config", tiny, "--batch", "2", "--length", "64", "--no-growth"]) == 0
    shown = capsys.readouterr().out
    assert "on a CPU: it shows that all of it runs" in shown and "windows of 64 random bp" in shown
    saved = json.loads(files[0].read_text())["encoders"]
    assert [row["name"] for row in saved["rows"]] == [tiny, "hydra", "conv"]
    assert {row["training"]["batch"] for row in saved["rows"]} == {2} and saved["length"] == 64
    assert saved["growth"] == [] and "| hydra |" in files[1].read_text()

    assert main([*words[:-1], "none", "--config", "none", "--like", tiny, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["encoders"]["rows"] == []


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "encoder"]) == 2
    assert main(["bench", "encoders", "--batch", "0"]) == 2
    assert main(["bench", "encoders", "--device", "cpu"]) == 1
    assert "give --quick" in capsys.readouterr().err
    assert main(["bench", "encoders", "--help"]) == main(["bench", "kernels", "--help"]) == 0
    assert "--json" in capsys.readouterr().out
