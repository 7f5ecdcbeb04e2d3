"""Trained models on disk: one safetensors file with weights, configuration and provenance; no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genossm.atomic import atomic_path
from genossm.config import build, to_mapping
from genossm.errors import CheckpointError, GenossmError

if TYPE_CHECKING:
    from genossm.models.accessibility import AccessibilityModel

FORMAT = "genossm-model/2"
MODEL_FILE = "model.safetensors"


def save(model: AccessibilityModel, path: str | os.PathLike[str]) -> None:
    """Write `model` to one safetensors file, complete or not at all."""
    from safetensors.torch import save as serialise

    description = {
        "model": to_mapping(model.config),
        "tracks": to_mapping(model.tracks),
        "window_bp": model.window_bp,
        "margin_bp": model.margin_bp,
        "assembly": model.assembly,
        "threshold": model.threshold,
        "provenance": model.provenance,
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        metadata = {"format": FORMAT, "genossm": json.dumps(description)}
        # written here, not by safetensors: a full disk is then an OSError, and the file gets the usual mode
        temporary.write_bytes(serialise(weights, metadata))


def load(path: str | os.PathLike[str]) -> AccessibilityModel:
    """Load a trained model, on the CPU and in evaluation mode.

    Args:
        path: a run folder written by `train`, or the `model.safetensors` in it.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of genossm wrote it.
    """
    from safetensors import SafetensorError, safe_open

    from genossm.models.accessibility import AccessibilityModel, ModelConfig
    from genossm.models.heads import TrackHead

    file = model_file(path)
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            weights = {name: stored.get_tensor(name) for name in stored.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}); it is damaged: train again or copy it anew"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has the format {metadata.get('format', 'unknown')!r}, and this genossm reads {FORMAT!r}; "
            "use the genossm version that wrote it, or train again"
        )
    try:
        description: dict[str, Any] = json.loads(metadata["genossm"])
        model = AccessibilityModel(
            build(ModelConfig, description["model"], where=f"{file}: model"),
            [build(TrackHead, track, where=f"{file}: tracks") for track in description["tracks"]],
            window_bp=description["window_bp"],
            margin_bp=description["margin_bp"],
            assembly=description["assembly"],
            threshold=description["threshold"],
            provenance=description["provenance"],
        )
        model.load_state_dict(weights)
    except (GenossmError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} does not fit this version of genossm ({' '.join(str(error).split())[:300]}); "
            "use the version that wrote it, or train again"
        ) from error
    return model.eval()


def model_file(path: str | os.PathLike[str]) -> Path:
    """The model file of a run folder, or `path` itself where it is a file.

    Raises:
        CheckpointError: there is none.
    """
    given = Path(path)
    file = given / MODEL_FILE if given.is_dir() else given
    if not file.is_file():
        raise CheckpointError(
            f"there is no trained model at {given}: {file.name} is missing; give a folder that `genossm train` finished "
            "at least one validation in"
        )
    return file
