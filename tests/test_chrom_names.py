"""Tests of genossm.chrom_names on the names that assemblies use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.chrom_names import is_primary, mismatch_advice, name_hint, repair_names


@pytest.mark.parametrize(
    "name",
    ["chr1", "1", "chrX", "Y", "chrIV", "XVI", "2L", "chr2R", "Chr5", "NC_000001.11", "CM000663.2", "chrZ"],
)
def test_chromosomes_are_primary(name: str) -> None:
    assert is_primary(name)


@pytest.mark.parametrize(
    "name",
    [
        *("chrM", "chrMT", "MT", "M", "Mito", "Pt", "ChrC", "chrEBV"),
        *("chr1_random", "chr1_KI270706v1_random", "chrUn_GL000220v1", "chr6_GL000250v2_alt", "scaffold_12"),
        *("GL000220.1", "KI270728.1", "HLA-A*01:01:01:01", "hs37d5", "chr1_KN196472v1_fix"),
    ],
)
def test_pieces_and_organelles_are_not(name: str) -> None:
    assert not is_primary(name)


@pytest.mark.parametrize(
    ("names", "genome", "expected"),
    [
        (["1", "X", "MT"], ["chr1", "chrX", "chrM"], {"1": "chr1", "X": "chrX", "MT": "chrM"}),
        (["chr1", "chrX", "chrM"], ["1", "X", "MT"], {"chr1": "1", "chrX": "X", "chrM": "MT"}),
        (["MT"], ["chrM"], {"MT": "chrM"}),
        (["chrM"], ["chrMT"], {"chrM": "chrMT"}),
        (["Mito"], ["chrM"], {"Mito": "chrM"}),
        (["Chr1"], ["chr1"], {"Chr1": "chr1"}),
        (["chr1", "chr2"], ["chr1"], {}),
        (["7"], ["chr1"], {}),
        (["1", "chr1"], ["chr1"], {}),  # both would become chr1
        (["1", "CHR1"], ["chr1"], {}),
        (["Chr1"], ["chr1", "1"], {}),  # either could be meant
    ],
)
def test_repair(names: list[str], genome: list[str], expected: dict[str, str]) -> None:
    assert repair_names(names, genome) == expected
    assert repair_names(names, dict.fromkeys(genome, 100)) == expected


NAMES = st.lists(
    st.sampled_from(["1", "chr1", "Chr1", "X", "chrX", "M", "MT", "chrM", "chrMT", "2", "chr2", "z"])
)


@given(NAMES, NAMES)
def test_repair_gives_each_chromosome_once(names: list[str], genome: list[str]) -> None:
    repaired = repair_names(names, genome)
    assert set(repaired) <= set(names) - set(genome)
    assert set(repaired.values()) <= set(genome)
    renamed = {repaired.get(name, name) for name in names}
    assert len(renamed) == len(set(names))


def test_the_hint_names_what_is_meant() -> None:
    genome = {f"chr{number}": 1 for number in range(1, 23)}
    assert name_hint("4", genome) == "did you mean chr4?"
    assert "chr22" in name_hint("chrr22", genome)
    assert name_hint("scaffold", genome) == "it has chr1, chr2, chr3, chr4, chr5 ..."


def test_the_advice_offers_a_repair_only_where_it_helps() -> None:
    assert "1 looks like the genome's chr1: set `chrom_names: repair`" in mismatch_advice(
        ["2L", "1"], ["2L", "1"], ["chr1"]
    )
    assert "set `unknown: skip`" in mismatch_advice(["1"], ["1", "chr1"], ["chr1"])  # both would become chr1
