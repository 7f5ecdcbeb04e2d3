"""The tables of a comparison: every run, a row per configuration, and the same for people."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from genossm.atomic import atomic_path, atomic_write_text
from genossm.pipelines.compare_trial import Candidate, Row

FIGURES = ("steps", "seconds", "loss_first", "loss_last")
RUN_COLUMNS = ("configuration", "seed", "run", "state", "error", *FIGURES, "non_finite", "valid_best")


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What a comparison found.

    Attributes:
        folder: where it was written.
        table: one row per configuration: `configuration`, `mixers`, `parameters`, `runs`, `done`, `failed`; `steps`,
            `seconds`, `loss_first` and `loss_last` (of the first and last epoch), means over runs; `non_finite`, whether
            a loss, gradient or prediction was ever NaN or infinite; `valid_best`, `<split>/<track>/<metric>` and, of
            sites, `<split>/<track>/<rule>/<metric>`, means over the finished runs, each with its sample standard
            deviation `_sd`; `ensemble/<split>/...`, of the seeds' averaged predictions; `errors`.
        runs: one row per run, with the same figures.
        failures: a sentence for each run or ensemble that failed.
    """

    folder: Path
    table: pd.DataFrame
    runs: pd.DataFrame
    failures: tuple[str, ...]

    def cells(self) -> pd.DataFrame:
        """The table for people, a text per cell: `mean ± standard deviation` over seeds, seeds averaged in an own row."""
        columns = [str(name) for name in self.table.columns]
        shown = [name for name in columns if name.startswith("test/") and name.endswith(("/auprc", "/auroc"))]
        shown = shown or [name for name in columns if name.startswith("test/") and name.endswith("/pearson")]
        shown = [
            name for name in shown if name.count("/") == 2 or name.endswith("/auprc")
        ]  # of sites one figure
        score = "Pearson" if shown and shown[0].endswith("/pearson") else "AUPRC"
        rows = []
        for row in self.table.to_dict(orient="records"):
            rows.append(
                {
                    "configuration": row["configuration"],
                    "layers": row["mixers"],
                    "parameters": f"{row['parameters']:,}",
                    "runs": f"{row['done']}/{row['runs']}",
                    "steps": _number(row["steps"], ",.0f"),
                    "seconds": _number(row["seconds"], ",.0f"),
                    "first loss": _number(row["loss_first"], ".4g"),
                    "last loss": _number(row["loss_last"], ".4g"),
                    "NaN": "yes" if row["non_finite"] else "no",
                    f"best valid {score}": _spread(row, "valid_best"),
                    **{_heading(name): _spread(row, name) for name in shown},
                    "failed": textwrap.shorten(row["errors"], 60, placeholder=" ..."),
                }
            )
            averaged = {_heading(name): row.get(f"ensemble/{name}", math.nan) for name in shown}
            if any(math.isfinite(value) for value in averaged.values()):
                figures = {name: _number(value, ".4f") for name, value in averaged.items()}
                rows.append({"configuration": f"{row['configuration']}, seeds averaged", **figures})
        cells = pd.DataFrame(rows).fillna("")
        return cells if cells["failed"].any() else cells.drop(columns="failed")

    def notes(self) -> list[str]:
        """What the table's figures are to be held against, and every failure in full."""
        rates = []
        for name in self.table.columns:
            part, _, metric = str(name).rpartition("/")
            if part.startswith("test/") and metric == "auprc":
                rate = self.table[f"{part}/positive_rate"].max()
                rates.append(f"{_heading(name).removeprefix('AUPRC ')} {_number(rate, '.4f')}")
        chance = [f"AUPRC of a random ranking (the positive rate): {'; '.join(rates)}"] if rates else []
        return [*chance, *self.failures]

    def text(self) -> str:
        """`cells` and `notes` for a terminal."""
        return "\n".join([str(self.cells().to_string(index=False)), *self.notes()])

    def to_mapping(self) -> dict[str, Any]:
        """All figures, ready for JSON: `configurations`, `runs`, `failures`."""
        return {
            "configurations": _records(self.table),
            "runs": _records(self.runs),
            "failures": list(self.failures),
        }


def summarise(
    folder: Path,
    candidates: Sequence[Candidate],
    runs: Sequence[Row],
    ensembles: Mapping[str, Mapping[str, float]],
    failures: Sequence[str],
) -> Comparison:
    """Average the runs of each configuration over its seeds; `ensembles` are figures by configuration."""
    every = pd.DataFrame(runs)
    every = every[[*RUN_COLUMNS, *(name for name in every.columns if name not in RUN_COLUMNS)]]
    measured = ["valid_best", *every.columns[len(RUN_COLUMNS) :]]
    rows: list[Row] = []
    for candidate in candidates:
        own = every[every["configuration"] == candidate.name]
        done = own[own["state"] == "done"]
        failed = own[own["state"] == "failed"]
        row: Row = {
            "configuration": candidate.name,
            "mixers": candidate.mixers,
            "parameters": candidate.parameters,
            "runs": len(own),
            "done": len(done),
            "failed": len(failed),
            "non_finite": bool(own["non_finite"].any()),
        }
        row |= {name: (done if len(done) else own)[name].mean() for name in FIGURES}
        for name in measured:
            row[name] = done[name].mean()
            if not name.endswith("/positive_rate"):  # the same in all
                row[f"{name}_sd"] = done[name].std()
        row |= {f"ensemble/{name}": value for name, value in ensembles.get(candidate.name, {}).items()}
        row["errors"] = "; ".join(
            f"seed {seed}: {error}" for seed, error in zip(failed["seed"], failed["error"], strict=True)
        )
        rows.append(row)
    table = pd.DataFrame(rows)
    table = table[[*(name for name in table.columns if name != "errors"), "errors"]]
    return Comparison(folder, table, every, tuple(failures))


def write_comparison(comparison: Comparison, record: Mapping[str, Any]) -> None:
    """Write compare.tsv, compare.json (after what `record` says of how) and compare.md to the comparison's folder."""
    folder = comparison.folder
    with atomic_path(folder / "compare.tsv") as temporary:
        comparison.table.to_csv(temporary, sep="\t", index=False, float_format="%.6g", na_rep="NA")
    content = {**record, **comparison.to_mapping()}
    atomic_write_text(folder / "compare.json", json.dumps(content, indent=2) + "\n")
    lines = [*_markdown(comparison.cells()), "", *(f"- {note}" for note in comparison.notes())]
    atomic_write_text(folder / "compare.md", "\n".join(lines) + "\n")


def _markdown(cells: pd.DataFrame) -> list[str]:
    rows = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


def _records(table: pd.DataFrame) -> list[Row]:
    rows: list[Row] = json.loads(table.to_json(orient="records", double_precision=10))
    return rows


def _heading(name: str) -> str:
    """`test/atac_peaks/auprc` as `AUPRC atac_peaks`, `test/peaks/long_range/auprc` as `AUPRC peaks, long_range sites`."""
    _, track, *rule, metric = name.split("/")
    metric = "Pearson" if metric == "pearson" else metric.upper()
    return f"{metric} {track}{f', {rule[0]} sites' if rule else ''}"


def _spread(row: Mapping[Any, Any], name: str) -> str:
    spread = row.get(f"{name}_sd", math.nan)
    return _number(row[name], ".4f") + (f" ± {spread:.4f}" if math.isfinite(spread) else "")


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
