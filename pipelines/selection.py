"""What a prediction covers: chromosomes, regions and BED rows as bins and the windows that hold them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from genossm.annotations import read_annotations
from genossm.chrom_names import is_primary, name_hint, repair_names
from genossm.errors import ConfigError, DataError
from genossm.interval import Interval, merge
from genossm.progress import say
from genossm.windows import Window, target_of, tile


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Wanted bins and the windows that hold them, both in genome order.

    `bins[chrom]` is int64 (n, 2): sorted, disjoint half-open ranges of bin numbers. Windows lie on the same
    grid as those of the whole chromosome, so a bin's value never depends on what else was asked for. Targets of
    neighbours overlap by `overlap_bp`: these bins are the later one's own, and hold a blend of both (`blended`).
    """

    lengths: Mapping[str, int]
    bins: Mapping[str, npt.NDArray[np.int64]]
    windows: tuple[Window, ...]
    bin_bp: int
    margin_bp: int
    overlap_bp: int = 0

    def target_bins(self, window: Window) -> tuple[int, int]:
        """First and past-the-last bin number of a window's own target inside the chromosome; each bin is one window's."""
        start, end = target_of(window, self.margin_bp, self.lengths[window.chrom], self.overlap_bp)
        return start // self.bin_bp, -(-end // self.bin_bp)

    def wanted(self, chrom: str, first: int = 0, stop: int | None = None) -> npt.NDArray[np.bool_]:
        """bool (bins,) of bins [first, stop), by default the whole chromosome: true where a value was asked for."""
        stop = -(-self.lengths[chrom] // self.bin_bp) if stop is None else stop
        ranges = self.bins[chrom]
        low, high = np.searchsorted(ranges[:, 1], first, "right"), np.searchsorted(ranges[:, 0], stop)
        inside = np.clip(ranges[low:high], first, stop) - first
        steps = np.zeros(stop - first + 1, dtype=np.int8)
        steps[inside[:, 0]] += 1
        steps[inside[:, 1]] -= 1
        return np.cumsum(steps[:-1], dtype=np.int8) > 0

    def target_bp_of(self, window: Window) -> int:
        """Bases of a window's own target inside the chromosome."""
        start, end = target_of(window, self.margin_bp, self.lengths[window.chrom], self.overlap_bp)
        return end - start

    def before(self, window: Window) -> Window | None:
        """The window on the grid whose target overlaps the first bins of this one's; None where there is none."""
        if not self.overlap_bp or window.start + self.margin_bp <= 0:
            return None
        stride_bp = window.length_bp - 2 * self.margin_bp - self.overlap_bp
        return replace(window, start=window.start - stride_bp, end=window.end - stride_bp)

    def needed(self, windows: Iterable[Window]) -> list[Window]:
        """The windows that the values of `windows` need, in order: before each the one that overlaps it, once."""
        found: list[Window] = []
        for window in windows:
            before = self.before(window)
            if before is not None and found[-1:] != [before]:
                found.append(before)
            found.append(window)
        return found

    @property
    def target_bp(self) -> int:
        """Bases that the targets of all windows cover together."""
        return sum(map(self.target_bp_of, self.windows))


def select(
    lengths: Mapping[str, int],
    *,
    window_bp: int,
    margin_bp: int,
    bin_bp: int,
    overlap_bp: int = 0,
    chroms: str | Sequence[str] | None = None,
    regions: str | Interval | Sequence[str | Interval] | None = None,
    bed: str | os.PathLike[str] | None = None,
) -> Selection:
    """Choose whole chromosomes (all when nothing is named), or the bins that overlap regions and BED rows.

    Args:
        lengths: chromosome lengths in bp, in genome order.
        window_bp, margin_bp, bin_bp: geometry of the model.
        overlap_bp: base pairs of target that neighbouring windows share.
        chroms: whole chromosomes, or the name of one.
        regions: "chrom:start-end" (0-based half-open), a bare chromosome name, or intervals; several or one.
        bed: a BED, narrowPeak or broadPeak file, plain or gzip; its regions are joined with `regions`.

    Raises:
        ConfigError: chromosomes together with regions, or an overlap that `check_overlap` refuses.
        DataError: a name the genome does not have, a region past a chromosome's end, or nothing to predict.
    """
    if chroms is not None and (regions is not None or bed is not None):
        raise ConfigError("chromosomes and regions were both given: name either whole chromosomes or regions")
    if chroms is None and regions is None and bed is None:
        chroms = list(lengths)
    chroms = [chroms] if isinstance(chroms, str) else chroms
    regions = [regions] if isinstance(regions, str | Interval) else regions
    spans: dict[str, list[tuple[int, int]]] = {}
    if chroms is not None:
        _check_names(chroms, lengths, "the request")
        spans = {chrom: [(0, lengths[chrom])] for chrom in chroms}
    for interval in [_parse(region, lengths) for region in regions or ()]:
        spans.setdefault(interval.chrom, []).append((interval.start, interval.end))
    if bed is not None:
        for chrom, start, end in _bed_rows(bed, lengths):
            spans.setdefault(chrom, []).append((start, end))

    bins: dict[str, npt.NDArray[np.int64]] = {}
    for chrom in lengths:  # genome order, whatever the order of the request
        if chrom in spans:
            ends = np.array(spans[chrom], dtype=np.int64).reshape(-1, 2)
            ends = ends[ends[:, 1] > ends[:, 0]]
            firsts, stops = merge(ends[:, 0] // bin_bp, -(-ends[:, 1] // bin_bp))
            if firsts.size:
                bins[chrom] = np.stack([firsts, stops], axis=1)
    if not bins:
        raise DataError("there is nothing to predict: no region holds a base; give regions of at least 1 bp")
    return selection_of(
        lengths, bins, window_bp=window_bp, margin_bp=margin_bp, bin_bp=bin_bp, overlap_bp=overlap_bp
    )


def selection_of(
    lengths: Mapping[str, int],
    bins: Mapping[str, npt.NDArray[np.int64]],
    *,
    window_bp: int,
    margin_bp: int,
    bin_bp: int,
    overlap_bp: int = 0,
) -> Selection:
    """The selection of bins that are known, see `Selection.bins`: with the windows that hold them."""
    windows: list[Window] = []
    for chrom, ranges in bins.items():
        grid = tile(
            chrom,
            lengths[chrom],
            window_bp=window_bp,
            margin_bp=margin_bp,
            bin_bp=bin_bp,
            overlap_bp=overlap_bp,
        )
        if len(grid) > 1:  # one window is every bin's: most contigs of an assembly
            targets = [target_of(window, margin_bp, lengths[chrom], overlap_bp) for window in grid]
            grid = _overlapping(grid, targets, ranges * bin_bp)
        windows += grid
    return Selection(dict(lengths), bins, tuple(windows), bin_bp, margin_bp, overlap_bp)


def whole_chromosomes(selection: Selection) -> Selection:
    """The same bins, with one window for each chromosome: all of it, without margins."""
    windows = tuple(Window(chrom, 0, selection.lengths[chrom]) for chrom in selection.bins)
    return replace(selection, windows=windows, margin_bp=0, overlap_bp=0)


def _overlapping(
    grid: Sequence[Window], own: Sequence[tuple[int, int]], ranges: npt.NDArray[np.int64]
) -> list[Window]:
    """The windows whose `own` bases meet one of the ranges, in bases."""
    targets, (starts, ends) = np.array(own, dtype=np.int64), ranges.T
    # The ranges are sorted and disjoint: a target meets one when the first range that ends after the target's
    # start begins before the target's end.
    candidate = np.searchsorted(ends, targets[:, 0], side="right")
    meets = candidate < len(starts)
    meets[meets] = starts[candidate[meets]] < targets[meets, 1]
    return [window for window, hit in zip(grid, meets.tolist(), strict=True) if hit]


def _parse(region: str | Interval, lengths: Mapping[str, int]) -> Interval:
    if isinstance(region, str):
        if region not in lengths and ":" in region:
            _check_names([region.strip().rpartition(":")[0]], lengths, f"the region {region!r}")
        return Interval.parse(region, lengths)
    _check_names([region.chrom], lengths, f"the region {region}")
    if region.start < 0 or region.end > lengths[region.chrom]:
        raise DataError(
            f"the region {region} does not lie inside {region.chrom} (0-{lengths[region.chrom]}): correct "
            "its ends"
        )
    return region


def _bed_rows(bed: str | os.PathLike[str], lengths: Mapping[str, int]) -> Iterable[tuple[str, int, int]]:
    """Merged rows of a BED file that lie on the genome; oddities are said on standard error."""
    annotations = read_annotations(bed)
    primary = [name for name in annotations.chrom_names() if is_primary(name)]
    _check_names(primary, lengths, f"the file {bed}")
    fitted = annotations.fit(lengths)
    if fitted.oddities:
        counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in fitted.oddities.items())
        say(f"{bed}: {counts}")
    for chrom in fitted.chrom_names():
        starts, ends = fitted.on(chrom)
        yield from ((chrom, start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


def _check_names(names: Iterable[str], lengths: Mapping[str, int], what: str) -> None:
    """Refuse names that the genome does not have, and say which ones it has in their place."""
    unknown = [name for name in dict.fromkeys(names) if name not in lengths]
    if unknown:
        listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        twins = repair_names(unknown, lengths)
        repairs = ", ".join(f"{known} for {name}" for name, known in list(twins.items())[:5])
        hint = f"write {repairs}" if repairs else name_hint(unknown[0], lengths)
        raise DataError(f"{what} names {listed}, which the genome does not have: {hint}")
