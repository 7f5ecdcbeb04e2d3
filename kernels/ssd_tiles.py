"""How the SSD kernels are built for a dtype, sizes and a device's shared memory. Measured on an H200: docs/notes.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIM, STATE, STATE_ELEMENTS = 128, 256, 16384
"""The largest head_dim and state that the kernels take, and the largest product of the two."""
CHUNKS = (64, 128, 256)
RESERVED = 24 * 1024
"""Bytes of shared memory for exchanges between threads, beyond the tiles."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is built: positions of a tile, warps, loads in flight, registers a thread (None: as many as it takes)."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


@dataclass(frozen=True)
class Tiles:
    """Positions of a chunk, and how each kernel is built; `output` works on half a chunk, `near` and `far` on as many rows."""

    chunk: int
    states: Launch
    output: Launch
    near: Launch
    far: Launch
    keys: Launch


def padded(size: int) -> int:
    """The tile extent that holds head_dim or state: a power of two of at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def padded_head(head_dim: int, dtype: torch.dtype) -> int:
    """The same for head_dim: at least 64 in 16 bits, where tiles of 32 columns come out wrong (Triton 3.6, H200)."""
    return padded(head_dim) if dtype == torch.float32 else max(64, padded(head_dim))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def chunk_for(dtype: torch.dtype, head_dim: int, state: int, budget: int, chunk: int | None) -> int | None:
    """The chunk of `tiles_for`, or None where the kernels do not fit; torch.compile takes it as it is."""
    tiles = tiles_for(dtype, head_dim, state, budget, chunk)
    return None if tiles is None else tiles.chunk


def tiles_for(dtype: torch.dtype, head_dim: int, state: int, budget: int, chunk: int | None) -> Tiles | None:
    """How the kernels are built within `budget` bytes of shared memory a program, or None where they do not fit.

    Args:
        chunk: positions of a chunk (one of CHUNKS), or None for the largest that fits and pays.
    """
    key = (dtype, head_dim, state, budget, chunk)
    if key not in _chosen:
        _chosen[key] = _choose(
            4 if dtype == torch.float32 else 2, padded_head(head_dim, dtype), padded(state), budget, chunk
        )
    return _chosen[key]


_chosen: dict[tuple[torch.dtype, int, int, int, int | None], Tiles | None] = {}


def _choose(size: int, P: int, N: int, budget: int, chunk: int | None) -> Tiles | None:
    """The same for elements of `size` bytes and padded extents."""

    def output(positions: int, stages: int) -> int:
        return stages * (positions * P + 2 * P * N) * size + positions // 2 * N * size + RESERVED

    def least() -> int:
        # The estimate is generous: compiled for sm_86 and sm_80, chunks of 64 take 66 KiB at the most of the four kernels
        # where head_dim and state are 128 (float32; 48 in 16 bits), 41 where they are 64 and 128.
        return (P * N + CHUNKS[0] // 2 * (P + N)) * size + RESERVED

    def keys(rows: int, stages: int) -> int:
        return max(stages * (rows * rows + rows * N), stages * (rows * P + P * N)) * size + RESERVED

    for positions in (chunk,) if chunk else ((256, 128, 64) if size == 2 else (128, 64)):
        for stages in (3, 2, 1) if size == 2 else (1,):
            smallest = positions == CHUNKS[0] and stages == 1
            if output(positions, stages) > budget and not (smallest and least() <= budget):
                continue
            half = positions // 2
            warps = 8 if half >= 64 and (half > 64 or size == 4) else 4
            wide = P * N > 8192  # twice the registers for states
            loaded = 128 if size == 2 and not wide and 256 * (P + N) * size + RESERVED <= budget else 32
            if size == 4:
                near = far = Launch(min(32, half), 4, 1)
                of_keys = Launch(min(32, half), 8, 1)
            else:
                tile = min(64, half)
                near, far = Launch(tile, 8 if tile == 64 else 4, 3, 128), Launch(tile, 4, 3)
                rows = 128 if half >= 128 and N > 64 and not wide and keys(128, 2) <= budget else tile
                deep = next((count for count in (3, 2) if not wide and keys(rows, count) <= budget), 1)
                of_keys = Launch(rows, 4 if N <= 64 else 8, 2 if wide and keys(rows, 2) <= budget else deep)
            return Tiles(
                positions,
                Launch(min(loaded, positions), 8 if wide else 4, 3 if size == 2 and N <= 64 else 2),
                Launch(half, warps, stages),
                near,
                far,
                of_keys,
            )
    return None
