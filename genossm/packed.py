"""A batch of windows as it crosses threads, processes and the bus, and the batch that a model reads, made of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genossm.dataset import MaskParts, PreparedDataset
from genossm.sequence import NO_BASE
from genossm.strands import partner_columns

_FEW_RUNS = 16


class Batch(NamedTuple):
    """What a model reads.

    Attributes:
        codes: int8 (batch, window), bases as 0..3 = ACGT, 4 = no base.
        targets: float32 (batch, bins, tracks), 0 where masked; the bins of the window without its margins.
        mask: bool (batch, bins, tracks), False where there is no loss and no metric: nowhere True in a window that
            only fills up the last batch of an epoch.
    """

    codes: Tensor
    targets: Tensor
    mask: Tensor


class Packed(NamedTuple):
    """A batch before it is on the device: of the forward strand, targets as they are stored, the mask in parts.

    Attributes:
        codes: int8 (batch, window), or (batch, 0) where they are read on the device.
        targets: of the stored dtype (batch, bins, tracks), 0 where masked; or (batch, 0, tracks) likewise.
        usable: bool (batch, bins, tracks), or (batch, bins, 1) where all tracks have the same;
        present: bool (batch, tracks): a bin counts where both are True.
        places: int64 (3, batch): the chromosome's number in the dataset, the first base of the codes, the first bin of the targets.
        flip: bool (batch,), windows to be reverse-complemented.
        real: bool (batch,), False for windows that only fill up the batch.
    """

    codes: Tensor
    targets: Tensor
    usable: Tensor
    present: Tensor
    places: Tensor
    flip: Tensor
    real: Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on `device`; without waiting, where it is in pinned memory."""
        return Packed(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pinned(self) -> Packed:
        """The same in memory from which a CUDA device copies beside other work."""
        return Packed(*(tensor.pin_memory() for tensor in self))

    def exceptions(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is to be done to single windows: the indices of those to flip, of those that only fill up the batch, and
        (window, track) of tracks that are absent, int64. Asked on the host, where that makes no device wait."""
        return self.flip.nonzero()[:, 0], (~self.real).nonzero()[:, 0], (~self.present).nonzero()

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(tensor.nbytes for tensor in self)


class Unpacker:
    """Makes a `Batch` of what was packed, on the device where that is: decodes targets, turns strands, joins masks.

    It may take over the arrays of what was packed.
    """

    def __init__(self, dataset: PreparedDataset, device: torch.device) -> None:
        partners = partner_columns(dataset.tracks)
        own = partners == tuple(range(len(partners)))
        self._partners = None if own else torch.tensor(partners, device=device)
        codings = dataset.storage.codings
        steps = [coding.step for coding in codings]
        self._steps = None if set(steps) == {1.0} else torch.tensor(steps, device=device)
        self._table: Tensor | None = None
        if any(coding.curve == "log" for coding in codings):
            tables = np.concatenate([coding.table() for coding in codings])
            self._table = torch.from_numpy(tables).to(device)
        self._first_entry = 256 * torch.arange(len(codings), device=device)

    def __call__(self, packed: Packed, flipped: Tensor, filling: Tensor, absent: Tensor) -> Batch:
        """The batch, given what `Packed.exceptions` says, on the same device."""
        codes = packed.codes
        targets = self._decode(packed.targets)
        mask = packed.usable.expand(-1, -1, targets.shape[2]).contiguous()
        if absent.numel():
            mask[absent[:, 0], :, absent[:, 1]] = False
        if filling.numel():
            targets[filling], mask[filling] = 0, False
        if flipped.numel():
            codes = codes.index_copy(0, flipped, complement(codes[flipped]).flip(1))
            for_partners = slice(None) if self._partners is None else self._partners
            targets[flipped] = targets[flipped].flip(1)[..., for_partners]
            mask[flipped] = mask[flipped].flip(1)[..., for_partners]
        return Batch(codes, targets, mask)

    def _decode(self, stored: Tensor) -> Tensor:
        """float32, as `Storage.decode` does it; may be `stored` itself."""
        if self._table is not None:
            return self._table[stored.long() + self._first_entry]
        values = stored.float()
        return values if self._steps is None else values.mul_(self._steps)


def complement(codes: Tensor) -> Tensor:
    """The complement of each code 0..4, int8, same shape, not reversed."""
    return torch.where(codes == NO_BASE, codes, 3 - codes)


def clear_masked(parts: MaskParts, first_bin: int, *arrays: npt.NDArray[Any]) -> None:
    """Set the rows of arrays, bins from `first_bin` on, to 0 or False where all tracks are masked."""
    begin = int(np.searchsorted(parts.ends, first_bin, side="right"))
    end = int(np.searchsorted(parts.starts, first_bin + len(arrays[0])))
    if begin == end:
        return
    starts = np.maximum(parts.starts[begin:end] - first_bin, 0)
    stops = np.minimum(parts.ends[begin:end] - first_bin, len(arrays[0]))
    if end - begin <= _FEW_RUNS:
        rows = [slice(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    else:
        sizes = stops - starts
        rows = [np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)]
    for array in arrays:
        for row in rows:
            array[row] = 0


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch dtype of a numpy dtype."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
