"""Track heads: losses against formulas written out, masks, and what the outputs mean."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from genossm.models.heads import TrackHead, TrackHeads, unscaled
from genossm.scaling import UNSCALED, Scaling, Squash

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
        (
            {"scaling": Scaling(clip=9.0)},
            r"'minus' and 'plus' are partners and differ in scaling \(Scaling\(clip=9.0",
        ),
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


SCALINGS = [Scaling(clip, squash, 0.37) for clip in (None, 50.0) for squash in ("none", "sqrt", "log1p")]
VALUES = torch.tensor([0, 1e-6, 0.3, 7, 49.9, 50, 51, 1e6, -3, -80], dtype=torch.float64)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_tensors_are_scaled_as_arrays_are_and_come_back(scaling: Scaling) -> None:
    columns = with_scaling(scaling).scaled(torch.stack([VALUES] * 3, -1)[None])
    assert torch.equal(columns[0, :, 0], VALUES)
    there = columns[0, :, 1]
    np.testing.assert_allclose(there.numpy(), scaling.forward(VALUES.numpy()), rtol=1e-12)
    back = unscaled(there, scaling)
    np.testing.assert_allclose(back.numpy(), scaling.inverse(there.numpy()), rtol=1e-12)
    limit = scaling.clip or math.inf
    torch.testing.assert_close(back, VALUES.clamp(-limit, limit), rtol=1e-9, atol=1e-12)
    assert with_scaling(scaling).scaled(torch.ones(1, 1, 3)).dtype == torch.float32


def test_tracks_have_each_their_own_scaling() -> None:
    tracks = [replace(TRACKS[2], name=str(number), scaling=item) for number, item in enumerate(SCALINGS)]
    there = TrackHeads(tracks, 8, hidden=8, dropout=0.0).scaled(torch.stack([VALUES] * len(tracks), -1))
    for column, scaling in enumerate(SCALINGS):
        np.testing.assert_allclose(there[:, column].numpy(), scaling.forward(VALUES.numpy()), rtol=1e-12)


def test_without_a_scale_nothing_is_done() -> None:
    assert heads().scaled(VALUES) is VALUES and unscaled(VALUES, UNSCALED) is VALUES


def with_scaling(scaling: Scaling) -> TrackHeads:
    torch.manual_seed(0)
    tracks = [TRACKS[0], *(replace(track, scaling=scaling) for track in TRACKS[1:])]
    return TrackHeads(tracks, 8, hidden=8, dropout=0.0).double()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_losses_are_those_of_targets_scaled_by_hand(scaling: Scaling) -> None:
    raw = torch.randn(2, 7, 3, dtype=torch.float64)
    targets = (torch.rand(2, 7, 3) * 100).double()
    targets[..., 0] = (targets[..., 0] > 50).double()
    mask = torch.rand(2, 7, 3) > 0.3
    by_hand = targets.clone()
    by_hand[..., 1:] = torch.from_numpy(scaling.forward(targets[..., 1:].numpy()))
    got = with_scaling(scaling).losses(raw, targets.masked_fill(~mask, math.nan), mask, total_weight=0.2)
    torch.testing.assert_close(got, heads().losses(raw, by_hand, mask, total_weight=0.2))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_values_of_scaled_tracks_are_in_their_unit(scaling: Scaling) -> None:
    """Where the outputs are what the loss aims at, the values are the targets."""
    targets = torch.tensor([1.0, 7.0, 49.0, 80.0], dtype=torch.float64)
    aims = torch.from_numpy(scaling.forward(targets.numpy()))
    raw = torch.stack([torch.zeros(4), (aims / 2.0).log(), (aims - 1.0) / 0.5], -1)[None]
    values = with_scaling(scaling).values(raw)
    expected = targets.clamp(max=scaling.clip or math.inf)
    torch.testing.assert_close(values[0, :, 1], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(values[0, :, 2], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("squash", ["none", "sqrt", "log1p"])
def test_the_largest_outputs_have_finite_values(squash: Squash) -> None:
    raw = torch.full((1, 1, 3), 1e9, dtype=torch.float32)
    assert torch.isfinite(with_scaling(Scaling(squash=squash)).values(raw)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "peaks", "loss": "mse"}, "peaks take bce"),
        ({"kind": "signal", "loss": "bce"}, "signal poisson or mse"),
        ({"kind": "peaks", "loss": "bce", "scaling": Scaling(squash="sqrt")}, "only signal is scaled"),
        ({"kind": "signal", "loss": "poisson", "mean": 0.0}, "needs a mean above 0"),
        ({"kind": "signal", "loss": "mse", "std": 0.0}, "needs one above 0"),
    ],
)
def test_an_impossible_track_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrackHead("t", **options)  # type: ignore[arg-type]
