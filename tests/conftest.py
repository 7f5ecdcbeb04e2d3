"""Fixtures that several tests share: the real data, the device, and a tiny genome with peaks and signal."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Where there is no CUDA device, Triton kernels run in its interpreter; it has to know before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what runs in its background with SIGINT ignored, and so would be all processes of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]

# Not every machine that runs tests/gpu has hypothesis. Deadlines are off: a busy machine is no bug.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("genossm", deadline=None, max_examples=50, derandomize=True, database=None)
    settings.load_profile("genossm")


def cuda_is_there() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave tests/gpu out where there is no CUDA device."""
    return True if collection_path == ROOT / "tests" / "gpu" and not cuda_is_there() else None


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real data (README.md, sacCer3/, hg38_chr1_1m/), or a skip that says where it was sought."""
    named = os.environ.get("GENOSSM_REALDATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "realdata"
    if not (folder / "sacCer3" / "sacCer3.fa.gz").is_file():
        pytest.skip(
            "no real data: neither $GENOSSM_REALDATA nor ../shared/realdata holds sacCer3/sacCer3.fa.gz"
        )
    return folder


@pytest.fixture(scope="session")
def device() -> str:
    """The device to test on: "cuda" where there is one, else "cpu"."""
    return "cuda" if cuda_is_there() else "cpu"


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A genome cache folder ($GENOSSM_CACHE) of this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GENOSSM_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Genome caches and plot settings go to a temporary folder, never to the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if "GENOSSM_CACHE" not in os.environ:
            patch.setenv("GENOSSM_CACHE", str(tmp_path_factory.mktemp("genossm-cache")))
        patch.setenv("MPLBACKEND", "Agg")
        yield


@pytest.fixture(scope="session")
def tiny_lengths() -> dict[str, int]:
    """Chromosomes of the tiny genome, in file order; chrC is shorter than a window of the tiny dataset."""
    return {"chrA": 40_000, "chrB": 20_011, "chrC": 1_234}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_lengths: dict[str, int]) -> Path:
    """A folder with genome.fa, peaks.narrowPeak, signal.bw and dataset.yaml. Read it, never write into it.

    The bases are random, with 500 N at the start of chrA. A peak of 200 bp stands every 2,000 bp from
    1,000 on; the signal is 2.0 inside peaks and absent elsewhere, and lacks chrC.
    """
    import pyBigWig

    folder = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(7)
    with (folder / "genome.fa").open("w") as fasta:
        for chrom, length_bp in tiny_lengths.items():
            bases = random.choice(np.frombuffer(b"ACGT", dtype="S1"), size=length_bp)
            if chrom == "chrA":
                bases[:500] = b"N"
            text = bases.tobytes().decode()
            lines = (text[start : start + 60] for start in range(0, length_bp, 60))
            fasta.write(f">{chrom}\n" + "\n".join(lines) + "\n")
    peaks = [
        (chrom, start, start + 200)
        for chrom, length_bp in tiny_lengths.items()
        for start in range(1_000, length_bp - 200, 2_000)
    ]
    with (folder / "peaks.narrowPeak").open("w") as table:
        for number, (chrom, start, end) in enumerate(peaks):
            table.write(f"{chrom}\t{start}\t{end}\tpeak{number}\t500\t.\t5.0\t9.0\t7.0\t100\n")
    bigwig = pyBigWig.open(str(folder / "signal.bw"), "w")
    bigwig.addHeader([(chrom, tiny_lengths[chrom]) for chrom in ("chrA", "chrB")])
    for chrom in ("chrA", "chrB"):
        here = [peak for peak in peaks if peak[0] == chrom]
        bigwig.addEntries(
            [chrom] * len(here),
            [start for _, start, _ in here],
            ends=[end for _, _, end in here],
            values=[2.0] * len(here),
        )
    bigwig.close()
    (folder / "dataset.yaml").write_text(
        "assembly: tiny\n"
        "genome: genome.fa\n"
        "tracks:\n"
        "  - {name: peaks, file: peaks.narrowPeak, kind: peaks}\n"
        "  - {name: signal, file: signal.bw, kind: signal, aggregate: sum}\n"
        "window: {length: 4096, margin: 512, bin: 32}\n"
        "split: {valid: [chrB], test: [chrC]}\n"
    )
    return folder


@pytest.fixture(scope="session")
def tiny_prepared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dataset prepared: a folder to read from, never to write into."""
    from genossm.pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "tiny"
    prepare(tiny_folder / "dataset.yaml", folder)
    return folder


@pytest.fixture(scope="session")
def stranded_prepared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dataset with a stranded pair, `minus` (0.5 or 1 a base, masked up to 10 kb) and `plus` (1 or 3)."""
    import pyBigWig

    from genossm.pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("stranded")
    for name in ("genome.fa", "peaks.narrowPeak"):
        shutil.copy(tiny_folder / name, folder / name)
    random = np.random.default_rng(3)
    for name, high, start in (("minus", 0.5, 10_000), ("plus", 3.0, 0)):
        bigwig = pyBigWig.open(str(folder / f"{name}.bw"), "w")
        bigwig.addHeader([("chrA", 40_000), ("chrB", 20_011), ("chrC", 1_234)])
        for chrom, length_bp in (("chrA", 40_000), ("chrB", 20_011)):
            values = np.where(random.random((length_bp - start) // 50) < 0.5, 1.0, high)
            bigwig.addEntries(chrom, start, values=values.tolist(), span=50, step=50)
        bigwig.close()
    (folder / "dataset.yaml").write_text(
        "assembly: tiny\n"
        "genome: genome.fa\n"
        "tracks:\n"
        "  - {name: minus, file: minus.bw, kind: signal, aggregate: sum, missing: mask, "
        'strand: "-", partner: plus}\n'
        "  - {name: peaks, file: peaks.narrowPeak, kind: peaks}\n"
        "  - {name: plus, file: plus.bw, kind: signal, aggregate: sum, missing: mask, "
        'strand: "+", partner: minus}\n'
        "window: {length: 4096, margin: 512, bin: 32}\n"
        "split: {valid: [chrB], test: [chrC]}\n"
    )
    prepare(folder / "dataset.yaml", folder / "prepared")
    return folder / "prepared"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny dataset that a test may spoil."""
    copy = tmp_path / "data"
    copy.mkdir()
    for name in ("genome.fa", "peaks.narrowPeak", "signal.bw", "dataset.yaml"):
        shutil.copy(tiny_folder / name, copy / name)
    return copy
