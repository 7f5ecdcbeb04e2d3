"""targets.h5: every way to store targets and masks reads the same, and sparse things take no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyBigWig
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import genossm.pipelines.prepare_targets as module
from genossm.dataset_config import load_dataset_config
from genossm.dataset_inputs import open_inputs
from genossm.pipelines.prepare import prepare
from genossm.pipelines.prepare_targets import array_layout, is_compressed


@pytest.fixture
def mixed(folder: Path) -> Path:
    """The tiny dataset with a track masked in places, one absent from chrC, and excluded regions."""
    bigwig = pyBigWig.open(str(folder / "gaps.bw"), "w")
    bigwig.addHeader([("chrA", 40_000), ("chrB", 20_011)])
    bigwig.addEntries("chrA", 64, values=[0.5 + number for number in range(300)], span=32, step=64)
    bigwig.addEntries("chrB", 0, values=[1e-3] * 626, span=32, step=32)
    bigwig.close()
    (folder / "out.bed").write_text("chrA\t3200\t3300\nchrA\t10000\t10040\nchrB\t20000\t20011\n")
    content = yaml.safe_load((folder / "dataset.yaml").read_text())
    content["exclude"] = ["out.bed"]
    content["tracks"].append({"name": "gaps", "file": "gaps.bw", "kind": "signal", "missing": "mask"})
    (folder / "dataset.yaml").write_text(yaml.safe_dump(content))
    return folder / "dataset.yaml"


@pytest.mark.parametrize("storage", ["auto", "uint8", "float16", "float32"])
@pytest.mark.parametrize("compress", ["auto", "none", "gzip"])
def test_targets_and_masks_are_what_the_inputs_say(
    mixed: Path, tmp_path: Path, storage: str, compress: str
) -> None:
    prepared = prepare(mixed, tmp_path / "out", overrides=[f"storage={storage}", f"compress={compress}"])
    inputs = open_inputs(load_dataset_config(mixed))
    assert prepared.storage.dtype == ("float16" if storage == "auto" else storage)
    assert prepared.compressed == (compress == "gzip")
    for chrom in prepared.lengths:
        columns = [(values, mask) for _, values, mask in inputs.columns(chrom)]
        targets, mask = prepared.targets(chrom), prepared.mask(chrom)
        assert np.array_equal(mask, np.stack([mask for _, mask in columns], axis=1))
        for column, (true, _) in enumerate(columns):
            stated = prepared.storage.codings[column].largest_error
            np.testing.assert_allclose(targets[:, column], true, rtol=1.001 * stated + 1e-7)
        for start, stop in ((90, 330), (0, 0), (5, 20), (len(mask) - 1, len(mask))):
            start, stop = min(start, len(mask)), min(stop, len(mask))
            assert np.array_equal(prepared.targets(chrom, start, stop), targets[start:stop])
            assert np.array_equal(prepared.mask(chrom, start, stop), mask[start:stop])
        with h5py.File(tmp_path / "out" / "targets.h5") as file:
            assert np.array_equal(file[f"{chrom}/mask"][:] != 0, mask)
            assert file[f"{chrom}/targets"].shape == targets.shape
    parts = {chrom: prepared.mask_parts(chrom) for chrom in prepared.lengths}
    assert [part.own for part in parts.values()] == [True, False, False]
    assert [part.absent.tolist() for part in parts.values()] == [[], [], [1, 2]]
    assert list(zip(parts["chrA"].starts, parts["chrA"].ends, strict=True)) == [
        (0, 16),
        (100, 103),
        (312, 314),
    ]
    assert prepared.storage.codings[2].largest_error < {"uint8": 0.04}.get(storage, 5e-4)


def test_pieces_of_the_mask_in_which_all_counts_are_not_stored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 128)  # 64 bins of two tracks
    prepare(folder / "dataset.yaml", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "targets.h5") as file:
        assert file["chrA/mask"].chunks == (64, 2)
        assert file["chrA/mask"].id.get_num_chunks() == 1  # the one with the run of N, of 20
        assert file["chrB/mask"].id.get_num_chunks() == 0


def test_large_arrays_are_compressed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compressed(*overrides: str) -> bool:
        return is_compressed(
            open_inputs(load_dataset_config(folder / "dataset.yaml", overrides)), 1_000, "float16"
        )

    assert not compressed()
    assert compressed("compress=gzip")
    monkeypatch.setattr(module, "PLAIN_BYTES", 3_999)  # 1,000 bins x 2 tracks x 2 bytes are more
    assert compressed()
    assert not compressed("compress=none")


@given(bins=st.integers(1, 10**7), tracks=st.integers(1, 2_000), dtype=st.sampled_from(["uint8", "float32"]))
def test_pieces_are_of_whole_rows_and_blocks_end_where_pieces_do(bins: int, tracks: int, dtype: str) -> None:
    rows, columns = array_layout(bins, tracks, dtype, compressed=True)["chunks"]
    assert columns == tracks and 1 <= rows <= bins
    blocks = module._blocks(bins, tracks * np.dtype(dtype).itemsize)
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])] and blocks[-1][1] == bins
    assert all(start % rows == 0 for start, _ in blocks) or rows == bins


@given(tracks=st.integers(1, 9), bins=st.integers(1, 40), tile=st.integers(1, 12))
def test_a_turned_block_is_its_transpose(tracks: int, bins: int, tile: int) -> None:
    block: npt.NDArray[Any] = np.arange(tracks * bins).reshape(tracks, bins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_BINS", tile)
        assert np.array_equal(module._turned(block), block.T)
