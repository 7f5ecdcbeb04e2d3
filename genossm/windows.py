"""Input windows: tiling so that every base is a target once, finding leaks, and the windows table.

An input window of `window_bp` bases has a context margin of `margin_bp` at either side; what lies between the
margins is its target. Coordinates are 0-based half-open; a window may start below 0 or end past the
chromosome (the genome pads there), its target never does once clipped by `target_of`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from genossm.atomic import atomic_path
from genossm.errors import ConfigError, DataError, FileError
from genossm.interval import bases_below, merge

COLUMNS = ("chrom", "start", "end", "split")
Positions = npt.NDArray[np.int64]
_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Window:
    """An input window, margins included, 0-based half-open; it may hang over either end of the chromosome."""

    chrom: str
    start: int
    end: int
    split: str = ""

    @property
    def length_bp(self) -> int:
        """Bases from start to end, those outside the chromosome included."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.chrom}:{self.start}-{self.end}" + (f" ({self.split})" if self.split else "")


@dataclass(frozen=True, slots=True)
class Leak:
    """A window of one split that reads target bases of another split: `bases` of them, all of `other`."""

    window: Window
    other: str
    bases: int

    def __str__(self) -> str:
        return f"{self.window} holds {self.bases} target bases of {self.other}"


def check_geometry(window_bp: int, margin_bp: int, bin_bp: int) -> None:
    """Refuse window sizes whose bins would not line up.

    Raises:
        ConfigError: a size is not positive, the margins leave no target, or margin or target is no multiple
            of the bin.
    """
    if bin_bp < 1:
        raise ConfigError(f"bin of {bin_bp} bp: it must be 1 bp or more")
    if margin_bp < 0:
        raise ConfigError(f"margin of {margin_bp} bp: it must be 0 or more")
    target_bp = window_bp - 2 * margin_bp
    if target_bp < bin_bp:
        raise ConfigError(
            f"a window of {window_bp} bp with two margins of {margin_bp} bp leaves {target_bp} bp of target: "
            f"at least one bin of {bin_bp} bp is needed; make the window longer or the margin shorter"
        )
    if margin_bp % bin_bp or target_bp % bin_bp:
        raise ConfigError(
            f"margin ({margin_bp} bp) and window minus two margins ({target_bp} bp) must both be multiples "
            f"of the bin ({bin_bp} bp), so that bins of neighbouring windows line up"
        )


def check_overlap(overlap_bp: int, window_bp: int, margin_bp: int, bin_bp: int) -> None:
    """Refuse an overlap of neighbouring targets that cuts bins or leaves a base in more than two targets.

    Raises:
        ConfigError: it is negative, no multiple of the bin, or longer than half of the target.
    """
    target_bp = window_bp - 2 * margin_bp
    if overlap_bp < 0 or overlap_bp % bin_bp or 2 * overlap_bp > target_bp:
        raise ConfigError(
            f"overlap of {overlap_bp} bp: it must be a multiple of the bin ({bin_bp} bp) from 0 to "
            f"{target_bp // 2 // bin_bp * bin_bp} bp, half of the target of a window ({target_bp} bp)"
        )


def tile(
    chrom: str,
    length_bp: int,
    *,
    window_bp: int,
    margin_bp: int,
    bin_bp: int,
    overlap_bp: int = 0,
    split: str = "",
) -> list[Window]:
    """Windows whose targets cover each base of a chromosome once, or with an overlap once or twice.

    Target k is `[k*S, k*S + T)`, T = window_bp - 2*margin_bp and S = T - overlap_bp. A chromosome no longer than T gives
    one window. The last target may run past the end; no other one reaches it.

    Raises:
        DataError: `length_bp` below 1.
        ConfigError: a geometry that `check_geometry` refuses, or an overlap that `check_overlap` does.
    """
    check_geometry(window_bp, margin_bp, bin_bp)
    check_overlap(overlap_bp, window_bp, margin_bp, bin_bp)
    if length_bp < 1:
        raise DataError(f"chromosome {chrom} has {length_bp} bases: there is nothing to tile")
    stride_bp = window_bp - 2 * margin_bp - overlap_bp
    starts = range(-margin_bp, max(1, length_bp - overlap_bp) - margin_bp, stride_bp)
    return [Window(chrom, start, start + window_bp, split) for start in starts]


def target_of(window: Window, margin_bp: int, length_bp: int, overlap_bp: int = 0) -> tuple[int, int]:
    """The (start, end) of a window's target bases, clipped to the chromosome; (x, x) where none is inside.

    With an overlap, those that are its own: without the last `overlap_bp`, unless it reaches the chromosome's end.
    So of windows of `tile` each base is one's own, once.
    """
    start = min(max(window.start + margin_bp, 0), length_bp)
    end = window.end - margin_bp
    return start, max(start, length_bp if end >= length_bp else end - overlap_bp)


def find_leaks(windows: Sequence[Window], *, margin_bp: int, lengths: Mapping[str, int]) -> list[Leak]:
    """Every window that, margins included, holds target bases of a split other than its own.

    `lengths` gives each chromosome's length in bp. Time is that of sorting the windows; the answer is in the
    order of `windows`.

    Raises:
        DataError: a window on a chromosome that `lengths` lacks.
    """
    leaks: list[tuple[int, Leak]] = []
    for other, starts, ends, rest, spans in _against_others(windows, margin_bp, lengths):
        bases = bases_below(spans[:, 1], starts, ends) - bases_below(spans[:, 0], starts, ends)
        leaks += [(int(rest[k]), Leak(windows[rest[k]], other, int(bases[k]))) for k in np.flatnonzero(bases)]
    return [leak for _, leak in sorted(leaks, key=lambda found: (found[0], found[1].other))]


def split_distance(windows: Sequence[Window], *, margin_bp: int, lengths: Mapping[str, int]) -> int | None:
    """The fewest bp between a window, margins included, and a target base of another split; 0 where they touch or leak.

    None where no chromosome has windows of two splits.

    Raises:
        DataError: a window on a chromosome that `lengths` lacks.
    """
    nearest: int | None = None
    for _, starts, ends, _, spans in _against_others(windows, margin_bp, lengths):
        if not starts.size or not spans.size:
            continue
        following = np.searchsorted(starts, spans[:, 0], side="left")
        before = np.where(following > 0, spans[:, 0] - ends[following - 1], _FAR)
        after = np.where(
            following < starts.size, starts[np.minimum(following, starts.size - 1)] - spans[:, 1], _FAR
        )
        closest = max(0, int(np.minimum(before, after).min()))
        nearest = closest if nearest is None else min(nearest, closest)
    return nearest


def _against_others(
    windows: Sequence[Window], margin_bp: int, lengths: Mapping[str, int]
) -> Iterator[tuple[str, Positions, Positions, Positions, Positions]]:
    """For each chromosome of several splits and each of these: its name, (starts, ends) of its merged targets, and of
    all other splits' windows there the indices and the spans (n, 2)."""
    by_chrom: dict[str, dict[str, list[int]]] = {}
    for index, window in enumerate(windows):
        if window.chrom not in lengths:
            raise DataError(f"window {window} is on {window.chrom}, which the genome does not have")
        by_chrom.setdefault(window.chrom, {}).setdefault(window.split, []).append(index)
    for chrom, splits in by_chrom.items():
        for other, members in splits.items() if len(splits) > 1 else ():
            targets = np.array(
                [target_of(windows[i], margin_bp, lengths[chrom]) for i in members], dtype=np.int64
            )
            rest = np.array([i for name, ids in splits.items() if name != other for i in ids], dtype=np.int64)
            spans = np.array([(windows[i].start, windows[i].end) for i in rest], dtype=np.int64)
            yield other, *merge(targets[:, 0], targets[:, 1]), rest, spans


def write_windows(path: str | os.PathLike[str], windows: Iterable[Window]) -> None:
    """Write a table of chrom, start, end and split (tabs, one header line), complete or not at all."""
    lines = ["\t".join(COLUMNS)]
    lines += [f"{window.chrom}\t{window.start}\t{window.end}\t{window.split}" for window in windows]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_windows(path: str | os.PathLike[str]) -> list[Window]:
    """Read what `write_windows` wrote.

    Raises:
        FileError: the file is missing or unreadable.
        DataError: the header is another, or a row has other than four fields, no whole numbers, or
            end <= start.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read the windows table {source}: {error}") from error
    if not lines or tuple(lines[0].split("\t")) != COLUMNS:
        found = lines[0] if lines else "an empty file"
        raise DataError(
            f"{source} is no windows table: its first line must be {' '.join(COLUMNS)}, not {found!r}"
        )
    windows = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        try:
            chrom, start, end, split = fields
            window = Window(chrom, int(start), int(end), split)
        except ValueError as error:
            raise DataError(
                f"{source}, line {number}: {line!r} must be chrom, start, end (whole numbers) and split, "
                "separated by tabs"
            ) from error
        if window.end <= window.start:
            raise DataError(
                f"{source}, line {number}: end {window.end} must be greater than start {window.start}"
            )
        windows.append(window)
    return windows
