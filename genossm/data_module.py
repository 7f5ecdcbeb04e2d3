"""Training and validation windows for a Lightning trainer: shares of ranks, place on the device, state in the checkpoint."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from genossm.device_data import DeviceData, PlaceName, place_data
from genossm.errors import ConfigError
from genossm.loaders import WindowDataset
from genossm.sampling import count_steps
from genossm.stream_loader import LoaderName, WindowLoader


class WindowDataModule(lightning.LightningDataModule):
    """Windows of a prepared dataset for `Trainer.fit(module, datamodule=...)`; give the trainer `use_distributed_sampler=False`.

    Batches are `genossm.packed.Batch`, on the device already. The ranks together see each training and each validation
    window once an epoch; a checkpoint of any step holds the position in the data, and a training resumed from it sees
    the batches that the unbroken one would have seen.

    Args:
        training, validation: windows of one dataset.
        batch_size: windows of a step on each rank.
        workers: threads or processes that read, for each of the two.
        loader, prefetch: see `WindowLoader`.
        data_on: what lies on the device for the whole training, see `place_data`.

    Raises:
        ConfigError: the windows are of two datasets.
    """

    def __init__(
        self,
        training: WindowDataset,
        validation: WindowDataset,
        *,
        batch_size: int,
        workers: int = 2,
        loader: LoaderName = "threads",
        prefetch: int = 4,
        data_on: PlaceName = "auto",
    ) -> None:
        super().__init__()
        if training.dataset is not validation.dataset:
            raise ConfigError(
                "training and validation windows are of two datasets; make both of one PreparedDataset"
            )
        self.training, self.validation = training, validation
        self.batch_size, self.workers, self.prefetch = batch_size, workers, prefetch
        self.loader: LoaderName = loader
        self.data_on: PlaceName = data_on
        self._loaders: dict[str, WindowLoader] = {}
        self._placed: tuple[torch.device, DeviceData | None] | None = None

    def steps_per_epoch(self, ranks: int = 1) -> int:
        """Training steps of an epoch."""
        return count_steps(len(self.training), self.batch_size, ranks)

    def train_dataloader(self) -> WindowLoader:
        """The training batches of this rank."""
        return self._loader_of("training")

    def val_dataloader(self) -> WindowLoader:
        """The validation batches of this rank, in the order of the windows."""
        return self._loader_of("validation")

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data."""
        return self.train_dataloader().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from that position.

        Raises:
            CheckpointError: it is of other data, other settings or another number of ranks.
        """
        self.train_dataloader().load_state_dict(state_dict)

    def _loader_of(self, name: str) -> WindowLoader:
        if name not in self._loaders:
            trainer = self.trainer
            ranks, rank, device = (
                (1, 0, torch.device("cpu"))
                if trainer is None
                else (trainer.world_size, trainer.global_rank, trainer.strategy.root_device)
            )
            self._loaders[name] = WindowLoader(
                self.training if name == "training" else self.validation,
                batch_size=self.batch_size,
                shuffle=name == "training",
                workers=self.workers,
                loader=self.loader,
                prefetch=self.prefetch,
                device=device,
                data=self._data(device),
                rank=rank,
                ranks=ranks,
            )
        return self._loaders[name]

    def _data(self, device: torch.device) -> DeviceData | None:
        """What lies on the device, for both kinds of windows."""
        if self._placed is None or self._placed[0] != device:
            chroms = tuple(dict.fromkeys((*self.training.chroms, *self.validation.chroms)))
            self._placed = device, place_data(self.training.dataset, chroms, device, self.data_on)
        return self._placed[1]
