"""Shares of a prediction for jobs of their own: runs of consecutive parts, alike in bases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genossm.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Share number `index` (from 1) of `count`.

    Raises:
        ConfigError: the number is not among 1 to `count`.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ConfigError(
                f"the shard {self} is not there: give i/n with i from 1 to n, such as 1/{max(self.count, 1)}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that "i/n" names.

        Raises:
            ConfigError: the text is another.
        """
        found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, flags=re.ASCII)
        if found is None:
            raise ConfigError(f"the shard {text!r} is none: give i/n with i from 1 to n, such as 1/4")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def share(self, bases: Sequence[int]) -> range:
        """Which parts are this shard's, of parts of so many bases: every part is exactly one shard's.

        A part goes to the shard in whose n-th of all bases its middle lies. So a shard has its n-th of the bases, give
        or take half of a part at either end, and none where there are fewer parts than shards.
        """
        owners = _owners(bases, self.count)
        first, stop = np.searchsorted(owners, [self.index - 1, self.index])
        return range(int(first), int(stop))


def shards_of(bases: Sequence[int], count: int, parts: Sequence[int]) -> list[Shard]:
    """The shards, of `count`, that have the parts of these numbers."""
    owners = _owners(bases, count)
    return [Shard(int(owner) + 1, count) for owner in np.unique(owners[list(parts)])]


def _owners(bases: Sequence[int], count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64 (parts,): the shard of each part, from 0, never falling."""
    sizes = np.asarray(bases, dtype=np.int64)
    twice_middle = 2 * np.cumsum(sizes) - sizes
    total = max(1, int(sizes.sum()))
    # Python's whole numbers: bases times shards may pass 2^63
    owners = [middle * count // (2 * total) for middle in twice_middle.tolist()]
    return np.minimum(np.array(owners, dtype=np.int64), count - 1)
