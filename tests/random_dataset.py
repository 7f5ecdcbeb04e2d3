"""A prepared dataset that is random in all that loaders depend on, and its items computed without any loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyBigWig

from genossm.dataset import PreparedDataset
from genossm.loaders import WindowDataset
from genossm.pipelines.prepare import prepare
from genossm.sequence import reverse_complement
from genossm.strands import partner_columns


def random_dataset(folder: Path, seed: int, *, own_masks: bool = True) -> PreparedDataset:
    """Chromosomes of odd lengths with runs of N and excluded regions, peaks, and a stranded pair that lacks chrom c2.

    With `own_masks` the pair is masked where its files have nothing. Chromosome c3 is excluded as a whole.
    """
    random = np.random.default_rng(seed)
    lengths = {f"c{number}": int(random.integers(3_000, 12_000)) for number in range(5)}
    with (folder / "genome.fa").open("w") as fasta:
        for chrom, length in lengths.items():
            bases = random.choice(np.frombuffer(b"ACGTacgtR", dtype="S1"), size=length)
            for start in random.integers(0, length, 4):
                bases[start : start + random.integers(1, 900)] = b"N"
            fasta.write(f">{chrom}\n{bases.tobytes().decode()}\n")
    with (folder / "exclude.bed").open("w") as bed:
        bed.write(f"c3\t0\t{lengths['c3']}\n")
        for chrom in ("c0", "c1"):
            for start in random.integers(0, lengths[chrom], 5):
                bed.write(f"{chrom}\t{start}\t{min(start + random.integers(1, 700), lengths[chrom])}\n")
    with (folder / "peaks.bed").open("w") as bed:
        for chrom, length in lengths.items():
            for start in random.integers(0, length - 200, 12):
                bed.write(f"{chrom}\t{start}\t{start + random.integers(20, 200)}\n")
    for name in ("plus", "minus"):
        bigwig = pyBigWig.open(str(folder / f"{name}.bw"), "w")
        there = [chrom for chrom in lengths if chrom != "c2"]
        bigwig.addHeader([(chrom, lengths[chrom]) for chrom in there])
        for chrom in there:
            starts = np.unique(random.integers(0, lengths[chrom] // 100, 40)) * 100
            starts = starts[starts + 100 <= lengths[chrom]]
            values = random.gamma(1.0, 3.0, len(starts))
            bigwig.addEntries(
                [chrom] * len(starts), starts.tolist(), ends=(starts + 100).tolist(), values=values.tolist()
            )
        bigwig.close()
    missing = "mask" if own_masks else "zero"
    (folder / "dataset.yaml").write_text(
        "assembly: random\ngenome: genome.fa\nexclude: [exclude.bed]\ntracks:\n"
        f'  - {{name: plus, file: plus.bw, kind: signal, missing: {missing}, strand: "+", partner: minus}}\n'
        "  - {name: peaks, file: peaks.bed, kind: peaks}\n"
        f'  - {{name: minus, file: minus.bw, kind: signal, missing: {missing}, strand: "-", partner: plus}}\n'
        f"window: {{length: 1024, margin: 128, bin: {(8, 16, 32)[seed % 3]}}}\n"
        "split: {train: [c0, c2, c3, c4], valid: [c1], test: []}\n"
        "storage: " + ("auto", "float32", "uint8")[seed % 3] + "\n"
    )
    return prepare(folder / "dataset.yaml", folder / "prepared")


def expected_item(
    windows: WindowDataset, index: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Codes, targets and mask of an item, base by base and bin by bin from the whole chromosome."""
    data, place = windows.dataset, windows.place(index)
    start = place.start + place.jitter_bp
    codes = data.genome.window(place.chrom, start, start + windows.window_bp)
    all_targets, all_mask = data.targets(place.chrom), data.mask(place.chrom)
    first = (place.start + windows.margin_bp) // data.bin_bp
    targets = np.zeros((windows.bins, len(data.tracks)), dtype=np.float32)
    mask = np.zeros(targets.shape, dtype=np.bool_)
    for row in range(windows.bins):
        if 0 <= first + row < len(all_mask):
            mask[row] = all_mask[first + row]
            targets[row] = np.where(mask[row], all_targets[first + row], 0)
    if place.flip:
        columns = list(partner_columns(data.tracks))
        codes, targets, mask = reverse_complement(codes), targets[::-1, columns], mask[::-1, columns]
    return codes, targets, mask
