"""What of a dataset lies in the device's memory for the whole training, so that it is not read again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genossm.dataset import PreparedDataset
from genossm.device_genome import DeviceGenome
from genossm.errors import DeviceError
from genossm.packed import Packed, clear_masked, torch_dtype
from genossm.progress import say

PlaceName = Literal["auto", "host", "genome", "device"]

AUTO_SHARE = 0.1
"""`auto` takes at most this share of the device's memory."""
AUTO_TARGET_BYTES = 2**30
"""`auto` puts no more targets there than these: seconds of reading at the start."""

_SLICE_BYTES = 1 << 26


class DeviceTargets:
    """Stored targets and masks of some chromosomes on a device; windows of them are gathered at once.

    Attributes:
        chroms: the chromosomes it holds; windows name them by their place in this tuple.

    Args:
        dataset: the dataset.
        chroms: the chromosomes to hold.
        device: where to hold them.
    """

    def __init__(self, dataset: PreparedDataset, chroms: Sequence[str], device: torch.device | str) -> None:
        device = torch.device(device)
        self.chroms = tuple(chroms)
        bins = [dataset.bins(chrom) for chrom in self.chroms]
        firsts = np.cumsum([0, *bins])
        parts = [dataset.mask_parts(chrom) for chrom in self.chroms]
        tracks = len(dataset.tracks)
        columns = tracks if any(part.own for part in parts) else 1
        dtype = torch_dtype(dataset.storage.dtype)
        # One row more than there are bins: what lies outside a chromosome.
        self._targets = torch.zeros((int(firsts[-1]) + 1, tracks), dtype=dtype, device=device)
        self._usable = torch.zeros((int(firsts[-1]) + 1, columns), dtype=torch.bool, device=device)
        self._bins = torch.tensor(bins, device=device)
        self._first = torch.from_numpy(firsts[:-1]).to(device)
        step = max(1, _SLICE_BYTES // (tracks * max(1, dataset.storage.dtype.itemsize)))
        for number, (chrom, part) in enumerate(zip(self.chroms, parts, strict=True)):
            first = int(firsts[number])
            for start in range(0, bins[number], step):
                stop = min(start + step, bins[number])
                here = slice(first + start, first + stop)
                stored = dataset.stored(chrom, start, stop)
                stored[:, part.absent] = 0
                if columns > 1:
                    usable = dataset.mask(chrom, start, stop)
                    stored[~usable] = 0
                else:
                    usable = np.ones((stop - start, 1), dtype=np.bool_)
                    clear_masked(part, start, usable, stored)
                self._targets[here] = torch.from_numpy(stored).to(device)
                self._usable[here] = torch.from_numpy(usable).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the device."""
        parts = (self._targets, self._usable, self._bins, self._first)
        return sum(part.nbytes for part in parts)

    def windows(self, chroms: Tensor, first_bins: Tensor, bins: int) -> tuple[Tensor, Tensor]:
        """Targets (windows, bins, tracks) and usable, both as in `Packed`, of the bins from each first on.

        Args:
            chroms: int64 (windows,), places in `self.chroms`.
            first_bins: int64 (windows,), may be below 0 or past the end.
            bins: of a window.
        """
        position = first_bins[:, None] + torch.arange(bins, device=first_bins.device)
        inside = (position >= 0) & (position < self._bins[chroms][:, None])
        row = torch.where(inside, self._first[chroms][:, None] + position, len(self._targets) - 1)
        return self._targets[row], self._usable[row]


class DeviceData:
    """A dataset's genome and targets on a device.

    Attributes:
        genome, targets: None for what is read on the host instead.

    Args:
        dataset: the dataset.
        chroms: the chromosomes to hold.
        device: where to hold them.
        genome, targets: what to hold.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        chroms: Sequence[str],
        device: torch.device | str,
        *,
        genome: bool = True,
        targets: bool = True,
    ) -> None:
        self.genome = DeviceGenome(dataset.genome, device, chroms=chroms) if genome else None
        self.targets = DeviceTargets(dataset, chroms, device) if targets else None
        own = {chrom: number for number, chrom in enumerate(chroms)}
        self._numbers = torch.tensor([own.get(chrom, -1) for chrom in dataset.lengths], device=device)

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the device."""
        return sum(part.nbytes for part in (self.genome, self.targets) if part is not None)

    def complete(self, packed: Packed, window_bp: int, bins: int) -> Packed:
        """`packed`, on the device, with what it lacks gathered there: windows of so many bases and bins."""
        chroms = self._numbers[packed.places[0]]
        if self.genome is not None:
            packed = packed._replace(codes=self.genome.windows(chroms, packed.places[1], window_bp))
        if self.targets is not None:
            targets, usable = self.targets.windows(chroms, packed.places[2], bins)
            packed = packed._replace(targets=targets, usable=usable)
        return packed


def place_data(
    dataset: PreparedDataset, chroms: Sequence[str], device: torch.device, where: PlaceName
) -> DeviceData | None:
    """Put on the device what `where` says, and tell it; None for nothing.

    `host`: nothing; `genome`: the sequence; `device`: the sequence and the targets; `auto`: on CUDA as much of that as
    takes little of the device's memory and little time to read, on a CPU nothing.

    Raises:
        DeviceError: it does not fit into the device's memory.
    """
    bases = sum(-(-dataset.lengths[chrom] // 4) for chrom in chroms)
    row_bytes = len(dataset.tracks) * (dataset.storage.dtype.itemsize + 1)
    targets = sum(dataset.bins(chrom) for chrom in chroms) * row_bytes
    if where == "auto":
        if device.type != "cuda":
            return None
        room = AUTO_SHARE * torch.cuda.get_device_properties(device).total_memory
        fits = targets <= AUTO_TARGET_BYTES and bases + targets <= room
        where = "device" if fits else "genome" if bases <= room else "host"
    if where == "host":
        return None
    needed = bases + (targets if where == "device" else 0)
    what, lie = ("the genome and its targets", "lie") if where == "device" else ("the genome", "lies")
    if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]):
        raise DeviceError(
            f"{needed / 1e9:.1f} GB are needed for {what}, and {device} has {free / 1e9:.1f} GB free; set train.data_on "
            "to host" + (" or genome" if where == "device" else "")
        )
    data = DeviceData(dataset, chroms, device, targets=where == "device")
    say(f"{what} {lie} on {device}: {data.nbytes / 1e6:,.0f} MB")
    return data
