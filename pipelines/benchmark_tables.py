"""The GPU benchmark as tables: aligned for a terminal, or Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from genossm.pipelines.benchmark_beside import QUOTED_FROM
from genossm.pipelines.benchmark_gpu import US, GpuBenchmark
from genossm.pipelines.benchmark_timing import Measured, Pass

Rows = list[list[str]]
Fact = tuple[str, str]
Table = tuple[str, Rows, str]
"""Title, rows with their head, and a note."""


def text(result: GpuBenchmark) -> str:
    """For a terminal."""
    return as_text(_facts(result), _tables(result))


def markdown(result: GpuBenchmark) -> str:
    """For docs/performance.md."""
    return as_markdown(_facts(result), _tables(result))


def as_text(facts: Iterable[Fact], tables: Iterable[Table]) -> str:
    """Facts, then tables under their titles, aligned."""
    parts = ["\n".join(f"{name:<10}{value}" for name, value in facts)]
    parts += [f"{title}\n{_aligned(rows)}" + (f"\n{note}" if note else "") for title, rows, note in tables]
    return "\n\n".join(parts)


def as_markdown(facts: Iterable[Fact], tables: Iterable[Table]) -> str:
    """The same in Markdown."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in facts)]
    for title, rows, note in tables:
        head, *body = rows
        lines = [_piped(head), _piped(["---"] * len(head)), *(_piped(row) for row in body)]
        parts += [f"### {title}", "\n".join(lines)] + ([note] if note else [])
    return "\n\n".join(parts) + "\n"


def machine_facts(device: str, hardware: Mapping[str, str], versions: Mapping[str, str]) -> list[Fact]:
    """What a benchmark ran on and with."""
    return [
        ("device", device + "".join(f", {name} {value}" for name, value in hardware.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _facts(result: GpuBenchmark) -> list[tuple[str, str]]:
    shapes = result.shapes
    facts = [
        *machine_facts(result.device, result.hardware, result.versions),
        (
            "shapes",
            f"{result.dtype}, batch {shapes.batch}; ssd: {shapes.heads} heads of {shapes.head_dim}, 1 group, state as "
            f"named; selective_scan: {shapes.channels} channels, state {shapes.state}; short_conv: {shapes.channels} "
            f"channels, width {shapes.width}, SiLU",
        ),
    ]
    ceilings = result.ceilings
    if ceilings is not None:
        powers = (
            ""
            if ceilings.exponentials_g_per_s is None
            else f", exponentials {ceilings.exponentials_g_per_s / 1000:.2f} T/s"
        )
        facts.append(
            (
                "ceilings",
                f"copy {ceilings.copy_gb_per_s / 1000:.2f} TB/s (read and written), bf16 matrix product "
                f"{ceilings.matmul_tflop_per_s:.0f} TFLOP/s{powers}",
            )
        )
    facts.append(
        (
            "method",
            "medians by CUDA events, the L2 cache overwritten before each; [ ] the same as a CUDA graph; peak memory "
            f"beyond inputs; {result.seconds:.0f} s in all",
        )
    )
    facts += [("absent", f"{name}: {why}") for name, why in result.absent.items()]
    return facts


def _tables(result: GpuBenchmark) -> list[tuple[str, Rows, str]]:
    """Title, rows with their head, and a note."""
    checks: Rows = [["case", "dtype", "positions", "outputs", "gradients"]]
    checks += [
        [c.case, c.dtype, f"{c.length:,}", f"{c.output_error:.1e}", f"{c.gradient_error:.1e}"]
        for c in result.checks
    ]
    tables = [("Largest error against float64, over the norm", checks, "")]
    times, quoted = _times(result)
    note = "x: the time of that line over ours (as CUDA graphs in brackets); %: our peak memory over its."
    if quoted:
        note += f" (q): not measured here but quoted from {QUOTED_FROM}; its ratios compare two cards."
    tables.append(("Times and memory", times, note))
    host = _host(result)
    if len(host) > 1:
        tables.append(("The host's time to launch one call, ms", host, ""))
    if result.growth:
        tables.append(("Growth with the length, both directions", *_growth(result)))
    return tables


def _times(result: GpuBenchmark) -> tuple[Rows, bool]:
    table: Rows = [
        [
            "case",
            "positions",
            "by",
            "forward ms",
            "with gradient ms",
            "peak GiB",
            "forward x",
            "with gradient x",
            "memory %",
        ]
    ]
    ours = {(row.case, row.length): row for row in result.rows if row.by == US}
    floors = {(floor.case, floor.length): floor for floor in result.floors}
    for key, own in ours.items():
        table.append([*_label(key), US, *_figures(own), "", "", ""])
        for row in result.rows:
            if (row.case, row.length) == key and row.by != US:
                name = f"{row.by} (q)" if row.quoted else row.by
                table.append([*_label(key), name, *_figures(row), *_ratios(own, row)])
        least = floors.get(key)
        if least is not None:
            table.append(
                [
                    *_label(key),
                    f"floor ({'; '.join(dict.fromkeys((least.forward_limit, least.forward_backward_limit)))})",
                    _ms(least.forward_ms),
                    _ms(least.forward_backward_ms),
                    "",
                    _times_faster(own.forward, least.forward_ms),
                    _times_faster(own.forward_backward, least.forward_backward_ms),
                    "",
                ]
            )
    return table, any(row.quoted for row in result.rows)


def _host(result: GpuBenchmark) -> Rows:
    table: Rows = [["case", "positions", "by", "forward", "with gradient"]]
    for row in result.rows:
        parts = (row.forward, row.forward_backward)
        if any(part is not None and part.host_ms is not None for part in parts):
            cells = ["" if part is None or part.host_ms is None else _ms(part.host_ms) for part in parts]
            table.append([row.case, f"{row.length:,}", row.by, *cells])
    return table


def _growth(result: GpuBenchmark) -> tuple[Rows, str]:
    table: Rows = [["case", "positions", "forward ms", "with gradient ms", "peak GiB"]]
    notes = []
    for growth in result.growth:
        table += [[*_label((growth.case, row.length)), *_figures(row)] for row in growth.rows]
        fits = (
            growth.forward,
            growth.forward_backward,
            growth.long_forward,
            growth.long_forward_backward,
        )
        words = ["-" if fit is None else f"{fit:.2f}" for fit in fits]
        notes.append(
            f"{growth.case}: time grows as length to the power {words[0]} forward and {words[1]} with the gradient; from "
            f"131,072 positions on {words[2]} and {words[3]}."
        )
    return table, " ".join(notes)


def _label(key: tuple[str, int]) -> list[str]:
    return [key[0], f"{key[1]:,}"]


def _figures(row: Measured) -> list[str]:
    """Forward, with the gradient, peak; where a pass is missing, why stands in its place."""
    missing = row.problem or "-"
    forward = missing if row.forward is None else _pass(row.forward)
    if row.forward_backward is not None:
        both = _pass(row.forward_backward)
    else:
        both = missing if row.forward is not None else "-"
    largest = row.forward_backward or row.forward
    peak = "" if largest is None or largest.peak_mib is None else f"{largest.peak_mib / 1024:.2f}"
    return [forward, both, peak]


def _pass(part: Pass) -> str:
    graph = (
        "failed" if part.graph_problem is not None else "" if part.graph_ms is None else _ms(part.graph_ms)
    )
    return _ms(part.ms) + (f" [{graph}]" if graph else "")


def _ratios(own: Measured, peer: Measured) -> list[str]:
    cells = []
    for us, them in ((own.forward, peer.forward), (own.forward_backward, peer.forward_backward)):
        if us is None or them is None:
            cells.append("")
            continue
        graph = f" [{them.graph_ms / us.graph_ms:.1f}x]" if us.graph_ms and them.graph_ms is not None else ""
        cells.append(f"{them.ms / us.ms:.1f}x{graph}")
    a, b = (
        part.peak_mib if part is not None else None for part in (own.forward_backward, peer.forward_backward)
    )
    return [*cells, f"{100 * a / b:.0f} %" if a and b else ""]


def _times_faster(own: Pass | None, least_ms: float) -> str:
    return "" if own is None or not own.ms else f"{least_ms / own.ms:.2f}x"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 or rows[0][column] == "by" else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
