"""The benchmark of the PyTorch backend at tiny sizes: what it checks and prints, and that a wrong kernel is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genossm.cli import main
from genossm.errors import GenossmError
from genossm.pipelines import benchmark
from genossm.pipelines.benchmark import Sizes, benchmark_kernels, report
from genossm.pipelines.benchmark_timing import peak_mib

TINY = Sizes(heads=2, head_dim=4, ssd_state=4, channels=6, state=3)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CHECK_LENGTH", 40)


@pytest.mark.usefixtures("tiny")
def test_it_checks_times_and_reports() -> None:
    result = benchmark_kernels(device="cpu", length=64, sizes=TINY, growth=(32, 128), repeats=2)
    assert [check.case for check in result.checks] == [
        f"{name} {direction}" for name in ("ssd", "selective_scan") for direction in ("forward", "both")
    ]
    assert all(0 < max(check.output_error, check.gradient_error) < 1e-5 for check in result.checks)
    assert [(timing.case, timing.backend) for timing in result.timings if "ssd" in timing.case] == [
        ("ssd forward", "torch"),
        ("ssd forward", "reference"),
        ("ssd both", "torch"),
    ]
    assert [timing.length for timing in result.growth] == [32, 128, 32, 128]
    assert all(0 < t.forward_ms < t.forward_backward_ms * 10 for t in [*result.timings, *result.growth])
    fast, naive = result.timings[:2]
    assert result.speedup("ssd forward")[0] == naive.forward_ms / fast.forward_ms
    text = report(result)
    for words in ("CPU, ", torch.__version__, "heads 2", "64 positions, medians", "ratio (length 4.0x)"):
        assert words in text


@pytest.mark.usefixtures("tiny")
def test_a_wrong_kernel_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true_ssd = benchmark.ssd

    def wrong(*arguments: Any, **options: Any) -> Any:
        y = true_ssd(*arguments, **options)
        return y * 1.01 if options["backend"] == "torch" else y

    monkeypatch.setattr(benchmark, "ssd", wrong)
    with pytest.raises(GenossmError, match=r"ssd forward in float32 differs .* by 1\.0e-02"):
        benchmark_kernels(device="cpu", length=64, sizes=TINY, growth=(32, 64), repeats=1)


def test_peak_memory_sees_what_is_allocated_and_freed() -> None:
    def step() -> None:
        torch.ones(2**25).sum()  # 128 MiB

    peak = peak_mib(step, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert 120 < peak < 160


@pytest.mark.usefixtures("tiny")
def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(**options: Any) -> benchmark.KernelBenchmark:
        assert options["sizes"] == Sizes(heads=3)
        return benchmark_kernels(**{**options, "sizes": TINY, "growth": (16, 32), "repeats": 1})

    monkeypatch.setattr(benchmark, "benchmark_kernels", small)
    target = tmp_path / "bench.json"
    words = ["bench", "kernels", "--cpu", "--length", "48", "--heads", "3"]
    assert main([*words, "--json-out", str(target)]) == 0
    assert "ssd forward: reference / torch" in capsys.readouterr().out
    saved = json.loads(target.read_text())["kernels"]
    assert saved["length"] == 48 and len(saved["timings"]) == 6
    assert main(["bench", "models"]) == 2
    assert main(["bench", "kernels", "--device", "cpu", "--quick"]) == 2
