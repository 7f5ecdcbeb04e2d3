"""The table of tolerances on the CPU: reference, fused and unfused, convolution and recurrence, stream and one pass.

tests/gpu/test_equality_table.py goes through what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.short_conv import short_conv
from genossm.models.encoder import MixerName
from genossm.models.mixers.build import MIXERS
from genossm.models.mixers.h3 import H3
from genossm.models.mixers.mamba import Mamba
from genossm.models.mixers.mamba2 import Mamba2
from genossm.models.mixers.mixer import Mixer
from genossm.models.mixers.s4 import S4
from genossm.models.mixers.s4d import S4D
from genossm.pipelines.benchmark_rivals import _fused_by_flips, _tied_by_flips
from tests import (
    test_attention,
    test_conv,
    test_h3,
    test_hydra,
    test_hyena,
    test_lstm,
    test_mamba,
    test_mamba2,
    test_mamba3,
    test_s4,
    test_s4d,
    test_stream,
)
from tests.tolerances import (
    DTYPES,
    EXACT,
    LENGTHS,
    OUTPUT,
    SINGLE,
    TOLERANCES,
    Outcome,
    Relation,
    assert_agree,
    differences,
)

Build = Callable[[], Mixer]
Way = Callable[[Any, Tensor], Tensor]
"""Another way to compute what a mixer gives for features (batch, length, width)."""


def random_features(length: int, width: int, seed: int) -> Tensor:
    """The same numbers in every dtype."""
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(seed))


def run(way: Way, mixer: Mixer, length: int, width: int) -> Outcome:
    """The output for random features, and every gradient of a random function of it."""
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    x = random_features(length, width, seed=1).to(parameters[0].dtype).requires_grad_()
    y = way(mixer, x)
    # a single position is mixed with nothing: a reference may not touch what would mix it
    gradients = torch.autograd.grad(
        y, [x, *parameters], random_features(length, width, seed=2).to(y), materialize_grads=True
    )
    return {OUTPUT: y.detach(), **dict(zip(("input", *names), gradients, strict=True))}


def forward(mixer: Mixer, x_BLD: Tensor) -> Tensor:
    y_BLD: Tensor = mixer(x_BLD)
    return y_BLD


def in_dtype(build: Build, dtype: torch.dtype) -> Mixer:
    """With weights that float32 holds, so that they are the same in both."""
    return build().float().to(dtype)


# Against the references, which are those of each mixer's own tests.


def reference_cases() -> dict[str, tuple[Build, Way, int]]:
    """How a mixer is built, its equations step by step, and its width."""
    cases: dict[str, tuple[Build, Way, int]] = {
        "s4": (partial(test_s4.small, expand=2), test_s4.slow_s4, 2),
        "s4d, bilinear": (
            partial(test_s4d.small, initialisation="lin", discretisation="bilinear"),
            partial(test_s4d.slow_s4d, discretisation="bilinear"),
            3,
        ),
        "s4d, zoh": (test_s4d.small, partial(test_s4d.slow_s4d, discretisation="zoh"), 3),
        "h3": (test_h3.small, test_h3.slow_h3, 3),
        "hyena": (partial(test_hyena.small, width=2), test_hyena.slow_hyena, 2),
        "attention, sliding": (test_attention.small, test_attention.slow_attention, 8),
        "attention, full": (partial(test_attention.small, None), test_attention.slow_attention, 8),
        "lstm": (test_lstm.small, test_lstm.slow_lstm, 4),
    }
    for name, depthwise in (("conv", False), ("conv, depthwise", True)):
        slow = partial(test_conv.slow_conv, dilations=(1, 3, 9), depthwise=depthwise)
        cases[name] = partial(test_conv.small, depthwise=depthwise), slow, 4
    for form in ("fused", "tied"):
        for name, module in (("mamba", test_mamba), ("mamba2", test_mamba2)):
            options = module.CASES[form]
            build = partial(module.random_mixer, **options)
            cases[f"{name}, {form}"] = build, partial(module.reference, **options), 6
    for form in ("one group", "two ranks, two groups", "convolution"):
        build = partial(test_mamba3.small_mixer, **test_mamba3.FORMS[form])
        cases[f"mamba3, {form}"] = build, test_mamba3.slow, 8
    options = test_hydra.CASES["seven wide"]
    slow = partial(test_hydra.reference, mixed_by=test_hydra.by_shifted_scans, **options)
    cases["hydra"] = partial(test_hydra.random_mixer, **options), slow, 6
    return cases


REFERENCES = reference_cases()


@cache
def by_reference(case: str, length: int) -> Outcome:
    """In float64, for both dtypes."""
    build, slow, width = REFERENCES[case]
    return run(slow, in_dtype(build, torch.float64), length, width)


def reference(case: str, length: int, dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    build, _, width = REFERENCES[case]
    return run(forward, in_dtype(build, dtype), length, width), by_reference(case, length)


# Both directions at once, against a scan of the sequence and one of the flipped sequence.


def random_scan(kind: type[Mamba] | type[Mamba2], **options: Any) -> Mixer:
    """With weights that are not those of the start, of which some are the same in both directions."""
    torch.manual_seed(0)
    mixer = kind(16, state=8, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def mamba_by_flips(of: Mamba, x_BLD: Tensor) -> Tensor:
    x_BLE, gate_BLE = of.in_projection(x_BLD).chunk(2, -1)
    y_BLE = torch.zeros_like(x_BLE)
    for way in (0, 1):
        if of.tied:
            turned = x_BLE.flip(1) if way else x_BLE
            weight, bias, own, D = of.conv_weight[way], of.conv_bias[way], way, of.D[:, way]
            mixed = short_conv(turned, weight, bias, activation="silu", padding="causal")
        else:
            own, D = 0, None if way else of.D
            mixed = short_conv(x_BLE, of.conv_weight, of.conv_bias, activation="silu", padding="centered")
            mixed = mixed.flip(1) if way else mixed
        low_rank, B, C = of.x_projection[own](mixed).split(of.low_rank_B_C, -1)
        dt = of.dt_projection[own](low_rank)
        A, bias = -torch.exp(of.A_log[..., way]), of.dt_bias[:, way]
        y = selective_scan(mixed, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)
        assert isinstance(y, Tensor)
        y_BLE = y_BLE + (y.flip(1) if way else y)
    return of.out_projection(y_BLE * F.silu(gate_BLE))


FUSED: dict[str, tuple[Build, Way]] = {
    "mamba, fused": (partial(random_scan, Mamba), mamba_by_flips),
    "mamba, tied": (partial(random_scan, Mamba, bidirectional="tied"), mamba_by_flips),
    "mamba2, fused": (partial(random_scan, Mamba2, head_dim=8, groups=2), _fused_by_flips),
    "mamba2, tied": (
        partial(random_scan, Mamba2, head_dim=8, groups=2, conv_width=4, bidirectional="tied"),
        _tied_by_flips,
    ),
}


def fused(case: str, length: int, dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    build, by_flips = FUSED[case]
    mixer = in_dtype(build, dtype)
    return run(forward, mixer, length, 16), run(by_flips, mixer, length, 16)


# A convolution by FFT, against the recurrence position by position.


def s4_recurrence(mixer: S4, x_BLD: Tensor) -> Tensor:
    u_BLD = mixer.in_projection(x_BLD)
    A_bar, B_bar, C = mixer.ssm.discrete()
    y_BLD = mixer.ssm.D * u_BLD
    for direction, order in ((0, range(u_BLD.shape[1])), (1, reversed(range(u_BLD.shape[1])))):
        h_BDN = torch.zeros_like(B_bar).expand(len(u_BLD), -1, -1)
        for t in order:
            h_BDN = torch.einsum("dnm,bdm->bdn", A_bar, h_BDN) + B_bar * u_BLD[:, t, :, None]
            y_BLD[:, t] += (C[direction] * h_BDN).sum(2)
    return mixer._out(y_BLD)


def h3_recurrence(mixer: H3, x_BLD: Tensor) -> Tensor:
    """The shift's state is what it saw last, on both sides."""
    q_BLD, k_BLD, v_BLD = mixer.qkv_projection(x_BLD).chunk(3, -1)
    seen_BLDK = F.pad(k_BLD, (0, 0, *mixer.halo)).unfold(1, sum(mixer.halo) + 1, 1)
    shifted_BLD = (seen_BLDK * mixer.shift_filter.flip(1)).sum(-1) + mixer.shift_D * k_BLD
    u_BLD = shifted_BLD * v_BLD
    y_BLD = mixer.ssm.D * u_BLD
    for direction in (0, 1):
        y_BLD = y_BLD + mixer.ssm.recurrence(u_BLD, direction)[0]
    return mixer.out_projection(q_BLD * y_BLD)


BILINEAR = {"initialisation": "legs", "discretisation": "bilinear"}
RECURRENCES: dict[str, tuple[Build, Way]] = {
    "s4": (partial(test_s4.small, 4, state=16), s4_recurrence),
    "s4, expanded": (partial(test_s4.small, 4, state=16, expand=2), s4_recurrence),
    "s4d": (partial(test_s4d.small, 4, state=16, initialisation="lin"), S4D.recurrence),
    "s4d, expanded": (partial(test_s4d.small, 4, state=16, expand=2, **BILINEAR), S4D.recurrence),
    "h3": (partial(test_h3.small, 4, state=16), h3_recurrence),
    "h3, long shift": (partial(test_h3.small, 4, state=16, shift=64, **BILINEAR), h3_recurrence),
}


@torch.no_grad()
def recurrence(case: str, length: int, dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    build, one_by_one = RECURRENCES[case]
    mixer, x = in_dtype(build, dtype), random_features(length, 4, seed=1).to(dtype)
    return {OUTPUT: mixer(x)}, {OUTPUT: one_by_one(mixer, x)}


# An encoder chunk by chunk, against one pass.

STREAMED = {
    **{name: {"pattern": (name, name)} for name in get_args(MixerName)},
    "mamba, tied": {"pattern": ("mamba", "mamba"), "bidirectional": "tied"},
    "mamba2, tied": {"pattern": ("mamba2", "mamba2"), "bidirectional": "tied"},
}
CHUNKS = (1, 13, 64, 100)
"""Bins: 13 is a whole part of 65, 64 of 64; of 257 and 331 none but 1 is."""


@torch.no_grad()
def stream(case: str, length: int, dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    """The outputs of all chunk sizes, one after another; single bins for short sequences alone, as they take long."""
    encoder = test_stream.build(dtype, **STREAMED[case])
    tokens = test_stream.random_tokens(2, length * encoder.trunk_bp)
    got = []
    for chunk in CHUNKS if length < 64 else CHUNKS[1:]:
        parts = list(encoder.stream(tokens, chunk_bp=chunk * encoder.trunk_bp))
        assert len(parts) == -(-length // chunk)
        got.append(test_stream.joined(parts))
    whole = encoder(tokens)
    return {OUTPUT: torch.stack(got)}, {OUTPUT: whole.expand(len(got), *whole.shape)}


Compare = Callable[[str, int, torch.dtype], tuple[Outcome, Outcome]]
COMPARED: dict[Relation, tuple[Compare, tuple[str, ...]]] = {
    "reference": (reference, tuple(REFERENCES)),
    "fused": (fused, tuple(FUSED)),
    "recurrence": (recurrence, tuple(RECURRENCES)),
    "stream": (stream, tuple(STREAMED)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("relation", "case"),
    [(relation, case) for relation, (_, cases) in COMPARED.items() for case in cases],
)
def test_both_ways_agree(relation: Relation, case: str, length: int, dtype: torch.dtype) -> None:
    compare, _ = COMPARED[relation]
    got, expected = compare(case, length, dtype)
    assert_agree(got, expected, relation, dtype)


def test_the_table_is_gone_through_for_every_mixer() -> None:
    assert TOLERANCES.keys() == {*get_args(Relation)} == {*COMPARED, "device"}
    assert all(row == {torch.float64: EXACT, torch.float32: SINGLE} for row in TOLERANCES.values())
    assert (EXACT, SINGLE) == (1e-10, 1e-4)
    for cases in (REFERENCES, STREAMED):
        assert {case.split(",")[0] for case in cases} == {*MIXERS}


@pytest.mark.parametrize(("part", "allowed"), [(0.9, True), (1.1, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_wrong_element_is_found(dtype: torch.dtype, part: float, allowed: bool) -> None:
    expected = {
        OUTPUT: torch.linspace(-8, 4, 1000, dtype=torch.float64),
        "zero": torch.zeros(3),
        "x": torch.ones(3),
    }
    for name, size in ((OUTPUT, 8.0), ("zero", 1e-3), ("x", 1.0)):
        got = {name: tensor.double().clone() for name, tensor in expected.items()}
        got[name][1] += part * size * TOLERANCES["fused"][dtype]
        far = {name: error > TOLERANCES["fused"][dtype] for name, error in differences(got, expected).items()}
        assert far == {**dict.fromkeys(expected, False), name: not allowed}
