"""Loaders on a CUDA device: the same batches as on the CPU, wherever the data lie, also while graphs are recorded."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from genossm.device_data import DeviceData, PlaceName, place_data
from genossm.device_lock import DEVICE_LOCK
from genossm.loaders import WindowDataset
from genossm.stream_loader import LoaderName, WindowLoader

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("where", ["auto", "host", "genome", "device"])
@pytest.mark.parametrize(("loader", "workers"), [("threads", 0), ("threads", 2), ("processes", 2)])
def test_batches_are_those_of_the_cpu(
    stranded_prepared: Path, where: PlaceName, loader: LoaderName, workers: int
) -> None:
    windows = WindowDataset(stranded_prepared, "train", augment=True, jitter_bp=5, seed=3)
    data = place_data(windows.dataset, windows.chroms, CUDA, where)
    there = WindowLoader(
        windows, batch_size=3, device=CUDA, data=data, loader=loader, workers=workers, prefetch=2
    )
    plain = WindowLoader(windows, batch_size=3)
    for _ in range(2):
        for expected, batch in zip(plain, there, strict=True):
            torch.mm(torch.randn(512, 512, device=CUDA), torch.randn(512, 512, device=CUDA))
            for one, other in zip(expected, batch, strict=True):
                assert other.device == CUDA and torch.equal(one, other.cpu())


def test_a_graph_is_recorded_while_batches_are_made(stranded_prepared: Path) -> None:
    windows = WindowDataset(stranded_prepared, "train", augment=True, windows_per_epoch=400)
    loader = WindowLoader(windows, batch_size=2, device=CUDA, workers=2)
    weight = torch.randn(64, 64, device=CUDA)
    for number, batch in enumerate(loader):
        if number % 20 == 0:
            graph = torch.cuda.CUDAGraph()
            with DEVICE_LOCK, torch.cuda.graph(graph):
                product = weight * 3 + 1
            graph.replay()
            assert torch.equal(product, weight * 3 + 1)
        assert batch.codes.is_cuda


def test_a_pass_that_is_given_up_ends_its_thread(stranded_prepared: Path) -> None:
    windows = WindowDataset(stranded_prepared, "train", augment=True, windows_per_epoch=100)
    held = DeviceData(windows.dataset, windows.chroms, CUDA)
    loader = WindowLoader(windows, batch_size=2, device=CUDA, workers=1, data=held)
    batches = iter(loader)
    next(batches)
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name == "genossm-device"]
