"""genossm.pipelines.compare: its figures against files and single evaluations, what is done again, failures, processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import genossm as gs
from genossm.cli import main
from genossm.dataset import PreparedDataset
from genossm.errors import CheckpointError, ConfigError, DataError
from genossm.pipelines.compare import compare
from genossm.pipelines.compare_processes import CommandError, Commands, alone_in
from genossm.pipelines.compare_tables import summarise
from genossm.pipelines.compare_trial import Candidate, Trial, read_log
from genossm.pipelines.evaluate import evaluate, evaluate_sites
from genossm.run_config import RunConfig, load_run_config

CONFIG = """\
model:
  encoder: {width: 16, pattern: [mamba2, conv], stem: {channels: [8, 8], pool: [8, 4]}, state: 8, head_dim: 16}
  head_hidden: 8
train: {epochs: 2, windows_per_epoch: 4, batch_size: 2, workers: 0, ema_decay: 0.5, loggers: [csv]}
"""
SITES = "chrom\tstart\tend\topen\trule\nchrC\t0\t200\t0\tnear\nchrC\t1000\t1200\t1\tnear\nchrC\t400\t700\t0\tnear\n"


class InProcess(Commands):
    """Runs the commands in this process, which is quicker, and keeps their words."""

    calls: tuple[list[str], ...] = ()

    def run(self, words, log) -> None:  # type: ignore[no-untyped-def]
        type(self).calls = (*self.calls, list(words))
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = main(["--json", *words])
        if status:
            raise CommandError(json.loads(out.getvalue())["error"]["message"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    monkeypatch.setattr("genossm.pipelines.compare.Commands", InProcess)
    monkeypatch.setattr(InProcess, "calls", ())
    return InProcess


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.yaml, b.yaml (another mixer) and wild.yaml, which diverges."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "a.yaml").write_text(CONFIG)
    (folder / "b.yaml").write_text(CONFIG.replace("[mamba2, conv]", "[lstm]"))
    (folder / "wild.yaml").write_text(CONFIG.replace("epochs: 2", "epochs: 2, learning_rate: 1.0e+30"))
    (folder / "sites.tsv").write_text(SITES)
    return folder


@pytest.fixture(scope="module")
def compared(configs: Path, tiny_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of a and b with the seeds 1 and 2, to be read only."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genossm.pipelines.compare.Commands", InProcess)
        compare(
            [configs / "a.yaml", configs / "b.yaml"],
            tiny_prepared,
            out,
            seeds=[1, 2],
            sites=configs / "sites.tsv",
            device="cpu",
        )
    return out


def test_figures_are_those_of_the_runs(
    compared: Path, configs: Path, tiny_prepared: Path, calls: type[InProcess]
) -> None:
    # everything is there: nothing is trained or evaluated, and the same comes out
    result = compare(
        [configs / "a.yaml", configs / "b.yaml"],
        tiny_prepared,
        compared,
        seeds=[1, 2],
        sites=configs / "sites.tsv",
        device="cpu",
    )
    assert calls.calls == () and result.failures == ()
    assert result.table["configuration"].tolist() == ["a", "b"]
    assert result.table["mixers"].tolist() == ["1 mamba2 + 1 conv", "1 lstm"]
    for name, row in zip("ab", result.table.to_dict(orient="records"), strict=True):
        runs = [compared / f"{name}-seed{seed}" for seed in (1, 2)]
        assert row["parameters"] == sum(p.numel() for p in gs.load(runs[0]).parameters())
        logs = [pd.read_csv(run / "metrics.csv") for run in runs]
        assert row["steps"] == 4 and not row["non_finite"]
        assert row["seconds"] == pytest.approx(np.mean([log["seconds"].sum() for log in logs]))
        assert row["loss_first"] == pytest.approx(np.mean([log["train/loss"].iloc[0] for log in logs]))
        assert row["loss_last"] == pytest.approx(np.mean([log["train/loss"].iloc[-1] for log in logs]))
        best = [log["valid/auprc"].max() for log in logs]
        assert row["valid_best"] == pytest.approx(np.mean(best))
        assert row["valid_best_sd"] == pytest.approx(np.std(best, ddof=1))
        sites = configs / "sites.tsv"
        single = [evaluate_sites(run, tiny_prepared, sites, device="cpu") for run in runs]
        for metric in ("auprc", "auroc"):
            bins = [table.set_index("track").loc["peaks", metric] for table, _ in single]
            at_sites = [scores.loc[0, metric] for _, scores in single]
            for column, values in ((f"test/peaks/{metric}", bins), (f"test/peaks/near/{metric}", at_sites)):
                assert row[column] == pytest.approx(np.mean(values), abs=1e-6)
                assert row[f"{column}_sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
        averaged, _ = evaluate_sites(runs, tiny_prepared, sites, device="cpu")
        assert row["ensemble/test/peaks/auprc"] == pytest.approx(averaged.loc[0, "auprc"], abs=1e-6)
        valid = evaluate(runs[1], tiny_prepared, split="valid", device="cpu")
        own = result.runs.set_index("run").loc[f"{name}-seed2"]
        assert own["valid/peaks/auprc"] == pytest.approx(valid.loc[0, "auprc"], abs=1e-6)


def test_files_hold_the_tables(compared: Path) -> None:
    table = pd.read_csv(compared / "compare.tsv", sep="\t")
    record = json.loads((compared / "compare.json").read_text())
    assert [row["configuration"] for row in record["configurations"]] == ["a", "b"]
    assert [row["run"] for row in record["runs"]] == ["a-seed1", "b-seed1", "a-seed2", "b-seed2"]
    assert {row["state"] for row in record["runs"]} == {"done"} and record["failures"] == []
    assert table["test/peaks/auprc"].tolist() == pytest.approx(
        [row["test/peaks/auprc"] for row in record["configurations"]], rel=1e-5
    )
    lines = (compared / "compare.md").read_text().splitlines()
    heading = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert heading[:3] == ["configuration", "layers", "parameters"] and "failed" not in heading
    assert heading[-3:] == ["AUPRC peaks", "AUROC peaks", "AUPRC peaks, near sites"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert [row[0] for row in rows] == ["a", "a, seeds averaged", "b", "b, seeds averaged"]
    first = record["configurations"][0]
    assert rows[0][-3] == f"{first['test/peaks/auprc']:.4f} ± {first['test/peaks/auprc_sd']:.4f}"
    assert rows[1][-3] == f"{first['ensemble/test/peaks/auprc']:.4f}" and rows[1][2] == ""
    assert lines[-1].endswith("(the positive rate): peaks 0.1795; peaks, near sites 0.3333")


def test_a_run_is_as_train_writes_it(
    compared: Path, configs: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    gs.train(configs / "a.yaml", tiny_prepared, tmp_path / "run", device="cpu", seed=2)
    by_hand = {path.name for path in (tmp_path / "run").iterdir()}
    run = compared / "a-seed2"
    assert {path.name for path in run.iterdir()} == by_hand | {"test", "valid"}
    assert (run / "config.yaml").read_text() == (tmp_path / "run" / "config.yaml").read_text()
    assert (
        not (compared / "a-seed1" / "model.safetensors").read_bytes()
        == (run / "model.safetensors").read_bytes()
    )
    theirs, ours = (gs.load(folder).state_dict() for folder in (tmp_path / "run", run))
    assert all((theirs[name] == ours[name]).all() for name in theirs)


def test_only_what_is_missing_is_done(
    configs: Path, tiny_prepared: Path, tmp_path: Path, calls: type[InProcess]
) -> None:
    def again(*seeds: int, **options: object) -> list[str]:
        calls.calls = ()
        compare([configs / "a.yaml"], tiny_prepared, out, seeds=seeds, device="cpu", **options)  # type: ignore[arg-type]
        return [
            f"{words[0]} {'+'.join(Path(word).name for word in words if 'a-seed' in Path(word).name)} "
            + " ".join(
                word for word in words if word in ("--resume", "test", "valid", "--resolution", "--sites")
            )
            for words in calls.calls
        ]

    out = tmp_path / "out"
    one = ["train a-seed1 ", "evaluate a-seed1 test", "evaluate a-seed1 valid"]
    assert again(1) == one
    assert again(1) == []
    assert again(2, 1, ensembles=False) == [line.replace("seed1", "seed2") for line in one]
    assert again(1, 2) == ["evaluate a-seed1+a-seed2 test"]
    assert again(1, 2) == [] and again(2, 1) == ["evaluate a-seed2+a-seed1 test"]
    # other sites or bins: scored again, not trained again
    assert again(1, sites=configs / "sites.tsv") == ["evaluate a-seed1 test --sites"]
    assert again(1, resolution=64) == [
        "evaluate a-seed1 test --resolution",
        "evaluate a-seed1 valid --resolution",
    ]
    (out / "a-seed1" / "valid" / "metrics.json").unlink()
    assert again(1, resolution=64) == ["evaluate a-seed1 valid --resolution"]
    # an epoch is missing: the training goes on, and its model is scored again
    log = out / "a-seed1" / "metrics.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert again(1, resolution=64) == ["train a-seed1 --resume"]  # it was complete but for the log
    os.utime(out / "a-seed1" / "model.safetensors")
    assert again(1, resolution=64)[-2:] == [
        "evaluate a-seed1 test --resolution",
        "evaluate a-seed1 valid --resolution",
    ]


def test_when_a_training_is_finished(tmp_path: Path) -> None:
    config = load_run_config("tiny", ["train.epochs=2"])
    trial = Trial(Candidate("t", "tiny", config, 1, 1, 1), 1, tmp_path / "t-seed1")
    assert (trial.begun, trial.epochs, trial.trained) == (False, 0, False)
    trial.folder.mkdir()
    log, state, model = (trial.folder / name for name in ("metrics.csv", "last.ckpt", "model.safetensors"))
    log.write_text("epoch,step,train/loss,valid/auprc,seconds\n1,4,0.5,nan,2\n")
    model.touch()
    assert (trial.epochs, trial.trained) == (1, False)
    log.write_text(log.read_text() + "2,8,0.25,,3.5\n")
    assert trial.trained  # somebody has removed the state
    state.touch()
    assert trial.trained
    os.utime(state, ns=(0, log.stat().st_mtime_ns - 1))  # killed between the log and the state
    assert not trial.trained
    os.utime(state)
    model.unlink()
    assert not trial.trained
    row = trial.row({})
    assert (row["steps"], row["seconds"], row["loss_first"], row["loss_last"]) == (8, 5.5, 0.5, 0.25)
    assert row["state"] == "unfinished" and not row["non_finite"] and np.isnan(row["valid_best"])
    assert "valid/auprc" not in read_log(trial.folder)[1]
    log.write_text(log.read_text().replace("0.25", "inf"))
    assert trial.row({})["non_finite"]


def test_a_run_that_fails_is_told_and_the_others_go_on(
    configs: Path,
    tiny_prepared: Path,
    tmp_path: Path,
    calls: type[InProcess],
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = compare(
        [configs / "wild.yaml", configs / "a.yaml"],
        tiny_prepared,
        tmp_path / "out",
        overrides=["train.epochs=1"],
        device="cpu",
    )
    (failure,) = result.failures
    assert failure.startswith("wild-seed1: the gradient became")
    wild, fine = result.table.to_dict(orient="records")
    assert (wild["failed"], wild["done"], wild["non_finite"]) == (1, 0, True)
    assert wild["errors"].startswith("seed 1: the gradient became") and np.isnan(wild["test/peaks/auprc"])
    assert (fine["failed"], fine["done"], fine["steps"], fine["errors"]) == (0, 1, 2, "")
    assert np.isnan(fine["test/peaks/auprc_sd"]) and fine["test/peaks/auprc"] > 0
    assert "[1/2] wild-seed1: failed: the gradient became" in capsys.readouterr().err
    assert failure in result.text() and failure in (tmp_path / "out" / "compare.md").read_text()
    cells = result.cells().to_dict(orient="records")
    assert cells[0]["failed"].startswith("seed 1: the gradient became") and len(cells[0]["failed"]) <= 60
    assert (cells[0]["runs"], cells[0]["NaN"], cells[1]["runs"], cells[1]["NaN"]) == (
        "0/1",
        "yes",
        "1/1",
        "no",
    )


def test_another_comparisons_runs_are_refused(
    compared: Path,
    configs: Path,
    tiny_prepared: Path,
    tiny_folder: Path,
    tmp_path: Path,
    calls: type[InProcess],
) -> None:
    with pytest.raises(CheckpointError, match=r"a-seed1 holds a run of another configuration"):
        compare([configs / "a.yaml"], tiny_prepared, compared, overrides=["train.epochs=3"], device="cpu")
    other = gs.prepare(tiny_folder / "dataset.yaml", tmp_path / "other", overrides=["window.margin=1024"])
    with pytest.raises(CheckpointError, match=r"a-seed1 holds a run of another dataset"):
        compare([configs / "a.yaml"], other, compared, device="cpu")
    with (
        alone_in(compared),
        pytest.raises(CheckpointError, match="another comparison is at work"),
        alone_in(compared, patience_s=0),
    ):
        pass
    assert calls.calls == ()


def test_what_is_wrong_is_told_before_anything_runs(
    configs: Path, tiny_prepared: Path, tmp_path: Path, calls: type[InProcess]
) -> None:
    a = configs / "a.yaml"
    (tmp_path / "a.yaml").write_text(CONFIG)
    (tmp_path / "silent.yaml").write_text(CONFIG.replace("[csv]", "[]"))
    cases: list[tuple[list[Path | str], dict[str, object], type[Exception], str]] = [
        ([], {}, ConfigError, "no configuration is named"),
        ([a, tmp_path / "a.yaml"], {}, ConfigError, "a is named twice"),
        (["yeast"], {}, ConfigError, "there is no shipped configuration 'yeast'"),
        ([a], {"seeds": [1, 1]}, ConfigError, r"the seeds are \[1, 1\]"),
        ([a], {"seeds": []}, ConfigError, r"the seeds are \[\]"),
        ([a], {"jobs": 0}, ConfigError, "jobs is 0"),
        ([a], {"resolution": 16}, DataError, "finer than the 32-bp bins"),
        ([a], {"overrides": ["train.margin_bp=17"]}, ConfigError, "does not fit bins of 32 bp"),
        ([tmp_path / "silent.yaml"], {}, ConfigError, "train.loggers lacks csv"),
    ]
    for names, options, error, words in cases:
        with pytest.raises(error, match=words):
            compare(names, tiny_prepared, tmp_path / "out", device="cpu", **options)  # type: ignore[arg-type]
    untested = PreparedDataset(tiny_prepared)
    untested.splits = {**untested.splits, "test": ()}
    with pytest.raises(DataError, match=r"the split 'test' of .* has no chromosome"):
        compare([a], untested, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists() and calls.calls == ()


def test_a_table_of_signal_alone(tmp_path: Path) -> None:
    candidate = Candidate("s", "s.yaml", RunConfig(), 1_234_567, 1, 1)
    rows = []
    for seed, value in ((1, 0.25), (2, 0.75)):
        trial = Trial(candidate, seed, tmp_path / f"s-seed{seed}")
        rows.append(trial.row({"test": {"cuts/pearson": value}, "valid": {"cuts/pearson": 1.0}}))
    result = summarise(tmp_path, [candidate], rows, {"s": {"test/cuts/pearson": 0.875}}, [])
    cells = result.cells()
    assert cells["Pearson cuts"].tolist() == ["0.5000 ± 0.3536", "0.8750"]
    assert cells.loc[0, "parameters"] == "1,234,567" and cells.loc[0, "runs"] == "2/2"
    assert "best valid Pearson" in cells and result.notes() == []


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A file that whoever opens it waits for, for ever."""
    os.mkfifo(tmp_path / "pipe.yaml")
    return tmp_path / "pipe.yaml"


def wait_for(condition: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_closing_ends_what_runs(pipe: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path) as lock:
        commands = Commands(threads=1, lock=lock)
        told: list[str] = []

        def work() -> None:
            with pytest.raises(CommandError) as caught:
                commands.run(["check", str(pipe)], tmp_path / "log")
            told.append(str(caught.value))

        thread = threading.Thread(target=work)
        thread.start()
        wait_for(lambda: commands._running)
        commands.close()
        thread.join(60)
        assert told and told[0].startswith(f"ended by signal {signal.SIGTERM.value}; the last line of")
        with pytest.raises(CommandError, match="stopped"):
            commands.run(["--version"], tmp_path / "log")


def test_a_command_that_fails_says_why_and_one_that_works_nothing(tmp_path: Path) -> None:
    with alone_in(tmp_path) as lock:
        commands = Commands(threads=1, lock=lock)
        with pytest.raises(CommandError, match=r"absent.yaml"):
            commands.run(["check", str(tmp_path / "absent.yaml")], tmp_path / "log")
        commands.run(["--version"], tmp_path / "log")


def test_a_killed_comparison_takes_its_trainings_with_it(pipe: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from genossm.pipelines.compare_processes import Commands, alone_in\n"
        "folder = Path(sys.argv[1])\n"
        "with alone_in(folder) as lock:\n"
        "    print('at work', flush=True)\n"
        "    Commands(threads=1, lock=lock).run(['check', str(folder / 'pipe.yaml')], folder / 'log')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None and parent.stdout.readline() == "at work\n"
        wait_for(lambda: (tmp_path / "log").exists())
        time.sleep(0.5)
        parent.kill()
    with alone_in(tmp_path, patience_s=60):  # its process holds the folder until it has ended
        pass
