"""The motif grammar of the simulated genome: where sites stand, which are open, and what bases they have."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
from Bio import motifs as bio_motifs

from genossm.errors import ConfigError
from genossm.sequence import NO_BASE

MOTIF_NAMES = ("A", "B", "P", "E")
GC_STEP_BP = 1000
MINIMUM_BITS_PER_BASE = 0.5


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules and densities of the planted sites; distances are base pairs between site centres.

    One site stands in each slot of `spacing_bp`; the fractions say how often a slot holds each kind, the rest
    stays background. Enhancers come in clusters, so that a chromosome has active and silent stretches.

    Raises:
        ConfigError: fractions outside 0-1 or above 1 together, or distances that contradict each other.
    """

    spacing_bp: int = 1500
    pairs: float = 0.15
    single_a: float = 0.18
    single_b: float = 0.18
    far_pairs: float = 0.10
    promoters: float = 0.25
    pair_span_bp: int = 60
    enhancer_near_bp: int = 10_000
    enhancer_far_bp: int = 60_000
    clusters_per_mb: float = 4.0
    cluster_bp: int = 20_000
    enhancers_per_cluster: int = 4
    open_bp: int = 256
    open_jitter_bp: int = 16
    cuts_per_site: float = 150.0
    cuts_per_background_bp: float = 0.01

    def __post_init__(self) -> None:
        fractions = (self.pairs, self.single_a, self.single_b, self.far_pairs, self.promoters)
        if min(fractions) < 0 or sum(fractions) > 1:
            raise ConfigError(
                f"the fractions of site kinds are {fractions}: each must be at least 0 and their sum at most "
                "1; lower some"
            )
        if self.spacing_bp < 1200:
            raise ConfigError(
                f"spacing_bp is {self.spacing_bp}: at least 1200 bp keep neighbouring sites apart; choose a "
                "larger one"
            )
        if not 0 < self.enhancer_near_bp < self.enhancer_far_bp:
            raise ConfigError(
                f"enhancer distances are {self.enhancer_near_bp} to {self.enhancer_far_bp} bp: "
                "they must be positive and the second the larger; correct them"
            )
        if not 30 <= self.pair_span_bp <= 140:
            raise ConfigError(
                f"pair_span_bp is {self.pair_span_bp}: allowed are 30 to 140 bp; choose one of those"
            )


@dataclass(frozen=True, slots=True)
class PlantedMotif:
    """One motif instance: name, 0-based start on the chromosome, strand of its forward reading."""

    name: str
    start: int
    strand: str

    def __str__(self) -> str:
        return f"{self.name}@{self.start}{self.strand}"


@dataclass(frozen=True, slots=True)
class Site:
    """One planted site with its ground truth; coordinates 0-based half-open.

    `start`-`end` spans the motifs; `region_start`-`region_end` is the stretch that is open, or would be if
    the rule held. `rule` names what decides (`local`, `long_range`, `enhancer`), `enhancer_distance_bp` is,
    for promoters only, the distance of the enhancer that opens it, or of the nearest one when it is closed;
    -1 when there is none.
    """

    start: int
    end: int
    kind: str
    strand: str
    open: bool
    rule: str
    enhancer_distance_bp: int
    region_start: int
    region_end: int
    cuts: float
    motifs: tuple[PlantedMotif, ...]

    @property
    def centre(self) -> int:
        """Middle of the motifs, where the signal is highest; distances between sites are taken here."""
        return (self.start + self.end) // 2


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedChromosome:
    """`codes` int8 (bases,), 0-3 = ACGT, 4 = N; `sites` by position; `cut_rate` float64 (bases,)."""

    codes: npt.NDArray[np.int8]
    sites: tuple[Site, ...]
    cut_rate: npt.NDArray[np.float64]


def load_motifs() -> dict[str, npt.NDArray[np.float64]]:
    """The shipped motifs (JASPAR, read by Bio.motifs) as probabilities (positions, 4), in the order ACGT."""
    parse: Any = bio_motifs.parse  # Biopython's own annotations are partial
    with files("genossm.data").joinpath("motifs.jaspar").open("r", encoding="utf-8") as handle:
        parsed = {motif.name: motif for motif in parse(handle, "jaspar")}
    matrices = {}
    for name in MOTIF_NAMES:
        probabilities = parsed[name].counts.normalize(pseudocounts=0.5)
        matrices[name] = np.array([probabilities[base] for base in "ACGT"], dtype=np.float64).T
    return matrices


def build_chromosome(
    length_bp: int,
    grammar: Grammar,
    matrices: dict[str, npt.NDArray[np.float64]],
    rng: np.random.Generator,
) -> SimulatedChromosome:
    """Draw one chromosome of `length_bp` bases: background, N runs, sites, expected cuts at each base."""
    codes = _background(length_bp, rng)
    gaps = _gaps(length_bp, rng)
    centres, kinds = _assign_slots(length_bp, gaps, grammar, rng)
    enhancers = centres[kinds == "enhancer"]
    sites = tuple(
        _plant(codes, int(centre), str(kind), enhancers, grammar, matrices, rng)
        for centre, kind in zip(centres, kinds, strict=True)
    )
    cut_rate = _cut_rate(length_bp, sites, grammar)
    for start, end in gaps:
        codes[start:end] = NO_BASE
        cut_rate[start:end] = 0.0
    return SimulatedChromosome(codes, sites, cut_rate)


def opening_distance(
    centre: int, enhancers: npt.NDArray[np.int64], near_bp: int, far_bp: int
) -> tuple[bool, int]:
    """Whether an enhancer stands `near_bp` to `far_bp` from `centre`, either side, and its distance."""
    if enhancers.size == 0:
        return False, -1
    distances = np.abs(enhancers - centre)
    inside = distances[(distances >= near_bp) & (distances <= far_bp)]
    if inside.size:
        return True, int(inside.min())
    return False, int(distances.min())


def _background(length_bp: int, rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """Bases whose GC fraction drifts along the chromosome (isochore-like), between 0.28 and 0.60."""
    knots = length_bp // GC_STEP_BP + 2
    steps = rng.standard_normal(knots)
    drift = np.empty(knots)
    value = 0.0
    for index in range(knots):
        value = 0.97 * value + 0.24 * steps[index]
        drift[index] = value
    gc_knots = np.clip(0.42 + 0.06 * drift, 0.28, 0.60)
    gc = np.interp(np.arange(length_bp), np.arange(knots) * GC_STEP_BP, gc_knots)
    strong = rng.random(length_bp) < gc
    second = rng.random(length_bp) < 0.5
    codes = np.where(strong, np.where(second, 1, 2), np.where(second, 0, 3))
    return codes.astype(np.int8)


def _gaps(length_bp: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """N runs: one at each end and one inside, about 2 % of the chromosome together."""
    end_bp = max(1, length_bp // 200)
    inner_bp = max(1, int(length_bp * (0.005 + 0.01 * rng.random())))
    inner = int(length_bp * (0.1 + 0.8 * rng.random()))
    inner = min(inner, length_bp - inner_bp)
    return [(0, end_bp), (inner, inner + inner_bp), (length_bp - end_bp, length_bp)]


def _assign_slots(
    length_bp: int, gaps: list[tuple[int, int]], grammar: Grammar, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.str_]]:
    """Centres (sorted) and kinds of all sites of one chromosome.

    Kinds are drawn independently of the enhancers' places, so how many promoters stand somewhere tells
    nothing about whether they are open.
    """
    slots = length_bp // grammar.spacing_bp
    play_bp = grammar.spacing_bp - 800
    centres = np.arange(slots) * grammar.spacing_bp + 400 + (rng.random(slots) * play_bp).astype(np.int64)
    names = np.array(["pair", "single_a", "single_b", "far_pair", "promoter", ""])
    fractions = np.array(
        [grammar.pairs, grammar.single_a, grammar.single_b, grammar.far_pairs, grammar.promoters]
    )
    kinds = names[np.searchsorted(np.cumsum(fractions), rng.random(slots), side="right")]
    kinds = kinds.astype("<U16")
    free = (centres >= 600) & (centres < length_bp - 600)
    for start, end in gaps:
        free &= (centres < start - 600) | (centres >= end + 600)

    clusters = max(1, round(length_bp * grammar.clusters_per_mb / 1_000_000))
    stretch = length_bp / clusters
    for cluster in range(clusters):
        middle = (cluster + 0.35 + 0.3 * rng.random()) * stretch
        wanted = middle + (rng.random(grammar.enhancers_per_cluster) - 0.5) * grammar.cluster_bp
        for place in wanted:
            distance = np.where(free & (kinds != "enhancer"), np.abs(centres - place), np.inf)
            if distance.size and np.isfinite(distance.min()):
                kinds[int(np.argmin(distance))] = "enhancer"
    keep = free & (kinds != "")
    return centres[keep], kinds[keep]


def _plant(
    codes: npt.NDArray[np.int8],
    centre: int,
    kind: str,
    enhancers: npt.NDArray[np.int64],
    grammar: Grammar,
    matrices: dict[str, npt.NDArray[np.float64]],
    rng: np.random.Generator,
) -> Site:
    """Write one site's motifs into `codes` around `centre` and decide whether it is open."""
    names, gap_bp = _parts(kind, grammar, matrices, rng)
    span_bp = sum(len(matrices[name]) for name in names) + gap_bp
    start = centre - span_bp // 2
    cursor = start
    planted = []
    for name in names:
        strand = "+" if rng.random() < 0.5 else "-"
        instance = _sample(matrices[name], strand, rng)
        codes[cursor : cursor + instance.size] = instance
        planted.append(PlantedMotif(name, cursor, strand))
        cursor += instance.size + gap_bp
    distance = -1
    if kind == "promoter":
        is_open, distance = opening_distance(
            centre, enhancers, grammar.enhancer_near_bp, grammar.enhancer_far_bp
        )
        rule = "long_range"
    else:
        is_open = kind in ("pair", "enhancer")
        rule = "enhancer" if kind == "enhancer" else "local"
    jitter = (rng.random(2) * (grammar.open_jitter_bp + 1)).astype(np.int64)
    cuts = grammar.cuts_per_site * float(np.exp(0.3 * rng.standard_normal()))
    return Site(
        start=start,
        end=start + span_bp,
        kind=kind,
        strand=planted[0].strand,
        open=is_open,
        rule=rule,
        enhancer_distance_bp=distance,
        region_start=centre - grammar.open_bp // 2 - int(jitter[0]),
        region_end=centre + grammar.open_bp // 2 + int(jitter[1]),
        cuts=cuts if is_open else 0.0,
        motifs=tuple(planted),
    )


def _parts(
    kind: str, grammar: Grammar, matrices: dict[str, npt.NDArray[np.float64]], rng: np.random.Generator
) -> tuple[tuple[str, ...], int]:
    """Motif names from left to right and the gap between them in bp (0 for a single motif)."""
    order = ("A", "B") if rng.random() < 0.5 else ("B", "A")
    draw = rng.random()
    if kind == "pair":
        room = grammar.pair_span_bp - len(matrices["A"]) - len(matrices["B"])
        return order, 2 + int(draw * (room - 1))
    if kind == "far_pair":
        return order, 150 + int(draw * 150)
    return ({"single_a": "A", "single_b": "B", "promoter": "P", "enhancer": "E"}[kind],), 0


def _sample(matrix: npt.NDArray[np.float64], strand: str, rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """One instance of a motif: each position drawn from its own base probabilities.

    Instances that have lost the motif are drawn again, so that the truth never rests on bases nobody could
    read.
    """
    cumulative = np.cumsum(matrix, axis=1)
    positions = np.arange(len(matrix))
    while True:
        draws = rng.random(len(matrix))[:, None]
        codes: npt.NDArray[np.int8] = np.minimum((cumulative <= draws).sum(axis=1), 3).astype(np.int8)
        if np.log2(matrix[positions, codes] / 0.25).mean() >= MINIMUM_BITS_PER_BASE:
            return codes if strand == "+" else np.subtract(3, codes, dtype=np.int8)[::-1]


def _cut_rate(length_bp: int, sites: tuple[Site, ...], grammar: Grammar) -> npt.NDArray[np.float64]:
    """Expected cuts at each base: an even background and a bell over each open site, sized to its total."""
    rate = np.full(length_bp, grammar.cuts_per_background_bp)
    sigma_bp = grammar.open_bp / 3.6
    reach_bp = grammar.open_bp
    offsets = np.arange(-reach_bp, reach_bp + 1)
    bell = np.exp(-0.5 * (offsets / sigma_bp) ** 2)
    bell /= bell.sum()
    for site in sites:
        if site.open:
            first, last = max(0, site.centre - reach_bp), min(length_bp, site.centre + reach_bp + 1)
            shift = site.centre - reach_bp
            rate[first:last] += site.cuts * bell[first - shift : last - shift]
    return rate
