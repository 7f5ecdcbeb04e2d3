"""Training configurations: files and overrides reach the dataclass, wrong values are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from genossm.errors import ConfigError
from genossm.run_config import TrainConfig, load_run_config


def test_overrides_and_files_reach_the_dataclass(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {encoder: {width: 32}}\ntrain: {epochs: 3}\n")
    config = load_run_config(file, ["train.batch_size=7", "train.track_weights={a: 2}"])
    assert config.model.encoder.width == 32
    assert (config.train.epochs, config.train.batch_size, config.train.track_weights) == (3, 7, {"a": 2.0})


def test_unknown_names_and_keys_are_told() -> None:
    with pytest.raises(ConfigError, match=r"choose one of .*yeast-100kb"):
        load_run_config("yeast-100k")
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        load_run_config("demo", ["train.learning_rat=1"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"windows_per_epoch": 2}, "less than one batch of 4"),
        ({"workers": -1}, "at least 0"),
        ({"track_weights": {"a": -1.0}}, "track_weights"),
    ],
)
def test_impossible_training_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TrainConfig(), **options)  # type: ignore[arg-type]
