"""Windows of a dataset: what an item holds, and that it depends on (seed, epoch, position) alone."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import genossm as gs
from genossm.dataset import PreparedDataset
from genossm.loaders import WindowDataset
from genossm.sequence import reverse_complement
from tests.random_dataset import expected_item, random_dataset


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def random_data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """A random dataset; of every second one all tracks have the same mask but for absent ones."""
    return random_dataset(tmp_path_factory.mktemp("random"), request.param, own_masks=request.param % 2 == 0)


@pytest.mark.parametrize("augment", [False, True])
def test_items_of_random_genomes_are_what_the_dataset_says(
    random_data: PreparedDataset, augment: bool
) -> None:
    windows = WindowDataset(random_data, "train", augment=augment, jitter_bp=5, seed=random_data.bin_bp)
    flips = set()
    for index in range(3 * len(windows)) if augment else range(len(windows)):
        for part, expected in zip(windows[index], expected_item(windows, index), strict=True):
            np.testing.assert_array_equal(part.numpy(), expected)
        assert windows[index][2].any()  # never a window with nothing to learn
        flips.add(windows.place(index).flip)
    assert flips == ({False, True} if augment else {False})


def test_windows_masked_everywhere_are_left_out_and_no_others(random_data: PreparedDataset) -> None:
    windows = WindowDataset(random_data, "train")
    starts = {(place.chrom, place.start) for place in map(windows.place, range(len(windows)))}
    margin, bins = random_data.margin_bp, windows.bins
    for window in random_data.windows("train"):
        first = (window.start + margin) // random_data.bin_bp
        mask = random_data.mask(window.chrom, first, min(first + bins, random_data.bins(window.chrom)))
        assert mask.any() == ((window.chrom, window.start) in starts)
    assert not any(chrom == "c3" for chrom, _ in starts)


def test_packed_batches_hold_the_items(random_data: PreparedDataset) -> None:
    windows = WindowDataset(random_data, "train", augment=True, jitter_bp=3, seed=2)
    indices = [5, 0, 17, 3]
    packed = windows.read(indices, real=[True, True, False, True])
    assert packed.targets.element_size() == random_data.storage.dtype.itemsize
    assert packed.usable.shape[2] == (3 if random_data.mask_parts("c0").own else 1)
    batch = windows._unpacker(packed, *packed.exceptions())
    for row, index in enumerate(indices):
        codes, targets, mask = windows[index]
        assert torch.equal(batch.codes[row], codes)
        if row == 2:
            assert not batch.mask[row].any() and not batch.targets[row].any()
        else:
            assert torch.equal(batch.targets[row], targets) and torch.equal(batch.mask[row], mask)
    bare = windows.read(indices, codes=False, targets=False)
    assert bare.codes.numel() == bare.targets.numel() == bare.usable.numel() == 0
    assert torch.equal(bare.places, packed.places)
    assert bare.nbytes < 200 < packed.nbytes


def test_the_reverse_complement_of_a_batch_and_its_targets_agree(stranded_prepared: Path) -> None:
    flipping = WindowDataset(stranded_prepared, "train", augment=True, seed=1)
    plain = WindowDataset(stranded_prepared, "train", augment=True, seed=1, reverse_complement=False)
    flips = []
    for index in range(12):
        codes, targets, mask = (part.numpy() for part in plain[index])
        got = [part.numpy() for part in flipping[index]]
        flips.append(not np.array_equal(got[0], codes))
        if flips[-1]:
            codes, targets, mask = reverse_complement(codes), targets[::-1], mask[::-1]
            targets, mask = targets[:, [2, 1, 0]], mask[:, [2, 1, 0]]
        for part, expected in zip(got, (codes, targets, mask), strict=True):
            np.testing.assert_array_equal(part, expected)
    assert set(flips) == {False, True}


def test_items_depend_on_seed_epoch_and_position_alone(tiny_prepared: Path) -> None:
    first = WindowDataset(tiny_prepared, "train", augment=True, seed=1)
    again = WindowDataset(tiny_prepared, "train", augment=True, seed=1)
    other = WindowDataset(tiny_prepared, "train", augment=True, seed=2)
    epoch = len(first)
    assert torch.equal(first[3][0], again[3][0])
    assert not torch.equal(first[3][0], first[3 + epoch][0])
    assert not torch.equal(first[3][0], other[3][0])


def test_signal_sampling_prefers_windows_with_signal(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.bed").write_text("chrA\t20000\t20400\nchrA\t35000\t35100\n")
    text = (tiny_folder / "dataset.yaml").read_text().replace("peaks.narrowPeak", str(tmp_path / "few.bed"))
    text = text.replace("genome.fa", str(tiny_folder / "genome.fa"))
    track = next(line for line in text.splitlines() if "name: signal" in line)
    (tmp_path / "dataset.yaml").write_text(text.replace(f"{track}\n", ""))
    data = gs.prepare(tmp_path / "dataset.yaml", tmp_path / "out")
    settings = {"windows_per_epoch": 400, "seed": 3}
    everywhere = WindowDataset(data, "train", **settings)  # type: ignore[arg-type]
    drawn = WindowDataset(data, "train", sampling="signal", signal_fraction=0.8, **settings)  # type: ignore[arg-type]

    def share(windows: WindowDataset, at: int) -> float:
        inside = [window.start + 512 <= at < window.start + 3584 for window in map(windows.place, range(400))]
        return float(np.mean(inside))

    tiles = len(data.windows("train"))
    assert share(everywhere, 20_200) == pytest.approx(1 / tiles, abs=0.01)
    # Of 12.5 + 3 positive bins (three quarters and more of a bin counts as one) the first peak has about four fifths.
    assert share(drawn, 20_200) == pytest.approx(0.8 * 0.8 + 0.2 / tiles, abs=0.08)
    assert share(drawn, 35_050) == pytest.approx(0.8 * 0.2 + 0.2 / tiles, abs=0.08)
    with pytest.raises(ValueError, match="finds no signal"):
        WindowDataset(data, "valid", sampling="signal")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_torch_loop_in_five_lines(tiny_prepared: Path, workers: int) -> None:
    windows = gs.WindowDataset(tiny_prepared, "train", augment=True)
    seen = 0
    for codes, targets, mask in DataLoader(windows, batch_size=4, shuffle=True, num_workers=workers):
        assert codes.dtype == torch.int8 and targets.shape == mask.shape
        seen += len(codes)
    assert seen == len(windows) == len(list(windows))


def check_all(windows: WindowDataset) -> bool:
    """Whether every item is right, read twice over."""
    return all(
        np.array_equal(part.numpy(), expected)
        for index in [*range(len(windows)), *range(len(windows))]
        for part, expected in zip(windows[index], expected_item(windows, index), strict=True)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("compress", ["none", "gzip"])
def test_a_dataset_that_was_used_can_be_forked_and_pickled(
    tiny_folder: Path, tmp_path: Path, compress: str
) -> None:
    data = gs.prepare(tiny_folder / "dataset.yaml", tmp_path / "out", overrides=[f"compress={compress}"])
    assert data.compressed == (compress == "gzip")
    windows = WindowDataset(data, "train", augment=True, jitter_bp=7, seed=9)
    assert check_all(windows)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # as torch's own workers do: the threads of OpenMP do not outlive a fork
            os._exit(0 if check_all(windows) else 1)
        children.append(child)
    assert check_all(windows)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert check_all(pickle.loads(pickle.dumps(windows)))


def test_other_window_lengths_tile_the_split(tiny_prepared: Path) -> None:
    windows = WindowDataset(tiny_prepared, "train", window_bp=2048, margin_bp=256)
    codes, targets, _ = windows[0]
    assert codes.shape == (2048,) and targets.shape == (48, 2)
    assert len(windows) == -(-40_000 // 1536)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_bp": 1000}, "does not fit bins of 32 bp"),
        ({"window_bp": 1024, "margin_bp": 512}, "longer than two margins"),
        ({"split": "holdout"}, "train, valid"),
        ({"sampling": "peaks"}, "sampling is 'peaks'; it must be `all` or `signal`"),
        ({"signal_fraction": 0.0}, "signal_fraction is 0.0"),
        ({"signal_fraction": 1.5}, "signal_fraction is 1.5"),
    ],
)
def test_what_does_not_fit_is_told(tiny_prepared: Path, options: dict[str, object], words: str) -> None:
    split = str(options.pop("split", "train"))
    with pytest.raises(ValueError, match=words):
        WindowDataset(tiny_prepared, split, **options)  # type: ignore[arg-type]


def test_a_split_without_anything_to_learn_is_told(random_data: PreparedDataset) -> None:
    with pytest.raises(ValueError, match="no window with a bin that is not masked"):
        WindowDataset(random_data, "test")
