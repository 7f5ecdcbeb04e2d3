"""Train several configurations with several seeds on one dataset, score all of them alike, and tabulate.

Each training and each evaluation is a process of its own, the same as by hand (`genossm train`, `genossm evaluate`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from genossm.dataset import PreparedDataset
from genossm.errors import ConfigError, DataError
from genossm.loaders import WindowDataset
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.compare_processes import CommandError, Commands, alone_in
from genossm.pipelines.compare_tables import Comparison, summarise, write_comparison
from genossm.pipelines.compare_trial import Candidate, Trial, read_scores
from genossm.pipelines.device import describe, pick_device
from genossm.pipelines.site_scores import SiteScores, sites_sha256
from genossm.pipelines.train import fingerprint, track_heads
from genossm.progress import move, progress, say
from genossm.run_config import load_run_config
from genossm.sampling import count_steps
from genossm.version import versions

SPLITS = ("test", "valid")


def compare(
    configs: Sequence[str | os.PathLike[str]],
    dataset: PreparedDataset | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    seeds: Sequence[int] = (1,),
    overrides: Iterable[str] = (),
    sites: str | os.PathLike[str] | None = None,
    resolution: int | None = None,
    jobs: int = 1,
    device: str = "auto",
    ensembles: bool = True,
) -> Comparison:
    """Train every configuration with every seed on one dataset, score them on held-out chromosomes, and tabulate.

    `out` gets a run folder `<config>-seed<k>` for each training, with the scores of the held-out splits in its `test/`
    and `valid/`; `<config>-ensemble/test/`, the scores of the seeds' averaged predictions; `logs/`; and, renewed after
    each run, `compare.tsv` (a row per configuration), `compare.json` (that and every run) and `compare.md`.

    Called again, what is finished is kept and the rest goes on. A run that fails is told in its row; the others go on.

    Args:
        configs: YAML files and names of shipped configurations.
        dataset: a prepared dataset or its folder.
        out: folder to write into.
        seeds: each at least 0.
        overrides: `a.b=value` settings on top of every configuration.
        sites: a table of sites to score as well, on the test split, see `genossm.pipelines.site_scores.read_sites`.
        resolution: bin size in bp of the scores, see `evaluate`; None for the dataset's own.
        jobs: trainings at once, which share the device; the processor's cores are divided among them.
        device: `auto` (CUDA, or an error where there is none), `cuda`, `cuda:N` or `cpu`.
        ensembles: where there are several seeds, also score their averaged predictions.

    Raises:
        ConfigError: a configuration is wrong, or two have the same name.
        DataError: the dataset has nothing to test on, or the sites do not fit it.
        CheckpointError: `out` holds a run of another configuration or dataset, or is in use.
        DeviceError: the device is not there.
    """
    chosen = pick_device(device)
    data = dataset if isinstance(dataset, PreparedDataset) else PreparedDataset(dataset)
    settings = list(overrides)
    _check(data, seeds, sites, resolution, jobs)
    folder = Path(out)
    candidates = _candidates(configs, data, settings)
    trials = [
        Trial(candidate, seed, folder / f"{candidate.name}-seed{seed}")
        for seed in seeds
        for candidate in candidates
    ]
    own = fingerprint(data)
    for trial in trials:
        trial.check(own)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    say(
        f"comparing on {describe(chosen)}: {len(candidates)} configurations, {len(trials)} runs, {jobs} at a time; "
        f"into {folder}"
    )
    with alone_in(folder) as lock:
        commands = Commands(threads=max(1, torch.get_num_threads() // jobs), lock=lock)
        work = _Work(folder, data, candidates, trials, settings, sites, resolution, device, commands)
        return work.run(jobs, ensembles=ensembles and len(seeds) > 1)


@dataclass(eq=False)
class _Work:
    """What there is to do, and what came of it: `failures` by run or ensemble."""

    folder: Path
    data: PreparedDataset
    candidates: list[Candidate]
    trials: list[Trial]
    overrides: list[str]
    sites: str | os.PathLike[str] | None
    resolution: int | None
    device: str
    commands: Commands
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites_sha256 = None if self.sites is None else sites_sha256(self.sites)

    def run(self, jobs: int, *, ensembles: bool) -> Comparison:
        """Do all that is not done, `jobs` at a time, showing progress and writing the tables after each."""
        total_bp = sum(trial.candidate.epoch_bp * trial.config.train.epochs for trial in self.trials)
        with progress(total=total_bp, unit="bp", description="train", scale=True) as bar:
            move(bar, self._trained_bp())
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    self._wait(bar, {pool.submit(self._train, one): one.folder.name for one in self.trials})
                    if ensembles:
                        self._wait(
                            bar, {pool.submit(self._average, one): one.name for one in self.candidates}
                        )
                except BaseException:
                    self.commands.close()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return self._save()

    def _wait(self, bar: tqdm[Any], waiting: dict[Future[str], str]) -> None:
        total = len(waiting)
        while waiting:
            finished, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in finished:
                name = waiting.pop(future)
                say(f"[{total - len(waiting)}/{total}] {name}: {future.result()}")
                self._save()
            bar.update(max(0, self._trained_bp() - bar.n))

    def _trained_bp(self) -> int:
        """Base pairs of the windows of all whole epochs so far."""
        return sum(trial.candidate.epoch_bp * trial.epochs for trial in self.trials)

    def _train(self, trial: Trial) -> str:
        """Train and score one run, or what is left of that; in words what came of it."""
        name = trial.folder.name
        log = self.folder / "logs" / f"{name}.log"
        try:
            if not trial.trained:
                words = ["train", trial.candidate.source, "--dataset", str(self.data.folder)]
                words += ["-o", str(trial.folder), "--seed", str(trial.seed), "--device", self.device]
                words += [word for override in self.overrides for word in ("--set", override)]
                self.commands.run([*words, "--resume"] if trial.begun else words, log)
                trial.finished = True
            for split in SPLITS:
                self._evaluate([trial], trial.folder, split, log)
        except CommandError as error:
            trial.error = self.failures[name] = str(error)
            return f"failed: {error}"
        figures = self._scores([trial], trial.folder, "test") or {}
        told = [f"{name} {value:.4f}" for name, value in figures.items() if not name.endswith("_rate")]
        return f"test {', '.join(told)}"

    def _average(self, candidate: Candidate) -> str:
        """Score the averaged predictions of a configuration's runs; in words what came of it."""
        name = f"{candidate.name}-ensemble"
        own = self._of(candidate)
        if any(trial.error for trial in own):
            return "its seeds are not averaged, since a run failed"
        try:
            self._evaluate(own, self.folder / name, "test", self.folder / "logs" / f"{name}.log")
        except CommandError as error:
            self.failures[name] = str(error)
            return f"failed: {error}"
        return "its seeds' averaged predictions are scored"

    def _of(self, candidate: Candidate) -> list[Trial]:
        return [trial for trial in self.trials if trial.candidate is candidate]

    def _evaluate(self, trials: Sequence[Trial], folder: Path, split: str, log: Path) -> None:
        """Score the runs' averaged predictions into folder/split, where that is not done; sites on the test split."""
        if self._scores(trials, folder, split) is not None:
            return
        words = ["evaluate", *(str(trial.folder) for trial in trials), "--dataset", str(self.data.folder)]
        words += ["--split", split, "-o", str(folder / split), "--device", self.device]
        words += ["--batch-size", str(trials[0].candidate.batch_size)]
        words += [] if self.resolution is None else ["--resolution", str(self.resolution)]
        words += [] if self.sites is None or split != "test" else ["--sites", os.fspath(self.sites)]
        self.commands.run(words, log)

    def _scores(self, trials: Sequence[Trial], folder: Path, split: str) -> dict[str, float] | None:
        return read_scores(
            folder / split,
            [trial.folder for trial in trials],
            resolution_bp=self.resolution or self.data.bin_bp,
            sites_sha256=self.sites_sha256 if split == "test" else None,
        )

    def _save(self) -> Comparison:
        """Tabulate what is there, and write it."""
        runs = []
        for trial in self.trials:
            scores = {split: self._scores([trial], trial.folder, split) for split in SPLITS}
            runs.append(trial.row(scores if trial.trained else {}))
        ensembles = {}
        for candidate in self.candidates:
            figures = self._scores(self._of(candidate), self.folder / f"{candidate.name}-ensemble", "test")
            ensembles[candidate.name] = {f"test/{name}": value for name, value in (figures or {}).items()}
        failures = [f"{name}: {sentence}" for name, sentence in self.failures.items()]
        comparison = summarise(self.folder, self.candidates, runs, ensembles, failures)
        record = {
            "dataset": str(self.data.folder),
            "assembly": self.data.assembly,
            "splits": {split: list(self.data.splits[split]) for split in SPLITS},
            "resolution_bp": self.resolution or self.data.bin_bp,
            "overrides": self.overrides,
            "sites": None if self.sites is None else os.fspath(self.sites),
            "versions": versions(),
        }
        write_comparison(comparison, record)
        return comparison


def _check(
    data: PreparedDataset,
    seeds: Sequence[int],
    sites: str | os.PathLike[str] | None,
    resolution: int | None,
    jobs: int,
) -> None:
    """What would make every run fail is told before the first."""
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"the seeds are {list(seeds)}; give one or more different ones, each at least 0")
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; at least 1 training must run at a time")
    for split in SPLITS:
        if not data.splits[split]:
            raise DataError(
                f"the split {split!r} of {data.folder} has no chromosome, so models cannot be compared on it; "
                f"name some in the dataset YAML (split.{split})"
            )
    if sites is not None:
        peaks = [track.name for track in data.tracks if track.kind == "peaks"]
        SiteScores(sites, {chrom: data.lengths[chrom] for chrom in data.splits["test"]}, peaks)
    if resolution is not None and resolution < data.bin_bp:
        raise DataError(
            f"resolution {resolution} bp is finer than the {data.bin_bp}-bp bins of {data.folder}; "
            f"ask for {data.bin_bp} or more"
        )


def _candidates(
    configs: Sequence[str | os.PathLike[str]], data: PreparedDataset, overrides: Sequence[str]
) -> list[Candidate]:
    """The configurations, read and sized."""
    sources = [os.fspath(config) for config in configs]
    names = [Path(source).stem if source.endswith((".yaml", ".yml")) else source for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        what = f"{', '.join(twice)} is named twice" if twice else "no configuration is named"
        raise ConfigError(f"{what}; give configurations with different names, for their folders")
    heads = track_heads(data)
    candidates = []
    for name, source in zip(names, sources, strict=True):
        config = load_run_config(source, overrides)
        settings = config.train
        if "csv" not in settings.loggers:
            raise ConfigError(f"{source}: train.loggers lacks csv, which holds the losses to compare; add it")
        try:
            windows = WindowDataset(
                data,
                "train",
                window_bp=settings.window_bp,
                margin_bp=settings.margin_bp,
                windows_per_epoch=settings.windows_per_epoch,
            )
            model = AccessibilityModel(
                config.model,
                heads,
                window_bp=data.window_bp,
                margin_bp=data.margin_bp,
                assembly=data.assembly,
            )
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from error
        step_bp = settings.batch_size * windows.window_bp
        candidates.append(
            Candidate(
                name,
                source,
                config,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                epoch_bp=count_steps(len(windows), settings.batch_size) * step_bp,
                batch_size=max(1, step_bp // data.window_bp),
            )
        )
    return candidates
