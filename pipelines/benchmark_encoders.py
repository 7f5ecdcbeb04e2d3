"""Measure whole encoders: training steps and inference in Mbp/s, memory, and growth with the length, beside rivals."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from genossm.config import dump_yaml, to_mapping
from genossm.errors import ConfigError, GenossmError
from genossm.kernels.backend import HAS_TRITON
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.benchmark_encoder_cases import (
    CPU_QUICK,
    MODES,
    QUICK,
    TRACKS,
    Case,
    Cost,
    EncoderBenchmark,
    EncoderGrowth,
    EncoderRow,
    Mode,
    Plan,
    alike,
    find_cases,
    kb,
    row_of,
    strands,
)
from genossm.pipelines.benchmark_gpu import LONG, exponent, hardware
from genossm.pipelines.benchmark_rivals import (
    Pass,
    WarmUp,
    compare_forms,
    compare_passes,
    mamba_ssm_pass,
    use_two_passes,
)
from genossm.pipelines.benchmark_timing import Step, Stopwatch, release, sentence
from genossm.pipelines.cuda_graphs import GraphedPrediction
from genossm.pipelines.device import describe, pick_device
from genossm.pipelines.model_info import model_info
from genossm.pipelines.training_module import TrainingModule
from genossm.progress import say
from genossm.run_config import RunConfig
from genossm.version import versions

LARGEST_ERROR = {"bf16": 3e-2, "float32": 1e-4}
"""Between two forms of the same: the norm of the difference over the norm."""
OVER = "not measured: the time for this run was over"

Save = Callable[[EncoderBenchmark], None]
Steps = Callable[[int, int], Step]


def benchmark_encoders(
    *,
    device: str = "auto",
    configs: Sequence[str] | None = None,
    mixers: Sequence[str] | None = None,
    like: str | None = None,
    length: int | None = None,
    batch: int | None = None,
    growth: bool = True,
    with_rivals: bool = True,
    quick: bool = False,
    time_limit_s: float | None = None,
    plan: Plan | None = None,
    save: Save | None = None,
) -> EncoderBenchmark:
    """Time training steps and inference of configurations, of each mixer at equal size, and of rivals.

    Training is `TrainingModule`'s step (forward, loss, backward, AdamW, running average), inference is
    `AccessibilityModel.predict`; both with bfloat16 autocast on CUDA and in float32 on a CPU, on random bases with one
    track of peaks. Nothing is timed if two forms of the same differ.

    Args:
        device: auto, cuda, cuda:N or, with `quick`, cpu.
        configs: names of shipped configurations or YAML files; None for those of the plan.
        mixers: None for all.
        like: the configuration whose width, layers, stem and size mixers and rivals have; None for the plan's.
        length: base pairs of a window; None for the plan's.
        batch: windows at once; None for each configuration's own, mixers and rivals with that of `like`.
        growth: whether to measure how time grows with the length, with one window.
        with_rivals: whether to measure the rivals.
        quick: fewer configurations, lengths and repetitions.
        time_limit_s: no measurement begins later than this.
        plan: how much is measured; None for the plan of the device and `quick`.
        save: called with what there is after each row.

    Raises:
        DeviceError: the device is not there.
        ConfigError: a configuration or mixer is not there, a length does not fit, or a CPU is to do more than `quick`.
        GenossmError: two forms of the same differ.
    """
    began = time.monotonic()
    place = pick_device(device)
    if place.type == "cpu" and not quick:
        raise ConfigError(
            "encoders are measured on a GPU; on a CPU only a quick run is possible: give --quick"
        )
    plan = plan or (CPU_QUICK if place.type == "cpu" else QUICK if quick else Plan())
    plan = replace(
        plan,
        configs=plan.configs if configs is None else tuple(configs),
        like=like or plan.like,
        length=length or plan.length,
        growth=plan.growth if growth else (),
        time_limit_s=time_limit_s or plan.time_limit_s,
    )
    cases = find_cases(plan, mixers, batch, with_rivals)
    result = EncoderBenchmark(
        describe(place),
        hardware(place),
        versions(),
        "bf16" if place.type == "cuda" else "float32",
        plan.length,
        plan.like,
        quick,
    )
    bench = _Bench(place, plan, result, began, save or (lambda _: None))
    if place.type == "cuda":
        with torch.cuda.device(place):  # streams and events are of the current device
            bench.run(cases)
    else:
        bench.run(cases)
    return result


class _Bench:
    """One run: what it measures with, and what it has found."""

    def __init__(
        self, device: torch.device, plan: Plan, result: EncoderBenchmark, began: float, save: Save
    ) -> None:
        self.device, self.plan, self.result, self.began, self.save = device, plan, result, began, save
        self.watch = Stopwatch(device, plan.budget_s, fewest=3)
        self.growth_watch = Stopwatch(device, plan.growth_budget_s, fewest=1)
        self.theirs: Pass | None = None
        self.rows: list[tuple[Case, EncoderRow]] = []
        self.growth: list[tuple[Case, list[EncoderGrowth]]] = []

    def run(self, cases: Sequence[Case]) -> None:
        """Check, then measure every case at the length, then how they grow."""
        ours = [case for case in cases if case.passes != "mamba-ssm"]
        theirs = [case for case in cases if case.passes == "mamba-ssm"]
        passes = next((case for case in cases if case.passes), None)
        if theirs:
            self._find_mamba_ssm()
        compiling = passes if self.theirs is not None and self.device.type == "cuda" else None
        with WarmUp(self.plan.warm_processes, self.device) as warm:
            if compiling is not None:
                warm.start(compiling.config.model.encoder, self._bins(compiling))
            if passes is not None:
                self._check(passes)
            estimates = self._estimates(ours)
            warm.wait(self.plan.warm_limit_s)
        gc.collect()
        gc.freeze()  # what is there now stays, so that collecting the rest between measurements takes no time
        try:
            self._measure(ours, theirs, estimates)
        finally:
            gc.unfreeze()
        self._keep()

    def _measure(self, ours: Sequence[Case], theirs: Sequence[Case], estimates: dict[str, float]) -> None:
        for case in ours:
            self._row(case, estimates.get(case.name))
        # Should the time run out, it is the growth of configurations that is missing: most differ in the mixer alone.
        for case in ours if self.plan.growth else ():
            if case.group != "configuration":
                self._growth(case)
        for case in theirs:
            self._their_row(case)
        for case in ours if self.plan.growth else ():
            if case.group == "configuration":
                self._growth(case)

    def _find_mamba_ssm(self) -> None:
        if not self.plan.mamba_ssm:
            self.result.absent["mamba-ssm"] = "left out of a quick run"
            return
        try:
            self.theirs, version = mamba_ssm_pass()
        except Exception as error:  # whatever somebody else's package does while it is imported
            self.result.absent["mamba-ssm"] = sentence(error)
        else:
            self.result.versions["peer mamba_ssm"] = version

    def _check(self, case: Case) -> None:
        limit = LARGEST_ERROR[self.result.precision]
        with self._autocast():
            self.result.checks = compare_forms(case.config.model.encoder, self._bins(case), self.device)
        release(self.device)
        wrong = [f"{name} by {error:.1e}" for name, error in self.result.checks.items() if not error <= limit]
        if wrong:
            raise GenossmError(
                f"two forms of the same Mamba-2 layer differ, relative to the norm: {', '.join(wrong)} (at most "
                f"{limit:.0e}); nothing is timed; this is a fault of this build or device: please report it"
            )

    def _estimates(self, cases: Sequence[Case]) -> dict[str, float]:
        """What `genossm info` expects of a training step, in MiB, for as many cases as there is time for."""
        found: dict[str, float] = {}
        ends = time.monotonic() + self.plan.estimates_s
        for index, case in enumerate(cases if self.device.type == "cuda" and HAS_TRITON else ()):
            known = any(alike(case, other) for other in cases[:index])  # its row will be a copy
            if not known and not case.passes and time.monotonic() < ends:
                found[case.name] = estimate_mib(case.config, self.plan.length)
        return found

    def _row(self, case: Case, estimate: float | None) -> None:
        same = next((row for other, row in self.rows if alike(case, other)), None)
        if same is not None:
            row = replace(same, name=case.name, group=case.group, beside=case.beside)
        else:
            training, inference = (self._cost(case, mode) for mode in MODES)
            row = row_of(case, replace(training, estimate_mib=estimate), inference)
        self.rows.append((case, row))
        self.result.rows.append(row)
        say(_line(row))
        self._keep()

    def _their_row(self, case: Case) -> None:
        """mamba-ssm's row, if its kernels are there and compute the same; whatever they raise is told."""
        if self.theirs is None:
            return
        try:
            with self._autocast():
                error = compare_passes(case.config.model.encoder, self._bins(case), self.device, self.theirs)
            self.result.checks["one pass of mamba-ssm and of ours"] = error
            if error <= LARGEST_ERROR[self.result.precision]:
                self._row(case, None)
            else:
                self.result.absent["mamba-ssm"] = f"its pass differs from ours by {error:.1e} of the norm"
        except Exception as error:
            self.result.absent["mamba-ssm"] = sentence(error)
        release(self.device)

    def _growth(self, case: Case) -> None:
        same = next((found for other, found in self.growth if alike(case, other)), None)
        if same is None:
            same = []
            for mode in MODES:
                costs = self._costs_by_length(case, mode)
                same.append(EncoderGrowth(case.name, mode, costs, _fit(costs, 0), _fit(costs, LONG)))
                say(_growth_line(same[-1]))
        self.growth.append((case, same))
        named = {growth.name for growth in self.result.growth}
        self.result.growth += [replace(growth, name=case.name) for growth in same if case.name not in named]
        self._keep()

    def _cost(self, case: Case, mode: Mode) -> Cost:
        """A step at the main length, or why there is none."""
        empty = Cost(self.plan.length, case.config.train.batch_size, strands(case, mode))
        if self._over():
            return replace(empty, problem=OVER)
        try:
            cost = self._measured(case, mode, empty)
        except torch.OutOfMemoryError as error:
            cost = replace(empty, problem=sentence(error))
        release(self.device)
        return cost

    def _measured(self, case: Case, mode: Mode, empty: Cost) -> Cost:
        held = self._held()
        steps = self._steps(case, mode)
        if case.passes != "mamba-ssm":  # whose kernels would be compiled and tuned again for another length
            once = self._probe(steps(1, self.plan.probe_bp))
            seconds = once * empty.batch * empty.length / self.plan.probe_bp
            if seconds > self.plan.step_limit_s:
                return replace(empty, problem=f"left out: a step would take about {seconds:.0f} s")
        return self._timed(steps, empty, self.watch, held)

    def _costs_by_length(self, case: Case, mode: Mode) -> list[Cost]:
        """One window of each length, up to the first for which time or memory does not suffice."""
        costs: list[Cost] = []
        try:
            self._grow(case, mode, costs)
        except torch.OutOfMemoryError as error:
            length = self.plan.growth[len(costs)]
            costs.append(Cost(length, 1, strands(case, mode), problem=sentence(error)))
        release(self.device)
        return costs

    def _grow(self, case: Case, mode: Mode, costs: list[Cost]) -> None:
        held = self._held()
        steps = None if self._over() else self._steps(case, mode)
        for length in self.plan.growth:
            empty = Cost(length, 1, strands(case, mode))
            seconds = costs[-1].ms * length / costs[-1].length / 1000 if costs and costs[-1].ms else 0.0
            if steps is None or self._over():
                costs.append(replace(empty, problem=OVER))
                return
            if seconds > self.plan.growth_step_limit_s:
                problem = f"left out: a step would take {seconds:.0f} s or more"
                costs.append(replace(empty, problem=problem))
                return
            costs.append(self._timed(steps, empty, self.growth_watch, held))

    def _timed(self, steps: Steps, empty: Cost, watch: Stopwatch, held: int) -> Cost:
        step = steps(empty.batch, empty.length)  # held until its memory is counted: a graph goes with it
        found = watch.measure(step)
        peak = None
        if self.device.type == "cuda":
            release(self.device)  # what graphs hold remains
            taken = torch.cuda.memory_reserved(self.device)
            peak = (max(taken, torch.cuda.max_memory_allocated(self.device)) - held) / 2**20
        speed = empty.batch * empty.length / found.ms / 1000
        return replace(empty, ms=found.ms, mbp_per_s=speed, repeats=found.repeats, peak_mib=peak)

    def _probe(self, step: Step) -> float:
        """Seconds of a step that is not the first, which compiles."""
        step()
        self._wait()
        started = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - started

    def _steps(self, case: Case, mode: Mode) -> Steps:
        """The model of a case on the device, as a function of batch and length to the step that is timed."""
        torch.manual_seed(1)
        encoder = AccessibilityModel(case.config.model, TRACKS, window_bp=self.plan.length, margin_bp=0)
        if case.passes:
            encoder = use_two_passes(encoder, self.theirs if case.passes == "mamba-ssm" else None)
        encoder = encoder.to(self.device)
        if mode == "inference":
            encoder.eval()
            return partial(self._inference_step, encoder)
        config = replace(case.config.train, windows_per_epoch=None, track_weights={})
        module = TrainingModule(encoder, config, total_steps=10_000).to(self.device)
        return partial(self._training_step, module, module.configure_optimizers()["optimizer"])

    def _inference_step(self, model: AccessibilityModel, batch: int, length: int) -> Step:
        tokens, predict = self._tokens(batch, length), GraphedPrediction(model)

        def step() -> Tensor:
            with self._autocast():
                return predict(tokens)

        return step

    def _training_step(
        self, module: TrainingModule, optimizer: torch.optim.Optimizer, batch: int, length: int
    ) -> Step:
        tokens = self._tokens(batch, length)
        targets = torch.rand(batch, length // module.model.bin_bp, len(TRACKS), device=self.device) < 0.1
        data = tokens, targets.float(), torch.ones_like(targets)
        module.record_again()

        def step() -> None:
            with self._autocast():
                loss = module.training_step(data, 0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            module.configure_gradient_clipping(optimizer)
            optimizer.step()
            module.update_average()
            module.epoch_losses.clear()

        return step

    def _tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(0, 4, (batch, length), dtype=torch.int8, device=self.device)

    def _bins(self, case: Case) -> int:
        """Positions of the layers in a window."""
        return self.plan.length // case.config.model.encoder.stem.bin_bp

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.result.precision == "bf16")

    def _held(self) -> int:
        """Bytes that PyTorch has allocated before a model is made."""
        if self.device.type != "cuda":
            return 0
        release(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _over(self) -> bool:
        return time.monotonic() - self.began > self.plan.time_limit_s

    def _keep(self) -> None:
        self.result.seconds = time.monotonic() - self.began
        self.save(self.result)


def estimate_mib(config: RunConfig, length: int) -> float:
    """The memory that `genossm info` expects training to take, CUDA graphs included, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_yaml(to_mapping(config)))
        info = model_info(
            path, length_bp=length, batch_size=config.train.batch_size, mode="train", tracks=len(TRACKS)
        )
    assert info.training is not None
    return info.training.in_all / 2**20


def _fit(costs: Sequence[Cost], shortest: int) -> float | None:
    points = [(cost.length, cost.ms) for cost in costs if cost.ms is not None and cost.length >= shortest]
    return exponent([length for length, _ in points], [ms for _, ms in points])


def _line(row: EncoderRow) -> str:
    parts = [
        f"{mode} {_figure(cost)}" for mode, cost in (("training", row.training), ("inference", row.inference))
    ]
    return f"{row.group} {row.name}: {row.parameters:,} parameters, {', '.join(parts)}"


def _growth_line(growth: EncoderGrowth) -> str:
    figures = (f"{kb(cost.length)} {_figure(cost)}" for cost in growth.costs)
    return f"{growth.name}, {growth.mode}: {', '.join(figures)}"


def _figure(cost: Cost) -> str:
    return cost.problem or f"{cost.ms:.1f} ms ({cost.mbp_per_s:.3g} Mbp/s)"
