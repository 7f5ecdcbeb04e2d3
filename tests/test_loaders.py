"""Windows for training: what an item holds, and that it depends on (seed, epoch, position) alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from genossm.dataset import PreparedDataset
from genossm.loaders import EpochSampler, WindowDataset
from genossm.sequence import reverse_complement


def test_tiling_windows_hold_the_bases_and_bins_of_the_dataset(tiny_prepared: Path) -> None:
    data = PreparedDataset(tiny_prepared)
    windows = WindowDataset(data, "train")
    assert len(windows) == len(data.windows("train"))
    seen = 0
    for index, window in enumerate(data.windows("train")):
        codes, targets, mask = windows[index]
        np.testing.assert_array_equal(codes, data.genome.window(window.chrom, window.start, window.end))
        assert codes.dtype == torch.int8 and targets.dtype == torch.float32 and mask.dtype == torch.bool
        first = (window.start + data.margin_bp) // data.bin_bp
        inside = min(len(targets), data.bins(window.chrom) - first)
        stored = data.mask(window.chrom, first, first + inside) != 0
        np.testing.assert_array_equal(mask[:inside], stored)
        np.testing.assert_array_equal(
            targets[:inside].numpy()[stored], data.targets(window.chrom, first, first + inside)[stored]
        )
        assert not mask[inside:].any()
        seen += inside
    assert seen == data.bins("chrA")


def test_augmented_windows_are_moved_pieces_of_the_chromosome(tiny_prepared: Path) -> None:
    data = PreparedDataset(tiny_prepared)
    windows = WindowDataset(data, "train", augment=True, jitter_bp=5, seed=3, windows_per_epoch=24)
    genome = data.genome.window("chrA", -8192, data.lengths["chrA"] + 8192)
    all_targets, all_mask = data.targets("chrA"), data.mask("chrA") != 0
    flips = set()
    for index in range(48):
        codes, targets, mask = (part.numpy() for part in windows[index])
        places = []
        for flip in (False, True):
            forward = reverse_complement(codes) if flip else codes
            probe = forward[1024:1152].tobytes()
            position = genome.tobytes().find(probe)
            if position >= 0 and len(set(probe)) > 1:
                places.append((flip, position - 1024 - 8192))
        if not places:  # a window that is mostly outside the chromosome
            continue
        (flip, start), *_ = places
        flips.add(flip)
        first = round((start + data.margin_bp) / data.bin_bp)
        assert abs(start + data.margin_bp - first * data.bin_bp) <= 5
        if flip:
            targets, mask = targets[::-1], mask[::-1]
        low, high = max(0, -first), min(len(mask), data.bins("chrA") - first)
        np.testing.assert_array_equal(mask[low:high], all_mask[first + low : first + high])
        kept = all_targets[first + low : first + high] * mask[low:high]
        np.testing.assert_array_equal(targets[low:high], kept)
        assert not mask[:low].any() and not mask[high:].any()
    assert flips == {False, True}


def test_partners_swap_their_targets_on_the_other_strand(stranded_prepared: Path) -> None:
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


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_gives_the_same_stream(tiny_prepared: Path, workers: int) -> None:
    windows = WindowDataset(tiny_prepared, "train", augment=True, jitter_bp=3, seed=1)
    sampler = EpochSampler(len(windows), seed=1)
    sampler.set_epoch(2)
    stream = [batch[0] for batch in DataLoader(windows, batch_size=3, sampler=sampler, num_workers=workers)]
    expected = [windows[index][0] for index in sampler]
    assert torch.equal(torch.cat(stream), torch.stack(expected))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_an_epoch_without_overlap(ranks: int) -> None:
    whole = EpochSampler(20, seed=4)
    whole.set_epoch(5)
    order = list(whole)
    assert sorted(order) == list(range(100, 120))
    shares = []
    for rank in range(ranks):
        sampler = EpochSampler(20, seed=4, rank=rank, ranks=ranks)
        sampler.set_epoch(5)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == 20 // ranks
    assert [index for together in zip(*shares, strict=True) for index in together] == order[
        : 20 // ranks * ranks
    ]
    whole.set_epoch(6)
    assert [index - 20 for index in whole] != order


def test_other_window_lengths_tile_the_split(tiny_prepared: Path) -> None:
    windows = WindowDataset(tiny_prepared, "train", window_bp=2048, margin_bp=256)
    codes, targets, _ = windows[0]
    assert codes.shape == (2048,) and targets.shape == (48, 2)
    assert len(windows) == -(-40_000 // 1536)


def test_what_does_not_fit_is_told(tiny_prepared: Path) -> None:
    with pytest.raises(ValueError, match="does not fit bins of 32 bp"):
        WindowDataset(tiny_prepared, "train", window_bp=1000)
    with pytest.raises(ValueError, match="longer than two margins"):
        WindowDataset(tiny_prepared, "train", window_bp=1024, margin_bp=512)
    with pytest.raises(Exception, match="train, valid"):
        WindowDataset(tiny_prepared, "holdout")
