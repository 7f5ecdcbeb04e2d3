"""Simulate a small genome of known regulatory grammar: sequence, peaks, cut counts, and the truth."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from genossm import __version__
from genossm.errors import ConfigError, DataError, FileError
from genossm.outputs.bigwig import write_bigwig
from genossm.pipelines.grammar import Grammar, SimulatedChromosome, Site, build_chromosome, load_motifs
from genossm.progress import progress, say

LETTERS = np.frombuffer(b"ACGTN", dtype=np.uint8)
LINE_BP = 60
RECORD_NAME = "simulation.json"
TRUTH_COLUMNS = (
    "chrom",
    "start",
    "end",
    "kind",
    "strand",
    "open",
    "rule",
    "enhancer_distance_bp",
    "region_start",
    "region_end",
    "motifs",
)


def simulate(
    out: str | os.PathLike[str],
    *,
    seed: int = 1,
    chromosomes: int = 6,
    chromosome_bp: int = 1_000_000,
    window_bp: int = 131_072,
    margin_bp: int = 32_768,
    bin_bp: int = 32,
    grammar: Grammar | None = None,
    signal: bool = True,
    force: bool = False,
) -> Path:
    """Write a simulated genome with planted motif grammar into the folder `out` and return that folder.

    Three rules decide what is open. Local: motifs A and B within 60 bp, either order and orientation, are
    open; A alone, B alone, and A with B further apart are closed. Long range: motif P is open only where an
    enhancer motif E stands 10-60 kb away on either side. Enhancers themselves are open. Cuts are Poisson
    counts at each base.

    Files (coordinates 0-based half-open): `genome.fa`; `peaks.narrowPeak` (the open regions); `signal.bw`
    (cuts at each base, bases without a cut absent); `truth.tsv` (every planted site: chrom, start, end of its
    motifs, kind, strand, open 1/0, rule, enhancer_distance_bp or -1, region_start and region_end of the
    stretch that is or would be open, each motif as NAME@start and strand); `dataset.yaml` for `prepare`;
    `simulation.json` (parameters, counts). The same arguments give byte-identical files. The folder appears
    complete or not at all; one that already holds this very simulation is left as it is.

    Args:
        chromosomes: how many, at least 3: the last one in six (at least one) is the test split, as many
            before it the validation split.
        chromosome_bp: length of each, at least 20,000 bp.
        window_bp, margin_bp, bin_bp: written to `dataset.yaml`.
        grammar: densities and distances; the defaults make 4-5 % of the 32-bp bins positive.
        signal: False leaves out `signal.bw` and its track, which take about half of the time; all else is the same.
        force: replace an earlier simulation with other parameters.

    Raises:
        ConfigError: a count or length is too small.
        DataError: `out` holds something else.
        FileError: the disk is full or `out` cannot be written.
    """
    rules = Grammar() if grammar is None else grammar
    if chromosomes < 3:
        raise ConfigError(
            f"chromosomes is {chromosomes}: training, validation and test need one each; ask for at least 3"
        )
    if chromosome_bp < 20_000:
        raise ConfigError(f"chromosome_bp is {chromosome_bp}: sites need room; ask for at least 20000 bp")
    if seed < 0:
        raise ConfigError(f"seed is {seed}: it must be 0 or more; choose another")
    parameters: dict[str, object] = {
        "seed": seed,
        "chromosomes": chromosomes,
        "chromosome_bp": chromosome_bp,
        "window_bp": window_bp,
        "margin_bp": margin_bp,
        "bin_bp": bin_bp,
        "grammar": asdict(rules),
    }
    if not signal:
        parameters["signal"] = False
    folder = Path(out).absolute()
    if holds_simulation(folder, parameters, force):
        say(f"{folder} already holds this simulation; nothing to do")
        return folder

    matrices = load_motifs()
    names = [f"chr{index + 1}" for index in range(chromosomes)]
    drawn: list[SimulatedChromosome] = []
    counts: list[npt.NDArray[np.int32]] = []
    for index, _ in enumerate(progress(names, unit="chromosome", description="simulate")):
        rng = np.random.default_rng([seed, index])
        chromosome = build_chromosome(chromosome_bp, rules, matrices, rng)
        drawn.append(replace(chromosome, cut_rate=np.empty(0)))  # eight bytes a base
        if signal:
            counts.append(rng.poisson(chromosome.cut_rate).astype(np.int32))

    with simulation_folder(folder) as temporary:
        _write_fasta(temporary / "genome.fa", names, drawn)
        _write_peaks(temporary / "peaks.narrowPeak", names, drawn)
        if signal:
            cuts = (np.where(values, values, np.nan).astype(np.float32) for values in counts)
            slices = ((name, values, 0) for name, values in zip(names, cuts, strict=True))
            write_bigwig(temporary / "signal.bw", dict.fromkeys(names, chromosome_bp), slices, bin_bp=1)
        _write_truth(temporary / "truth.tsv", names, drawn)
        _write_dataset_yaml(temporary / "dataset.yaml", names, parameters)
        summary = {
            "sites": _count_sites(site for chromosome in drawn for site in chromosome.sites),
            "open_fraction": round(_open_bp(drawn) / (chromosomes * chromosome_bp), 5),
        }
        write_record(temporary, parameters, summary)
    return folder


@contextmanager
def simulation_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files take their places in `folder` at the end, or leave nothing behind.

    Raises:
        FileError: the disk is full or the folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _move_in(temporary, folder)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"cannot write the simulation to {folder}: {error.strerror or error}; free space or choose "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_record(folder: Path, parameters: dict[str, object], summary: dict[str, object]) -> None:
    """Write simulation.json: the version, the parameters, and what came of them."""
    record = {"genossm": __version__, "parameters": parameters, **summary}
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def holds_simulation(folder: Path, parameters: dict[str, object], force: bool) -> bool:
    """True when `folder` is this simulation, False when it may be written; anything else is an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    record = folder / RECORD_NAME
    if not record.is_file():
        raise DataError(f"{folder} exists and is not a simulation of genossm: choose another folder")
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
        same = stored["genossm"] == __version__ and stored["parameters"] == parameters
    except (ValueError, KeyError, TypeError):
        same = False
    if same and not force:
        return True
    if not force:
        raise DataError(
            f"{folder} holds a simulation with other parameters or of another version: "
            "choose another folder, or give force (--force) to replace it"
        )
    return False


def _move_in(temporary: Path, folder: Path) -> None:
    """Put the finished files in place; of an earlier simulation's folder only its own are replaced."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(temporary, folder)
        return
    record = folder / RECORD_NAME
    record.unlink()
    for path in temporary.iterdir():
        if path.name != record.name:
            os.replace(path, folder / path.name)
    os.replace(temporary / record.name, record)


def _write_fasta(path: Path, names: Sequence[str], drawn: Sequence[SimulatedChromosome]) -> None:
    with path.open("wb") as handle:
        for name, chromosome in zip(names, drawn, strict=True):
            text = LETTERS[chromosome.codes].tobytes()
            handle.write(f">{name}\n".encode())
            for start in range(0, len(text), LINE_BP):
                handle.write(text[start : start + LINE_BP] + b"\n")


def _write_peaks(path: Path, names: Sequence[str], drawn: Sequence[SimulatedChromosome]) -> None:
    number = 0
    with path.open("w", encoding="utf-8") as handle:
        for name, chromosome in zip(names, drawn, strict=True):
            for site in chromosome.sites:
                if site.open:
                    number += 1
                    score = min(1000, round(4 * site.cuts))
                    summit = site.centre - site.region_start
                    handle.write(
                        f"{name}\t{site.region_start}\t{site.region_end}\tpeak_{number}\t{score}\t.\t"
                        f"{site.cuts:.3f}\t-1\t-1\t{summit}\n"
                    )


def _write_truth(path: Path, names: Sequence[str], drawn: Sequence[SimulatedChromosome]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.write("\t".join(TRUTH_COLUMNS) + "\n")
        for name, chromosome in zip(names, drawn, strict=True):
            for site in chromosome.sites:
                fields = (
                    name,
                    site.start,
                    site.end,
                    site.kind,
                    site.strand,
                    int(site.open),
                    site.rule,
                    site.enhancer_distance_bp,
                    site.region_start,
                    site.region_end,
                    ",".join(str(motif) for motif in site.motifs),
                )
                handle.write("\t".join(str(field) for field in fields) + "\n")


def _write_dataset_yaml(path: Path, names: Sequence[str], parameters: dict[str, object]) -> None:
    held = max(1, len(names) // 6)
    tracks = [{"name": "peaks", "file": "peaks.narrowPeak", "kind": "peaks"}]
    if parameters.get("signal", True):
        tracks.append({"name": "cuts", "file": "signal.bw", "kind": "signal", "aggregate": "sum"})
    mapping = {
        "assembly": f"simulated-{parameters['seed']}",
        "genome": "genome.fa",
        "tracks": tracks,
        "window": {
            "length": parameters["window_bp"],
            "margin": parameters["margin_bp"],
            "bin": parameters["bin_bp"],
        },
        "split": {"valid": list(names[-2 * held : -held]), "test": list(names[-held:])},
    }
    path.write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")


def _count_sites(sites: Iterable[Site]) -> dict[str, dict[str, int]]:
    tally = Counter((site.kind, site.open) for site in sites)
    kinds = sorted({kind for kind, _ in tally})
    return {kind: {"open": tally[kind, True], "closed": tally[kind, False]} for kind in kinds}


def _open_bp(drawn: Iterable[SimulatedChromosome]) -> int:
    return sum(
        site.region_end - site.region_start for chromosome in drawn for site in chromosome.sites if site.open
    )
