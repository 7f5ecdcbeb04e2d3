"""Stranded pairs of tracks: who takes whose place, and declarations that do not fit."""

from __future__ import annotations

import pytest

from genossm.models.heads import TrackHead
from genossm.strands import Strand, partner_columns


def track(name: str, strand: Strand = ".", partner: str | None = None) -> TrackHead:
    return TrackHead(name, "signal", "poisson", strand=strand, partner=partner)


def test_partners_take_each_others_place_and_others_keep_theirs() -> None:
    tracks = [
        track("a+", "+", "a-"),
        track("b"),
        track("c-", "-", "c+"),
        track("a-", "-", "a+"),
        track("c+", "+", "c-"),
    ]
    assert partner_columns(tracks) == (3, 1, 4, 0, 2)
    assert partner_columns([track("a"), track("b")]) == (0, 1)
    assert partner_columns([]) == ()


@pytest.mark.parametrize(
    ("strand", "partner", "words"),
    [
        ("+", None, r"'t' has the strand '\+' and no partner"),
        (".", "u", r"'t' has the strand '.' and the partner 'u'"),
        ("*", "u", r"strand of track 't' is '\*'; allowed are"),
    ],
)
def test_a_strand_without_a_partner_is_refused(strand: Strand, partner: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        track("t", strand, partner)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([], "the partner 'b', which is no track"),
        ([track("b")], "which has the strand '.' and the partner None"),
        ([track("b", "+", "a")], r"which has the strand '\+' and the partner 'a'"),
        ([track("b", "-", "c"), track("c", "+", "b")], "which has the strand '-' and the partner 'c'"),
    ],
)
def test_partners_that_do_not_match_are_refused(others: list[TrackHead], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        partner_columns([track("a", "+", "b"), *others])


def test_a_track_is_not_its_own_partner() -> None:
    with pytest.raises(ValueError, match="two partners name each other, and are of opposite strands"):
        partner_columns([track("a", "+", "a")])
