"""What a comparison knows of its configurations and runs, all of it from their folders."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genossm.checkpoint import MODEL_FILE
from genossm.config import build, load_yaml
from genossm.errors import CheckpointError
from genossm.pipelines.run_log import METRICS_FILE, RESUME_FILE, selection_score
from genossm.pipelines.train import CONFIG_FILE
from genossm.run_config import RunConfig

NON_FINITE = re.compile(r"\b(nan|inf|infinite)\b", re.IGNORECASE)
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A configuration to compare.

    Attributes:
        name: the shipped name, or the file's without its ending.
        source: what `train` is given.
        config: its settings, overrides included.
        parameters: of its model.
        epoch_bp: base pairs of the windows of an epoch.
        batch_size: windows of the dataset that hold as many bases as a training step.
    """

    name: str
    source: str
    config: RunConfig
    parameters: int
    epoch_bp: int
    batch_size: int

    @property
    def mixers(self) -> str:
        """Its layers by mixer, such as `3 mamba2 + 2 attention`."""
        counts = Counter(self.config.model.encoder.pattern)
        return " + ".join(f"{count} {name}" for name, count in counts.items())


@dataclass(eq=False)
class Trial:
    """One training: a configuration with a seed, in `folder`.

    `finished` is set once its command has ended well; `error` says why it failed, if it did.
    """

    candidate: Candidate
    seed: int
    folder: Path
    finished: bool = False
    error: str = ""

    @property
    def config(self) -> RunConfig:
        """The configuration with this seed."""
        config = self.candidate.config
        return replace(config, train=replace(config.train, seed=self.seed))

    @property
    def begun(self) -> bool:
        """Whether there is something that `train --resume` can go on with."""
        return (self.folder / CONFIG_FILE).exists()

    @property
    def epochs(self) -> int:
        """Whole epochs so far."""
        rows = read_log(self.folder)
        return int(rows[-1]["epoch"]) if rows else 0

    @property
    def trained(self) -> bool:
        """Whether the training has come to its end, here or in an earlier comparison."""
        if self.finished:
            return True
        if self.epochs != self.config.train.epochs or not (self.folder / MODEL_FILE).is_file():
            return False
        log, state = self.folder / METRICS_FILE, self.folder / RESUME_FILE
        # the state is the last thing that an epoch writes
        return not state.exists() or state.stat().st_mtime_ns >= log.stat().st_mtime_ns

    def check(self, dataset_fingerprint: str) -> None:
        """Nothing, where the folder is empty or holds this very run.

        Raises:
            CheckpointError: it holds a run of another configuration or dataset.
        """
        if not self.begun:
            return
        stored = self.folder / CONFIG_FILE
        other = ""
        if build(RunConfig, load_yaml(stored), where=str(stored)) != self.config:
            other = f"configuration (see {stored})"
        provenance = self.folder / "provenance.json"
        if provenance.is_file():
            record = json.loads(provenance.read_text(encoding="utf-8"))
            if record["dataset"]["fingerprint"] != dataset_fingerprint:
                other = "dataset"
        if other:
            raise CheckpointError(
                f"{self.folder} holds a run of another {other}; compare into another folder, or remove it"
            )

    def row(self, scores: Mapping[str, Mapping[str, float] | None]) -> Row:
        """What is known of the run: its log's first and last figures, and its scores by split once all are there."""
        rows = read_log(self.folder)
        losses = [row[name] for row in rows for name in ("train/loss", "valid/loss") if name in row]
        best = [score[1] for row in rows if (score := selection_score(row)) is not None]
        figures = {
            f"{split}/{name}": value for split, own in scores.items() for name, value in (own or {}).items()
        }
        scored = bool(scores) and None not in scores.values()
        return {
            "configuration": self.candidate.name,
            "seed": self.seed,
            "run": self.folder.name,
            "state": "failed" if self.error else "done" if scored else "unfinished",
            "error": self.error,
            "steps": rows[-1]["step"] if rows else math.nan,
            "seconds": sum(row["seconds"] for row in rows) if rows else math.nan,
            "loss_first": rows[0]["train/loss"] if rows else math.nan,
            "loss_last": rows[-1]["train/loss"] if rows else math.nan,
            "non_finite": not all(map(math.isfinite, losses)) or NON_FINITE.search(self.error) is not None,
            "valid_best": max(best, default=math.nan),
            **figures,
        }


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, one per whole epoch; a figure that an epoch has not is not in its row."""
    try:
        with (folder / METRICS_FILE).open(encoding="utf-8", newline="") as file:
            return [
                {key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)
            ]
    except FileNotFoundError:
        return []


def read_scores(
    folder: Path, runs: Sequence[Path], *, resolution_bp: int, sites_sha256: str | None
) -> dict[str, float] | None:
    """The figures that `evaluate` left in `folder`, by `track/metric` and, of sites, `track/rule/metric`.

    None where there are none, or of other runs, other bins, other sites, or older than the runs' models.
    """
    file = folder / "metrics.json"
    models = [run / MODEL_FILE for run in runs]
    if not all(path.is_file() for path in (file, *models)):
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if (
        [Path(name).name for name in record["models"]] != [run.name for run in runs]
        or record["resolution_bp"] != resolution_bp
        or record.get("sites_file", {}).get("sha256") != sites_sha256
        or max(model.stat().st_mtime_ns for model in models) > file.stat().st_mtime_ns
    ):
        return None
    figures = {
        f"{row['track']}/{name}": row[name]
        for row in record["tracks"]
        for name in ("positive_rate", "auprc", "auroc", "pearson")
    }
    figures |= {
        f"{row['track']}/{row['rule']}/{name}": row[name]
        for row in record.get("sites", ())
        for name in ("positive_rate", "auprc", "auroc")
    }
    return {name: value for name, value in figures.items() if value is not None}
