"""Streams of windows for training and validation: int8 codes and compact targets, the same for any worker count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from genossm.dataset import PreparedDataset
from genossm.sequence import reverse_complement
from genossm.strands import partner_columns
from genossm.windows import Window, tile

Item = tuple[Tensor, Tensor, Tensor]


class WindowDataset(Dataset[Item]):
    """Windows of one split of a prepared dataset, map style.

    Item i is (codes int8 (window,), targets float32 (bins, tracks), mask bool (bins, tracks)); the bins are those of
    the window without its margins, False in the mask means no loss and no metric. Bases and bins outside the
    chromosome are code 4 and masked.

    With `augment`, an index counts on over epochs: index = epoch * len(self) + position, and the window is a pure
    function of (seed, epoch, position): its start is moved by a random whole number of bins, so that windows begin
    anywhere, its sequence by up to `jitter_bp` against its bins, and it is reverse-complemented half of the time,
    whereby stranded partners swap their targets.

    Args:
        dataset: a prepared dataset or its folder.
        split: `train`, `valid` or `test`.
        window_bp, margin_bp: other lengths than the dataset's, multiples of its bin.
        windows_per_epoch: len(self); None takes the number of windows that tile the split once.
        augment: see above; False gives the tiling windows themselves.
        reverse_complement: with `augment`, whether to flip strands.
        jitter_bp: with `augment`, see above.
        seed: of the augmentation.

    Raises:
        ValueError: window and margin do not fit the bin, the split has no window, or partners do not match.
    """

    def __init__(
        self,
        dataset: PreparedDataset | str | Path,
        split: str,
        *,
        window_bp: int | None = None,
        margin_bp: int | None = None,
        windows_per_epoch: int | None = None,
        augment: bool = False,
        reverse_complement: bool = True,
        jitter_bp: int = 0,
        seed: int = 0,
    ) -> None:
        self.dataset = dataset if isinstance(dataset, PreparedDataset) else PreparedDataset(dataset)
        self.window_bp = self.dataset.window_bp if window_bp is None else window_bp
        self.margin_bp = self.dataset.margin_bp if margin_bp is None else margin_bp
        self.bin_bp = self.dataset.bin_bp
        if (
            self.window_bp % self.bin_bp
            or self.margin_bp % self.bin_bp
            or self.window_bp <= 2 * self.margin_bp
        ):
            raise ValueError(
                f"a window of {self.window_bp} bp with margins of {self.margin_bp} bp does not fit bins of "
                f"{self.bin_bp} bp; both must be multiples of the bin, and the window longer than two margins"
            )
        self.augment, self.reverse_complement, self.jitter_bp = augment, reverse_complement, jitter_bp
        self.seed = seed
        self._partners = list(partner_columns(self.dataset.tracks))
        self._windows = self._tiles(split)
        if not self._windows:
            raise ValueError(
                f"the split {split!r} has no window: give it chromosomes in the dataset YAML (split.{split}); "
                f"splits are {', '.join(self.dataset.splits)}"
            )
        self._length = windows_per_epoch or len(self._windows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        epoch, position = divmod(index, self._length)
        window = self._windows[position % len(self._windows)]
        start, jitter, flip = window.start, 0, False
        if self.augment:
            random = np.random.default_rng([self.seed, epoch, position])
            target_bins = self.window_bp // self.bin_bp - 2 * (self.margin_bp // self.bin_bp)
            start += self.bin_bp * int(random.integers(-(target_bins // 2), target_bins - target_bins // 2))
            jitter = int(random.integers(-self.jitter_bp, self.jitter_bp + 1))
            flip = self.reverse_complement and bool(random.integers(2))
        codes = self.dataset.genome.window(window.chrom, start + jitter, start + jitter + self.window_bp)
        targets, mask = self._bins(window.chrom, start)
        if flip:
            codes = reverse_complement(codes)
            targets, mask = targets[::-1, self._partners], mask[::-1, self._partners]
        return torch.from_numpy(codes), torch.from_numpy(targets), torch.from_numpy(mask)

    def _tiles(self, split: str) -> list[Window]:
        if (self.window_bp, self.margin_bp) == (self.dataset.window_bp, self.dataset.margin_bp):
            return self.dataset.windows(split)
        return [
            window
            for chrom in self.dataset.splits.get(split, ())
            for window in tile(
                chrom,
                self.dataset.lengths[chrom],
                window_bp=self.window_bp,
                margin_bp=self.margin_bp,
                bin_bp=self.bin_bp,
                split=split,
            )
        ]

    def _bins(self, chrom: str, start: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Targets and mask of the window at `start`, margins left out, padded outside the chromosome."""
        first = (start + self.margin_bp) // self.bin_bp
        bins = (self.window_bp - 2 * self.margin_bp) // self.bin_bp
        available = -(-self.dataset.lengths[chrom] // self.bin_bp)
        low, high = min(max(first, 0), available), min(max(first + bins, 0), available)
        tracks = len(self.dataset.tracks)
        targets = np.zeros((bins, tracks), dtype=np.float32)
        mask = np.zeros((bins, tracks), dtype=np.bool_)
        if low < high:
            inside = slice(low - first, high - first)
            mask[inside] = self.dataset.mask(chrom, low, high) != 0
            targets[inside] = np.where(mask[inside], self.dataset.targets(chrom, low, high), 0)
        return targets, mask


class EpochSampler(Sampler[int]):
    """Indices of one epoch of a `WindowDataset`, in an order that depends on (seed, epoch) alone.

    Rank r of n takes every n-th index of that order, so that the ranks together see the same windows as one process;
    what is left over when n does not divide the epoch is dropped.
    """

    def __init__(self, length: int, *, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.length, self.seed, self.rank, self.ranks = length, seed, rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.ranks

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        share = order[self.rank : len(self) * self.ranks : self.ranks]
        return (self.epoch * self.length + int(position) for position in share)
