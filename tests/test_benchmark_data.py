"""The data benchmark: what it measures and prints, what it refuses, and how it deals with other people's loaders."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genossm.cli import main
from genossm.dataset import PreparedDataset
from genossm.errors import ConfigError, DataError
from genossm.loaders import WindowDataset
from genossm.pipelines import benchmark_data, benchmark_data_peers
from genossm.pipelines.benchmark_data import CODES, INLINE, MEMCPY, ONE, DataBenchmark, measure_data
from genossm.pipelines.benchmark_data_peers import NAMES, Task, Timed, absent_peers, time_passes, time_peer
from genossm.pipelines.benchmark_data_tables import markdown


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are not repeated for the sake of the figures."""
    monkeypatch.setattr(benchmark_data_peers, "_LEAST_S", 0.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Forty windows of 5 kb, prepared in `one`."""
    return benchmark_data._simulate_one(tmp_path_factory.mktemp("task"), 200_000, 5_000, 8, 1)


@pytest.mark.slow
def test_all_cases_are_measured_and_printed(
    tmp_path: Path, private_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(peer: str, task: Task, case: str, workers: int, *, limit_s: float) -> Timed:
        if peer == "tangermeme":
            return Timed(NAMES[peer], case, workers, (), "it yields other bases than genossm")
        return Timed(NAMES[peer], case, workers, (10.0, 30.0, 20.0))

    monkeypatch.setattr(benchmark_data, "time_peer", fake)
    monkeypatch.setattr(benchmark_data, "absent_peers", lambda: {"GenVarLoader": "not here"})
    files = ["--json-out", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    assert main(["bench", "data", "--genome-mb", "10", "--tracks", "2", "--repeats", "1", *files]) == 0
    assert not private_cache.exists() and os.environ["GENOSSM_CACHE"] == str(private_cache)
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "a.md").read_text().strip()
    result = json.loads((tmp_path / "a.json").read_text())["data"]
    rows = {(row["case"], row["by"], row["workers"]): row for row in result["rows"]}
    cases = [CODES, ONE, "2 tracks at 32 bp", "2 tracks at 32 bp, compressed"]
    assert list(dict.fromkeys(row["case"] for row in result["rows"])) == cases
    for case in cases[1:]:
        for by, workers in ((INLINE, 0), (f"{INLINE}, threads", 2), (f"{INLINE}, processes", 2)):
            assert rows[case, by, workers]["windows_per_s"] > 0
            assert 0 < rows[case, by, workers]["first_batch_s"] < 5
    naive = rows[ONE, NAMES["naive"], 0]
    assert naive["windows_per_s"] == pytest.approx(100 / 20) and naive["mb_per_s"] == pytest.approx(2.5)
    own, copied = rows[CODES, INLINE, 0]["windows_per_s"], rows[CODES, MEMCPY, 0]["windows_per_s"]
    assert result["ratios"]["memcpy"] == pytest.approx([own / copied, 0.5])
    assert set(result["ratios"]) == {"memcpy", "naive"}
    assert result["absent"] == {"GenVarLoader": "not here"}
    assert "it yields other bases than genossm" in printed and "| naive |" in printed
    assert result["versions"]["genossm"] and "CPU" in result["device"]


def test_a_dataset_of_ones_own_is_measured(tiny_prepared: Path) -> None:
    saved: list[int] = []

    def save(result: DataBenchmark) -> None:
        saved.append(len(result.rows))

    result = measure_data(dataset=tiny_prepared, workers=1, repeats=2, save=save)
    assert [row.by for row in result.rows] == [INLINE, f"{INLINE}, threads", f"{INLINE}, processes"]
    assert saved == [1, 2, 3, 3] and not result.ratios
    payload = 4096 + 4 * 96 * 2
    for row in result.rows:
        assert row.windows_per_s is not None and row.mb_per_s == pytest.approx(
            row.windows_per_s * payload / 1e6
        )
    assert "Training windows of tiny" in markdown(result)


@pytest.mark.parametrize(
    "options", [{"genome_bp": 1_000_000}, {"window_bp": 2_000_000, "genome_bp": 10_000_000}, {"repeats": 0}]
)
def test_numbers_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        measure_data(**options)  # type: ignore[arg-type]


def test_a_loader_that_reads_wrongly_is_told(task: Task, tmp_path: Path) -> None:
    windows = WindowDataset(PreparedDataset(task.folder / "one"), "train")
    benchmark_data._check_own(windows, task)
    expected = dict(np.load(task.folder / task.expected))
    expected["track"][3, 17] += 1
    np.savez(tmp_path / task.expected, **expected)
    with pytest.raises(DataError, match=r"window 3 .* is read wrongly"):
        benchmark_data._check_own(windows, replace(task, folder=tmp_path))


@pytest.mark.parametrize("peer", list(NAMES))
@pytest.mark.parametrize("case", [CODES, ONE])
def test_what_a_peer_yields_is_compared_with_ours(task: Task, tmp_path: Path, peer: str, case: str) -> None:
    if peer in absent_peers():
        pytest.skip(absent_peers()[peer])
    make, codes_of, track_of = benchmark_data_peers._PEERS[peer](task, case, 0)
    batch = next(iter(make()))
    track = None if case == CODES else track_of
    benchmark_data_peers._compare(batch, task, codes_of, track)
    expected = dict(np.load(task.folder / task.expected))
    wrong = {**expected, "codes": expected["codes"].copy()}
    wrong["codes"][1, 2] = (wrong["codes"][1, 2] + 1) % 4
    np.savez(tmp_path / task.expected, **wrong)
    other = replace(task, folder=tmp_path)
    with pytest.raises(ValueError, match="other bases"):
        benchmark_data_peers._compare(batch, other, codes_of, track)
    if track is not None:
        np.savez(tmp_path / task.expected, codes=expected["codes"], track=expected["track"] + 1)
        with pytest.raises(ValueError, match="other values"):
            benchmark_data_peers._compare(batch, other, codes_of, track)


def test_a_peer_that_hangs_is_given_up(task: Task) -> None:
    timed = time_peer("naive", task, CODES, 0, limit_s=0.01)
    assert timed.seconds == () and timed.problem == "not done after 0 s"
    assert np.isnan(timed.median_s)


@pytest.mark.slow
def test_a_peer_is_timed_in_a_process_of_its_own(task: Task) -> None:
    timed = time_peer("naive", replace(task, repeats=3), ONE, 0, limit_s=120)
    assert timed.problem is None and len(timed.seconds) == 3
    failed = time_peer("naive", replace(task, genome="absent.fa"), ONE, 0, limit_s=120)
    assert failed.problem is not None and "absent.fa" in failed.problem


def test_passes_are_timed_in_turn() -> None:
    order: list[str] = []

    def named(name: str) -> benchmark_data_peers.Pass:
        return lambda: iter([order.append(name)])

    times = time_passes([named("a"), named("b")], 2)
    assert order == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert len(times) == 2 and all(len(seconds) == 2 for seconds in times)


def test_absent_peers_are_named() -> None:
    absent = absent_peers()
    assert "naive" not in absent
    assert ("GenVarLoader" in absent) == (importlib.util.find_spec("genvarloader") is None)
