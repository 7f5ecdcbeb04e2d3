"""`model_info`: parameters, FLOPs and memory against models, hand counts, each other, and what a GPU has measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from genossm import checkpoint
from genossm.atomic import atomic_write_text
from genossm.config import dump_yaml, to_mapping
from genossm.errors import CheckpointError, ConfigError, DeviceError
from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import TrackHead
from genossm.pipelines.model_costs import Measured
from genossm.pipelines.model_info import model_info
from genossm.run_config import load_run_config

LENGTH = 8192


def test_parameters_are_those_of_the_model_by_part() -> None:
    settings = ["model.encoder.decoder.bin_bp=4", "model.encoder.mlp_ratio=2"]
    info = model_info("tiny", length_bp=LENGTH, mode="predict", overrides=settings, tracks=3)
    config = load_run_config("tiny", settings).model
    heads = [TrackHead(f"track{index}", "peaks", "bce") for index in range(3)]
    model = AccessibilityModel(config, heads, window_bp=LENGTH, margin_bp=0)

    def count(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    mamba2, attention = model.encoder.mixers()
    assert model.encoder.decoder is not None
    assert info.parameters == {
        "stem": count(model.encoder.stem),
        "mamba2": count(mamba2),
        "attention": count(attention),
        "mlp": 2 * (32 * 128 + 64 * 32),
        "norms": 32 * 5,
        "decoder": count(model.encoder.decoder),
        "heads": count(model.heads),
    }
    assert info.total_parameters == count(model)
    assert info.layers == {"mamba2": 1, "attention": 1}
    assert (info.bin_bp, info.trunk_bp, info.receptive_field_bp) == (4, 32, None)
    assert info.training is None and info.training_flops is None and info.measured is None


def test_a_receptive_field_that_ends_is_told_in_base_pairs() -> None:
    info = model_info("yeast-conv", length_bp=LENGTH, mode="predict")
    stem_bp = 17 // 2 + 2 * (4 + 8 + 16 + 32)  # the first convolution, and two positions before each pooling
    assert info.receptive_field_bp == 32 * (1 + 2 * (1 + 4 + 16 + 64)) + 2 * stem_bp
    assert f"receptive field: {info.receptive_field_bp:,} bp" in info.text()


def costs(*overrides: str, batch_size: int = 1, length_bp: int = LENGTH) -> tuple[int, int, int]:
    """FLOPs of a forward pass and of a training step, and the bytes that are kept."""
    info = model_info("tiny", length_bp=length_bp, batch_size=batch_size, overrides=overrides, mode="train")
    assert info.training is not None and info.training_flops is not None and info.forward_flops is not None
    return info.forward_flops, info.training_flops, info.training.kept


def test_costs_grow_as_they_should() -> None:
    forward, training, kept = costs()
    assert 2.5 * forward < training < 3.5 * forward
    two = costs(batch_size=2)
    assert two[:2] == (2 * forward, 2 * training)
    assert costs(batch_size=3)[2] - two[2] == pytest.approx(two[2] - kept, rel=0.01)
    assert costs(length_bp=2 * LENGTH)[0] == pytest.approx(2 * forward, rel=0.05)  # the window's edges aside
    again = costs("model.encoder.checkpoint=true")
    assert again[0] == forward and again[1] > training and again[2] < kept
    assert costs("train.precision=float32")[2] > kept


def test_both_strands_cost_twice_as_much() -> None:
    forward, training, kept = costs()
    assert costs("model.reverse_complement=none") == (forward, training, kept)
    both = costs("model.reverse_complement=shared")
    assert both[:2] == (2 * forward, 2 * training) and 1.8 * kept < both[2] < 2.2 * kept

    def prediction(form: str) -> int:
        overrides = [f"model.reverse_complement={form}"]
        flops = model_info("tiny", length_bp=LENGTH, mode="predict", overrides=overrides).prediction_flops
        assert flops is not None
        return flops

    assert prediction("augment") == prediction("shared") == 2 * prediction("none")
    assert prediction("none") == pytest.approx(forward, rel=0.01)
    in_full = model_info("tiny", length_bp=LENGTH, mode="predict", predict_in="float32")
    assert in_full.prediction is not None and in_full.prediction_precision == "float32"
    narrow = model_info("tiny", length_bp=LENGTH, mode="predict").prediction
    assert narrow is not None and narrow.temporary < in_full.prediction.temporary


def test_memory_adds_up() -> None:
    info = model_info("tiny", length_bp=LENGTH, tracks=2)
    training, prediction = info.training, info.prediction
    assert training is not None and prediction is not None
    weights = 4 * info.total_parameters
    assert weights <= training.weights < 1.5 * weights  # buffers, and multiples of 512 bytes
    assert training.average == training.weights
    assert weights <= training.gradients < 1.5 * weights and training.optimiser == 2 * training.gradients
    parts = (
        training.weights, training.gradients, training.optimiser, training.average, training.kept, training.temporary,
        training.libraries,
    )  # fmt: skip
    assert training.peak == sum(parts) and min(parts) > 0
    assert (
        training.in_all == training.peak + training.graphs == pytest.approx(1.1 * training.peak + (160 << 20))
    )
    assert prediction.peak == prediction.weights + prediction.temporary + prediction.libraries
    without = model_info("tiny", length_bp=LENGTH, mode="train", overrides=["train.ema_decay=0"]).training
    assert without is not None and without.average == 0
    for option in ("train.cuda_graphs=false", "model.encoder.checkpoint=true"):
        plain = model_info("tiny", length_bp=LENGTH, mode="train", overrides=[option]).training
        assert plain is not None and plain.graphs == 0 and plain.in_all == plain.peak


def test_a_short_step_has_its_peak_in_the_optimiser() -> None:
    info = model_info("yeast-100kb", length_bp=64, mode="train")
    assert info.training is not None and info.training.operator == "AdamW"
    assert info.training.kept + info.training.temporary == info.training.gradients


@pytest.mark.parametrize("mixer", ["mamba", "mamba3", "hydra", "s4", "s4d", "h3", "hyena", "conv", "lstm"])
def test_every_mixer_can_be_rehearsed(mixer: str) -> None:
    options = [f"model.encoder.pattern=[{mixer}]", "model.encoder.mlp_ratio=1", "model.encoder.experts=2"]
    info = model_info("tiny", length_bp=2048, overrides=options)
    assert list(info.parameters) == ["stem", mixer, "experts", "norms", "heads"]
    assert info.training is not None and info.training.kept > 0 and info.training_flops
    assert info.training.graphs == 0  # experts cannot be recorded


def test_a_run_is_told_as_its_configuration(tmp_path: Path) -> None:
    config = load_run_config("tiny", ["train.ema_decay=0", "model.encoder.width=48"])
    heads = [TrackHead("a", "peaks", "bce"), TrackHead("b", "peaks", "bce")]
    model = AccessibilityModel(config.model, heads, window_bp=4096, margin_bp=512)
    checkpoint.save(model, tmp_path / checkpoint.MODEL_FILE)
    atomic_write_text(tmp_path / "config.yaml", dump_yaml(to_mapping(config)))
    of_run = model_info(tmp_path, length_bp=LENGTH)
    of_config = model_info(tmp_path / "config.yaml", length_bp=LENGTH, tracks=2)
    assert replace(of_run, name="") == replace(of_config, name="")
    assert of_run.training is not None and of_run.training.average == 0
    of_file = model_info(tmp_path / checkpoint.MODEL_FILE, length_bp=LENGTH, mode="predict")
    assert of_file.prediction == of_run.prediction
    with pytest.raises(ConfigError, match="is a run, whose configuration is settled"):
        model_info(tmp_path, overrides=["train.epochs=1"])


def test_a_folder_does_not_hide_a_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_info("tiny", length_bp=LENGTH, mode="predict").prediction is not None
    with pytest.raises(CheckpointError, match="no trained model"):
        model_info("empty")


def test_impossible_questions_are_answered_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="length_bp is 100, no multiple of the model's bin of 32 bp"):
        model_info("tiny", length_bp=100)
    with pytest.raises(ConfigError, match="choose one of"):
        model_info("tini")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="measured on a CUDA GPU"):
        model_info("tiny", measure=True)


def test_what_was_measured_stands_beside_the_estimates() -> None:
    info = model_info("tiny", length_bp=LENGTH, mode="train")
    measured = Measured("an H100", 2**30, 0.95, None, None)
    lines = replace(info, measured=measured).text().splitlines()
    assert lines[-2] == "measured on an H100"
    assert lines[-1].split() == ["training", "memory", "1.000", "GiB", "estimate", "/", "measured", "0.950"]
