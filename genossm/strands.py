"""Pairs of tracks, one for each strand: which track takes which one's place on the other strand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

Strand = Literal[".", "+", "-"]


class Stranded(Protocol):
    """A track: "." is of no strand, "+" and "-" are the two of a pair that name each other as `partner`."""

    @property
    def name(self) -> str: ...
    @property
    def strand(self) -> Strand: ...
    @property
    def partner(self) -> str | None: ...


def check_strand(track: Stranded) -> None:
    """A ValueError unless the track has both a strand and a partner, or neither."""
    if track.strand not in (".", "+", "-"):
        raise ValueError(f"strand of track {track.name!r} is {track.strand!r}; allowed are '.', '+' and '-'")
    if (track.strand == ".") != (track.partner is None):
        partner = "no partner" if track.partner is None else f"the partner {track.partner!r}"
        raise ValueError(
            f"track {track.name!r} has the strand {track.strand!r} and {partner}; a track of one strand needs "
            "both `strand` (+ or -) and `partner` (the same assay's track of the other strand), others neither"
        )


def partner_columns(tracks: Sequence[Stranded]) -> tuple[int, ...]:
    """For each track, in order, the column of the one that takes its place on the other strand: often its own.

    Raises:
        ValueError: two tracks do not name each other as partners, or are of the same strand.
    """
    columns = {track.name: column for column, track in enumerate(tracks)}
    result = []
    for column, track in enumerate(tracks):
        check_strand(track)
        if track.partner is not None:
            other = tracks[columns[track.partner]] if track.partner in columns else None
            if other is None or other.partner != track.name or other.strand == track.strand:
                found = (
                    "which is no track"
                    if other is None
                    else f"which has the strand {other.strand!r} and the partner {other.partner!r}"
                )
                raise ValueError(
                    f"track {track.name!r} of strand {track.strand!r} has the partner {track.partner!r}, {found}; "
                    "two partners name each other, and are of opposite strands"
                )
            column = columns[track.partner]
        result.append(column)
    return tuple(result)
