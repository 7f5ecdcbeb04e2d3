"""Shipped YAML files: every one loads, and every model is built, runs and takes a training step on a processor."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import torch

from genossm.config import load_yaml
from genossm.dataset_config import load_dataset_config
from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import TrackHead
from genossm.pipelines.training_module import TrainingModule
from genossm.run_config import RunConfig, load_run_config, shipped_configs
from genossm.sequence import NO_BASE

ROOT = Path(__file__).resolve().parents[1]
BIN_BP = {"base-resolution": 1}
COMPARED = ("attention", "conv", "h3", "hydra", "hyena", "lstm", "mamba", "mamba3", "s4", "s4d")
TRACKS = (
    TrackHead("peaks", "peaks", "bce"),
    TrackHead("cuts", "signal", "poisson", "sum"),
    TrackHead("occupancy", "signal", "mse"),
)


def built(config: RunConfig) -> AccessibilityModel:
    return AccessibilityModel(config.model, TRACKS, window_bp=131_072, margin_bp=16_384)


def size(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in built(load_run_config(name)).parameters())


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_runs_and_trains(name: str) -> None:
    config = load_run_config(name)
    torch.manual_seed(0)
    model = built(config)
    bin_bp = BIN_BP.get(name, 32)
    assert model.bin_bp == bin_bp
    length = 256 if bin_bp == 1 else 1024
    tokens = torch.randint(0, 4, (2, length), dtype=torch.int8)
    values = model.eval().predict(tokens)
    assert values.shape == (2, length // bin_bp, 3) and torch.isfinite(values).all()

    module = TrainingModule(model.train(), config.train, total_steps=10)
    optimizer = module.configure_optimizers()["optimizer"]
    targets = torch.randint(0, 2, (2, length // bin_bp // 2, 3)).float()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = module.training_step((tokens, targets, torch.ones_like(targets, dtype=torch.bool)), 0)
    loss.backward()
    module.configure_gradient_clipping(optimizer)  # which refuses a gradient that is not finite
    optimizer.step()
    still = [
        name
        for (name, parameter), old in zip(model.named_parameters(), before, strict=True)
        if torch.equal(parameter, old)
    ]
    assert torch.isfinite(loss) and still == []


@pytest.mark.parametrize("name", shipped_configs())
def test_gradients_are_finite_where_bases_are_missing(name: str) -> None:
    torch.manual_seed(0)
    model = built(load_run_config(name))
    tokens = torch.randint(0, 4, (2, 256), dtype=torch.int8)
    tokens[:, 100:180] = NO_BASE
    model(tokens).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
    )


@pytest.mark.parametrize("name", ["hybrid", *(f"yeast-{mixer}" for mixer in COMPARED)])
def test_models_to_compare_differ_in_their_mixers_only(name: str) -> None:
    config, reference = load_run_config(name), load_run_config("yeast-100kb")
    assert abs(size(name) / size("yeast-100kb") - 1) < 0.1
    assert config.train == reference.train
    assert config.model.head_hidden == reference.model.head_hidden
    encoder, other = config.model.encoder, reference.model.encoder
    assert (encoder.stem, encoder.width, encoder.dropout) == (other.stem, other.width, other.dropout)
    if name == "hybrid":
        assert set(encoder.pattern) == {"mamba2", "attention"}
    else:
        assert set(encoder.pattern) == {name.removeprefix("yeast-")}


def test_the_default_reads_and_gives_what_its_name_says() -> None:
    config = load_run_config("accessibility-100kb")
    assert (config.train.window_bp, config.train.margin_bp, config.train.batch_size) == (131_072, 16_384, 8)
    assert 10e6 < size("accessibility-100kb") < 30e6
    assert 7e6 < size("base-resolution") < 8e6


def test_every_yaml_in_configs_is_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENOSSM_REALDATA", str(tmp_path))
    names = {
        item.name for item in resources.files("genossm.configs").iterdir() if item.name.endswith(".yaml")
    }
    datasets = {name for name in names if name.endswith("-dataset.yaml")}
    assert names - datasets == {f"{name}.yaml" for name in shipped_configs()}
    assert datasets
    for name in datasets:
        with resources.as_file(resources.files("genossm.configs") / name) as path:
            assert load_dataset_config(path).tracks


def test_no_file_sets_what_it_does_not_use() -> None:
    """A key that no mixer of the pattern takes would be ignored: in a shipped file that misleads."""
    from genossm.models.mixers.build import FIELDS

    of_all = {field for fields in FIELDS.values() for field in fields}
    for name in shipped_configs():
        with resources.as_file(resources.files("genossm.configs") / f"{name}.yaml") as path:
            encoder = load_yaml(path)["model"]["encoder"]
        used = {field for mixer in encoder["pattern"] for field in FIELDS[mixer]}
        assert (encoder.keys() & of_all) - used == set(), name


def test_the_readme_lists_every_file() -> None:
    listed = re.findall(r"^\| `([^`]+)`", (ROOT / "configs" / "README.md").read_text(), flags=re.MULTILINE)
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert set(listed) == files and len(listed) == len(files)
