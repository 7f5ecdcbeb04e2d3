"""Exact reverse-complement equivariance of the plain network, at about its own cost, by tied weights.

The mirror image R of features (batch, length, channels) turns positions and channels round, so that the last channel is
on one strand what the first is on the other; of one-hot bases A C G T it is the reverse complement. A module f with
weights w has R f_w R = f_gw, where g turns the axes of each weight round: channels, a filter's taps, the two directions
of a scan. Of an axis that holds several things one after another (x, B and C), each block is turned by itself; what both
strands share (real and imaginary parts, experts) stays. Where w = g w, f(R x) = R f(x).

So half of each parameter is stored, cut from what the plain network starts with, and the rest is made from it. Kernels,
streaming and FLOPs are the plain network's. Batch normalisation takes the statistics of a channel and its mirror image
together.

Letters: B batch, C channels, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from genossm.kernels.batch_norm_gelu import batch_norm_gelu
from genossm.models.mixers.attention import Attention
from genossm.models.mixers.conv import GatedConv
from genossm.models.mixers.h3 import H3
from genossm.models.mixers.hydra import Hydra
from genossm.models.mixers.linear_ssm import LinearSSM, LinearSSMBlock
from genossm.models.mixers.mamba import Mamba
from genossm.models.mixers.mamba2 import Mamba2
from genossm.models.mixers.mamba3 import Mamba3
from genossm.models.mlp import GatedMLP, MixtureOfExperts
from genossm.models.stem import NO_BASE, BaseStem, BatchNormGelu

if TYPE_CHECKING:
    from genossm.models.encoder import EncoderConfig

TIED = ("s4", "s4d", "h3", "mamba", "mamba2", "mamba3", "hydra", "attention", "conv")
"""Mixers of which `_rules` knows what g does. Not lstm, whose directions are parameters of their own, nor hyena, of which
one network writes all filters, under windows that differ from channel to channel."""


@dataclass(frozen=True)
class Block:
    """A part of an axis, seen as several axes, of which `turned` are turned round."""

    shape: tuple[int, ...]
    turned: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Rule:
    """g for a parameter: every axis is turned round, but `axis` block by block where there are any, and `kept` not."""

    blocks: tuple[Block, ...] = ()
    axis: int = 0
    kept: tuple[int, ...] = ()


def tie(encoder: nn.Module) -> None:
    """Tie an encoder's weights in place, so that the features of the reverse complement are the mirror image.

    `torch.nn.utils.parametrize` holds the stored halves, under other names (`plain_name` gives the first ones).
    """
    rules = {
        f"{path}.{name}": rule
        for path, module in encoder.named_modules()
        for name, rule in _rules(module).items()
    }
    for path, module in list(encoder.named_modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchNormGelu):
                setattr(module, name, PairedBatchNorm(child.num_features))
        if isinstance(module, BatchNormGelu):
            continue  # replaced
        for name, parameter in list(module.named_parameters(recurse=False)):
            rule = rules.get(f"{path}.{name}", Rule())
            register_parametrization(module, name, Tied(parameter.shape, rule))


def mirrored(x_BLC: Tensor) -> Tensor:
    """R: the features of the other strand, where the encoder is tied."""
    return x_BLC.flip(1, 2)


def plain_name(name: str) -> str:
    """The name that a parameter has in a network that is not tied."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")


def check_parity(config: EncoderConfig) -> None:
    """A ValueError for an encoder whose weights cannot be tied."""
    used = set(config.pattern)
    wanted = "reverse_complement is 'parity'"
    if others := sorted(used - set(TIED)):
        raise ValueError(
            f"{wanted}, and the pattern has {others[0]}, whose weights cannot be tied; choose from {', '.join(TIED)}, or "
            "reverse_complement 'shared', which takes any"
        )
    fused = config.bidirectional == "fused"
    if "mamba" in used and not fused:
        raise ValueError(
            f"{wanted}, and the pattern has mamba with bidirectional 'tied', where each direction has projections of "
            "its own; choose 'fused', or mamba2"
        )
    centred = used & ({"mamba", "mamba2", "mamba3", "hydra"} if fused else {"mamba3", "hydra"})
    if centred and config.conv_width and config.conv_width % 2 == 0:
        raise ValueError(f"{wanted}, and conv_width {config.conv_width}; it must be odd, to be centred")
    even = {"width": config.width}
    if config.stem.kind == "conv":
        even |= {
            f"one of the stem's channels {config.stem.channels}": n for n in config.stem.channels if n % 2
        }
    if used & {"mamba2", "mamba3", "hydra"}:
        heads = config.expand * config.width // config.head_dim
        even["the number of heads, expand * width / head_dim,"] = heads
    if "mamba2" in used and fused:
        even["groups * state"] = config.groups * config.state
    if "mamba3" in used:
        even["state / 2 of mamba3"] = config.state // 2
    for name, size in even.items():
        if size % 2:
            raise ValueError(f"{wanted}, and {name} is {size}; it must be even, to have two halves")


class Tied(nn.Module):
    """A parameter that is its own mirror image, from the half that is stored (for torch's `parametrize`).

    Args:
        shape: of the whole parameter.
        rule: how it is mirrored.

    Raises:
        ValueError: it does not fall into two halves.
    """

    def __init__(self, shape: Sequence[int], rule: Rule) -> None:
        super().__init__()
        self.axis = axis = rule.axis
        self.before, self.after = tuple(shape[:axis]), tuple(shape[axis + 1 :])
        whole = Block((shape[axis],), () if axis in rule.kept else (0,))
        self.parts = [self._part(block, rule.kept) for block in rule.blocks or (whole,)]

    def __call__(self, stored: Tensor) -> Tensor:
        """Without hooks: a FLOP counter's fails in inference mode on an input that is a parameter."""
        return self.forward(stored)

    def forward(self, stored: Tensor) -> Tensor:
        wholes = []
        halves = torch.split(stored, [part.stored for part in self.parts], self.axis)
        for part, half in zip(self.parts, halves, strict=True):
            opened = half.reshape(part.opened_half)
            whole = torch.cat([opened, opened.flip(part.turned)], part.cut)
            wholes.append(whole.reshape(*self.before, -1, *self.after))
        return torch.cat(wholes, self.axis) if len(wholes) > 1 else wholes[0]

    def right_inverse(self, whole: Tensor) -> Tensor:
        """What is stored of a parameter: the first half of each block."""
        halves = []
        blocks = torch.split(whole, [prod(part.shape) for part in self.parts], self.axis)
        for part, block in zip(self.parts, blocks, strict=True):
            opened = torch.unflatten(block, self.axis, part.shape)
            half = opened.narrow(part.cut, 0, part.opened_half[part.cut])
            halves.append(half.flatten(self.axis, self.axis + len(part.shape) - 1))
        return torch.cat(halves, self.axis)

    def _part(self, block: Block, kept: tuple[int, ...]) -> _Part:
        axis, more = self.axis, len(block.shape) - 1
        opened = [*self.before, *block.shape, *self.after]
        others = [*range(axis), *range(axis + more + 1, len(opened))]
        kept = tuple(own + more if own > axis else own for own in kept)
        # other axes first: one of them suits all blocks, where it is even
        turned = [*(own for own in others if own not in kept), *(axis + own for own in block.turned)]
        cut = next((own for own in turned if opened[own] % 2 == 0), None)
        if cut is None:
            raise ValueError(
                f"a part of a parameter has the shape {tuple(opened)}, of which no axis that is turned round is even, so "
                "that it has no two halves"
            )
        opened[cut] //= 2
        return _Part(block.shape, tuple(opened), tuple(turned), cut, prod(opened[axis : axis + more + 1]))


@dataclass(frozen=True)
class _Part:
    """A block of a parameter.

    Attributes:
        shape: the block's own axes.
        opened_half: what is stored, with the other axes.
        turned: which of all these axes are turned round.
        cut: which of them is halved: the same one for all blocks where it is none of their own.
        stored: positions along the parameter's axis that are stored.
    """

    shape: tuple[int, ...]
    opened_half: tuple[int, ...]
    turned: tuple[int, ...]
    cut: int
    stored: int


class PairedBatchNorm(BatchNormGelu):
    """`BatchNormGelu` where a channel and its mirror image are one: half as many are stored."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels // 2)

    def forward(self, x_BLC: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        weight, bias = _both(self.weight), _both(self.bias)
        if not self.training:
            known = _both(self.running_mean), _both(self.running_var)
            return batch_norm_gelu(x_BLC, weight, bias, known, eps=self.eps)[0]
        y_BLC, mean, variance = batch_norm_gelu(x_BLC, weight, bias, eps=self.eps, paired=True)
        half = self.num_features
        self._track(mean[:half], variance[:half], x_BLC.numel() // half)
        return y_BLC


def _rules(module: nn.Module) -> dict[str, Rule]:
    """The rules of the parameters of which not every axis is turned round as a whole."""
    match module:
        case BaseStem():
            return {"weight": _rows(NO_BASE, Block((1,), ()))}
        case GatedMLP():
            return {"up.weight": _rows(*[module.down.in_features] * 2)}
        case MixtureOfExperts():
            # mirror images go to the same expert; if experts had partners, features that are their own mirror image, as
            # in a run of N, would find two equally probable
            halves = _rows(*[module.down.shape[2]] * 2).blocks
            kept = Rule(kept=(0,))
            return {"router.weight": kept, "up": Rule(halves, axis=1, kept=(0,)), "down": kept}
        case Attention():  # positions turn the other way: the components of a rotating pair change places
            half = module.head_dim // 2
            pairs = Block((2 * module.heads, half))
            scale = _rows(Block((2, half)))
            rows = _rows(pairs, pairs, module.heads * module.head_dim)
            return {"in_projection.weight": rows, "query_scale": scale, "key_scale": scale}
        case GatedConv():
            rows = _rows(*[module.out_projection.in_features] * 2)
            return dict.fromkeys(("in_projection.weight", "conv.weight", "conv.bias"), rows)
        case H3():
            rows = _rows(*[module.out_projection.in_features] * 3)
            return dict.fromkeys(("qkv_projection.weight", "qkv_projection.bias"), rows)
        case LinearSSMBlock():
            rows = _rows(*[module.out_projection.out_features // 2] * 2)
            return dict.fromkeys(("out_projection.weight", "out_projection.bias"), rows)
        case LinearSSM():  # the last axis: real and imaginary parts
            return {"B": Rule(kept=(2,)), "C": Rule(kept=(3,)), "P": Rule(kept=(2,))}
        case Mamba():
            rows = _rows(module.inner, module.inner)
            return {"in_projection.weight": rows, "x_projection.0.weight": _rows(*module.low_rank_B_C)}
        case Mamba2():
            mixed = _rows(module.inner, *[module.groups * module.state] * 2)
            rows = _rows(module.inner, *mixed.blocks, module.scan_inputs[1])
            if module.tied:  # the directions' filters are each other's mirror image as they stand
                mixed = Rule(mixed.blocks, axis=1, kept=(2,))
            return {"in_projection.weight": rows, "conv_weight": mixed, "conv_bias": mixed}
        case Mamba3():  # the state's pairs rotate, and are turned round as pairs; ranks stay
            half = module.state // 2
            vectors = Block((module.rank, module.groups, 2, half), (1, 3))
            steps = Block((3, module.heads, 2), (1, 2))
            mixed = _rows(module.inner, vectors, vectors)
            return {
                "in_projection.weight": _rows(module.inner, *mixed.blocks, steps, module.groups * half),
                **dict.fromkeys(("conv_weight", "conv_bias"), mixed),
                **dict.fromkeys(("B_norm", "C_norm"), _rows(Block((2, half), (1,)))),
                **dict.fromkeys(("B_bias", "C_bias"), _rows(vectors)),
                **dict.fromkeys(("rank_x", "rank_gate", "rank_out"), Rule(kept=(0,))),
            }
        case Hydra():  # B and C of one direction, then of the other
            mixed = _rows(module.inner, Block((2, 2, module.groups * module.state), (0, 2)))
            rows = _rows(module.inner, *mixed.blocks, 2 * module.heads)
            return {"in_projection.weight": rows, "conv_weight": mixed, "conv_bias": mixed}
    return {}


def _rows(*blocks: int | Block) -> Rule:
    """Blocks along the first axis, by their sizes where they are turned round as they are."""
    return Rule(tuple(block if isinstance(block, Block) else Block((block,)) for block in blocks))


def _both(half: Tensor) -> Tensor:
    """What a channel has, for itself and its mirror image."""
    return torch.cat([half, half.flip(0)])
