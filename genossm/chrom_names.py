"""Chromosome names: which ones are whole chromosomes, and which differ only by habit (1 and chr1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches

_MITOCHONDRION = {"m", "mt", "mito", "mtdna"}
_OTHER_LEFT_OUT = {"pt", "chrc", "chrpt", "chrebv", "ebv", "hs37d5"}
_SCAFFOLD = re.compile(r"(GL|JH|KB|KI|KN|KQ|KV|KZ|ML|MU)\d{6}(\.\d+)?")


def is_primary(name: str) -> bool:
    """Whether `name` looks like a chromosome to be used unless the user says otherwise.

    Left out: mitochondria and chloroplasts (chrM, MT, Mito, Pt), unplaced and alternative pieces (any name
    with "_" such as chr1_random, chrUn_GL000220v1, chr6_alt; GL/KI accessions; HLA- contigs) and chrEBV.
    RefSeq chromosomes (NC_000001.11) are in.
    """
    if name.startswith("NC_"):
        return True
    if "_" in name or name.startswith("HLA-") or _SCAFFOLD.fullmatch(name):
        return False
    return _bare(name) not in _MITOCHONDRION and name.lower() not in _OTHER_LEFT_OUT


def repair_names(names: Iterable[str], lengths: Iterable[str]) -> dict[str, str]:
    """Names of a file that the genome calls differently: {"1": "chr1", "MT": "chrM"}.

    Two names mean the same chromosome when they are equal after "chr" is taken away (in any case) and M, MT
    and Mito are one. Names the genome has are left out, and so are ambiguous ones: several names of the
    file, or of the genome, would become one.

    Args:
        names: chromosome names of a file.
        lengths: chromosome names (or a mapping keyed by them) of the genome.
    """
    known = list(dict.fromkeys(lengths))
    given = list(dict.fromkeys(names))
    known_as = {_canonical(name): name for name in known}
    ambiguous = {key for key, count in Counter(map(_canonical, known)).items() if count > 1}
    ambiguous |= {key for key, count in Counter(map(_canonical, given)).items() if count > 1}
    present = set(known)
    return {
        name: known_as[_canonical(name)]
        for name in given
        if name not in present and _canonical(name) in known_as and _canonical(name) not in ambiguous
    }


def name_hint(name: str, lengths: Iterable[str]) -> str:
    """What there is instead of the unknown `name`: close names, or the first few; for error messages."""
    known = list(dict.fromkeys(lengths))
    same = repair_names([name], known).get(name)
    close = [same] if same else get_close_matches(name, known, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"it has {', '.join(known[:5])}{' ...' if len(known) > 5 else ''}"


def mismatch_advice(offenders: Iterable[str], names: Iterable[str], lengths: Iterable[str]) -> str:
    """What to do about those `names` of a file that the genome lacks, the `offenders`; for error messages."""
    repairs = repair_names(names, lengths)
    for name in offenders:
        if name in repairs:
            known = repairs[name]
            return f"{name} looks like the genome's {known}: set `chrom_names: repair` in the dataset YAML"
    return "give a file of this assembly, or set `unknown: skip` in the dataset YAML to leave them out"


def _bare(name: str) -> str:
    return re.sub(r"^chr", "", name, flags=re.IGNORECASE).lower()


def _canonical(name: str) -> str:
    bare = _bare(name)
    return "m" if bare in _MITOCHONDRION else bare
