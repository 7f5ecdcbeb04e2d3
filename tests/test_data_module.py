"""The data module under a real trainer: mid-epoch resumption, shares of ranks, and checkpoints of other data."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from genossm.data_module import WindowDataModule
from genossm.dataset import PreparedDataset
from genossm.errors import CheckpointError, ConfigError
from genossm.loaders import WindowDataset
from genossm.packed import Batch
from tests.random_dataset import random_dataset

EPOCHS = 3


class Recorder(lightning.LightningModule):
    """A model that learns next to nothing and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        codes, targets, mask = batch
        self.trained.append((self.global_step, hash(codes.numpy().tobytes() + mask.numpy().tobytes())))
        return self.weight * (targets * mask).mean()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.validated += [
            hash(codes.numpy().tobytes())
            for codes, mask in zip(batch.codes, batch.mask, strict=True)
            if mask.any()
        ]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Save(lightning.Callback):
    """Saves a checkpoint after a step, or at the end of an epoch."""

    def __init__(self, path: Path, *, step: int | None = None, epoch: int | None = None) -> None:
        self.path, self.step, self.epoch = path, step, epoch

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return random_dataset(tmp_path_factory.mktemp("random"), 1)


def module_of(data: PreparedDataset, *, seed: int = 5, **options: Any) -> WindowDataModule:
    training = WindowDataset(data, "train", augment=True, jitter_bp=3, seed=seed)
    settings = {"batch_size": 4, "workers": 0, **options}
    return WindowDataModule(training, WindowDataset(data, "valid"), **settings)


def fit(
    module: WindowDataModule, *, callbacks: list[lightning.Callback] | None = None, resume: Path | None = None
) -> Recorder:
    """Train for three epochs, from a checkpoint on if one is given."""
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*srun.*")  # where Slurm is installed
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*srun.*")  # where Slurm is installed
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            callbacks=callbacks or [],
            plugins=[LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        trainer.fit(recorder, datamodule=module, ckpt_path=resume, weights_only=True)
    return recorder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["first", "middle", "last", "next", "later", "whole"])
def test_a_training_resumed_anywhere_sees_the_batches_of_the_unbroken_one(
    data: PreparedDataset, tmp_path: Path, place: str, workers: int
) -> None:
    steps = module_of(data).steps_per_epoch()
    assert steps > 4
    at = {"first": 1, "middle": 3, "last": steps, "next": steps + 1, "later": 2 * steps - 1}.get(place)
    save = Save(tmp_path / "state.ckpt", step=at, epoch=0 if at is None else None)
    unbroken = fit(module_of(data), callbacks=[save])
    assert [step for step, _ in unbroken.trained] == list(range(EPOCHS * steps))
    assert len(set(unbroken.trained)) == EPOCHS * steps
    resumed = fit(module_of(data, workers=workers), resume=tmp_path / "state.ckpt")
    assert resumed.trained == unbroken.trained[steps if at is None else at :]
    epochs_left = len(resumed.validated) // len(module_of(data).validation)
    assert resumed.validated == unbroken.validated[-len(resumed.validated) :] and epochs_left >= 1


def test_validation_sees_each_window_once_in_order(data: PreparedDataset) -> None:
    module = module_of(data)
    assert len(module.validation) % module.batch_size
    recorder = fit(module)
    each = [hash(codes.numpy().tobytes()) for codes, _, _ in module.validation]
    assert recorder.validated == EPOCHS * each


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_training_and_validation(data: PreparedDataset, ranks: int) -> None:
    shares: dict[str, list[list[bytes]]] = {"train": [], "valid": []}
    for rank in range(ranks):
        module = module_of(data)
        module.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=ranks, global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        for name, loader in (("train", module.train_dataloader()), ("valid", module.val_dataloader())):
            batches = list(loader)
            assert len(batches) == len(loader)
            shares[name].append(
                [
                    codes.numpy().tobytes()
                    for batch in batches
                    for codes, mask in zip(batch.codes, batch.mask, strict=True)
                    if mask.any()
                ]
            )
    module = module_of(data)
    assert len(batches) == -(-len(module.validation) // (4 * ranks))
    for name, windows in (("train", module.training), ("valid", module.validation)):
        together = sorted(item for part in shares[name] for item in part)
        assert together == sorted(codes.numpy().tobytes() for codes, _, _ in windows)
        assert max(map(len, shares[name])) - min(map(len, shares[name])) <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [({"seed": 6}, "seed 5 instead of 6"), ({"batch_size": 3}, "batch_size 4 instead of 3")],
)
def test_a_checkpoint_of_other_data_is_refused(
    data: PreparedDataset, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    fit(module_of(data), callbacks=[Save(tmp_path / "state.ckpt", epoch=0)])
    with pytest.raises(CheckpointError, match=words):
        fit(module_of(data, **options), resume=tmp_path / "state.ckpt")


def test_data_on_the_device_are_shared_by_training_and_validation(
    data: PreparedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = fit(module_of(data))
    placed = fit(module_of(data, data_on="device"))
    assert placed.trained == plain.trained and placed.validated == plain.validated
    assert capsys.readouterr().err.count("lie on cpu") == 1


def test_windows_of_two_datasets_are_refused(data: PreparedDataset) -> None:
    other = PreparedDataset(data.folder)
    with pytest.raises(ConfigError, match="of two datasets"):
        WindowDataModule(WindowDataset(data, "train"), WindowDataset(other, "valid"), batch_size=2)
