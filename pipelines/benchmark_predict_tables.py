"""The benchmark of whole chromosomes as tables: aligned for a terminal, or Markdown for the documentation."""

from __future__ import annotations

from genossm.pipelines.benchmark_predict import PredictBenchmark, PredictRow
from genossm.pipelines.benchmark_tables import Fact, Rows, Table, as_markdown, as_text, machine_facts


def text(result: PredictBenchmark) -> str:
    """For a terminal."""
    return as_text(_facts(result), _tables(result))


def markdown(result: PredictBenchmark) -> str:
    """For docs/performance.md."""
    return as_markdown(_facts(result), _tables(result))


def _facts(result: PredictBenchmark) -> list[Fact]:
    precision = "bfloat16 autocast" if result.precision == "bf16" else "float32"
    facts = [
        *machine_facts(result.device, result.hardware, result.versions),
        (
            "shapes",
            f"{result.config} with random weights, one track, {precision}, batches of {result.batch_size} windows; random "
            "chromosomes with 7 % N",
        ),
        (
            "method",
            "one run each in a process of its own, after a short one that compiles: from the call until the bigWig is "
            "there; memory: the most that PyTorch reserved on the device, and resident on the host. Model's share: of these "
            "seconds, what the model alone takes: in windows mode its fastest batch times the batches with bases, in "
            "chromosome mode one `stream` of random codes of the whole length, with all features on the device",
        ),
        (
            "chromosome mode",
            "between layers the features of the whole chromosome wait on the device, up to a quarter of what is free there, so "
            "its device memory grows with the length up to that; with --spill it does not",
        ),
    ]
    if result.growth:
        lines = (
            f"{by} {growth.start_s:.2f} + {growth.s_per_mb:.4f} per Mb (R2 {growth.r2:.4f}; length ** {growth.power:.2f})"
            for by, growth in result.growth.items()
        )
        facts.append(("growth", f"seconds: {'; '.join(lines)}"))
    if result.difference is not None:
        facts.append(("equality", f"largest difference between loop and windows: {result.difference:.1e}"))
    if result.quick:
        facts.append(("quick", "short chromosomes: it shows that all of it runs, not how fast"))
    return facts


def _tables(result: PredictBenchmark) -> list[Table]:
    rows: Rows = [
        ["length, bp", "by", "s", "Mbp/s", "ratio", "model's share", "device MiB", "host MiB", "start, s"]
    ]
    windows = {row.length_bp: row.seconds for row in result.rows if row.by == "genossm windows"}
    for row in sorted(result.rows, key=lambda row: row.length_bp):
        rows.append(_row(row, windows.get(row.length_bp)))
    return [("Whole chromosomes to bigWig", rows, "ratio: seconds over those of windows mode at this length")]


def _row(row: PredictRow, unit: float | None) -> list[str]:
    if row.seconds is None:
        return [f"{row.length_bp:,}", row.by, row.problem or "", *[""] * 6]
    return [
        f"{row.length_bp:,}",
        row.by,
        f"{row.seconds:.1f}",
        f"{row.mbp_per_s:.3g}",
        "" if not unit else f"{row.seconds / unit:.2f}x",
        "" if row.model_share is None else f"{row.model_share:.0%}",
        "" if row.device_mib is None else f"{row.device_mib:,.0f}",
        "" if row.host_mib is None else f"{row.host_mib:,.0f}",
        "" if row.start_s is None else f"{row.start_s:.0f}",
    ]
