"""Genome and targets on a device: the same as read on the host, at ends, at runs of N, on either strand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genossm import device_data, device_genome
from genossm.dataset import PreparedDataset
from genossm.device_data import DeviceData, DeviceTargets, place_data
from genossm.device_genome import DeviceGenome
from genossm.errors import DataError, DeviceError
from genossm.genome import Genome
from genossm.loaders import WindowDataset
from genossm.packed import Batch
from genossm.sequence import reverse_complement
from genossm.stream_loader import WindowLoader
from tests.random_dataset import random_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[0, 1])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """A random dataset, of the second one all tracks have the same mask but for absent ones."""
    return random_dataset(tmp_path_factory.mktemp("random"), request.param, own_masks=request.param == 0)


@settings(max_examples=100)
@given(st.data())
def test_windows_are_those_of_the_genome(
    tmp_path_factory: pytest.TempPathFactory, choose: st.DataObject
) -> None:
    sequences = choose.draw(st.lists(st.text("ACGTN", min_size=1, max_size=40), min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text("".join(f">c{number}\n{text}\n" for number, text in enumerate(sequences)))
    genome = Genome(path)
    names = choose.draw(st.permutations(genome.names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_genome, "_SLICE_BP", choose.draw(st.sampled_from([4, 8, 1 << 20])))
        held = DeviceGenome(genome, "cpu", chroms=names)
    length = choose.draw(st.integers(1, 50))
    asked = choose.draw(
        st.lists(
            st.tuples(st.integers(0, len(names) - 1), st.integers(-60, 60), st.booleans()),
            min_size=1,
            max_size=6,
        )
    )
    numbers, starts, flips = (torch.tensor(part) for part in zip(*asked, strict=True))
    found = held.windows(numbers, starts, length, flip=flips)
    assert found.dtype == torch.int8
    for row, (number, start, flip) in enumerate(asked):
        codes = genome.window(names[number], start, start + length)
        np.testing.assert_array_equal(found[row], reverse_complement(codes) if flip else codes)
    forward = held.windows(numbers, starts, length)
    assert torch.equal(forward[~flips], found[~flips])


def test_a_genome_takes_two_bits_a_base(tmp_path: Path) -> None:
    bases = np.random.default_rng(1).choice(np.frombuffer(b"ACGT", dtype="S1"), 1_000_003)
    bases[5_000:60_000] = b"N"
    (tmp_path / "genome.fa").write_text(f">c\n{bases.tobytes().decode()}\n")
    genome = Genome(tmp_path / "genome.fa")
    held = DeviceGenome(genome, "cpu")
    assert held.nbytes < 1_000_003 / 4 + 100
    codes = held.windows(torch.tensor([0]), torch.tensor([-10]), 1_000_023)[0]
    np.testing.assert_array_equal(codes, genome.window("c", -10, 1_000_013))
    with pytest.raises(DataError, match="cX"):
        DeviceGenome(genome, "cpu", chroms=["cX"])
    with pytest.raises(DataError, match="name at least one"):
        DeviceGenome(genome, "cpu", chroms=[])


@pytest.mark.parametrize("slice_bytes", [1, 1 << 26])
def test_targets_are_those_of_the_dataset(
    data: PreparedDataset, monkeypatch: pytest.MonkeyPatch, slice_bytes: int
) -> None:
    monkeypatch.setattr(device_data, "_SLICE_BYTES", slice_bytes)
    chroms = ("c4", "c2", "c0")
    held = DeviceTargets(data, chroms, "cpu")
    random = np.random.default_rng(3)
    numbers, firsts = random.integers(0, 3, 40), random.integers(-60, 1_600, 40)
    stored, usable = held.windows(torch.from_numpy(numbers), torch.from_numpy(firsts), 50)
    for row, (number, first) in enumerate(zip(numbers, firsts, strict=True)):
        chrom = chroms[number]
        targets, mask = data.targets(chrom), data.mask(chrom)
        decoded = data.storage.decode(stored[row].numpy())
        for place in range(50):
            inside = 0 <= first + place < len(mask)
            whole = usable[row, place].expand(3).numpy().copy()
            whole[data.mask_parts(chrom).absent] = False
            np.testing.assert_array_equal(whole, mask[first + place] if inside else [False] * 3)
            expected = np.where(whole, targets[first + place], 0) if inside else [0] * 3
            np.testing.assert_array_equal(decoded[place], expected)


@pytest.mark.parametrize(("genome", "targets"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_same_batches_wherever_the_data_lie(
    data: PreparedDataset, genome: bool, targets: bool, workers: int
) -> None:
    windows = WindowDataset(data, "train", augment=True, jitter_bp=9, seed=4)
    held = DeviceData(data, ("c1", "c4", "c2", "c0"), "cpu", genome=genome, targets=targets)
    assert held.nbytes > 0
    plain = WindowLoader(windows, batch_size=4)
    there = WindowLoader(windows, batch_size=4, data=held, workers=workers)
    for _ in range(2):
        for expected, batch in zip(plain, there, strict=True):
            assert isinstance(batch, Batch)
            for one, other in zip(expected, batch, strict=True):
                assert torch.equal(one, other)


def test_what_is_put_on_the_device_is_said(
    data: PreparedDataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chroms = ("c0", "c1")
    assert place_data(data, chroms, CPU, "host") is None
    assert place_data(data, chroms, CPU, "auto") is None
    assert capsys.readouterr().err == ""
    for where, words, has_targets in (
        ("device", "the genome and its targets lie on cpu", True),
        ("genome", "the genome lies on cpu", False),
    ):
        held = place_data(data, chroms, CPU, where)  # type: ignore[arg-type]
        assert held is not None and held.genome is not None and (held.targets is not None) == has_targets
        assert words in capsys.readouterr().err


class FakeProperties:
    """A CUDA device's memory."""

    def __init__(self, total_memory: int) -> None:
        self.total_memory = total_memory


@pytest.mark.parametrize(
    ("total", "most_targets", "expected"),
    [(10**9, 2**30, "device"), (10**9, 10, "genome"), (100_000, 2**30, "genome"), (10_000, 2**30, None)],
)
def test_auto_takes_little_of_a_cuda_device(
    data: PreparedDataset,
    monkeypatch: pytest.MonkeyPatch,
    total: int,
    most_targets: int,
    expected: str | None,
) -> None:
    made: list[str] = []

    class Recorded:
        nbytes = 1

        def __init__(self, *arguments: object, targets: bool) -> None:
            made.append("device" if targets else "genome")

    monkeypatch.setattr(device_data, "DeviceData", Recorded)
    monkeypatch.setattr(device_data, "AUTO_TARGET_BYTES", most_targets)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeProperties(total))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    place_data(data, tuple(data.lengths), torch.device("cuda", 0), "auto")
    assert made == ([] if expected is None else [expected])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    with pytest.raises(DeviceError, match=r"cuda:0 has 0\.0 GB free; set train\.data_on to host or genome"):
        place_data(data, tuple(data.lengths), torch.device("cuda", 0), "device")
