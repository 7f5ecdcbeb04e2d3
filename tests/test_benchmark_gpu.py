"""The GPU benchmark, run on the CPU with the PyTorch backend and made-up peers: its checks, figures, tables and floors."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.cli import main
from genossm.cli.console import to_json
from genossm.errors import ConfigError, GenossmError
from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.ssd import ssd
from genossm.pipelines import benchmark, benchmark_cases, benchmark_gpu, benchmark_peers
from genossm.pipelines.benchmark_beside import QUOTED, quoted
from genossm.pipelines.benchmark_cases import CASES, Case, Shapes, Work, select_cases
from genossm.pipelines.benchmark_gpu import Plan, benchmark_on_gpu, exponent, floor
from genossm.pipelines.benchmark_peers import PEERS, Peer
from genossm.pipelines.benchmark_tables import markdown, text
from genossm.pipelines.benchmark_timing import (
    Ceilings,
    Measured,
    Pass,
    Stopwatch,
    measure_ceilings,
    measure_passes,
)

CPU = torch.device("cpu")
TINY = Shapes(heads=2, head_dim=4, channels=6, state=3)
PLAN = Plan(
    lengths=(16, 48),
    one_direction=(32,),
    growth=(16, 32, 64),
    host_bound_below=16,
    check_length=19,
    check_shapes=TINY,
    check_dtypes=(torch.float32,),
    dtype=torch.float32,
    budget_s=0.0,
    peers_limit_s=120,
    copy_bytes=2**20,
    matmul_size=32,
)

FAKE_SSD = """
from genossm.kernels.ssd import ssd

def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus):
    return ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, backend="torch")
"""
BROKEN_SCAN = """
def selective_scan_fn(*arguments):
    raise RuntimeError("no kernel image\\nis available")
"""


@pytest.fixture
def peers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A $PEER_PATH with a package called mamba_ssm: an SSD that works, a selective scan that does not."""
    ops = tmp_path / "peers" / "mamba_ssm" / "ops"
    (ops / "triton").mkdir(parents=True)
    (ops.parent / "__init__.py").write_text('__version__ = "9.8"\nraise RuntimeError("not to be run")\n')
    (ops / "triton" / "ssd_combined.py").write_text(FAKE_SSD)
    (ops / "selective_scan_interface.py").write_text(BROKEN_SCAN)
    monkeypatch.setenv("PEER_PATH", str(tmp_path / "peers"))
    return tmp_path / "peers"


@pytest.mark.slow
@pytest.mark.usefixtures("peers_folder")
def test_the_whole_run_with_peers() -> None:
    cases = ("ssd-both-64", "ssd-forward-64", "selective_scan-both-shared")
    saved: list[tuple[int, int]] = []
    result = benchmark_on_gpu(
        device="cpu",
        cases=cases,
        plan=PLAN,
        shapes=TINY,
        backend="torch",
        save=lambda partial: saved.append((len(partial.rows), len(partial.growth))),
    )
    own_rows = sum(row.by == "genossm" for row in result.rows)
    assert saved == [(own_rows, 0), (own_rows, len(result.growth)), (len(result.rows), len(result.growth))]
    assert [check.case for check in result.checks] == list(cases)
    assert all(0 < check.gradient_error < 1e-5 for check in result.checks)
    own = {(row.case, row.length): row for row in result.rows if row.by == "genossm"}
    assert [length for case, length in own if case == "ssd-forward-64"] == [16, 32, 48]
    assert [length for case, length in own if case == "ssd-both-64"] == [16, 48]
    assert all(row.forward and row.forward_backward and not row.problem for row in own.values())

    peers = {(row.case, row.length, row.by): row for row in result.rows if row.by != "genossm"}
    beside = peers["ssd-both-64", 16, "mamba-ssm, two + flips"]
    assert beside.forward is not None and beside.forward_backward is not None and not beside.quoted
    assert isinstance(beside.forward, Pass)
    broken = peers["selective_scan-both-shared", 48, "mamba-ssm, two + flips"]
    assert broken.forward is None and broken.problem == "RuntimeError: no kernel image is available"
    assert result.versions["peer mamba_ssm"] == "9.8"
    assert "no package 'fla'" in result.absent["fla (ssd)"]

    assert [row.length for row in result.growth[0].rows] == [16, 32, 64]
    assert result.growth[0].forward is not None and result.growth[0].long_forward is None
    saved = json.loads(to_json(result))
    assert saved["rows"][0]["forward"]["ms"] > 0 and saved["states"]["ssd-both-64"] == 64
    for shown in (text(result), markdown(result)):
        for words in (
            "mamba-ssm, two + flips",
            "no kernel image",
            "floor (",
            "ssd-both-64: time grows",
            torch.__version__,
        ):
            assert words in shown
    assert "| case | positions | by |" in markdown(result)


def test_a_wrong_gradient_is_named_and_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any, **options: Any) -> Any:
        if options["backend"] == "torch":
            B = B + 0.05 * (B - B.detach())  # the same value, another gradient
        return ssd(x, dt, A, B, *rest, **options)

    monkeypatch.setitem(benchmark_cases.OPERATORS, "ssd", wrong)
    monkeypatch.setattr(benchmark_gpu, "measure_ceilings", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(
        GenossmError, match=r"ssd-both-64 in float32 is off in the gradient of B by 5\.0e-02 \(at"
    ):
        benchmark_on_gpu(
            device="cpu", cases=["ssd-both-64"], plan=PLAN, shapes=TINY, peers=False, backend="torch"
        )


def test_a_nan_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(*arguments: Any, **options: Any) -> Any:
        y = ssd(*arguments, **options)
        return y * math.nan if options["backend"] == "torch" else y

    monkeypatch.setitem(benchmark_cases.OPERATORS, "ssd", nan)
    with pytest.raises(GenossmError, match="off in output 0 by nan, the gradient of x by nan"):
        benchmark_on_gpu(
            device="cpu", cases=["ssd-forward-64"], plan=PLAN, shapes=TINY, peers=False, backend="torch"
        )


def test_a_failing_kernel_does_not_lose_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(x: Tensor, *rest: Any, **options: Any) -> Any:
        if x.shape[1] == 48:
            raise RuntimeError("an illegal memory access was encountered")
        return ssd(x, *rest, **options)

    monkeypatch.setitem(benchmark_cases.OPERATORS, "ssd", long)
    result = benchmark_on_gpu(
        device="cpu", cases=["ssd-both-64"], plan=PLAN, shapes=TINY, peers=False, backend="torch"
    )
    assert [row.forward is None for row in result.rows] == [False, True]
    assert result.failures() == [
        "ssd-both-64, 48 positions, genossm: RuntimeError: an illegal memory access was encountered"
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_are_those_of_inputs_and_outputs(case: Case) -> None:
    inputs = case.inputs(TINY, 12, torch.bfloat16, CPU)
    outputs = case.reference([tensor.double() for tensor in inputs])
    read = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    written = sum(tensor.numel() * 2 for tensor in outputs)
    forward, both = case.work(TINY, 12, inputs)
    assert forward.bytes == read + written and both.bytes == 3 * read + 2 * written


def test_the_floors_of_the_published_comparison() -> None:
    """KERNELS: an H100 with copy 3.03 TB/s, 795 TFLOP/s, 4.13 T exponentials/s, at 131,072 positions."""
    ceilings = Ceilings(3030, 795, 4130)
    wanted = {
        "ssd-both-128": (0.20, 0.68),
        "ssd-both-64": (0.19, 0.48),
        "ssd-forward-128": (0.20, 0.51),
        "selective_scan-forward": (0.58, 1.17),
        "selective_scan-both-shared": (1.17, 2.34),
    }
    with torch.device("meta"):
        for name, times in wanted.items():
            (case,) = select_cases([name])
            shapes = [
                torch.empty(1, 131072, 16, 64),
                torch.empty(1, 131072, 16),
                *(torch.empty(1, 131072, 1, case.state) for _ in range(2)),
            ]
            if case.operator == "selective_scan":
                shapes = [torch.empty(1, 131072, 1024)] * 2 + [torch.empty(1, 131072, 16)] * 2
            inputs = [tensor.bfloat16() for tensor in shapes]
            least = floor(name, 131072, case.work(Shapes(), 131072, inputs), ceilings)
            assert (least.forward_ms, least.forward_backward_ms) == pytest.approx(times, abs=0.01)
    least = floor("a", 1, (Work(3.03e9), Work(1.0, flops=7.95e12)), ceilings)
    assert (least.forward_ms, least.forward_limit) == (pytest.approx(1), "bytes")
    assert (least.forward_backward_ms, least.forward_backward_limit) == (pytest.approx(10), "matrix products")


def test_cases_by_name() -> None:
    assert select_cases([]) == list(CASES)
    assert [case.name for case in select_cases(["ssd-both", "ssd-both-64"])] == [
        "ssd-both-128",
        "ssd-both-64",
    ]
    with pytest.raises(ConfigError, match=r"no case 'ssd-bath-64'.*did you mean 'ssd-both-64'"):
        select_cases(["ssd-bath-64"])


def test_the_exponent_of_powers() -> None:
    assert exponent([1, 10, 100], [3.0, 30.0, 300.0]) == pytest.approx(1)
    assert exponent([2, 4, 8], [5.0, 20.0, 80.0]) == pytest.approx(2)
    assert exponent([2], [5.0]) is None


def test_a_pass_without_memory_is_told_and_other_errors_are_not_hidden() -> None:
    x = torch.ones(3)

    def full(inputs: Sequence[Tensor]) -> list[Tensor]:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return [inputs[0] * 2]

    watch = Stopwatch(CPU, 0.0)
    row = measure_passes(watch, full, [x], case="a", length=3, by="b")
    assert row.forward is not None and row.forward.repeats == 5
    assert row.forward_backward is None and row.problem == "out of memory"

    def wrong(inputs: Sequence[Tensor]) -> list[Tensor]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        measure_passes(watch, wrong, [x], case="a", length=3, by="b")
    caught = measure_passes(watch, wrong, [x], case="a", length=3, by="b", catch=True)
    assert caught.problem == "ValueError: no"


def test_ceilings_are_rates() -> None:
    found = measure_ceilings(CPU, copy_bytes=2**16, matmul_size=16)
    assert found.copy_gb_per_s > 0 and found.matmul_tflop_per_s > 0 and found.exponentials_g_per_s is None


def test_absent_peers_are_quoted_where_nothing_was_measured() -> None:
    cases = select_cases(["ssd-both"])
    lengths = {case.name: [131072] for case in cases}
    measured = Measured("ssd-both-64", 131072, "mamba-ssm, two + flips", Pass(1.0, 5, None))
    (row,) = quoted(cases, lengths, [measured])
    assert (row.case, row.quoted) == ("ssd-both-128", True)
    assert row.forward is not None and row.forward_backward is not None
    assert (row.forward.ms, row.forward_backward.ms, row.forward.graph_ms) == (4.39, 16.3, None)
    assert all(
        any(peer.label == label and peer.fits(select_cases([name])[0]) for peer in PEERS)
        for name, label in QUOTED
    )
    result = benchmark_gpu.GpuBenchmark("d", {}, {}, "triton", "bfloat16", Shapes(), {}, rows=[row])
    result.rows.append(dataclasses.replace(row, by="genossm", quoted=False, forward=Pass(1.0, 5, None, 0.5)))
    assert "mamba-ssm, two + flips (q)" in text(result) and "4.4x" in text(result)


def fake_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: None, bias: Tensor, soft: bool
) -> Any:
    """mamba-ssm's selective scan, channels first."""
    x, dt, B, C = (tensor.transpose(1, 2) for tensor in (u, dt, B, C))
    y = selective_scan(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=soft, backend="torch")
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def fake_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int, **options: Any) -> Any:
    return ssd(x, dt, A, B, C, backend="torch", **options)


def fake_convolution(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    assert activation == "silu"
    return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1]))


def fake_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> tuple[Tensor, None]:
    """One step after the other."""
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=q.dtype)
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(2) * scale)
    return torch.stack(outputs, 1), None


FAKES: dict[str, Callable[..., Any]] = {
    "mamba_chunk_scan_combined": fake_ssd,
    "selective_scan_fn": fake_scan,
    "causal_conv1d_fn": fake_convolution,
    "chunk_simple_gla": fake_gla,
}


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.label} {peer.operator} {peer.direction}")
def test_peers_compute_what_the_case_does(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_peers.importlib, "import_module", lambda name: object())
    for case in filter(peer.fits, CASES):
        inputs = [tensor.double() for tensor in case.inputs(TINY, 11, torch.float32, CPU)]
        if case.operator != "short_conv":
            inputs[5] = torch.zeros_like(inputs[5])  # two scans add D x twice, and simple_gla has none
        got = peer.run(FAKES[peer.function], peer.prepare(inputs))
        wanted = case.reference(inputs)
        if "no flips" in peer.label:
            wanted = wanted[:1]
        if case.operator != "ssd":
            wanted = [y.transpose(1, 2) for y in wanted]
        for a, b in zip(got, wanted, strict=False):
            torch.testing.assert_close(
                a, b, rtol=1e-5 if "gla" in peer.label else 1e-9, atol=1e-5 if "gla" in peer.label else 1e-9
            )


def test_warming_processes_share_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    class Autotuner:
        def __init__(self, fn: str, arg_names: list[str], configs: list[int], key: str = "") -> None:
            self.configs, self.key = configs, key

    module = types.SimpleNamespace(Autotuner=Autotuner)
    plain = Autotuner.__init__
    monkeypatch.setattr(benchmark_peers.importlib, "import_module", lambda name: module)
    kept = []
    for index in range(3):
        monkeypatch.setattr(Autotuner, "__init__", plain)
        benchmark_peers.share_autotuning(index, 3)
        tuner = Autotuner("f", [], [1, 2, 3, 4, 5, 6, 7, 8], key="k")
        assert tuner.configs[-1] == 8 and tuner.key == "k"
        kept += tuner.configs
        assert Autotuner("f", [], [1, 2]).configs == [1, 2]
    assert sorted(set(kept)) == [1, 2, 3, 4, 5, 6, 7, 8] and len(kept) == 10


def test_the_command_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def small(**options: Any) -> benchmark_gpu.GpuBenchmark:
        asked.update(options)
        options |= {"device": "cpu", "plan": PLAN, "shapes": TINY, "backend": "torch"}
        return benchmark_on_gpu(**options)

    monkeypatch.setattr(benchmark, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(benchmark, "benchmark_on_gpu", small)
    target, page = tmp_path / "bench.json", tmp_path / "page.md"
    words = [
        "bench",
        "kernels",
        "--quick",
        "--no-peers",
        "--case",
        "ssd-forward-64",
        "--length",
        "16",
        "--heads",
        "8",
    ]
    assert main([*words, "--json-out", str(target), "--markdown", str(page)]) == 0
    assert (
        asked["plan"].lengths == (16,)
        and asked["plan"].growth == ()
        and asked["plan"].budget_s == benchmark_gpu.QUICK.budget_s
    )
    assert asked["shapes"].heads == 8 and asked["peers"] is False and asked["cases"] == ("ssd-forward-64",)
    assert "Times and memory" in capsys.readouterr().out
    assert json.loads(target.read_text())["kernels"]["rows"][0]["by"] == "genossm"
    assert page.read_text().startswith("- device: CPU")
