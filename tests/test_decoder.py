"""The decoder against its sums written out, what an output sees, parts of a sequence with their halo, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genossm.models.decoder import Decoder, DecoderConfig
from genossm.models.stem import NormGeluConv, StemConfig

STEM = StemConfig(channels=(5, 6, 7), pool=(2, 3, 2), norm="rms")
"""Through 1, 2 and 6 bp to 12 bp."""


def small(bin_bp: int, kernel: int = 3, width: int = 4) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(bin_bp, kernel), STEM, width).double().eval()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    return decoder


def random_input(bins: int, batch: int = 2, width: int = 4) -> tuple[Tensor, dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    finer = {bin_bp: normal(batch, bins * 12 // bin_bp, channels) for bin_bp, channels in STEM.finer.items()}
    return normal(batch, bins, width), finer


def slow_block(x_DL: Tensor, block: NormGeluConv) -> Tensor:
    """RMSNorm, GELU and convolution, position by position."""
    norm, weight, bias = block.norm, block.conv.weight, block.conv.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor) and isinstance(norm.weight, Tensor)
    x_DL = x_DL / (x_DL.square().mean(0) + 1e-5).sqrt() * norm.weight[:, None]
    x_DL = x_DL * (1 + torch.erf(x_DL / math.sqrt(2))) / 2
    length, kernel = x_DL.shape[1], weight.shape[2]
    columns = []
    for t in range(length):
        total = bias
        for k in range(kernel):
            if 0 <= (s := t + k - kernel // 2) < length:
                total = total + weight[:, :, k] @ x_DL[:, s]
        columns.append(total)
    return torch.stack(columns, 1)


def slow_decoder(decoder: Decoder, x_BLD: Tensor, finer: dict[int, Tensor]) -> Tensor:
    rows = []
    for row in range(len(x_BLD)):
        x_DL, at = x_BLD[row].T, 12
        for bin_bp, level in zip(decoder.finer, decoder.levels, strict=True):
            factor, at = at // bin_bp, bin_bp
            weight, bias = level.skip.weight, level.skip.bias  # type: ignore[union-attr]
            columns = [
                x_DL[:, t // factor] + weight @ finer[bin_bp][row, t] + bias  # type: ignore[operator]
                for t in range(x_DL.shape[1] * factor)
            ]
            x_DL = torch.stack(columns, 1)
            x_DL = x_DL + slow_block(x_DL, level.conv)  # type: ignore[arg-type]
            x_DL = x_DL + slow_block(x_DL, level.pointwise)  # type: ignore[arg-type]
        rows.append((x_DL / (x_DL.square().mean(0) + 1e-5).sqrt()).T * decoder.norm.weight)
    return torch.stack(rows)


@pytest.mark.parametrize("bin_bp", [6, 2, 1])
@pytest.mark.parametrize("bins", [1, 3])
def test_the_decoder_is_its_sums_written_out(bin_bp: int, bins: int) -> None:
    decoder = small(bin_bp)
    x, finer = random_input(bins)
    got, expected = decoder(x, finer), slow_decoder(decoder, x, finer)
    assert got.shape == (2, bins * 12 // bin_bp, 4)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    wanted = [x, *(finer[bp] for bp in decoder.finer), *decoder.parameters()]
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0])


@pytest.mark.parametrize(
    ("bin_bp", "kernel", "halo"), [(6, 3, 1), (2, 3, 1), (1, 5, 2), (1, 1, 0), (6, 9, 2), (1, 13, 5)]
)
def test_the_halo_is_just_what_an_output_sees_of_the_trunk(bin_bp: int, kernel: int, halo: int) -> None:
    decoder = small(bin_bp, kernel)
    assert decoder.halo == halo
    x, finer = random_input(13, batch=1)
    factor = 12 // bin_bp
    y = decoder(x, finer)[:, 6 * factor : 7 * factor]
    gradients = torch.autograd.grad(y.square().sum(), [x, finer[bin_bp]])
    seen = (gradients[0].abs().amax((0, 2)) > 1e-13).nonzero().flatten()
    assert (6 - int(seen.min()), int(seen.max()) - 6) == (halo, halo)
    seen = (gradients[1].abs().amax((0, 2)) > 1e-13).nonzero().flatten()
    assert int(seen.min()) >= (6 - halo) * factor and int(seen.max()) < (7 + halo) * factor


@pytest.mark.parametrize("bin_bp", [6, 2, 1])
@pytest.mark.parametrize("kernel", [1, 3, 9])
def test_a_part_with_its_halo_has_the_features_of_the_whole(bin_bp: int, kernel: int) -> None:
    decoder, factor = small(bin_bp, kernel), 12 // bin_bp
    with torch.no_grad():
        x, finer = random_input(11)
        whole = decoder(x, finer)
        for start, stop in ((0, 1), (0, 4), (3, 4), (4, 10), (10, 11)):
            first, last = max(0, start - decoder.halo), min(11, stop + decoder.halo)
            cut = {bp: t[:, first * 12 // bp : last * 12 // bp] for bp, t in finer.items()}
            got = decoder(x[:, first:last], cut)[:, (start - first) * factor : (stop - first) * factor]
            expected = whole[:, start * factor : stop * factor]
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_follows_the_stem() -> None:
    stem = StemConfig(channels=(5, 6), pool=(2, 2))
    decoder = Decoder(DecoderConfig(1), stem, 4)
    assert sum(isinstance(module, nn.BatchNorm1d) for module in decoder.modules()) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bin_bp": 0}, "bin_bp of the decoder is 0; it must be at least 1"),
        ({"kernel": 2}, "kernel of the decoder is 2; it must be odd"),
        ({"kernel": -3}, "kernel of the decoder is -3"),
    ],
)
def test_an_impossible_decoder_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DecoderConfig(**options)


@pytest.mark.parametrize(
    ("stem", "bin_bp", "words"),
    [
        (STEM, 4, "bin_bp of the decoder is 4; the stem, which ends at 12 bp, passes through 1, 2, 6:"),
        (STEM, 12, "bin_bp of the decoder is 12"),
        (STEM, 24, "bin_bp of the decoder is 24"),
        (StemConfig(kind="base"), 1, "ends at 1 bp, passes through no other"),
    ],
)
def test_a_resolution_that_the_stem_does_not_pass_is_refused(
    stem: StemConfig, bin_bp: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Decoder(DecoderConfig(bin_bp), stem, 4)
