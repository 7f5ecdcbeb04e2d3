"""Simulate a genome of any size with many tracks of sparse peaks: something to measure on, with nothing to learn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import yaml

from genossm.errors import ConfigError
from genossm.outputs.bigwig import write_bigwig
from genossm.pipelines.simulate import LINE_BP, holds_simulation, simulation_folder, write_record
from genossm.progress import progress, say

# The chromosomes of the human assembly GRCh38 in Mb; others are scaled to them.
CHROMOSOME_MB = {
    **dict(
        zip(
            [f"chr{number}" for number in range(1, 23)],
            [249.0, 242.2, 198.3, 190.2, 181.5, 170.8, 159.3, 145.1, 138.4, 133.8, 135.1, 133.3, 114.4, 107.0,
             102.0, 90.3, 83.3, 80.4, 58.6, 64.4, 46.7, 50.8],
            strict=True,
        )
    ),
    "chrX": 156.0,
    "chrY": 57.2,
}  # fmt: skip
SPLIT = {"valid": ["chr10"], "test": ["chr8", "chr9"]}
SMALLEST_BP = 10_000_000

_LETTERS = np.repeat(np.frombuffer(b"ACGT", dtype=np.uint8), [76, 52, 52, 76])  # 41 % GC
_SLICE_LINES = 1 << 16
_SPACING_BP = 4_000
_WIDTHS_BP = (150, 1_200)
_OPENNESS = (0.25, 2.0)  # of a Beta distribution: most sites are open in few tracks, some in nearly all
_GAP_SHARE = 0.01
_SIGNAL_BIN_BP = 32
_BACKGROUND = 0.02


def simulate_sparse(
    out: str | os.PathLike[str],
    *,
    genome_bp: int = 3_100_000_000,
    tracks: int = 161,
    signals: int = 0,
    seed: int = 1,
    window_bp: int = 131_072,
    margin_bp: int = 16_384,
    bin_bp: int = 32,
    force: bool = False,
) -> Path:
    """Write a random genome of 24 chromosomes as large, relatively, as the human ones, with sparse tracks.

    Each track has a peak of 150-1,200 bp at about one in nine of the sites that all tracks share, one in 4 kb. Memory
    does not grow with the genome or the tracks.

    Files: `genome.fa` (random bases, 41 % GC, a run of N in each chromosome); `peaksNNN.narrowPeak`;
    `signalNNN.bw` (counts in 32-bp bins, in peaks and at 2 % of the others); `dataset.yaml` for `prepare`;
    `simulation.json` (parameters, counts). The same arguments give byte-identical files.

    Args:
        genome_bp: length of the genome, at least 10,000,000 bp.
        tracks: how many, at least 1.
        signals: how many of them, the last ones, are bigWigs instead of peaks.
        window_bp, margin_bp, bin_bp: written to `dataset.yaml`.
        force: replace an earlier simulation with other parameters.

    Raises:
        ConfigError: a number is too small or too large.
        DataError: `out` holds something else.
        FileError: the disk is full or `out` cannot be written.
    """
    if genome_bp < SMALLEST_BP:
        raise ConfigError(f"genome_bp is {genome_bp}: ask for at least {SMALLEST_BP} bp")
    if tracks < 1 or not 0 <= signals <= tracks:
        raise ConfigError(
            f"tracks is {tracks} and signals {signals}: ask for at least one track, and no more signals than tracks"
        )
    if seed < 0:
        raise ConfigError(f"seed is {seed}: it must be 0 or more; choose another")
    parameters: dict[str, object] = {
        "sparse": True,
        "genome_bp": genome_bp,
        "tracks": tracks,
        "signals": signals,
        "seed": seed,
        "window_bp": window_bp,
        "margin_bp": margin_bp,
        "bin_bp": bin_bp,
    }
    folder = Path(out).absolute()
    if holds_simulation(folder, parameters, force):
        say(f"{folder} already holds this simulation; nothing to do")
        return folder
    share = genome_bp / sum(CHROMOSOME_MB.values())
    lengths = {chrom: round(share * size) for chrom, size in CHROMOSOME_MB.items()}
    lengths["chr1"] += genome_bp - sum(lengths.values())
    sites = {
        chrom: _Sites.draw(length, [seed, number]) for number, (chrom, length) in enumerate(lengths.items())
    }
    entries, peak_count, peak_bp = [], 0, 0
    with simulation_folder(folder) as temporary:
        _write_genome(temporary / "genome.fa", lengths, sites, seed)
        for number in progress(range(tracks), unit="track", description="tracks"):
            opened = {
                chrom: those.open_in(np.random.default_rng([seed, len(lengths) + number, index]))
                for index, (chrom, those) in enumerate(sites.items())
            }
            if number < tracks - signals:
                entry: dict[str, Any] = {"name": f"peaks{number + 1:03}", "kind": "peaks"}
                entry["file"] = f"{entry['name']}.narrowPeak"
                _write_peaks(temporary / entry["file"], opened)
                peak_count += sum(len(starts) for starts, _ in opened.values())
                peak_bp += int(sum((ends - starts).sum() for starts, ends in opened.values()))
            else:
                entry = {"name": f"signal{number + 1:03}", "kind": "signal", "aggregate": "sum"}
                entry["file"] = f"{entry['name']}.bw"
                slices = _signal(opened, lengths, [seed, len(lengths) + number])
                write_bigwig(temporary / entry["file"], lengths, slices, _SIGNAL_BIN_BP)
            entries.append(entry)
        mapping = {
            "assembly": f"simulated-{genome_bp / 1e9:g}-gb-{seed}",
            "genome": "genome.fa",
            "tracks": entries,
            "window": {"length": window_bp, "margin": margin_bp, "bin": bin_bp},
            "split": SPLIT,
        }
        (temporary / "dataset.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")
        per_track = max(1, tracks - signals)
        summary: dict[str, object] = {
            "bases": sum(lengths.values()),
            "peaks_per_track": round(peak_count / per_track),
            "peak_fraction": round(peak_bp / per_track / sum(lengths.values()), 5),
        }
        write_record(temporary, parameters, summary)
    return folder


@dataclass(frozen=True)
class _Sites:
    """Where the peaks of a chromosome can be (bp, sorted, apart), and in which share of the tracks each is."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    openness: npt.NDArray[np.float64]
    gap: tuple[int, int]

    @classmethod
    def draw(cls, length_bp: int, seed: list[int]) -> _Sites:
        random = np.random.default_rng(seed)
        slots = np.arange(length_bp // _SPACING_BP, dtype=np.int64) * _SPACING_BP
        widths = random.integers(*_WIDTHS_BP, slots.size)
        starts = slots + random.integers(0, _SPACING_BP - _WIDTHS_BP[1], slots.size)
        openness = random.beta(*_OPENNESS, slots.size)
        gap = int(0.4 * length_bp), int((0.4 + _GAP_SHARE) * length_bp)
        kept = (starts + widths <= gap[0]) | (starts >= gap[1])
        return cls(starts[kept], (starts + widths)[kept], openness[kept], gap)

    def open_in(self, random: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Starts and ends of the peaks of one track, each moved by up to 50 bp."""
        here = random.random(self.starts.size) < self.openness
        moved = random.integers(0, 50, int(here.sum()))
        return self.starts[here] + moved, self.ends[here] + moved


def _write_genome(path: Path, lengths: dict[str, int], sites: dict[str, _Sites], seed: int) -> None:
    total = sum(lengths.values())
    with path.open("wb") as file, progress(total=total, unit="bp", description="genome", scale=True) as bar:
        for number, (chrom, length_bp) in enumerate(lengths.items()):
            random = np.random.default_rng([seed, number, 1])
            file.write(f">{chrom}\n".encode())
            for start in range(0, length_bp, _SLICE_LINES * LINE_BP):
                size = min(_SLICE_LINES * LINE_BP, length_bp - start)
                letters = _LETTERS[np.frombuffer(random.bytes(size), dtype=np.uint8)]
                low, high = (min(max(edge - start, 0), size) for edge in sites[chrom].gap)
                letters[low:high] = ord("N")
                _write_lines(file, letters)
                bar.update(size)


def _write_lines(file: BinaryIO, letters: npt.NDArray[np.uint8]) -> None:
    whole = letters.size // LINE_BP
    lines = np.full((whole, LINE_BP + 1), ord("\n"), dtype=np.uint8)
    lines[:, :LINE_BP] = letters[: whole * LINE_BP].reshape(whole, LINE_BP)
    file.write(lines.data)
    if letters.size % LINE_BP:
        file.write(letters[whole * LINE_BP :].tobytes() + b"\n")


def _write_peaks(path: Path, opened: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]) -> None:
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for chrom, (starts, ends) in opened.items():
            rows = zip(starts.tolist(), ends.tolist(), strict=True)
            file.writelines(
                f"{chrom}\t{start}\t{end}\tpeak{number + count}\t500\t.\t5\t-1\t-1\t{(end - start) // 2}\n"
                for count, (start, end) in enumerate(rows, start=1)
            )
            number += len(starts)


def _signal(
    opened: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    lengths: dict[str, int],
    seed: list[int],
) -> Iterator[tuple[str, npt.NDArray[np.float32], int]]:
    """(chromosome, counts per bin with NaN where there are none, 0), for `write_bigwig`."""
    for index, (chrom, (starts, ends)) in enumerate(opened.items()):
        random = np.random.default_rng([*seed, index, 1])
        bins = -(-lengths[chrom] // _SIGNAL_BIN_BP)
        change = np.zeros(bins + 1, dtype=np.int32)
        np.add.at(change, starts // _SIGNAL_BIN_BP, 1)
        np.add.at(change, ends // _SIGNAL_BIN_BP, -1)
        rate = np.where(np.cumsum(change[:-1]) > 0, 8.0, 0.0)
        counts = random.poisson(rate + np.where(random.random(bins) < _BACKGROUND, 1.0, 0.0))
        yield chrom, np.where(counts > 0, counts, np.nan).astype(np.float32), 0
