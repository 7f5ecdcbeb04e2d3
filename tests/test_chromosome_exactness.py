"""Two million bases in chunks of 64 kb, 256 kb and in one pass: the same values, whatever the mixer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from genossm.genome import Genome
from genossm.pipelines.chromosome import predict_chromosomes
from genossm.windows import Window
from tests.test_chromosome import CPU, in_one_pass, tiny_model

LENGTH_BP = 2_000_011
PATTERNS = {
    **{name: (name,) for name in ("mamba", "mamba2", "mamba3", "hydra", "lstm", "s4", "s4d", "h3")},
    "hybrid": ("mamba2", "attention"),
}


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    """Random bases, with GC that drifts along and a run of N over several chunks' ends."""
    dice, folder = np.random.default_rng(4), tmp_path_factory.mktemp("genome")
    strong = dice.random(LENGTH_BP) < 0.5 + 0.15 * np.sin(np.arange(LENGTH_BP) / 30_000)
    letters = np.frombuffer(b"ACTG", "S1")[2 * (dice.random(LENGTH_BP) < 0.5) + strong]
    letters[700_001:900_017] = b"N"
    (folder / "g.fa").write_bytes(b">chr\n" + letters.tobytes() + b"\n")
    return Genome(folder / "g.fa")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PATTERNS)
def test_chunks_of_64_and_256_kb_and_one_pass_agree(name: str, genome: Genome, tmp_path: Path) -> None:
    model = tiny_model("none", pattern=PATTERNS[name], window=65)
    whole = in_one_pass(model, genome, "chr")
    assert np.nanstd(whole, axis=0).max() > 5e-3  # far above the tolerance
    for chunk_bp in (1 << 16, 1 << 18):
        (values,) = predict_chromosomes(
            model, genome, [Window("chr", 0, LENGTH_BP)], chunk_bp=chunk_bp, device=CPU, overflow=tmp_path
        )
        np.testing.assert_allclose(values, whole, rtol=0, atol=1e-4)
