"""Models on disk: what is saved comes back; damaged and foreign files are refused; nothing is unpickled."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import genossm as gs
from genossm import checkpoint
from genossm.errors import CheckpointError, FileError
from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.encoder import EncoderConfig
from genossm.models.heads import TrackHead
from genossm.models.stem import StemConfig
from genossm.scaling import UNSCALED, Scaling


def make_model() -> AccessibilityModel:
    torch.manual_seed(0)
    encoder = EncoderConfig(
        width=16, pattern=("mamba2",), stem=StemConfig((8, 8), (4, 4)), state=8, head_dim=16, dropout=0.1
    )
    return AccessibilityModel(
        ModelConfig(encoder, 12),
        [
            TrackHead("peaks", "peaks", "bce"),
            TrackHead("cuts", "signal", "poisson", "sum", 2.5, 3.0, scaling=Scaling(40.0, "sqrt", 0.3)),
        ],
        window_bp=512,
        margin_bp=64,
        assembly="tiny",
        threshold={"peaks": 0.25},
        provenance={"versions": {"genossm": "x"}},
    )


def test_a_model_comes_back_whole(tmp_path: Path) -> None:
    model = make_model().eval()
    checkpoint.save(model, tmp_path / checkpoint.MODEL_FILE)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.MODEL_FILE]
    for path in (tmp_path, tmp_path / checkpoint.MODEL_FILE):
        loaded = gs.load(path)
        assert not loaded.training
        assert loaded.config == model.config and loaded.tracks == model.tracks
        assert (loaded.window_bp, loaded.margin_bp, loaded.assembly) == (512, 64, "tiny")
        assert loaded.threshold == {"peaks": 0.25} and loaded.provenance == model.provenance
        tokens = torch.randint(0, 5, (1, 512), dtype=torch.int8)
        assert torch.equal(loaded.predict(tokens), model.predict(tokens))


def test_loading_runs_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(make_model(), tmp_path / checkpoint.MODEL_FILE)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    gs.load(tmp_path)


def rewritten(path: Path, **changes: str) -> None:
    """The model file with other metadata."""
    with safe_open(path, framework="pt") as stored:
        metadata = {**stored.metadata(), **changes}
        weights = {name: stored.get_tensor(name) for name in stored.keys()}
    save_file(weights, path, metadata=metadata)


def test_a_model_of_before_scalings_is_loaded_without_one(tmp_path: Path) -> None:
    file = tmp_path / checkpoint.MODEL_FILE
    checkpoint.save(make_model(), file)
    with safe_open(file, framework="pt") as stored:
        description = json.loads(stored.metadata()["genossm"])
    for track in description["tracks"]:
        del track["scaling"]
    rewritten(file, genossm=json.dumps(description))
    assert [track.scaling for track in gs.load(file).tracks] == [UNSCALED, UNSCALED]


def test_another_version_or_a_foreign_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / checkpoint.MODEL_FILE
    checkpoint.save(make_model(), file)
    rewritten(file, format="genossm-model/9")
    with pytest.raises(CheckpointError, match="'genossm-model/9', and this genossm reads 'genossm-model/2'"):
        gs.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match="'unknown'"):
        gs.load(tmp_path)


@pytest.mark.parametrize("change", ["key", "shape"])
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    file = tmp_path / checkpoint.MODEL_FILE
    checkpoint.save(make_model(), file)
    with safe_open(file, framework="pt") as stored:
        description = json.loads(stored.metadata()["genossm"])
    if change == "key":
        description["model"]["encoder"]["heads"] = 3
    else:
        description["model"]["head_hidden"] = 13
    rewritten(file, genossm=json.dumps(description))
    with pytest.raises(CheckpointError, match="does not fit this version of genossm"):
        gs.load(tmp_path)


def test_a_damaged_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no trained model"):
        gs.load(tmp_path)
    file = tmp_path / checkpoint.MODEL_FILE
    checkpoint.save(make_model(), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        gs.load(tmp_path)


def test_a_full_disk_is_a_sentence_and_others_may_read_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / checkpoint.MODEL_FILE
    checkpoint.save(make_model(), file)
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert file.stat().st_mode == plain.stat().st_mode

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FileError, match="no space left on the disk"):
        checkpoint.save(make_model(), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.MODEL_FILE, "plain"]
