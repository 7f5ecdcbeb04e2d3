"""The streaming loader: one sequence for any workers and ranks, each window once an epoch, and resumption anywhere."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genossm as gs
from genossm.dataset import PreparedDataset
from genossm.errors import CheckpointError, FileError
from genossm.loaders import WindowDataset
from genossm.packed import Batch
from genossm.stream_loader import WindowLoader
from tests.random_dataset import expected_item, random_dataset

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return random_dataset(tmp_path_factory.mktemp("random"), 6)


@pytest.fixture(scope="module")
def training(data: PreparedDataset) -> WindowDataset:
    return WindowDataset(data, "train", augment=True, jitter_bp=5, seed=11)


@pytest.fixture(scope="module")
def compressed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("compressed") / "out"
    return gs.prepare(tiny_folder / "dataset.yaml", folder, overrides=["compress=gzip"])


def same(first: Iterable[Batch], second: Iterable[Batch]) -> bool:
    """Whether both give equal batches, as many."""
    return all(
        torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True)
    )


def windows_of(batches: Iterable[Batch]) -> list[bytes]:
    """The codes of each window that counts, in order."""
    return [
        codes.numpy().tobytes()
        for batch in batches
        for codes, mask in zip(batch.codes, batch.mask, strict=True)
        if mask.any()
    ]


def test_batches_hold_the_items_of_the_epoch(training: WindowDataset) -> None:
    loader = WindowLoader(training, batch_size=5)
    length = len(training)
    assert length % 5  # so that the last batch is filled up
    for epoch in (0, 1):
        seen: Counter[int] = Counter()
        portions = loader.portions()
        for portion, batch in zip(portions, loader, strict=True):
            assert batch.codes.shape == (5, 1024)
            for row, (index, real) in enumerate(zip(*portion, strict=True)):
                codes, targets, mask = expected_item(training, index)
                np.testing.assert_array_equal(batch.codes[row], codes)
                np.testing.assert_array_equal(batch.targets[row], targets * real)
                np.testing.assert_array_equal(batch.mask[row], mask & real)
                seen[index] += real
        assert {index for index, count in seen.items() if count} == set(
            range(epoch * length, (epoch + 1) * length)
        )
        assert max(seen.values()) == 1


@settings(max_examples=25)
@given(
    batch_size=st.integers(1, 6),
    ranks=st.integers(1, 4),
    workers=st.integers(0, 3),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_any_number_of_workers_and_ranks_gives_the_same_windows_each_once(
    training: WindowDataset, batch_size: int, ranks: int, workers: int, epoch: int, shuffle: bool
) -> None:
    def loader(**options: Any) -> WindowLoader:
        made = WindowLoader(training, shuffle=shuffle, **options)
        made.set_epoch(epoch)
        return made

    alone = list(loader(batch_size=batch_size * ranks))
    parts = [
        list(loader(batch_size=batch_size, rank=rank, ranks=ranks, workers=workers, loader="threads"))
        for rank in range(ranks)
    ]
    together = [
        Batch(*(torch.stack(pieces, dim=1).flatten(0, 1) for pieces in zip(*step, strict=True)))
        for step in zip(*parts, strict=True)  # all ranks have as many batches
    ]
    codes = [torch.cat([batch.codes for batch in batches]) for batches in (alone, together)]
    masks = [torch.cat([batch.mask for batch in batches]) for batches in (alone, together)]
    counting = masks[0].flatten(1).any(1)
    assert torch.equal(masks[0], masks[1]) and torch.equal(codes[0][counting], codes[1][counting])
    assert int(counting.sum()) == len(training) == len(windows_of(together))
    first = epoch * len(training) if shuffle else 0
    expected = Counter(
        expected_item(training, index)[0].tobytes() for index in range(first, first + len(training))
    )
    assert Counter(windows_of(together)) == expected


@forks
@pytest.mark.parametrize("source", ["plain", "compressed"])
def test_processes_give_what_one_thread_gives(
    training: WindowDataset, compressed: PreparedDataset, source: str
) -> None:
    windows = training if source == "plain" else WindowDataset(compressed, "train", augment=True, jitter_bp=4)
    alone = WindowLoader(windows, batch_size=3)
    processes = WindowLoader(windows, batch_size=3, workers=2, loader="processes", prefetch=3)
    for _ in range(2):
        assert same(alone, processes)
    for number, _ in enumerate(processes):  # given up in the middle
        if number == 2:
            break
    alone.set_epoch(5)
    processes.set_epoch(5)
    assert same(alone, processes)


@settings(max_examples=30)
@given(
    stop=st.integers(0, 40),
    batch_size=st.integers(1, 5),
    rank=st.integers(0, 1),
    workers=st.integers(0, 2),
)
def test_a_restored_state_goes_on_where_it_was_taken(
    training: WindowDataset, stop: int, batch_size: int, rank: int, workers: int
) -> None:
    def loader() -> WindowLoader:
        return WindowLoader(training, batch_size=batch_size, rank=rank, ranks=2, workers=workers)

    def stream(source: WindowLoader, count: int) -> list[Batch]:
        found: list[Batch] = []
        while len(found) < count:
            for batch in source:
                found.append(batch)
                if len(found) == count:
                    break
        return found

    unbroken = stream(loader(), stop + 10)
    first = loader()
    before = stream(first, stop)
    state = first.state_dict()
    assert (state["epoch"], state["next_batch"]) == divmod(stop, len(first))
    second = loader()
    second.load_state_dict(state)
    second.set_epoch(state["epoch"])  # as Lightning does it: changes nothing
    assert same(before + stream(second, 10), unbroken)


def test_a_new_epoch_begins_at_its_beginning(training: WindowDataset) -> None:
    loader = WindowLoader(training, batch_size=4)
    first = next(iter(loader))
    assert same([next(iter(loader))], [first])  # a pass that was given up begins again
    loader.set_epoch(3)
    assert loader.state_dict()["next_batch"] == 0 and not same([next(iter(loader))], [first])
    loader.set_epoch(0)
    assert same([next(iter(loader))], [first])
    assert len(list(loader)) == len(loader) and loader.epoch == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 2}, "batch_size 3 instead of 2"),
        ({"ranks": 2}, "ranks 1 instead of 2.*as many processes"),
        ({"shuffle": False}, "shuffle True instead of False"),
        ({"seed": 12}, "seed 11 instead of 12"),
        ({"windows_per_epoch": 7}, "windows .* instead of 7"),
        ({"split": "valid"}, "split train instead of valid"),
        ({"window_bp": 512}, "window_bp 1024 instead of 512"),
        ({"margin_bp": 64}, "margin_bp 128 instead of 64"),
        ({"augment": False}, "augment True instead of False"),
        ({"jitter_bp": 0}, "jitter_bp 5 instead of 0"),
        ({"reverse_complement": False}, "reverse_complement True instead of False"),
    ],
)
def test_a_state_of_other_data_is_refused(
    data: PreparedDataset, training: WindowDataset, options: dict[str, Any], words: str
) -> None:
    state = WindowLoader(training, batch_size=3).state_dict()
    of_loader = {key: options[key] for key in ("batch_size", "ranks", "shuffle") if key in options}
    of_windows = {key: value for key, value in options.items() if key not in of_loader}
    split = of_windows.pop("split", "train")
    other = WindowDataset(data, split, **{"augment": True, "jitter_bp": 5, "seed": 11, **of_windows})
    with pytest.raises(CheckpointError, match=words):
        WindowLoader(other, **{"batch_size": 3, **of_loader}).load_state_dict(state)


def test_a_state_of_another_dataset_is_refused_and_of_a_moved_one_taken(
    data: PreparedDataset, training: WindowDataset, tmp_path: Path
) -> None:
    state = WindowLoader(training, batch_size=3).state_dict()
    shutil.copytree(data.folder, tmp_path / "moved")
    moved = PreparedDataset(tmp_path / "moved", genome=data.genome.path)
    options: dict[str, Any] = {"augment": True, "jitter_bp": 5, "seed": 11}
    WindowLoader(WindowDataset(moved, "train", **options), batch_size=3).load_state_dict(state)
    (tmp_path / "other").mkdir()
    other = random_dataset(tmp_path / "other", 9)
    with pytest.raises(CheckpointError, match=r"dataset .* instead of"):
        WindowLoader(WindowDataset(other, "train", **options), batch_size=3).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_while_reading_is_raised_and_leaves_no_thread(
    data: PreparedDataset, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    windows = WindowDataset(data, "train")
    original = WindowDataset.read

    def broken(self: WindowDataset, indices: Any, **options: Any) -> Any:
        if 7 in indices:
            raise FileError("targets.h5 ends too early")
        return original(self, indices, **options)

    monkeypatch.setattr(WindowDataset, "read", broken)
    loader = WindowLoader(windows, batch_size=2, shuffle=False, workers=workers, loader="threads")
    got = 0
    with pytest.raises(FileError, match="ends too early"):
        for _ in loader:
            got += 1
    assert got == 3
    batches = iter(loader)
    next(batches)
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("genossm")]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"workers": -1}, {"prefetch": 0}, {"rank": 1}, {"rank": -1, "ranks": 2}]
)
def test_numbers_out_of_range_are_refused(training: WindowDataset, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        WindowLoader(training, **{"batch_size": 2, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loader is 'fork'; it must be `threads` or `processes`"):
        WindowLoader(training, batch_size=2, loader="fork")  # type: ignore[arg-type]
