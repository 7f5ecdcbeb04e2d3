"""Track heads: losses against formulas written out, masks, and what the outputs mean."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from genossm.models.heads import TrackHead, TrackHeads

TRACKS = (
    TrackHead("peaks", "peaks", "bce"),
    TrackHead("cuts", "signal", "poisson", "sum", mean=2.0),
    TrackHead("occupancy", "signal", "mse", mean=1.0, std=0.5),
)


def heads() -> TrackHeads:
    torch.manual_seed(0)
    return TrackHeads(TRACKS, 8, hidden=8, dropout=0.0).double()


def test_losses_equal_their_formulas() -> None:
    raw = torch.randn(2, 7, 3, dtype=torch.float64)
    targets = torch.stack(
        [torch.randint(0, 2, (2, 7)), torch.poisson(torch.full((2, 7), 2.0)), torch.randn(2, 7)], -1
    ).double()
    mask = torch.rand(2, 7, 3) > 0.3
    mask[1, :, 1] = False  # a window without a single counted bin
    got = heads().losses(raw, targets.clone().masked_fill(~mask, math.nan), mask, total_weight=0.2)

    keep = mask[..., 0]
    p = torch.sigmoid(raw[..., 0])
    y = targets[..., 0]
    expected_peaks = -(y * p.log() + (1 - y) * (1 - p).log())[keep].mean()
    keep = mask[0, :, 1]
    rate, counts = raw[0, keep, 1].exp(), targets[0, keep, 1] / 2.0
    multinomial = -(counts * (rate / rate.sum()).log()).sum()
    poisson = rate.sum() - counts.sum() * rate.sum().log()
    expected_cuts = (multinomial + 0.2 * poisson) / keep.sum()
    keep = mask[..., 2]
    expected_occupancy = (raw[..., 2] - (targets[..., 2] - 1.0) / 0.5)[keep].square().mean()
    torch.testing.assert_close(got, torch.stack([expected_peaks, expected_cuts, expected_occupancy]))


def test_the_poisson_loss_is_least_at_the_truth() -> None:
    counts = torch.tensor([[1.0, 4.0, 2.0, 8.0]], dtype=torch.float64)
    targets = torch.stack([torch.zeros_like(counts), counts, torch.zeros_like(counts)], -1)
    raw = torch.zeros(1, 4, 3, dtype=torch.float64)
    raw[..., 1] = (counts / 2.0).log()
    raw.requires_grad_()
    heads().losses(raw, targets, torch.ones(1, 4, 3, dtype=torch.bool), total_weight=0.2)[1].backward()
    assert raw.grad is not None and raw.grad[..., 1].abs().max() < 1e-12


def test_masked_bins_have_no_gradient_and_all_masked_is_zero() -> None:
    raw = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.ones(1, 5, 3, dtype=torch.float64)
    mask = torch.zeros(1, 5, 3, dtype=torch.bool)
    losses = heads().losses(raw, targets, mask, total_weight=0.2)
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0]
    assert raw.grad is not None and torch.isfinite(raw.grad).all() and not raw.grad.any()


def stranded(**changes: Any) -> list[TrackHead]:
    plus = TrackHead("plus", "signal", "poisson", "sum", 2.0, 3.0, "+", "minus")
    return [replace(plus, name="minus", strand="-", partner="plus", **changes), TRACKS[0], plus]


def test_the_other_strand_has_its_bins_turned_round_and_partners_swapped() -> None:
    outputs = torch.arange(12.0).reshape(1, 4, 3)
    both = TrackHeads(stranded(), 8, hidden=8, dropout=0.0).other_strand(outputs)
    assert both[0, 0].tolist() == [11, 10, 9] and both[0, 3].tolist() == [2, 1, 0]
    assert heads().other_strand(outputs)[0, 0].tolist() == [9, 10, 11]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": 2.5}, r"'minus' and 'plus' are partners and differ in mean \(2.5 and 2.0\)"),
        ({"std": 2.5}, r"differ in std \(2.5 and 3.0\)"),
        ({"loss": "mse"}, r"differ in loss \(mse and poisson\)"),
        ({"aggregate": "max"}, r"differ in aggregate \(max and sum\)"),
    ],
)
def test_partners_that_are_not_alike_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrackHeads(stranded(**changes), 8, hidden=8, dropout=0.0)


def test_raw_outputs_are_float32_or_float64() -> None:
    x = torch.randn(1, 3, 8)
    assert heads()(x.double()).dtype == torch.float64
    assert heads().float()(x).dtype == heads().bfloat16()(x.bfloat16()).dtype == torch.float32


def test_values_are_in_the_units_of_the_tracks() -> None:
    values = heads().values(torch.tensor([[[0.0, math.log(3.0), 2.0], [0.0, 1e9, 0.0]]]))
    torch.testing.assert_close(values[0, 0], torch.tensor([0.5, 6.0, 2.0]))
    assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "peaks", "loss": "mse"}, "peaks take bce"),
        ({"kind": "signal", "loss": "bce"}, "signal poisson or mse"),
        ({"kind": "signal", "loss": "poisson", "mean": 0.0}, "needs a mean above 0"),
        ({"kind": "signal", "loss": "mse", "std": 0.0}, "needs one above 0"),
    ],
)
def test_an_impossible_track_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrackHead("t", **options)  # type: ignore[arg-type]
