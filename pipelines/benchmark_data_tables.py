"""The data benchmark as Markdown."""

from __future__ import annotations

from genossm.pipelines.benchmark_data import DataBenchmark, Rate
from genossm.pipelines.benchmark_tables import Fact, Rows, Table, as_markdown


def markdown(result: DataBenchmark) -> str:
    """Facts and tables."""
    settings = result.settings
    facts: list[Fact] = [
        ("device", f"{result.device}; {result.machine}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        (
            "method",
            f"medians of {settings['repeats']} whole passes, batches of {settings['batch_size']}, files in the page cache, "
            "one thread for torch; MB/s: of codes (a byte a base) and targets as float32; others' first windows are equal "
            f"to ours; {result.seconds:.0f} s in all. Other work on the machine shows in all figures",
        ),
    ]
    if result.peak_memory_mb is not None:
        facts.append(
            ("peak memory", f"{result.peak_memory_mb:,.0f} MB, of this process, without its workers")
        )
    facts += [("absent", f"{name}: {why}") for name, why in result.absent.items()]
    tables: list[Table] = []
    for case in dict.fromkeys(row.case for row in result.rows):
        table: Rows = [["by", "workers", "windows/s", "MB/s", "first batch after s"]]
        table += [_row(row) for row in result.rows if row.case == case]
        tables.append((case[0].upper() + case[1:], table, ""))
    if result.ratios:
        ratios: Rows = [["genossm in one process over", "ratio", "at least"]]
        ratios += [[name, f"{value:.2f}", f"{wanted:g}"] for name, (value, wanted) in result.ratios.items()]
        tables.append(("Ratios", ratios, "memcpy: of codes alone; the others: with one track at 1 bp."))
    return as_markdown(facts, tables)


def _row(row: Rate) -> list[str]:
    if row.windows_per_s is None or row.mb_per_s is None:
        return [row.by, str(row.workers), row.problem or "-", "", ""]
    first = "" if row.first_batch_s is None else f"{row.first_batch_s:.2f}"
    return [row.by, str(row.workers), f"{row.windows_per_s:,.0f}", f"{row.mb_per_s:,.0f}", first]
