"""Prediction as people write it by hand, to be measured beside `predict`: pyfaidx, a DataLoader, the model, pyBigWig."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyBigWig
import pyfaidx
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genossm.checkpoint import load

WORKERS = 4
CODES = np.full(256, 4, np.int8)
CODES[np.frombuffer(b"ACGTacgt", np.uint8)] = [0, 1, 2, 3, 0, 1, 2, 3]


class Windows(Dataset[tuple[int, Tensor]]):
    """Item i: the first target base of window i, and its codes; N beyond the ends."""

    def __init__(self, genome: str, window_bp: int, margin_bp: int) -> None:
        self.genome, self.window_bp, self.margin_bp = genome, window_bp, margin_bp
        self.length = len(pyfaidx.Fasta(genome)["chr"])
        self.starts = range(0, self.length, window_bp - 2 * margin_bp)
        self._fasta: pyfaidx.Fasta | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        if self._fasta is None:
            self._fasta = pyfaidx.Fasta(self.genome)
        start = self.starts[index] - self.margin_bp
        low, high = max(start, 0), min(start + self.window_bp, self.length)
        codes = np.full(self.window_bp, 4, np.int8)
        bases = str(self._fasta["chr"][low:high]).encode()
        codes[low - start : high - start] = CODES[np.frombuffer(bases, np.uint8)]
        return self.starts[index], torch.from_numpy(codes)


def loop(
    run: str,
    genome: str,
    out: str,
    *,
    device: str,
    precision: Literal["bf16", "float32"],
    batch_size: int,
) -> None:
    """Write the bigWig of the one track of a model for the record `chr` of a FASTA, window by window."""
    model = load(run).to(device)
    windows = Windows(genome, model.window_bp, model.margin_bp)
    loader = DataLoader(windows, batch_size=batch_size, num_workers=WORKERS)
    Path(out).mkdir()
    bigwig = pyBigWig.open(f"{out}/{model.tracks[0].name}.bw", "w")
    bigwig.addHeader([("chr", windows.length)])
    margin_bins = model.margin_bp // model.bin_bp
    kind = torch.device(device).type
    for starts, tokens in loader:
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
            values = model.predict(tokens.to(device))
        cropped = values[:, margin_bins : values.shape[1] - margin_bins, 0].float().cpu().numpy()
        for start, codes, row in zip(starts.tolist(), tokens.numpy(), cropped, strict=True):
            target = codes[model.margin_bp : model.window_bp - model.margin_bp]
            for from_bp, to_bp, value in _bins(start, target, row, model.bin_bp, windows.length):
                bigwig.addEntries(["chr"] * len(from_bp), from_bp, ends=to_bp, values=value)
    bigwig.close()


def _bins(
    start: int, target: npt.NDArray[np.int8], row: npt.NDArray[np.float32], bin_bp: int, length_bp: int
) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """The bins inside the chromosome that are not mostly N."""
    from_bp = start + bin_bp * np.arange(len(row))
    to_bp = np.minimum(from_bp + bin_bp, length_bp)
    absent = (target.reshape(-1, bin_bp) == 4).sum(1) - (bin_bp - (to_bp - from_bp))
    kept = (from_bp < length_bp) & (2 * absent <= to_bp - from_bp)
    if kept.any():
        yield from_bp[kept].tolist(), to_bp[kept].tolist(), row[kept].tolist()
