"""genossm.outputs.plots: figures hold the values they are given and need no display or global settings."""

from __future__ import annotations

import struct
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from genossm import metrics
from genossm.outputs import plots


def png_size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.fixture(scope="module")
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = rng.random(3000) < 0.2
    return labels, np.clip(0.5 * rng.random(3000) + 0.4 * labels, 0, 1)


def test_precision_recall_plot_draws_the_curve_and_its_chance_line(
    scored: tuple[np.ndarray, np.ndarray],
) -> None:
    curve = metrics.precision_recall(*scored)
    figure = plots.precision_recall_plot({"peaks": curve}, {"peaks": 0.2})
    lines = figure.axes[0].get_lines()
    assert np.array_equal(lines[0].get_xdata(), curve.recall) and np.array_equal(
        lines[0].get_ydata(), curve.precision
    )
    assert set(lines[1].get_ydata()) == {0.2}
    assert png_size(plots.figure_png(figure)) == (832, 704)


def test_calibration_plot_names_the_error(scored: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    group = metrics.calibration(*scored)
    figure = plots.calibration_plot({"peaks": group, "more": group})
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert f"peaks (error {group.error:.3f})" in labels and len(labels) == 3
    plots.save_png(figure, tmp_path / "calibration.png")
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.png"]
    assert png_size((tmp_path / "calibration.png").read_bytes())[0] > 500


def test_training_plot_marks_the_best_validation() -> None:
    figure = plots.training_plot(([1, 2, 3], [0.9, 0.5, 0.4]), ([1, 2, 3], [0.1, 0.6, 0.5]))
    best = figure.axes[1].get_lines()[1]
    flat = plots.training_plot(
        ([1], [0.9]), ([1, 2], [0.077, 0.077])
    )  # a level curve is not cut off at the top
    assert flat.axes[1].get_ylim() == pytest.approx((0, 1.12 * 0.077))
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (2, 0.6)
    assert "best 0.600 (kept)" in [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    empty = plots.training_plot(([], []), ([], []))
    assert png_size(plots.figure_png(empty))[0] > 500


@pytest.mark.parametrize("marks", [(), (plots.LocusMark(1100, "open"), plots.LocusMark(1500, "closed"))])
def test_locus_plot_spans_the_locus_and_takes_gaps(marks: tuple[plots.LocusMark, ...]) -> None:
    observed, predicted = np.zeros(40), np.linspace(0, 1, 40)
    predicted[5:9] = np.nan
    tracks = [
        plots.LocusTrack(name, kind, observed, predicted) for name, kind in (("a", "peaks"), ("b", "signal"))
    ]
    figure = plots.locus_plot("chr1", 640, 32, tracks, marks)
    assert len(figure.axes) == (3 if marks else 2)
    assert figure.axes[0].get_xlim() == pytest.approx((0.64, 0.64 + 40 * 0.032))
    if marks:
        assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["open", "closed"]
    assert png_size(plots.figure_png(figure))[0] > 1000


def test_group_plot_counts_every_group() -> None:
    groups = {"open": np.linspace(0.5, 1, 500), "closed": np.zeros(3), "none": np.zeros(0)}
    colors = dict.fromkeys(groups, "#000000")
    figure = plots.group_plot(groups, colors, "title", "probability")
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["open (500)", "closed (3)", "none (0)"]
    assert png_size(plots.figure_png(figure))[1] > 100


def test_plots_change_no_global_setting(scored: tuple[np.ndarray, np.ndarray]) -> None:
    before = dict(mpl.rcParams)
    plots.figure_png(plots.precision_recall_plot({"a": metrics.precision_recall(*scored)}, {"a": 0.2}))
    assert dict(mpl.rcParams) == before
