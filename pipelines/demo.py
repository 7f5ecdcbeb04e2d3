"""`demo`: the whole path on a simulated genome, from FASTA and peaks to tested model, bigWigs and a page."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from genossm.checkpoint import load
from genossm.pipelines.demo_report import DemoRun, Step, write_demo_report
from genossm.pipelines.device import describe, pick_device
from genossm.pipelines.evaluate import evaluate
from genossm.pipelines.predict import predict
from genossm.pipelines.prepare import prepare
from genossm.pipelines.simulate import simulate
from genossm.pipelines.train import train
from genossm.progress import say

STEPS = ("simulate", "prepare", "train", "evaluate", "predict", "report")
QUICK_TRAINING = (
    "model.encoder.width=16",
    "model.encoder.pattern=[mamba2]",
    "model.encoder.stem.channels=[8, 8, 8, 16]",
    "model.encoder.stem.pool=[4, 2, 2, 2]",
    "model.encoder.state=8",
    "model.encoder.head_dim=16",
    "model.head_hidden=16",
    "train.epochs=2",
    "train.windows_per_epoch=8",
    "train.batch_size=2",
    "train.workers=0",
    "train.window_bp=null",
    "train.margin_bp=null",
)


@dataclass(frozen=True, slots=True, eq=False)
class DemoResult:
    """Where the demo wrote, its page, the test metrics (see `evaluate`) and the seconds of each step."""

    folder: Path
    report: Path
    table: pd.DataFrame
    seconds: dict[str, float]


def demo(
    out: str | os.PathLike[str],
    *,
    seed: int = 1,
    device: str = "cpu",
    quick: bool = False,
    batch_size: int = 4,
) -> DemoResult:
    """Simulate a genome, prepare, train, evaluate and predict on it, and write OUT/report.html.

    Below `out`: simulation/ (genome, peaks, cuts, truth), dataset/, run/, evaluation/, predictions/,
    report.html. Run again, finished steps are found done and an interrupted training goes on; a line on
    standard error tells the seconds of each step.

    Args:
        out: folder to write into.
        seed: of the genome and of the training.
        device: "cpu" (enough for the demo), "auto", "cuda" or "cuda:N".
        quick: a much smaller genome and two short epochs, to try the machinery; the figures mean nothing
            then.
        batch_size: windows computed at once in `evaluate` and `predict`.

    Raises:
        DataError: `out` holds a demo of another seed or size, or something else.
        DeviceError: the device is not there.
    """
    folder = Path(out)
    clock = _Clock()
    say(f"demo on {describe(pick_device(device))}, seed {seed}, into {folder}")
    with clock.step("simulate"):
        simulation = _simulate(folder / "simulation", seed, quick)
    with clock.step("prepare"):
        dataset = prepare(simulation / "dataset.yaml", folder / "dataset")
    with clock.step("train"):
        run = folder / "run"
        overrides = QUICK_TRAINING if quick else ()
        train("demo", dataset, run, device=device, seed=seed, resume=run.exists(), overrides=overrides)
    model = load(run)
    with clock.step("evaluate"):
        table = evaluate(
            model, dataset, split="test", out=folder / "evaluation", device=device, batch_size=batch_size
        )
    with clock.step("predict"):
        predict(
            model,
            dataset.genome,
            folder / "predictions",
            chroms=dataset.splits["test"],
            device=device,
            batch_size=batch_size,
            call_peaks=True,
        )
    report = folder / "report.html"
    with clock.step("report"):
        write_demo_report(report, DemoRun(folder, dataset, table, model, quick), clock.steps)
    say(f"demo done in {sum(step.seconds for step in clock.steps):.0f} s: open {report}")
    return DemoResult(folder, report, table, {step.name: step.seconds for step in clock.steps})


def _simulate(folder: Path, seed: int, quick: bool) -> Path:
    if not quick:
        return simulate(folder, seed=seed)
    return simulate(
        folder, seed=seed, chromosomes=3, chromosome_bp=120_000, window_bp=16_384, margin_bp=4_096
    )


@dataclass(slots=True)
class _Clock:
    """Tells when a step starts and how long it took, and keeps the seconds for the page."""

    steps: list[Step] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        number = f"[{STEPS.index(name) + 1}/{len(STEPS)}] {name}"
        say(f"{number} ...")
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.steps.append(Step(name, seconds))
        say(f"{number}: {seconds:.1f} s")
