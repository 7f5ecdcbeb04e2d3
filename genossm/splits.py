"""Which chromosomes train, validate and test: from a file of folds, or spread over folds of alike size."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from genossm.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
_OTHER_NAMES = {"val": "valid", "validation": "valid"}


def fold_of(content: Mapping[str, Any], fold: Any, where: str) -> dict[str, Any]:
    """The splits of one fold of a fold file: "valid", "test" and perhaps "train", with what stands there.

    Three forms are known: {"folds": [{"valid": [...], "test": [...]}, ...]}; folds by name, {"fold_0": {...}, ...},
    of which `fold` counts the rows from 0; and a single one, {"train": [...], "valid": [...], "test": [...]}.
    "val" and "validation" are "valid", too.

    Args:
        content: the file's content.
        fold: which one, from 0; None only where there is one.
        where: what the file is called in messages.

    Raises:
        ConfigError: the file has another form, or no such fold.
    """
    if isinstance(content.get("folds"), Sequence) and not isinstance(content["folds"], str):
        folds = list(content["folds"])
    elif content and all(isinstance(value, Mapping) for value in content.values()):
        folds = list(content.values())
    else:
        folds = [content]
    if fold is None and len(folds) == 1:
        fold = 0
    if not isinstance(fold, int) or isinstance(fold, bool) or not 0 <= fold < len(folds):
        has = "one fold" if len(folds) == 1 else f"{len(folds)} folds"
        raise ConfigError(f"{where} has {has}, and fold is {fold}: give `fold: k` from 0 to {len(folds) - 1}")
    chosen = folds[fold]
    named = {_OTHER_NAMES.get(str(key), str(key)) for key in chosen} if isinstance(chosen, Mapping) else set()
    if not {"valid", "test"} <= named or not named <= set(SPLITS):
        raise ConfigError(
            f"{where}: fold {fold} has the keys {', '.join(sorted(named)) or 'of no mapping'}: give valid, test and "
            "perhaps train, each a list of chromosomes"
        )
    return {_OTHER_NAMES.get(str(key), str(key)): value for key, value in chosen.items()}


def spread(
    sizes: Mapping[str, float], folds: int, *, seed: int = 0, positives: Mapping[str, float] | None = None
) -> tuple[tuple[str, ...], ...]:
    """Chromosomes in `folds` groups of alike load, each in one; a group's names keep the order of `sizes`.

    A chromosome's load is its share of all bases or, with `positives`, the mean of its shares of bases and of
    positives. The largest are placed first, each where the load is least (in an order that `seed` shuffles among
    chromosomes of about the same load), so that no two groups differ by more than the largest chromosome.

    Args:
        sizes: bases of each chromosome, above 0.
        folds: how many groups, at most as many as chromosomes.
        seed: another seed, another spread.
        positives: for each chromosome a number, such as its bases in peaks.

    Raises:
        DataError: there are fewer chromosomes than folds.
    """
    if folds < 1 or len(sizes) < folds:
        raise DataError(
            f"{len(sizes)} chromosomes cannot be spread over {folds} folds: give `n_folds` of at most as many as "
            "chromosomes are in use"
        )
    loads = _loads(sizes, positives)
    largest_first = sorted(loads, key=lambda name: (-loads[name], name))
    chance = random.Random(seed)
    order: list[str] = []
    for start in range(0, len(largest_first), folds):
        alike = largest_first[start : start + folds]
        chance.shuffle(alike)
        order += alike
    groups: list[list[str]] = [[] for _ in range(folds)]
    totals = [0.0] * folds
    for name in order:
        least = min(range(folds), key=lambda group: (totals[group], len(groups[group])))
        groups[least].append(name)
        totals[least] += loads[name]
    return tuple(tuple(name for name in sizes if name in group) for group in groups)


def rotate(groups: Sequence[tuple[str, ...]], fold: int) -> dict[str, tuple[str, ...]]:
    """The group `fold` tests, the next one validates (the first after the last), and the others train."""
    valid = (fold + 1) % len(groups)
    train = tuple(name for at, group in enumerate(groups) if at not in (fold, valid) for name in group)
    return {"train": train, "valid": groups[valid], "test": groups[fold]}


def _loads(sizes: Mapping[str, float], positives: Mapping[str, float] | None) -> dict[str, float]:
    total = sum(sizes.values())
    shares = {name: size / total for name, size in sizes.items()}
    found = sum((positives or {}).values())
    if positives is None or not found:
        return shares
    return {name: (shares[name] + positives[name] / found) / 2 for name in sizes}
