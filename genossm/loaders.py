"""Windows of a prepared dataset, one by one or packed as batches: where each is read depends on its index alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genossm.code_reader import CodeReader
from genossm.dataset import PreparedDataset
from genossm.packed import Packed, Unpacker, clear_masked
from genossm.sampling import Augmentation, Place, Places
from genossm.tiles import Unmasked, signal_weights, tile_split

Item = tuple[Tensor, Tensor, Tensor]
SamplingName = Literal["all", "signal"]


class WindowDataset(Dataset[Item]):
    """Windows of one split of a prepared dataset, map style.

    Item i is (codes int8 (window,), targets float32 (bins, tracks), mask bool (bins, tracks)); the bins are those of
    the window without its margins, False in the mask means no loss and no metric, and the target is 0 there. Bases
    and bins outside the chromosome are code 4 and masked. Windows of which every bin is masked are left out.

    With `augment`, an index counts on over epochs: index = epoch * len(self) + position, and the window is a pure
    function of (seed, epoch, position): its start is moved by a random whole number of bins, so that windows begin
    anywhere, its sequence by up to `jitter_bp` against its bins, and it is reverse-complemented half of the time,
    whereby stranded partners swap their targets.

    Files are opened when they are first read, again in each process; threads, forks and pickling are safe. In a
    plain loop (`genossm.stream_loader.WindowLoader` is faster, and shuffles alike for any number of workers):

        windows = gs.WindowDataset("yeast/", "train", augment=True)
        for codes, targets, mask in torch.utils.data.DataLoader(windows, batch_size=4, shuffle=True):
            loss = model.heads.losses(model(codes), targets, mask, total_weight=0.2).mean()
            loss.backward()
            ...

    Args:
        dataset: a prepared dataset or its folder.
        split: `train`, `valid` or `test`.
        window_bp, margin_bp: other lengths than the dataset's, multiples of its bin.
        windows_per_epoch: len(self); None takes the number of windows that tile the split once.
        augment: see above; False gives the tiling windows themselves.
        reverse_complement: with `augment`, whether to flip strands.
        jitter_bp: with `augment`, see above.
        seed: of the augmentation and of what is drawn.
        sampling: `all` takes the windows in turn; `signal` draws a share of each epoch's windows in proportion to
            the signal in them, mean over the tracks. That reads all targets of the split once.
        signal_fraction: that share, above 0 and at most 1.

    Raises:
        ValueError: window and margin do not fit the bin, the split has no window that counts, partners do not match,
            a setting is out of range, or there is no signal to sample.
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
        sampling: SamplingName = "all",
        signal_fraction: float = 0.5,
    ) -> None:
        self.dataset = dataset if isinstance(dataset, PreparedDataset) else PreparedDataset(dataset)
        self.window_bp = self.dataset.window_bp if window_bp is None else window_bp
        self.margin_bp = self.dataset.margin_bp if margin_bp is None else margin_bp
        self.bin_bp = self.dataset.bin_bp
        self._check(sampling, signal_fraction)
        self.augment, self.reverse_complement, self.jitter_bp = augment, reverse_complement, jitter_bp
        self.seed, self.sampling, self.signal_fraction = seed, sampling, signal_fraction
        self.bins = (self.window_bp - 2 * self.margin_bp) // self.bin_bp
        self._unpacker = Unpacker(self.dataset, torch.device("cpu"))
        self._unmasked = Unmasked(self.dataset)
        windows = [
            window
            for window in tile_split(self.dataset, split, window_bp=self.window_bp, margin_bp=self.margin_bp)
            if self._counts(window.chrom, window.start)
        ]
        if not windows:
            raise ValueError(
                f"the split {split!r} has no window with a bin that is not masked: give it chromosomes in the dataset "
                f"YAML (split.{split}); splits are {', '.join(self.dataset.splits)}"
            )
        self._length = windows_per_epoch or len(windows)
        self.chroms: tuple[str, ...] = tuple(dict.fromkeys(window.chrom for window in windows))
        self._numbers = {chrom: number for number, chrom in enumerate(self.dataset.lengths)}
        parts = {chrom: self.dataset.mask_parts(chrom) for chrom in self.chroms}
        self._absent = {chrom: part.absent for chrom, part in parts.items() if part.absent.size}
        self._mask_columns = len(self.dataset.tracks) if any(part.own for part in parts.values()) else 1
        self._places = Places(
            windows,
            self._length,
            seed=seed,
            augmentation=Augmentation(self.bin_bp, self.bins, jitter_bp, reverse_complement)
            if augment
            else None,
            counts=self._counts,
            weights=signal_weights(self.dataset, windows, margin_bp=self.margin_bp)
            if sampling == "signal"
            else None,
            signal_fraction=signal_fraction,
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        packed = self.read([index])
        codes, targets, mask = self._unpacker(packed, *packed.exceptions())
        return codes[0], targets[0], mask[0]

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> Place:
        """Where item `index` is read."""
        return self._places(*divmod(index, self._length))

    def read(
        self,
        indices: Sequence[int],
        *,
        real: Sequence[bool] | None = None,
        codes: bool = True,
        targets: bool = True,
    ) -> Packed:
        """Items as one packed batch, on the host.

        Args:
            indices: of the items.
            real: False for items that only fill up the batch; None for none.
            codes, targets: False leaves them out.
        """
        places = [self.place(index) for index in indices]
        count, tracks = len(places), len(self.dataset.tracks)
        bins = self.bins if targets else 0
        firsts = [place.start + place.jitter_bp for place in places]
        first_bins = [(place.start + self.margin_bp) // self.bin_bp for place in places]

        code_rows = np.empty((count, self.window_bp if codes else 0), dtype=np.int8)
        target_rows = np.empty((count, bins, tracks), dtype=self.dataset.storage.dtype)
        usable = np.empty((count, bins, self._mask_columns), dtype=np.bool_)
        present = np.ones((count, tracks), dtype=np.bool_)
        for row, place in enumerate(places):
            if codes:
                self._codes.fill(code_rows[row], place.chrom, firsts[row])
            if targets:
                self._fill(target_rows[row], usable[row], place.chrom, first_bins[row])
            if place.chrom in self._absent:
                present[row, self._absent[place.chrom]] = False
        numbers = [self._numbers[place.chrom] for place in places]
        arrays = (
            code_rows,
            target_rows,
            usable,
            present,
            np.array([numbers, firsts, first_bins], dtype=np.int64),
            np.array([place.flip for place in places], dtype=np.bool_),
            np.array([True] * count if real is None else real, dtype=np.bool_),
        )
        return Packed(*map(torch.from_numpy, arrays))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_codes", None)
        return state

    @cached_property
    def _codes(self) -> CodeReader:
        return CodeReader(self.dataset.genome)

    def _fill(self, targets: npt.NDArray[Any], usable: npt.NDArray[np.bool_], chrom: str, first: int) -> None:
        """Stored targets and mask of the bins from `first` on; targets are 0 where masked and outside the chromosome."""
        parts = self.dataset.mask_parts(chrom)
        low, high = max(first, 0), min(first + self.bins, self.dataset.bins(chrom))
        if high - low < self.bins:
            targets[:], usable[:] = 0, False
            if low >= high:
                return
            targets, usable = targets[low - first : high - first], usable[low - first : high - first]
        self.dataset.stored(chrom, low, high, out=targets)
        if parts.own:
            usable[:] = self.dataset.mask(chrom, low, high)
            targets[~usable] = 0
            return
        usable[:] = True
        targets[:, parts.absent] = 0
        clear_masked(parts, low, targets, usable)

    def _counts(self, chrom: str, start: int) -> bool:
        """Whether the window at `start` has a bin that counts."""
        first = (start + self.margin_bp) // self.bin_bp
        return self._unmasked.any(chrom, first, first + self.bins)

    def _check(self, sampling: str, signal_fraction: float) -> None:
        if (
            self.window_bp % self.bin_bp
            or self.margin_bp % self.bin_bp
            or self.window_bp <= 2 * self.margin_bp
        ):
            raise ValueError(
                f"a window of {self.window_bp} bp with margins of {self.margin_bp} bp does not fit bins of "
                f"{self.bin_bp} bp; both must be multiples of the bin, and the window longer than two margins"
            )
        if sampling not in ("all", "signal"):
            raise ValueError(f"sampling is {sampling!r}; it must be `all` or `signal`")
        if not 0 < signal_fraction <= 1:
            raise ValueError(f"signal_fraction is {signal_fraction}; it must be above 0 and at most 1")
