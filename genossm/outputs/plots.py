"""Plots of an evaluation, a training run and a locus, as matplotlib figures that need no display.

Figures are built without pyplot, so that nothing global changes in a program that plots for itself.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from genossm.atomic import atomic_path
from genossm.metrics import Calibration, PrecisionRecall

COLORS = ("#2563a8", "#c8641e", "#2a8c7d", "#8a4fa3", "#b8324f", "#7a7f2b", "#4b5563", "#3aa0c8")
_INK, _SOFT, _GRID, _OBSERVED, _PEAK = "#1f2933", "#616e7c", "#e4e7eb", "#9aa5b1", "#c3cbd4"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _OBSERVED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


@dataclass(frozen=True, slots=True)
class LocusTrack:
    """One track of a locus view: `observed` and `predicted` are (bins,) over the same bins, NaN = a gap."""

    name: str
    kind: str
    observed: npt.NDArray[Any]
    predicted: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class LocusMark:
    """A named element of a locus, drawn as a tick at `position_bp` in the row of its `label`."""

    position_bp: int
    label: str
    color: str = _INK


def precision_recall_plot(
    curves: Mapping[str, PrecisionRecall], positive_rates: Mapping[str, float]
) -> Figure:
    """Precision against recall of each peaks track; dotted, in the same colour, its positive rate."""
    with _styled():
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        axes: Axes = figure.subplots()
        for (name, curve), color in zip(curves.items(), _palette(len(curves)), strict=True):
            axes.plot(curve.recall, curve.precision, color=color, linewidth=2, label=name)
            axes.axhline(positive_rates[name], color=color, linestyle=":", linewidth=1.2)
        axes.set(
            xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title="Precision and recall"
        )
        axes.plot([], [], color=_SOFT, linestyle=":", linewidth=1.2, label="positive rate (chance)")
        axes.legend(loc="best")
        return figure


def calibration_plot(groups: Mapping[str, Calibration]) -> Figure:
    """Observed against predicted rate of each peaks track; a dot's area follows the logarithm of its bins."""
    with _styled():
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        axes: Axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=_OBSERVED, linewidth=1.2, linestyle="--", label="perfect")
        for (name, group), color in zip(groups.items(), _palette(len(groups)), strict=True):
            axes.plot(group.predicted, group.observed, color=color, linewidth=1.2, alpha=0.6)
            area = 8 + 12 * np.log10(np.maximum(group.count, 1))
            label = f"{name} (error {group.error:.3f})"
            axes.scatter(group.predicted, group.observed, s=area, color=color, label=label, zorder=3)
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1.02),
            xlabel="predicted probability",
            ylabel="share of bins in a peak",
            title="Calibration",
        )
        axes.legend(loc="upper left")
        return figure


def training_plot(
    loss: tuple[Sequence[float], Sequence[float]], validation: tuple[Sequence[float], Sequence[float]]
) -> Figure:
    """Training loss and validation AUPRC, each as (steps, values); the best validation value is marked."""
    with _styled():
        figure = Figure(figsize=(9.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(*loss, color=COLORS[0], linewidth=1.6)
        left.set(xlabel="step", ylabel="loss", title="Training loss")
        right.plot(*validation, color=COLORS[2], linewidth=1.6, marker="o", markersize=3.5)
        values = np.asarray(validation[1], dtype=np.float64)
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            right.plot(
                validation[0][best],
                values[best],
                "o",
                color=COLORS[1],
                label=f"best {values[best]:.3f} (kept)",
            )
            right.legend(loc="lower right")
            right.set_ylim(0, max(1.12 * float(np.nanmax(values)), 1e-3))
        right.set(xlabel="step", ylabel="AUPRC", title="Validation AUPRC")
        return figure


def locus_plot(
    chrom: str, start_bp: int, bin_bp: int, tracks: Sequence[LocusTrack], marks: Sequence[LocusMark] = ()
) -> Figure:
    """Observed (grey) and predicted (coloured) values over one locus, and named elements below.

    Args:
        chrom: chromosome name, for the axis.
        start_bp: first base of the first bin (0-based).
        bin_bp: base pairs of a bin.
        tracks: one panel each; peaks are drawn from 0 to 1, signal from 0 up, observed mirrored below the
            axis.
        marks: elements, one row for each distinct label, in order of first appearance.
    """
    rows = list(dict.fromkeys(mark.label for mark in marks))
    heights = [1.0] * len(tracks) + ([0.16 + 0.16 * len(rows)] if rows else [])
    with _styled():
        figure = Figure(figsize=(11, 0.8 + 1.45 * sum(heights)), layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, track, color in zip(panels, tracks, _palette(len(tracks)), strict=False):
            _draw_track(axes, track, start_bp, bin_bp, color)
        if rows:
            axes = panels[-1]
            for row, label in enumerate(rows):
                own = [mark for mark in marks if mark.label == label]
                x = [mark.position_bp / 1000 for mark in own]
                axes.scatter(
                    x, [-row] * len(x), marker="|", s=70, linewidths=1.8, color=[m.color for m in own]
                )
            axes.set_yticks([-row for row in range(len(rows))], rows)
            axes.set_ylim(-len(rows) + 0.4, 0.6)
            axes.tick_params(axis="y", length=0, labelsize=8)
        panels[-1].set_xlabel(f"{chrom} (kb)")
        bins = max((len(track.predicted) for track in tracks), default=0)
        panels[-1].set_xlim(start_bp / 1000, (start_bp + bins * bin_bp) / 1000)
        return figure


def group_plot(
    groups: Mapping[str, npt.NDArray[Any]], colors: Mapping[str, str], title: str, label: str
) -> Figure:
    """A row of dots and a median for each named group of probabilities, such as sites by planted rule."""
    with _styled():
        figure = Figure(figsize=(9.2, 0.9 + 0.52 * len(groups)), layout="constrained")
        axes: Axes = figure.subplots()
        spread = np.random.default_rng(0)
        for row, (name, values) in enumerate(groups.items()):
            shown = values if len(values) <= 400 else spread.choice(values, 400, replace=False)
            height = -row + spread.uniform(-0.28, 0.28, len(shown))
            axes.scatter(shown, height, s=9, color=colors[name], alpha=0.35, linewidths=0)
            if len(values):
                median = float(np.median(values))
                axes.plot([median, median], [-row - 0.36, -row + 0.36], color=_INK, linewidth=2)
        axes.set_yticks([-row for row in range(len(groups))], [f"{n} ({len(v)})" for n, v in groups.items()])
        axes.set(xlim=(-0.01, 1.01), ylim=(-len(groups) + 0.4, 0.6), xlabel=label, title=title)
        axes.grid(axis="y", visible=False)
        return figure


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    with _styled():
        figure.savefig(buffer, format="png", metadata={"Software": "genossm"})
    return buffer.getvalue()


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as PNG, complete or not at all."""
    png = figure_png(figure)
    with atomic_path(path) as temporary:
        temporary.write_bytes(png)


def _draw_track(axes: Axes, track: LocusTrack, start_bp: int, bin_bp: int, color: str) -> None:
    edges = (start_bp + bin_bp * np.arange(len(track.predicted) + 1)) / 1000
    predicted = np.asarray(track.predicted, dtype=np.float64)
    observed = np.asarray(track.observed, dtype=np.float64)
    if track.kind == "peaks":
        axes.stairs(observed, edges, fill=True, color=_PEAK, label="observed peak")
        axes.stairs(predicted, edges, color=color, linewidth=1.3, label="predicted probability")
        axes.set(ylim=(0, 1.05), yticks=[0, 0.5, 1])
    else:
        axes.stairs(predicted, edges, fill=True, color=color, alpha=0.85, label="predicted")
        axes.stairs(-observed, edges, fill=True, color=_OBSERVED, label="observed (mirrored)")
        axes.axhline(0, color=_SOFT, linewidth=0.8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_title(track.name)
    axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1.0, 1.22), borderaxespad=0.0)
    axes.grid(axis="x", visible=False)


def _palette(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(_STYLE):
        yield
