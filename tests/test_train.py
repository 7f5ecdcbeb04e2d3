"""Training: what a run leaves behind, that it learns, resumes to the same curve, and refuses what does not fit."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import genossm as gs
from genossm.dataset import PreparedDataset
from genossm.errors import CheckpointError, ConfigError, DataError, FileError, TrainingError
from genossm.loaders import WindowDataset
from genossm.models.accessibility import AccessibilityModel, ModelConfig, reverse_complement
from genossm.models.encoder import EncoderConfig, MixerName
from genossm.models.heads import TrackHead
from genossm.models.stem import StemConfig
from genossm.pipelines.train import track_heads
from genossm.pipelines.training_module import TrainingModule, parameter_groups
from genossm.run_config import TrainConfig, load_run_config
from genossm.scaling import UNSCALED

TINY = """\
model:
  encoder:
    width: 16
    pattern: [mamba2]
    stem: {channels: [16, 16], pool: [8, 4], first_kernel: 9, kernel: 3}
    state: 8
    head_dim: 16
    dropout: 0.1
  head_hidden: 16
train: {epochs: 4, windows_per_epoch: 16, batch_size: 4, learning_rate: 5.0e-3, ema_decay: 0.8, workers: 0, loggers: [csv]}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the machine: the wall time, and how long the device had nothing to do."""
    timing = ("seconds", "train/idle")
    with (folder / "metrics.csv").open() as table:
        return [
            {key: value for key, value in row.items() if key not in timing} for row in csv.DictReader(table)
        ]


def test_a_run_leaves_a_model_metrics_and_provenance(
    config: Path, tiny_prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = gs.train(
        config, tiny_prepared, tmp_path / "run", device="cpu", overrides=["train.loggers=[csv, tensorboard]"]
    )
    errors = capsys.readouterr().err
    assert errors.startswith("device: CPU") and "windows/s" in errors and "Mbp/s" in errors
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        "config.yaml",
        "last.ckpt",
        "metrics.csv",
        "model.safetensors",
        "provenance.json",
        "tensorboard",
    }
    assert list((run.path / "tensorboard").glob("events*"))
    table = rows(run.path)
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4"]
    assert all(math.isfinite(float(row["train/loss"])) for row in table)
    scores = [float(row["valid/auprc"]) for row in table]
    assert run.best_score == pytest.approx(max(scores), rel=1e-6)
    assert run.best_epoch == scores.index(max(scores)) + 1
    assert load_run_config(run.path / "config.yaml").train.epochs == 4
    model = run.load()
    assert [track.name for track in model.tracks] == ["peaks", "signal"]
    assert (model.window_bp, model.margin_bp, model.assembly) == (4096, 512, "tiny")
    record = json.loads((run.path / "provenance.json").read_text())
    for provenance in (record, model.provenance):
        assert provenance["versions"]["genossm"] == gs.__version__
        assert provenance["splits"]["valid"] == ["chrB"] and provenance["seed"] == 1
    assert model.provenance["epoch"] == run.best_epoch


def test_the_saved_model_is_the_one_that_was_validated(
    config: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    run = gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", overrides=["train.epochs=2"])
    table = gs.evaluate(run.path, tiny_prepared, split="valid", device="cpu").set_index("track")
    best = rows(run.path)[run.best_epoch - 1]
    # validation reads one strand, evaluate the mean of both
    assert table.loc["peaks", "auprc"] == pytest.approx(float(best["valid/peaks/auprc"]), abs=0.1)


def test_training_learns(config: Path, tiny_prepared: Path, tmp_path: Path) -> None:
    gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", overrides=["train.epochs=12"])
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(
    config: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        gs.train(
            config, tiny_prepared, tmp_path / name, device="cpu", seed=seed, overrides=["train.epochs=2"]
        )
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_curve(
    config: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    overrides = ["--set", "train.epochs=8", "--set", "train.windows_per_epoch=40"]
    arguments = ["train", str(config), "--dataset", str(tiny_prepared), "--device", "cpu", *overrides]
    command = [sys.executable, "-m", "genossm.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with subprocess.Popen(
        [*command, "-o", str(broken)], stderr=subprocess.DEVNULL, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while not (broken / "metrics.csv").exists() or len(rows(broken)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)  # into the next epoch
        process.send_signal(signal.SIGKILL)
    assert len(rows(broken)) < 8
    subprocess.run(
        [*command, "-o", str(broken), "--resume"], check=True, capture_output=True, env=environment
    )
    subprocess.run([*command, "-o", str(whole)], check=True, capture_output=True, env=environment)
    assert rows(broken) == rows(whole) and len(rows(whole)) == 8
    weights = []
    for folder in (broken, whole):
        with safe_open(folder / "model.safetensors", framework="pt") as stored:
            weights.append({name: stored.get_tensor(name) for name in stored.keys()})
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_a_training_stopped_within_an_epoch_resumes_at_the_saved_step(
    config: Path, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is saved; the seventh of 4 an epoch is the last: weights and figures are those of an unbroken training."""
    settings = ["train.save_minutes=1e-9", "train.epochs=3"]
    whole = gs.train(config, tiny_prepared, tmp_path / "whole", device="cpu", overrides=settings)
    step = TrainingModule.training_step

    def stopping(self: TrainingModule, *arguments: Any) -> torch.Tensor:
        if self.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(TrainingModule, "training_step", stopping)
    with pytest.raises(BaseException, match=r"by a signal|^$"):
        gs.train(config, tiny_prepared, tmp_path / "broken", device="cpu", overrides=settings)
    monkeypatch.setattr(TrainingModule, "training_step", step)
    assert len(rows(tmp_path / "broken")) == 1
    seen: list[int] = []

    def counting(self: TrainingModule, *arguments: Any) -> torch.Tensor:
        seen.append(self.global_step)
        return step(self, *arguments)

    monkeypatch.setattr(TrainingModule, "training_step", counting)
    run = gs.train(config, tiny_prepared, tmp_path / "broken", device="cpu", resume=True, overrides=settings)
    assert seen == list(range(7, 12))
    assert rows(run.path) == rows(whole.path) and len(rows(run.path)) == 3
    with (run.path / "metrics.csv").open() as table:
        assert all(0 < float(row["seconds"]) < 600 for row in csv.DictReader(table))
    stored = [load_file(folder / "model.safetensors") for folder in (whole.path, run.path)]
    assert all(torch.equal(stored[1][name], tensor) for name, tensor in stored[0].items())


def test_resume_before_the_first_epoch_starts_anew_and_after_the_last_changes_nothing(
    config: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    settings = ["train.epochs=2"]
    run = gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", resume=True, overrides=settings)
    before = rows(run.path)
    again = gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", resume=True, overrides=settings)
    assert rows(run.path) == before and again.best_epoch == run.best_epoch


def test_runs_are_not_overwritten_or_mixed(config: Path, tiny_prepared: Path, tmp_path: Path) -> None:
    settings = ["train.epochs=1"]
    gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", overrides=settings)
    with pytest.raises(CheckpointError, match="--resume"):
        gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", overrides=settings)
    with pytest.raises(CheckpointError, match="another configuration"):
        gs.train(
            config, tiny_prepared, tmp_path / "run", device="cpu", resume=True, overrides=["train.epochs=2"]
        )
    description = Path(PreparedDataset(tiny_prepared).config["genome"]).parent / "dataset.yaml"
    same, other = tmp_path / "same", tmp_path / "other"
    gs.prepare(description, same)
    gs.train(config, same, tmp_path / "run", device="cpu", resume=True, overrides=settings)
    gs.prepare(description, other, overrides=["split.valid=[chrC]", "split.test=[chrB]"])
    with pytest.raises(CheckpointError, match="another dataset"):
        gs.train(config, other, tmp_path / "run", device="cpu", resume=True, overrides=settings)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.encoder.stem.pool=[8, 8]", "the model's bins are 64 bp and the dataset's 32 bp"),
        ("train.window_bp=1000", "does not fit bins"),
        (
            "model.encoder={stem: {channels: [8, 8], pool: [32, 3]}, decoder: {bin_bp: 32}}",
            "windows of 4096 bp are no multiple of the 96 bp",
        ),
        ("train.track_weights={peak: 1}", "track_weights names peak; the dataset's tracks are peaks, signal"),
        ("train.batch_size=16", None),
    ],
)
def test_a_configuration_that_does_not_fit_the_dataset_is_told(
    config: Path, tiny_prepared: Path, tmp_path: Path, override: str, words: str | None
) -> None:
    overrides = ["train.epochs=1", override]
    if words is None:
        overrides += ["train.windows_per_epoch=null"]
        words = "batch_size is 16 and an epoch has"
    with pytest.raises(ConfigError, match=words):
        gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", overrides=overrides)


def test_heads_take_statistics_of_training_bins_alone(tiny_prepared: Path) -> None:
    data = PreparedDataset(tiny_prepared)
    head = track_heads(data)[1]
    keep = data.mask("chrA")[:, 1] != 0
    values = data.targets("chrA")[keep, 1].astype(float)
    assert (head.loss, head.aggregate) == ("poisson", "sum")
    assert head.mean == pytest.approx(values.mean()) and head.std == pytest.approx(values.std())


def test_partners_have_the_statistics_of_both(stranded_prepared: Path) -> None:
    data = PreparedDataset(stranded_prepared)
    minus, peaks, plus = track_heads(data)
    keep = data.mask("chrA") != 0
    both = [data.targets("chrA")[keep[:, column], column].astype(float) for column in (0, 2)]
    assert abs(both[0].mean() - both[1].mean()) > 1
    values = np.concatenate(both)
    for head, strand, partner in ((minus, "-", "plus"), (plus, "+", "minus")):
        assert (head.strand, head.partner) == (strand, partner)
        assert (head.mean, head.std) == (pytest.approx(values.mean()), pytest.approx(values.std()))
    assert (minus.mean, minus.std) == (plus.mean, plus.std) and peaks.partner is None


@pytest.mark.parametrize(("sharing", "flips"), [("augment", True), ("none", False), ("shared", False)])
def test_windows_are_flipped_only_where_the_network_does_not_read_both_strands(
    config: Path,
    stranded_prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sharing: str,
    flips: bool,
) -> None:
    asked: list[bool] = []
    original = WindowDataset.__init__

    def spied(self: WindowDataset, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        asked.append(self.augment and self.reverse_complement)

    monkeypatch.setattr(WindowDataset, "__init__", spied)
    overrides = [f"model.reverse_complement={sharing}", "train.epochs=1"]
    run = gs.train(config, stranded_prepared, tmp_path / "run", device="cpu", overrides=overrides)
    assert asked == [flips, False]  # training and validation windows
    assert load_run_config(run.path / "config.yaml").model.reverse_complement == sharing
    model = run.load()
    assert model.equivariant == (sharing == "shared")
    tokens = torch.randint(0, 4, (1, 4096), dtype=torch.int8)
    raw, other = model(tokens), model(reverse_complement(tokens)).flip(1)[..., [2, 1, 0]]
    assert torch.allclose(raw, other, rtol=1e-4, atol=1e-5) == (sharing == "shared")


def test_the_experts_balance_is_trained_and_not_told_as_the_tracks_loss() -> None:
    encoder = EncoderConfig(
        width=8, stem=StemConfig(kind="base"), pattern=("conv",), mlp_ratio=1.0, experts=4, dropout=0.0
    )
    torch.manual_seed(1)
    batch = (torch.randint(0, 5, (2, 40)), torch.rand(2, 40, 1).round(), torch.ones(2, 40, 1).bool())
    told, added, gradients = [], [], []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        config = ModelConfig(replace(encoder, balance_weight=weight), reverse_complement="shared")
        model = AccessibilityModel(config, [TrackHead("t", "peaks", "bce")], window_bp=40, margin_bp=0)
        module = TrainingModule(model, TrainConfig(ema_decay=0.0), total_steps=1)
        loss = module.training_step(batch, 0)
        loss.backward()
        told.append(float(module.epoch_losses[0]))
        added.append(loss.item() - told[-1])
        gradients.append(model.get_parameter("encoder.layers.0.mlp.router.weight").grad)
    assert told[0] == told[1] and added[0] == 0
    assert added[1] > 0.4  # 0.5 where the experts are used alike
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("name", "options", "of_state"),
    [
        ("s4d", {}, {"log_dt", "log_A_real", "A_imag", "D"}),
        ("mamba", {"bidirectional": "tied"}, {"A_log", "dt_bias", "D"}),
        ("mamba3", {"conv_width": 3}, {"dt_bias", "D"}),
        ("conv", {}, set()),
    ],
)
def test_every_mixer_names_its_state_parameters(
    name: MixerName, options: dict[str, Any], of_state: set[str]
) -> None:
    encoder = EncoderConfig(width=16, pattern=(name, name), state=8, head_dim=8, **options)
    model = AccessibilityModel(
        ModelConfig(encoder), [TrackHead("t", "peaks", "bce")], window_bp=64, margin_bp=0
    )
    groups = parameter_groups(model, TrainConfig())
    names = {id(parameter): path for path, parameter in model.named_parameters()}
    decayed, _, *state = ({names[id(p)] for p in group["params"]} for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert state == (
        [{path for path in names.values() if path.split(".")[-1] in of_state}] if of_state else []
    )
    assert decayed and not any("bias" in path or "norm" in path for path in decayed)


def test_parameters_of_the_recurrence_norms_and_biases_are_not_decayed(
    config: Path, tiny_prepared: Path
) -> None:
    run_config = load_run_config(config)
    model = AccessibilityModel(
        run_config.model, track_heads(PreparedDataset(tiny_prepared)), window_bp=4096, margin_bp=512
    )
    settings = TrainConfig(learning_rate=1e-3, ssm_rate=0.5, weight_decay=0.1)
    decayed, plain, ssm = parameter_groups(model, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == ssm["weight_decay"] == 0
    assert ssm["lr"] == 5e-4
    assert {names[id(p)].rsplit(".", 1)[-1] for p in ssm["params"]} == {"A_log", "dt_bias", "D"}
    assert all("norm" not in names[id(p)] and not names[id(p)].endswith("bias") for p in decayed["params"])
    assert sum(len(group["params"]) for group in (decayed, plain, ssm)) == len(names)


def test_a_gradient_that_is_not_finite_stops_with_a_sentence(
    config: Path, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genossm.models.heads import TrackHeads

    original = TrackHeads.losses
    monkeypatch.setattr(
        TrackHeads, "losses", lambda self, *args, **options: original(self, *args, **options) * math.inf
    )
    with pytest.raises(TrainingError, match=r"the gradient became .* lower train.learning_rate"):
        gs.train(config, tiny_prepared, tmp_path / "run", device="cpu")


def test_the_last_gradient_is_looked_at_before_anything_is_saved(
    config: Path, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    one_step = ["train.epochs=1", "train.windows_per_epoch=1", "train.batch_size=1"]
    with pytest.raises(TrainingError, match="the gradient became nan at step 0"):
        gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", overrides=one_step)
    assert not list((tmp_path / "run").glob("*.ckpt")) + list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_told_and_is_no_success(
    config: Path,
    tiny_prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    original = TrainingModule.training_step

    def stopped(self: TrainingModule, batch: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
        if self.current_epoch == 2:
            signal.raise_signal(number)
        return original(self, batch, index)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingModule, "training_step", stopped)
    with pytest.raises(TrainingError, match=r"stopped by a signal after 2 whole epochs.*--resume"):
        gs.train(config, tiny_prepared, tmp_path / "run", device="cpu")
    monkeypatch.setattr(TrainingModule, "training_step", original)
    gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", resume=True)
    gs.train(config, tiny_prepared, tmp_path / "whole", device="cpu")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "at", "resumed_from"),
    [
        ("training_step", 5, 6),  # the second of the four steps of the second epoch
        ("training_step", 7, 8),  # the last of it
        ("validation_step", 8, 8),
    ],
)
def test_a_signal_is_followed_at_the_end_of_the_step_and_resumes_there(
    config: Path,
    tiny_prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    where: str,
    at: int,
    resumed_from: int,
) -> None:
    """No state is saved within an epoch but by the signal; what follows is what an unbroken training does."""
    settings = ["train.save_minutes=0", "train.epochs=3"]
    whole = gs.train(config, tiny_prepared, tmp_path / "whole", device="cpu", overrides=settings)
    original = getattr(TrainingModule, where)

    def stopped(self: TrainingModule, batch: Any, index: int) -> Any:
        if self.global_step == at and (where == "training_step" or index == 1):
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # a batch system may well send it again
        return original(self, batch, index)

    monkeypatch.setattr(TrainingModule, where, stopped)
    with pytest.raises(TrainingError, match=r"stopped by a signal after 1 whole epochs.*--resume"):
        gs.train(config, tiny_prepared, tmp_path / "broken", device="cpu", overrides=settings)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert torch.load(tmp_path / "broken" / "last.ckpt", weights_only=True)["global_step"] == resumed_from
    monkeypatch.setattr(TrainingModule, where, original)
    steps: list[int] = []
    step, validate = TrainingModule.training_step, TrainingModule.validation_step
    validated: list[int] = []

    def counting(self: TrainingModule, *arguments: Any) -> torch.Tensor:
        steps.append(self.global_step)
        return step(self, *arguments)

    def counting_validation(self: TrainingModule, batch: Any, index: int) -> None:
        validated.append(index)
        validate(self, batch, index)

    monkeypatch.setattr(TrainingModule, "training_step", counting)
    monkeypatch.setattr(TrainingModule, "validation_step", counting_validation)
    run = gs.train(config, tiny_prepared, tmp_path / "broken", device="cpu", resume=True, overrides=settings)
    assert steps == list(range(resumed_from, 12))
    assert validated == 2 * list(range(max(validated) + 1)) and max(validated) > 0
    assert rows(run.path) == rows(whole.path) and len(rows(run.path)) == 3
    stored = [load_file(folder / "model.safetensors") for folder in (whole.path, run.path)]
    assert all(torch.equal(stored[1][name], tensor) for name, tensor in stored[0].items())


@pytest.mark.slow
def test_an_interrupt_of_all_processes_is_followed_like_one_of_the_training(
    config: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    """Ctrl+C in a terminal reaches the processes that read, too."""
    settings = ["train.epochs=60", "train.loader=processes", "train.workers=2"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    arguments = ["train", str(config), "--dataset", str(tiny_prepared), "--device", "cpu", *overrides]
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-m", "genossm.cli", *arguments, "-o", str(run)],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("SIGINT: finishing the step in hand, then stopping") == 1
    assert "training was stopped by a signal after" in errors and "Traceback" not in errors
    state = torch.load(run / "last.ckpt", weights_only=True)
    assert state["global_step"] >= 4 * len(rows(run))


def test_a_second_interrupt_stops_at_once(
    config: Path, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []

    def stopped(self: TrainingModule, batch: Any, index: int) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        ended.append(index)
        raise AssertionError

    monkeypatch.setattr(TrainingModule, "training_step", stopped)
    with pytest.raises(TrainingError, match="stopped by a signal after 0 whole epochs"):
        gs.train(config, tiny_prepared, tmp_path / "run", device="cpu")
    assert not ended and not (tmp_path / "run" / "last.ckpt").exists()


def test_no_state_is_saved_after_the_last_step_of_an_epoch_before_its_validation(
    config: Path, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the validation, a training that saves every step does not lose the epoch's figures."""
    settings = ["train.save_minutes=1e-9", "train.epochs=2"]
    whole = gs.train(config, tiny_prepared, tmp_path / "whole", device="cpu", overrides=settings)
    validate = TrainingModule.validation_step

    def killed(self: TrainingModule, batch: Any, index: int) -> None:
        if self.global_step == 8:
            raise RuntimeError("killed")
        validate(self, batch, index)

    monkeypatch.setattr(TrainingModule, "validation_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        gs.train(config, tiny_prepared, tmp_path / "broken", device="cpu", overrides=settings)
    monkeypatch.setattr(TrainingModule, "validation_step", validate)
    run = gs.train(config, tiny_prepared, tmp_path / "broken", device="cpu", resume=True, overrides=settings)
    assert rows(run.path) == rows(whole.path) and len(rows(run.path)) == 2


def test_memory_that_runs_out_is_told(
    config: Path, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: AccessibilityModel, tokens: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AccessibilityModel, "forward", full)
    with pytest.raises(TrainingError, match=r"batches of 4 windows of 4,096 bp; lower train\.batch_size"):
        gs.train(config, tiny_prepared, tmp_path / "run", device="cpu")


def test_a_genome_that_moved_is_told_before_anything_is_written(
    config: Path, tiny_prepared: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_prepared, copy)
    record = json.loads((copy / "dataset.json").read_text())
    record["genome"].update(path="/nowhere/genome.fa", as_written="genome.fa", relative_path="genome.fa")
    (copy / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(FileError, match="genome"):
        gs.train(config, copy, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def scaled_dataset(folder: Path) -> PreparedDataset:
    """Signal of 5 to 60 a bin, a steep function of its GC, with a few bins of 1,000, in two tracks with a scale."""
    import pyBigWig

    genome = gs.Genome(folder / "genome.fa")
    bigwig = pyBigWig.open(str(folder / "signal.bw"), "w")
    bigwig.addHeader([("chrA", 40_000), ("chrB", 20_011)])
    for chrom, bins in (("chrA", 1250), ("chrB", 625)):
        codes = genome.window(chrom, 0, 32 * bins).reshape(bins, 32)
        values = 5 * np.exp(3 * ((codes == 1) | (codes == 2)).mean(1))
        values[700:703] = 1_000 if chrom == "chrA" else values[700:703]
        bigwig.addEntries(chrom, 0, values=values.tolist(), span=32, step=32)
    bigwig.close()
    (folder / "dataset.yaml").write_text(
        "assembly: tiny\n"
        "genome: genome.fa\n"
        "tracks:\n"
        "  - {name: counts, file: signal.bw, kind: signal, scale: {clip: 99.5%, squash: sqrt, mean: 1}}\n"
        "  - {name: level, file: signal.bw, kind: signal, loss: mse, scale: {clip: 80, squash: log1p, mean: 7}}\n"
        "window: {length: 4096, margin: 512, bin: 32}\n"
        "split: {valid: [chrB], test: [chrC]}\n"
    )
    return gs.prepare(folder / "dataset.yaml", folder / "prepared")


def test_a_training_on_scaled_targets_gives_values_in_the_unit(
    config: Path, folder: Path, tmp_path: Path
) -> None:
    import pyBigWig

    data = scaled_dataset(folder)
    overrides = ["train.epochs=12", "model.encoder.dropout=0"]
    run = gs.train(config, data, tmp_path / "run", device="cpu", overrides=overrides)
    model = run.load()
    assert [track.scaling for track in model.tracks] == [data.scaling["counts"], data.scaling["level"]]
    table = gs.evaluate(model, data, split="valid", device="cpu").set_index("track")
    gs.predict(model, data.genome, tmp_path / "predictions", chroms=["chrB"], device="cpu")
    targets, mask = data.targets("chrB"), data.mask("chrB")
    for column, name in enumerate(("counts", "level")):
        assert table.loc[name, "pearson"] > 0.6
        with pyBigWig.open(str(tmp_path / "predictions" / f"{name}.bw")) as bigwig:
            values = bigwig.values("chrB", 0, 20_000, numpy=True)[::32]
        seen = targets[: values.size, column][mask[: values.size, column]]
        assert values.mean() == pytest.approx(seen.mean(), rel=0.15)
        assert 0.4 * seen.std() < values.std() < 1.3 * seen.std()
    assert max(float(row["valid/pearson"]) for row in rows(run.path)) > 0.6


def test_a_step_on_a_scaled_dataset_has_the_loss_of_scaled_targets(folder: Path) -> None:
    data = scaled_dataset(folder)
    plain = [replace(head, scaling=UNSCALED) for head in track_heads(data)]
    encoder = EncoderConfig(
        width=8, pattern=("conv",), stem=StemConfig(channels=(8,), pool=(32,)), dropout=0.0
    )
    losses = []
    for heads, is_scaled in ((track_heads(data), False), (plain, True)):
        torch.manual_seed(0)
        model = AccessibilityModel(ModelConfig(encoder), heads, window_bp=4096, margin_bp=0)
        module = TrainingModule(model, TrainConfig(ema_decay=0.0), total_steps=1)
        targets = torch.from_numpy(data.targets("chrA", 640, 768, scaled=is_scaled))
        mask = torch.from_numpy(data.mask("chrA", 640, 768))
        tokens = torch.from_numpy(data.genome.window("chrA", 640 * 32, 768 * 32))
        losses.append(module.training_step((tokens[None], targets[None], mask[None]), 0).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_heads_of_scaled_tracks_take_statistics_of_scaled_training_bins(folder: Path) -> None:
    data = scaled_dataset(folder)
    keep = data.mask("chrA")[:, 0]
    values = data.targets("chrA", scaled=True)[keep].astype(float)
    for column, (head, mean) in enumerate(zip(track_heads(data), (1.0, 7.0), strict=True)):
        assert head.scaling == data.scaling[head.name]
        assert head.mean == pytest.approx(values[:, column].mean(), rel=1e-3) == pytest.approx(mean, rel=1e-3)
        assert head.std == pytest.approx(values[:, column].std(), rel=1e-3)


def test_a_scaled_dataset_of_an_earlier_version_is_prepared_again(
    config: Path, folder: Path, tmp_path: Path
) -> None:
    data = scaled_dataset(folder)
    record = json.loads((data.folder / "dataset.json").read_text())
    del record["scaled_statistics"]
    (data.folder / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"scales the targets of counts .* run prepare again"):
        gs.train(config, data.folder, tmp_path / "run", device="cpu")
    again = gs.prepare(folder / "dataset.yaml", data.folder)
    assert set(again.scaled_statistics) == {"counts", "level"}


def test_validation_of_many_bins_is_counted_and_close(
    config: Path, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train.epochs=2"]
    exact = gs.train(config, tiny_prepared, tmp_path / "exact", device="cpu", overrides=settings)
    monkeypatch.setattr("genossm.ranking.EXACT_BYTES", 1)
    counted = gs.train(config, tiny_prepared, tmp_path / "counted", device="cpu", overrides=settings)
    for one, other in zip(rows(exact.path), rows(counted.path), strict=True):
        for name in one:
            assert float(other[name]) == pytest.approx(float(one[name]), abs=2e-3 if "au" in name else 1e-6)
    thresholds = [run.load().threshold["peaks"] for run in (exact, counted)]
    assert thresholds[0] == pytest.approx(thresholds[1], abs=0.01)


def test_predictions_that_overflow_are_told(config: Path, tiny_prepared: Path, tmp_path: Path) -> None:
    overrides = ["train.learning_rate=1e30", "train.epochs=1", "train.windows_per_epoch=4"]
    with pytest.raises(TrainingError, match=r"lower train\.learning_rate"):
        gs.train(config, tiny_prepared, tmp_path / "run", device="cpu", overrides=overrides)
    assert not (tmp_path / "run" / "model.safetensors").exists()
