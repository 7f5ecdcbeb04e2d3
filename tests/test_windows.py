"""Windows: every base is a target once, leaks between splits are found, the table survives a round trip."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.errors import ConfigError, DataError, FileError
from genossm.pipelines.selection import select
from genossm.windows import (
    Window,
    check_geometry,
    check_overlap,
    find_leaks,
    read_windows,
    split_distance,
    target_of,
    tile,
    write_windows,
)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, int, int]:
    """(window_bp, margin_bp, bin_bp) that fit together."""
    bin_bp = draw(st.integers(1, 40))
    margin_bp = bin_bp * draw(st.integers(0, 6))
    return bin_bp * draw(st.integers(1, 9)) + 2 * margin_bp, margin_bp, bin_bp


@given(geometry=geometries(), length_bp=st.integers(1, 2_000))
def test_tile_makes_every_base_a_target_once(geometry: tuple[int, int, int], length_bp: int) -> None:
    window_bp, margin_bp, bin_bp = geometry
    windows = tile("chr1", length_bp, window_bp=window_bp, margin_bp=margin_bp, bin_bp=bin_bp, split="train")
    times = np.zeros(length_bp, dtype=int)
    for window in windows:
        start, end = target_of(window, margin_bp, length_bp)
        assert start < end
        assert start % bin_bp == 0
        assert end % bin_bp == 0 or end == length_bp
        times[start:end] += 1
    assert (times == 1).all()
    assert {window.length_bp for window in windows} == {window_bp}
    assert {(window.chrom, window.split) for window in windows} == {("chr1", "train")}


@given(geometry=geometries(), length_bp=st.integers(1, 2_000), data=st.data())
def test_of_overlapping_windows_each_base_is_the_own_of_one(
    geometry: tuple[int, int, int], length_bp: int, data: st.DataObject
) -> None:
    window_bp, margin_bp, bin_bp = geometry
    target_bp = window_bp - 2 * margin_bp
    overlap_bp = bin_bp * data.draw(st.integers(0, target_bp // 2 // bin_bp))
    windows = tile(
        "chr1", length_bp, window_bp=window_bp, margin_bp=margin_bp, bin_bp=bin_bp, overlap_bp=overlap_bp
    )
    own = [target_of(window, margin_bp, length_bp, overlap_bp) for window in windows]
    assert own[0][0] == 0 and own[-1][1] == length_bp
    assert all(end == start for (_, end), (start, _) in pairwise(own))
    assert all(start < end and start % bin_bp == 0 for start, end in own)
    # all but the last have a whole target, and what the next one is blended with is all in its own
    full = [target_of(window, margin_bp, length_bp) for window in windows]
    assert all(end - start == target_bp and end < length_bp for start, end in full[:-1])
    assert all(end - start >= overlap_bp for start, end in own[1:])
    times = np.zeros(length_bp, dtype=int)
    for start, end in full:
        times[start:end] += 1
    assert times.max() <= 2 and (times == 2).sum() == overlap_bp * (len(windows) - 1)
    assert (len(windows) == 1) == (length_bp <= target_bp)
    selection = select(
        {"chr1": length_bp}, window_bp=window_bp, margin_bp=margin_bp, bin_bp=bin_bp, overlap_bp=overlap_bp
    )
    assert selection.needed(windows) == windows == list(selection.windows)
    for before, window in pairwise(windows):
        assert selection.needed([window]) == ([before, window] if overlap_bp else [window])


@pytest.mark.parametrize("overlap_bp", [-8, 4, 56])
def test_overlaps_that_are_refused(overlap_bp: int) -> None:
    check_overlap(48, 128, 16, 8)
    with pytest.raises(
        ConfigError, match=rf"overlap of {overlap_bp} bp: .* from 0 to 48 bp, half of the target"
    ):
        tile("c", 1_000, window_bp=128, margin_bp=16, bin_bp=8, overlap_bp=overlap_bp)


def test_tile_of_known_numbers() -> None:
    windows = tile("chrI", 230_218, window_bp=131_072, margin_bp=16_384, bin_bp=32)
    assert [(window.start, window.end) for window in windows] == [
        (-16_384, 114_688),
        (81_920, 212_992),
        (180_224, 311_296),
    ]
    assert target_of(windows[0], 16_384, 230_218) == (0, 98_304)
    assert target_of(windows[2], 16_384, 230_218) == (196_608, 230_218)


@pytest.mark.parametrize("length_bp", [1, 95, 96])
def test_a_short_chromosome_is_one_window(length_bp: int) -> None:
    windows = tile("c", length_bp, window_bp=128, margin_bp=16, bin_bp=8)
    assert windows == [Window("c", -16, 112)]
    assert target_of(windows[0], 16, length_bp) == (0, length_bp)


def test_a_chromosome_without_bases_is_refused() -> None:
    with pytest.raises(DataError, match="c has 0 bases"):
        tile("c", 0, window_bp=128, margin_bp=16, bin_bp=8)


@pytest.mark.parametrize(
    ("window_bp", "margin_bp", "bin_bp", "message"),
    [
        (128, 0, 0, "bin of 0 bp"),
        (128, -8, 8, "margin of -8 bp"),
        (128, 64, 8, "leaves 0 bp of target"),
        (0, 0, 8, "leaves 0 bp of target"),
        (100, 8, 8, "must both be multiples"),
        (136, 4, 8, "must both be multiples"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(window_bp: int, margin_bp: int, bin_bp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_geometry(window_bp, margin_bp, bin_bp)
    with pytest.raises(ConfigError, match=message):
        tile("c", 1_000, window_bp=window_bp, margin_bp=margin_bp, bin_bp=bin_bp)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(-50, 50, (0, 40)), (60, 160, (70, 100)), (100, 200, (100, 100)), (-200, -100, (0, 0))],
)
def test_target_of_is_clipped_to_the_chromosome(start: int, end: int, expected: tuple[int, int]) -> None:
    assert target_of(Window("c", start, end), 10, 100) == expected


ANY_WINDOW = st.builds(
    lambda chrom, start, length, split: Window(chrom, start, start + length, split),
    st.sampled_from(["a", "b"]),
    st.integers(-20, 70),
    st.integers(1, 40),
    st.sampled_from(["train", "valid", "test"]),
)


@given(windows=st.lists(ANY_WINDOW, max_size=12), margin_bp=st.integers(0, 12))
def test_find_leaks_agrees_with_counting_bases(windows: list[Window], margin_bp: int) -> None:
    lengths = {"a": 60, "b": 31}
    expected = []
    for window in windows:
        inside = set(range(window.start, window.end))
        for other in ("test", "train", "valid"):
            targets = {
                base
                for candidate in windows
                if candidate.chrom == window.chrom and candidate.split == other != window.split
                for base in range(*target_of(candidate, margin_bp, lengths[candidate.chrom]))
            }
            if inside & targets:
                expected.append((window, other, len(inside & targets)))
    found = find_leaks(windows, margin_bp=margin_bp, lengths=lengths)
    assert [(leak.window, leak.other, leak.bases) for leak in found] == expected


@given(windows=st.lists(ANY_WINDOW, max_size=8), margin_bp=st.integers(0, 12))
def test_split_distance_agrees_with_counting_bases(windows: list[Window], margin_bp: int) -> None:
    lengths = {"a": 60, "b": 31}
    gaps = []
    for window in windows:
        for other in windows:
            if other.chrom == window.chrom and other.split != window.split:
                for base in range(*target_of(other, margin_bp, lengths[other.chrom])):
                    gaps.append(max(window.start - base - 1, base - window.end, 0))
    assert split_distance(windows, margin_bp=margin_bp, lengths=lengths) == min(gaps, default=None)


def test_split_distance_of_known_windows() -> None:
    train, valid, test = (
        Window("c", 0, 100, "train"),
        Window("c", 105, 205, "valid"),
        Window("d", 0, 90, "test"),
    )
    lengths = {"c": 300, "d": 300}
    assert split_distance([train, valid, test], margin_bp=10, lengths=lengths) == 15
    assert split_distance([train, test], margin_bp=10, lengths=lengths) is None
    with pytest.raises(DataError, match="z:0-10 is on z"):
        split_distance([Window("z", 0, 10)], margin_bp=0, lengths=lengths)


def test_a_margin_that_reaches_into_another_split_is_a_leak() -> None:
    train, valid = Window("c", 0, 100, "train"), Window("c", 80, 180, "valid")
    leaks = find_leaks([train, valid], margin_bp=10, lengths={"c": 200})
    assert [str(leak) for leak in leaks] == [
        "c:0-100 (train) holds 10 target bases of valid",
        "c:80-180 (valid) holds 10 target bases of train",
    ]
    # Margins may touch each other: no target base is shared.
    assert not find_leaks([train, Window("c", 90, 190, "valid")], margin_bp=10, lengths={"c": 200})


def test_whole_chromosomes_never_leak() -> None:
    windows = [
        *tile("a", 5_000, window_bp=640, margin_bp=64, bin_bp=32, split="train"),
        *tile("b", 3_000, window_bp=640, margin_bp=64, bin_bp=32, split="test"),
    ]
    assert find_leaks(windows, margin_bp=64, lengths={"a": 5_000, "b": 3_000}) == []


def test_a_window_on_an_unknown_chromosome_is_refused() -> None:
    with pytest.raises(DataError, match="z:0-10 is on z"):
        find_leaks([Window("z", 0, 10)], margin_bp=0, lengths={"a": 10})


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)


@given(
    windows=st.lists(
        st.builds(
            lambda chrom, start, length, split: Window(chrom, start, start + length, split),
            NAMES,
            st.integers(-(10**9), 10**9),
            st.integers(1, 10**6),
            st.one_of(st.just(""), NAMES),
        )
    )
)
def test_the_table_survives_a_round_trip(
    windows: list[Window], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("table") / "windows.tsv"
    write_windows(path, windows)
    assert read_windows(path) == windows
    assert path.read_text().startswith("chrom\tstart\tend\tsplit\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ("chrom\tstart\tend\n", "first line must be"),
        ("chrom\tstart\tend\tsplit\nc\t0\t10\n", "line 2"),
        ("chrom\tstart\tend\tsplit\nc\t0\t10\ttrain\nc\tten\t20\ttrain\n", "line 3"),
        ("chrom\tstart\tend\tsplit\nc\t10\t10\ttrain\n", "end 10 must be greater than start 10"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "windows.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_windows(path)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot read the windows table"):
        read_windows(tmp_path / "windows.tsv")
