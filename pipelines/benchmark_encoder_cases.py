"""The encoders that are measured: what they are, how much of them is measured, and what is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from genossm.errors import ConfigError
from genossm.models.accessibility import AccessibilityModel
from genossm.models.encoder import EncoderConfig, MixerName
from genossm.models.heads import TrackHead
from genossm.pipelines.benchmark_rivals import rivals, sized_like
from genossm.run_config import RunConfig, load_run_config, shipped_configs

Mode = Literal["training", "inference"]
Group = Literal["configuration", "mixer", "rival"]
MODES: tuple[Mode, ...] = ("training", "inference")
LIKE = "accessibility-100kb"
TRACKS = (TrackHead("track0", "peaks", "bce"),)  # those of `genossm info`


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        configs: names or files; None for all that are shipped.
        like: the configuration whose size mixers and rivals have.
        length, growth: base pairs of the main table, and of the growth with the length.
        probe_bp: one window of this length is run first, and tells about how long a step will take.
        budget_s, growth_budget_s: time for the repetitions of a step (at least 3, and 1).
        step_limit_s, growth_step_limit_s: steps that would take longer are left out.
        estimates_s: time for the estimates of memory, 0 for none.
        mamba_ssm: whether to time mamba-ssm's kernels too, whose autotuners take long.
        warm_processes, warm_limit_s: see `WarmUp`.
        time_limit_s: no measurement begins later.
    """

    configs: tuple[str, ...] | None = None
    like: str = LIKE
    length: int = 131_072
    growth: tuple[int, ...] = (2**14, 2**16, 2**17, 2**18, 2**20)
    probe_bp: int = 16_384
    budget_s: float = 0.3
    growth_budget_s: float = 0.06
    step_limit_s: float = 10.0
    growth_step_limit_s: float = 2.0
    estimates_s: float = 45.0
    mamba_ssm: bool = True
    warm_processes: int = 6
    warm_limit_s: float = 60.0
    time_limit_s: float = 240.0


QUICK = Plan(
    configs=(LIKE, "base-resolution", "hybrid", "yeast-100kb"),
    growth=(2**14, 2**17, 2**20),
    budget_s=0.1,
    estimates_s=0.0,
    mamba_ssm=False,
    time_limit_s=120.0,
)
CPU_QUICK = replace(
    QUICK, configs=("tiny",), like="tiny", length=4096, growth=(2048, 8192), probe_bp=1024, budget_s=0.0
)


@dataclass(frozen=True)
class Cost:
    """A step of one batch: median ms and peak MiB (of what PyTorch allocated for it, model included; None off CUDA).

    Attributes:
        mbp_per_s: base pairs of the windows, each counted once, also where both strands are computed.
        strands: how many of each window are computed.
        estimate_mib: what `genossm info` expects; None where it was not asked.
        problem: why there is no time.
    """

    length: int
    batch: int
    strands: int
    ms: float | None = None
    mbp_per_s: float | None = None
    repeats: int = 0
    peak_mib: float | None = None
    estimate_mib: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class EncoderRow:
    """One encoder; `beside` names the row whose times are the unit for it."""

    name: str
    group: Group
    layers: str
    parameters: int
    trunk_bp: int
    bin_bp: int
    training: Cost
    inference: Cost
    beside: str | None = None


@dataclass(frozen=True)
class EncoderGrowth:
    """Costs of one window by its length, and ms ~ length ** exponent, fitted over all and from 131,072 on."""

    name: str
    mode: Mode
    costs: list[Cost]
    exponent: float | None
    long_exponent: float | None


@dataclass
class EncoderBenchmark:
    """All that a run found; the tables are in genossm.pipelines.benchmark_encoder_tables."""

    device: str
    hardware: dict[str, str]
    versions: dict[str, str]
    precision: str
    length: int
    like: str
    quick: bool
    checks: dict[str, float] = field(default_factory=dict)
    rows: list[EncoderRow] = field(default_factory=list)
    growth: list[EncoderGrowth] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """An encoder to measure; its `train.batch_size` is the batch. `passes` and `beside`: see `Rival`."""

    name: str
    group: Group
    config: RunConfig
    passes: str = ""
    beside: str | None = None


def find_cases(plan: Plan, mixers: Sequence[str] | None, batch: int | None, with_rivals: bool) -> list[Case]:
    """The encoders to measure, in order."""
    names = shipped_configs() if plan.configs is None else plan.configs
    wanted: Sequence[str] = get_args(MixerName) if mixers is None else mixers
    unknown = sorted(set(wanted) - set(get_args(MixerName)))
    if unknown:
        raise ConfigError(f"there is no mixer {unknown[0]!r}; choose among {', '.join(get_args(MixerName))}")
    like = load_run_config(plan.like)
    cases = [Case(name, "configuration", load_run_config(name)) for name in names]
    chosen: list[MixerName] = [mixer for mixer in get_args(MixerName) if mixer in wanted]
    try:
        cases += [Case(mixer, "mixer", sized_like(like, mixer)) for mixer in chosen]
        for rival in rivals(like) if with_rivals else ():
            cases.append(Case(rival.name, "rival", rival.config, rival.passes, rival.beside))
    except ValueError as error:
        raise ConfigError(
            f"{plan.like} has a size that not every mixer can have: {error}; name another with --like, or the mixers"
        ) from error
    if batch is not None:
        cases = [
            replace(case, config=replace(case.config, train=replace(case.config.train, batch_size=batch)))
            for case in cases
        ]
    for case in cases:
        trunk_bp = case.config.model.encoder.stem.bin_bp
        wrong = [length for length in (plan.length, *plan.growth, plan.probe_bp) if length % trunk_bp]
        if wrong:
            raise ConfigError(
                f"a length of {wrong[0]:,} bp is no multiple of the bins of {trunk_bp} bp of {case.name}; "
                "give another --length, or leave it out"
            )
    return cases


def alike(case: Case, other: Case) -> bool:
    """Whether both are the same to measure."""
    a, b = case.config, other.config
    return (a.model, a.train.batch_size, a.train.compile, case.passes) == (
        *(b.model, b.train.batch_size, b.train.compile),
        other.passes,
    )


def strands(case: Case, mode: Mode) -> int:
    """How many strands of a window are computed."""
    both = case.config.model.reverse_complement
    return 2 if both == "shared" or (both == "augment" and mode == "inference") else 1


def row_of(case: Case, training: Cost, inference: Cost) -> EncoderRow:
    """The row of a case."""
    with torch.device("meta"):
        model = AccessibilityModel(case.config.model, TRACKS, window_bp=training.length, margin_bp=0)
    return EncoderRow(
        case.name,
        case.group,
        _layers(case.config.model.encoder),
        sum(parameter.numel() for parameter in model.parameters()),
        model.encoder.trunk_bp,
        model.bin_bp,
        training,
        inference,
        case.beside,
    )


def kb(length: int) -> str:
    """A length in words: 16 kb are 2^14 bp, 1 Mb 2^20 bp."""
    if length % 2**10:
        return f"{length:,} bp"
    return f"{length / 2**20:g} Mb" if length >= 2**20 else f"{length / 2**10:g} kb"


def _layers(config: EncoderConfig) -> str:
    """The layers in words, such as `6 mamba2, 512 wide`."""
    mixers = ", ".join(f"{count} {name}" for name, count in Counter(config.pattern).items())
    mlp = f", MLPs of {int(config.mlp_ratio * config.width)}" if config.mlp_ratio else ""
    return f"{mixers}, {config.width} wide{mlp}" + (f", {config.experts} experts" if config.experts else "")
