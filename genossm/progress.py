"""Progress on standard error: one bar and one line style for every long task."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str = "it",
    description: str = "",
    scale: bool = False,
) -> tqdm[Any]:
    """A progress bar with a rate on standard error.

    Works as an iterator over `iterable`, or as a context manager with `.update(n)`; `scale` prints
    1_500_000 as 1.50M. Where standard error is no terminal (a batch job's log), lines come every 30 s.
    """
    interval_s = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        iterable,
        total=total,
        unit=unit,
        desc=description,
        unit_scale=scale,
        mininterval=interval_s,
        maxinterval=interval_s,
        file=sys.stderr,
        dynamic_ncols=True,
    )


def move(bar: tqdm[Any], amount: int) -> None:
    """Move a bar by what an earlier run has done, which does not count as speed."""
    bar.initial += amount
    bar.n += amount
    bar.last_print_n += amount


def say(message: str) -> None:
    """Print one line on standard error, without breaking a progress bar in use."""
    tqdm.write(message, file=sys.stderr)
