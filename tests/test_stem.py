"""Stems against their sums written out, what a bin sees, parts of a sequence with their halo, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genossm.models.norm import RMSNorm
from genossm.models.stem import BaseStem, ConvStem, NormGeluConv, StemConfig, build_stem

SHAPES = [
    {"channels": (6, 7), "pool": (4, 4), "first_kernel": 7, "kernel": 3},
    {"channels": (6, 5, 7), "pool": (1, 2, 3), "first_kernel": 1, "kernel": 5},
    {"channels": (6, 6, 6, 7), "pool": (2, 1, 2, 1), "first_kernel": 9, "kernel": 1},
    {"channels": (6,), "pool": (1,), "first_kernel": 5, "kernel": 3},
]


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 5, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def small(width: int = 8, **options: object) -> ConvStem:
    """In evaluation mode, with statistics and norms that are not those of the start."""
    torch.manual_seed(0)
    stem = ConvStem(StemConfig(**options), width).double().eval()  # type: ignore[arg-type]
    for module in stem.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        if isinstance(module, (nn.BatchNorm1d, RMSNorm)):
            nn.init.uniform_(module.weight, 0.5, 2)
    return stem


def slow_conv(x_CL: Tensor, conv: nn.Conv1d) -> Tensor:
    length, kernel = x_CL.shape[1], conv.weight.shape[2]
    columns = []
    for t in range(length):
        total = x_CL.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias
        for k in range(kernel):
            if 0 <= (s := t + k - kernel // 2) < length:
                total = total + conv.weight[:, :, k] @ x_CL[:, s]
        columns.append(total)
    return torch.stack(columns, 1)


def slow_norm_gelu(x_CL: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.BatchNorm1d):
        assert norm.running_mean is not None and norm.running_var is not None
        mean, deviation = norm.running_mean[:, None], (norm.running_var + norm.eps).sqrt()[:, None]
        x_CL = (x_CL - mean) / deviation * norm.weight[:, None] + norm.bias[:, None]
    else:
        assert isinstance(norm, RMSNorm)
        x_CL = x_CL / (x_CL.square().mean(0) + 1e-5).sqrt() * norm.weight[:, None]
    return x_CL * (1 + torch.erf(x_CL / math.sqrt(2))) / 2


def slow_norm_gelu_conv(x_CL: Tensor, module: object) -> Tensor:
    assert isinstance(module, NormGeluConv)
    return slow_conv(slow_norm_gelu(x_CL, module.norm), module.conv)


def slow_stem(stem: ConvStem, tokens_L: Tensor, pools: tuple[int, ...]) -> Tensor:
    one_hot = torch.zeros(4, len(tokens_L), dtype=torch.float64)
    for position, code in enumerate(tokens_L.tolist()):
        if code < 4:
            one_hot[code, position] = 1
    x = slow_conv(one_hot, stem.first)
    for pool, stage in zip(pools, stem.stages, strict=True):
        x = torch.stack([x[:, i : i + pool].amax(1) for i in range(0, x.shape[1], pool)], 1)
        x = slow_norm_gelu_conv(x, stage.conv)
        x = x + slow_norm_gelu_conv(x, stage.pointwise)
    return x.T


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_the_stem_is_its_convolutions_written_out(options: dict[str, tuple[int, ...]], norm: str) -> None:
    stem = small(norm=norm, **options)
    tokens = random_tokens(2, 3 * stem.bin_bp)
    expected = torch.stack([slow_stem(stem, row, options["pool"]) for row in tokens])
    torch.testing.assert_close(stem(tokens), expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    parameters = list(stem.parameters())
    got = torch.autograd.grad((stem(tokens) * weights).sum(), parameters)
    torch.testing.assert_close(
        got, torch.autograd.grad((expected * weights).sum(), parameters), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("options", SHAPES)
def test_a_bin_sees_just_its_reach(options: dict[str, tuple[int, ...]]) -> None:
    stem = small(**options)
    bin_bp, reach = stem.bin_bp, stem.reach_bp
    assert stem.halo_bp % bin_bp == 0 and 0 <= stem.halo_bp - reach < bin_bp
    middle = -(-(reach + 1) // bin_bp)
    tokens = random_tokens(64, (2 * middle + 1) * bin_bp)
    with torch.no_grad():
        features = stem(tokens)[:, middle]
    start, end = middle * bin_bp, (middle + 1) * bin_bp

    def change(position: int) -> float:
        moved = tokens.clone()
        moved[:, position] = (moved[:, position] + 1) % 4
        with torch.no_grad():
            return float((stem(moved)[:, middle] - features).abs().max())

    assert change(start - reach) > 1e-6 and change(end + reach - 1) > 1e-6
    assert change(start - reach - 1) == 0 and change(end + reach) == 0


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_a_part_with_its_halo_has_the_features_of_the_whole(
    options: dict[str, tuple[int, ...]], norm: str
) -> None:
    stem = small(norm=norm, **options)
    config = StemConfig(**options)  # type: ignore[arg-type]
    bins = 40
    tokens = random_tokens(2, bins * stem.bin_bp)
    whole, finer = stem.with_finer(tokens, config.finer)
    for start, stop in ((0, 1), (0, 13), (12, 13), (7, 33), (39, 40), (0, 40)):
        first = max(0, start * stem.bin_bp - stem.halo_bp)
        part = tokens[:, first : stop * stem.bin_bp + stem.halo_bp]
        features, found = stem.with_finer(part, config.finer)
        before = start - first // stem.bin_bp
        torch.testing.assert_close(
            features[:, before : before + stop - start], whole[:, start:stop], rtol=1e-12, atol=1e-12
        )
        for bin_bp, expected in finer.items():
            factor = stem.bin_bp // bin_bp
            got = found[bin_bp][:, before * factor : (before + stop - start) * factor]
            torch.testing.assert_close(
                got, expected[:, start * factor : stop * factor], rtol=1e-12, atol=1e-12
            )


def test_finer_resolutions_are_the_last_features_there() -> None:
    assert StemConfig().finer == {1: 96, 4: 128, 8: 160, 16: 192}
    config = StemConfig(channels=(5, 6, 7, 8), pool=(1, 2, 1, 4), first_kernel=3, kernel=3)
    assert config.bin_bp == 8 and config.finer == {1: 6, 2: 8}
    assert StemConfig(channels=(5, 6), pool=(4, 1)).finer == {1: 5}
    assert StemConfig(kind="base").finer == {}
    torch.manual_seed(0)
    stem = ConvStem(config, 9).eval()
    tokens = random_tokens(2, 32)
    features, finer = stem.with_finer(tokens, config.finer)
    assert {bin_bp: tuple(tensor.shape) for bin_bp, tensor in finer.items()} == {1: (2, 32, 6), 2: (2, 16, 8)}
    assert torch.equal(features, stem(tokens)) and features.shape == (2, 4, 9)
    assert stem.with_finer(tokens, (2,))[1].keys() == {2}
    # the next stage takes the finer features as they are
    summands = stem.stages[3](finer[2].unflatten(1, (-1, 4)).amax(2))
    torch.testing.assert_close(sum(summands), features)


def test_the_base_stem_is_a_vector_for_each_base_and_one_for_none() -> None:
    torch.manual_seed(0)
    stem = build_stem(StemConfig(kind="base"), 6)
    assert isinstance(stem, BaseStem)
    assert (stem.bin_bp, stem.reach_bp, stem.halo_bp) == (1, 0, 0)
    tokens = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 3, 0, 1]], dtype=torch.int8)
    features = stem(tokens)
    assert features.shape == (2, 5, 6) and features[tokens == 4].any()
    assert torch.equal(features[0, 3], features[1, 1]) and torch.equal(features[0, 0], features[1, 3])
    assert len({tuple(row.tolist()) for row in features[0]}) == 5
    assert stem.with_finer(tokens, ())[1] == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": (8,), "pool": (4, 4)}, "differ in length"),
        ({"channels": (), "pool": ()}, "differ in length"),
        ({"channels": (0,), "pool": (4,)}, "at least 1"),
        ({"channels": (8,), "pool": (0,)}, "at least 1"),
        ({"kernel": 4}, "kernel of the stem is 4; it must be odd"),
        ({"first_kernel": 0}, "first_kernel of the stem is 0"),
        ({"kernel": -1}, "kernel of the stem is -1"),
        ({"kind": "bases"}, "kind of the stem is 'bases'; allowed are 'conv' and 'base'"),
    ],
)
def test_an_impossible_stem_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StemConfig(**options)  # type: ignore[arg-type]


def test_a_length_that_is_no_multiple_of_the_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="the length 33 is no multiple of the bin of 16 bp"):
        small(**SHAPES[0])(random_tokens(1, 33))
