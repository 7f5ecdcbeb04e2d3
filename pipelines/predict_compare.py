"""How far the mode `windows` is from `chromosome`: by the distance of a bin from the edge of its window."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.atomic import atomic_write_text
from genossm.genome import Genome
from genossm.interval import bin_count
from genossm.models.accessibility import AccessibilityModel
from genossm.pipelines.device import describe
from genossm.pipelines.plan import Plan
from genossm.pipelines.predict_job import make_job
from genossm.progress import progress, say
from genossm.windows import Window, target_of

GROUPS = 8
NO_EDGE, CHROMOSOME_END = np.iinfo(np.int64).max - 1, np.iinfo(np.int64).max
PLACES = {GROUPS: "no edge", GROUPS + 1: "chromosome end"}
REPORT_FILE = "compare.json"

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """Differences of the two modes over the bins of a track in some place.

    `place`: "window edge" (bins from `from_bp` up to `to_bp` from it), "no edge" (the window holds the whole
    chromosome), "chromosome end" (no further from it than a margin: `windows` sees "no base" beyond it, and `chromosome`
    nothing), or "all".
    """

    track: str
    place: str
    from_bp: int | None
    to_bp: int | None
    bins: int
    mean: float
    rms: float
    largest: float


@dataclass(frozen=True, slots=True)
class ModeComparison:
    """The differences |windows - chromosome| of probabilities or expected values, by track and distance.

    Where windows overlap, a bin's distance is that in the window that holds it better.
    """

    rows: tuple[DifferenceRow, ...]
    chroms: tuple[str, ...]
    window_bp: int
    margin_bp: int
    precision: str
    device: str
    overlap_bp: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def text(self) -> str:
        """A table for people."""
        overlap = f", {self.overlap_bp:,} bp of overlap" if self.overlap_bp else ""
        lines = [
            f"|windows - chromosome| on {', '.join(self.chroms[:8])}{' ...' if len(self.chroms) > 8 else ''}: windows of "
            f"{self.window_bp:,} bp with margins of {self.margin_bp:,} bp{overlap}, {self.precision}",
            f"{'track':20} {'bp from the edge':>20} {'bins':>12} {'mean':>10} {'rms':>10} {'largest':>10}",
        ]
        for row in self.rows:
            distance = row.place if row.from_bp is None else f"{row.from_bp:,}-{row.to_bp:,}"
            lines.append(
                f"{row.track:20} {distance:>20} {row.bins:>12,} {row.mean:>10.3g} {row.rms:>10.3g} {row.largest:>10.3g}"
            )
        return "\n".join(lines)


def compare_modes(
    model: AccessibilityModel | StrPath | Sequence[AccessibilityModel | StrPath],
    genome: Genome | StrPath,
    out: StrPath,
    *,
    chroms: str | Sequence[str] | None = None,
    overlap_bp: int = 0,
    chunk_bp: int | None = None,
    spill: StrPath | None = None,
    batch_size: int = 4,
    precision: str = "auto",
    device: str = "auto",
) -> ModeComparison:
    """Predict chromosomes in both modes and tell the differences, in `out`/compare.json too.

    Distances are from a bin to the nearest edge of its input window, margins included; an edge outside the chromosome
    hides nothing. Memory is that of one chromosome's values.

    Raises:
        ConfigError: a mixer of the model cannot run in the mode chromosome.
        Others as of `predict`.
    """
    common: dict[str, Any] = {
        "chroms": chroms,
        "batch_size": batch_size,
        "precision": precision,
        "device": device,
    }
    by_windows = make_job(model, genome, out, overlap_bp=overlap_bp, **common)
    whole = make_job(
        by_windows.networks, genome, out, mode="chromosome", chunk_bp=chunk_bp, spill=spill, **common
    )
    say(f"compare on {describe(by_windows.device)}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    plan = by_windows.plan
    tables = [_Table(plan.window_bp, plan.margin_bp) for _ in plan.tracks]
    total = 2 * sum(plan.lengths[chrom] for chrom in plan.bins)
    with by_windows.placed(), progress(total=total, unit="bp", description="compare", scale=True) as bar:
        for chrom, group in groupby(plan.selection.windows, key=attrgetter("chrom")):
            windows = list(group)
            difference = np.concatenate(list(by_windows.values([windows], folder, bar.update)))
            (values,) = whole.values([[Window(chrom, 0, plan.lengths[chrom])]], folder, bar.update)
            difference -= values
            distance = _distances(windows, plan)
            there = ~np.isnan(difference[:, 0])
            for index, table in enumerate(tables):
                table.add(np.abs(difference[there, index], dtype=np.float64), distance[there])
    report = ModeComparison(
        rows=tuple(
            row for track, table in zip(plan.tracks, tables, strict=True) for row in table.rows(track.name)
        ),
        chroms=tuple(plan.bins),
        window_bp=plan.window_bp,
        margin_bp=plan.margin_bp,
        precision=by_windows.precision,
        device=describe(by_windows.device),
        overlap_bp=plan.overlap_bp,
    )
    atomic_write_text(folder / REPORT_FILE, json.dumps(report.to_mapping(), indent=2) + "\n")
    return report


class _Table:
    """Counts and sums of differences in groups of equal steps from the margin to the middle of a window."""

    def __init__(self, window_bp: int, margin_bp: int) -> None:
        self._edges = np.linspace(margin_bp, window_bp // 2, GROUPS + 1).astype(np.int64)
        self._edges[-1] = window_bp - margin_bp  # of the first and the last window the far side counts, too
        self._size = GROUPS + len(PLACES)
        self._count = np.zeros(self._size, dtype=np.int64)
        self._sum, self._squares, self._largest = (np.zeros(self._size) for _ in range(3))

    def add(self, difference: npt.NDArray[np.float64], distance: npt.NDArray[np.int64]) -> None:
        """Take the differences of a chromosome in."""
        group = np.searchsorted(self._edges, distance, side="right") - 1
        group[distance == NO_EDGE], group[distance == CHROMOSOME_END] = PLACES
        self._count += np.bincount(group, minlength=self._size)
        self._sum += np.bincount(group, difference, self._size)
        self._squares += np.bincount(group, difference**2, self._size)
        np.maximum.at(self._largest, group, difference)

    def rows(self, track: str) -> list[DifferenceRow]:
        """Rows of the groups that have a bin, from the edge inwards, and one of all."""
        found = []
        for group in np.flatnonzero(self._count).tolist():
            low, high = self._edges[group : group + 2].tolist() if group < GROUPS else (None, None)
            place = PLACES.get(group, "window edge")
            found.append(self._row(track, place, low, high, slice(group, group + 1)))
        return [*found, *([self._row(track, "all", None, None, slice(None))] if found else [])]

    def _row(self, track: str, place: str, low: int | None, high: int | None, which: slice) -> DifferenceRow:
        count = int(self._count[which].sum())
        return DifferenceRow(
            track,
            place,
            low,
            high,
            count,
            float(self._sum[which].sum() / count),
            float(np.sqrt(self._squares[which].sum() / count)),
            float(self._largest[which].max()),
        )


def _distances(windows: Sequence[Window], plan: Plan) -> npt.NDArray[np.int64]:
    """int64 (bins,) of a chromosome, from its windows: bp from a bin to the nearest edge of its window that lies inside
    the chromosome, NO_EDGE where none does, CHROMOSOME_END up to a margin from its own ends."""
    length_bp, bin_bp = plan.lengths[windows[0].chrom], plan.bin_bp
    distance = np.zeros(bin_count(length_bp, bin_bp), dtype=np.int64)
    for window in windows:
        start, end = target_of(window, plan.margin_bp, length_bp)
        starts = np.arange(start, end, bin_bp, dtype=np.int64)
        found = np.full(len(starts), NO_EDGE, dtype=np.int64)
        if window.start > 0:
            found = starts - window.start
        if window.end < length_bp:
            found = np.minimum(found, window.end - starts - bin_bp)
        held = distance[start // bin_bp :][: len(found)]
        np.maximum(held, found, out=held)
    near = plan.margin_bp // bin_bp
    distance[:near] = distance[max(0, len(distance) - near) :] = CHROMOSOME_END
    return distance
