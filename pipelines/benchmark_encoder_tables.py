"""The benchmark of encoders as tables: aligned for a terminal, or Markdown for the documentation."""

from __future__ import annotations

from genossm.pipelines.benchmark_encoder_cases import Cost, EncoderBenchmark, EncoderRow, Group, kb
from genossm.pipelines.benchmark_tables import Fact, Rows, Table, as_markdown, as_text, machine_facts

TITLES: dict[Group, str] = {
    "configuration": "Configurations",
    "mixer": "One mixer in all layers, sized like {like}",
    "rival": "Rivals, sized like {like}",
}


def text(result: EncoderBenchmark) -> str:
    """For a terminal."""
    return as_text(_facts(result), _tables(result))


def markdown(result: EncoderBenchmark) -> str:
    """For docs/encoders.md."""
    return as_markdown(_facts(result), _tables(result))


def _facts(result: EncoderBenchmark) -> list[Fact]:
    precision = "bfloat16 autocast" if result.precision == "bf16" else "float32"
    facts = [
        *machine_facts(result.device, result.hardware, result.versions),
        ("shapes", f"windows of {result.length:,} random bp, one track of peaks, {precision}"),
        (
            "method",
            "medians of a training step (forward, loss, backward, AdamW, running average) and of `predict`; every base of a "
            "window counted once, whether one strand is computed or both; GiB: the most that PyTorch had allocated, or "
            f"holds for CUDA graphs, model included; {result.seconds:.0f} s in all",
        ),
    ]
    if result.quick:
        where = (
            "" if result.hardware else ", on a CPU: it shows that all of it runs, not how fast encoders are"
        )
        facts.append(("quick", f"fewer configurations, lengths and repetitions{where}"))
    return facts + [("absent", f"{name}: {why}") for name, why in result.absent.items()]


def _tables(result: EncoderBenchmark) -> list[Table]:
    tables: list[Table] = []
    if result.checks:
        checks: Rows = [["two forms of the same", "largest difference over the norm"]]
        checks += [[name, f"{error:.1e}"] for name, error in result.checks.items()]
        tables.append(("Equality, outputs and gradients", checks, ""))
    for group, title in TITLES.items():
        rows = [row for row in result.rows if row.group == group]
        if rows:
            tables.append((title.format(like=result.like), *_costs(rows, result)))
    if result.growth:
        tables.append(("Growth with the length, one window, ms", *_growth(result)))
    return tables


def _costs(rows: list[EncoderRow], result: EncoderBenchmark) -> tuple[Rows, str]:
    estimated = any(row.training.estimate_mib is not None for row in rows)
    beside = any(row.beside is not None for row in rows)
    head = ["name", "layers", "bp", "parameters", "batch", "strands"]
    head += ["training ms", "Mbp/s", "GiB", *(["info"] if estimated else []), *(["x"] if beside else [])]
    head += ["inference ms", "Mbp/s", "GiB", *(["x"] if beside else [])]
    table: Rows = [head]
    for row in rows:
        unit = next((other for other in result.rows if other.name == row.beside), None)
        trunk = f"{row.trunk_bp}" if row.trunk_bp == row.bin_bp else f"{row.trunk_bp}, {row.bin_bp}"
        cells = [row.name, row.layers, trunk, f"{row.parameters:,}", f"{row.training.batch}"]
        cells += [f"{row.training.strands}, {row.inference.strands}", *_cost(row.training)]
        cells += [_ratio(row.training.estimate_mib, row.training.peak_mib)] if estimated else []
        cells += [_ratio(row.training.ms, unit.training.ms if unit else None)] if beside else []
        cells += _cost(row.inference)
        cells += [_ratio(row.inference.ms, unit.inference.ms if unit else None)] if beside else []
        table.append(cells)
    notes = ["bp: of a bin of the layers, and of an output bin where it is another;"]
    notes.append("strands: computed in training, in inference")
    if estimated:
        notes.append("; info: the memory that `genossm info` expects, over that measured")
    if beside:
        units = dict.fromkeys(f"{row.name}: over {row.beside}" for row in rows if row.beside)
        notes.append(f"; x: times the time of another row ({'; '.join(units)})")
    return table, f"{notes[0]} {''.join(notes[1:])}."


def _growth(result: EncoderBenchmark) -> tuple[Rows, str]:
    lengths = sorted({cost.length for growth in result.growth for cost in growth.costs})
    table: Rows = [["name", "of", *(kb(length) for length in lengths), "power", "from 128 kb"]]
    missing: dict[str, list[str]] = {}
    names = [row.name for row in result.rows]
    for growth in sorted(result.growth, key=lambda growth: names.index(growth.name)):
        by_length = {cost.length: cost for cost in growth.costs}
        times = [by_length[length].ms if length in by_length else None for length in lengths]
        fits = ["-" if fit is None else f"{fit:.2f}" for fit in (growth.exponent, growth.long_exponent)]
        table.append([growth.name, growth.mode, *map(_ms, times), *fits])
        for cost in growth.costs:
            if cost.problem is not None:
                missing.setdefault(cost.problem, []).append(
                    f"{growth.name}, {growth.mode}, from {kb(cost.length)} on"
                )
    note = "power: time grows as the length to that power, fitted over all lengths, and over those from 128 kb on."
    return table, " ".join([note, *(f"{'; '.join(which)}: {why}." for why, which in missing.items())])


def _cost(cost: Cost) -> list[str]:
    """Time, speed and memory; why there are none stands in their place."""
    if cost.ms is None or cost.mbp_per_s is None:
        return [cost.problem or "-", "", ""]
    return [
        _ms(cost.ms),
        f"{cost.mbp_per_s:,.1f}",
        "-" if cost.peak_mib is None else f"{cost.peak_mib / 1024:.2f}",
    ]


def _ratio(value: float | None, unit: float | None) -> str:
    return "" if value is None or not unit else f"{value / unit:.2f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"
