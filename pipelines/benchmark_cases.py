"""What the kernel benchmark measures on a GPU: cases, their inputs, and the least work that each can be done with."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genossm.errors import ConfigError
from genossm.kernels.arguments import Direction
from genossm.kernels.backend import Backend
from genossm.kernels.selective_scan import selective_scan
from genossm.kernels.short_conv import short_conv
from genossm.kernels.ssd import ssd

FLOOR_CHUNK = 64
"""Chunk length for which the matrix products of ssd are counted: shorter ones would be too small for tensor cores."""

PADDINGS = {"forward": "causal", "reverse": "reverse", "both": "both"}
OPERATORS: dict[str, Callable[..., Any]] = {
    "ssd": ssd,
    "selective_scan": selective_scan,
    "short_conv": short_conv,
}


@dataclass(frozen=True)
class Shapes:
    """Sizes of all cases; ssd's state is the case's own."""

    batch: int = 1
    heads: int = 16
    head_dim: int = 64
    channels: int = 1024
    state: int = 16
    width: int = 4


@dataclass(frozen=True)
class Work:
    """What cannot be avoided: bytes (inputs read once, outputs written once), matrix flops and exponentials."""

    bytes: float
    flops: float = 0.0
    exponentials: float = 0.0


@dataclass(frozen=True)
class Case:
    """One operator in one use. `state` is of ssd alone; `separate`: each direction has its own dt, A, B, C and bias."""

    name: str
    operator: Literal["ssd", "selective_scan", "short_conv"]
    direction: Direction
    state: int = 0
    separate: bool = False

    def inputs(
        self, shapes: Shapes, length: int, dtype: torch.dtype, device: torch.device, seed: int = 1
    ) -> list[Tensor]:
        """Random inputs, made on the device. Sequences are of `dtype`; A, D and biases of scans are float32.

        ssd and selective_scan: x, dt, A, B, C, D, dt_bias. short_conv: x, weight, bias.
        """
        # The meta device, for sizes alone, has no generator.
        random = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        batch = shapes.batch
        ways = (2,) if self.separate else ()

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device, dtype=dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=random, device=device)

        if self.operator == "short_conv":
            pair = (2,) if self.direction == "both" else ()
            filters = (*pair, shapes.channels, shapes.width)
            return [normal(batch, length, shapes.channels), normal(*filters), normal(*filters[:-1])]
        if self.operator == "ssd":
            heads, keys = shapes.heads, (batch, length, 1, self.state)
            return [
                normal(batch, length, heads, shapes.head_dim),
                normal(batch, length, heads) * 0.5,
                -1 - 15 * uniform(heads),
                normal(*keys),
                normal(*keys),
                torch.ones(heads, device=device),
                _step_bias(uniform(heads)),
            ]
        channels, keys = shapes.channels, (batch, length, shapes.state, *ways)
        ladder = torch.arange(1, shapes.state + 1, device=device, dtype=torch.float32)
        return [
            normal(batch, length, channels),
            normal(batch, length, channels, *ways) * 0.5,
            -ladder.view(-1, *(1 for _ in ways)) * (0.5 + uniform(channels, shapes.state, *ways)),
            normal(*keys),
            normal(*keys),
            torch.ones(channels, device=device),
            _step_bias(uniform(channels, *ways)),
        ]

    def run(self, inputs: Sequence[Tensor], backend: Backend) -> list[Tensor]:
        """The outputs of the kernel."""
        operator = OPERATORS[self.operator]
        if self.operator == "short_conv":
            x, weight, bias = inputs
            y = operator(
                x, weight, bias, activation="silu", padding=PADDINGS[self.direction], backend=backend
            )
            return list(y) if self.direction == "both" else [y]
        x, dt, A, B, C, D, dt_bias = inputs
        y = operator(
            x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, direction=self.direction, backend=backend
        )
        return [y]

    def reference(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The same outputs from the step-by-step recurrence, or for short_conv from torch's own convolution."""
        if self.operator != "short_conv":
            return self.run(inputs, "reference")
        x, weight, bias = inputs
        both = self.direction == "both"
        outputs = []
        for index in (0, 1) if both else (0,):
            one, offset = (weight[index], bias[index]) if both else (weight, bias)
            reverse = index == 1 or self.direction == "reverse"
            sequence = (x.flip(1) if reverse else x).transpose(1, 2)
            y = F.conv1d(F.pad(sequence, (one.shape[1] - 1, 0)), one[:, None], offset, groups=one.shape[0])
            y = F.silu(y).transpose(1, 2)
            outputs.append(y.flip(1) if reverse else y)
        return outputs

    def work(self, shapes: Shapes, length: int, inputs: Sequence[Tensor]) -> tuple[Work, Work]:
        """The least work of the forward pass, and of it with the gradient.

        The gradient reads every input and the output's gradient and writes every input's gradient. Matrix products of
        ssd, per position, direction and chunk of Q: forward Q N for C·Bᵀ (one group), Q H P for its product with x,
        4 H N P for the states and what they add; with the gradient 4 Q N + 3 Q H P + 14 H N P, the states computed
        again. selective_scan takes N + 2 exponentials a position, channel and direction (softplus is 2), and with the
        gradient twice as many.
        """
        read = float(sum(tensor.numel() * tensor.element_size() for tensor in inputs))
        x = inputs[0]
        outputs = 2 if self.operator == "short_conv" and self.direction == "both" else 1
        written = float(outputs * x.numel() * x.element_size())
        moved = read + written, 3 * read + 2 * written
        ways = 2 if self.direction == "both" else 1
        positions = shapes.batch * length * ways
        if self.operator == "ssd":
            pairs = FLOOR_CHUNK * self.state
            mixed = FLOOR_CHUNK * shapes.heads * shapes.head_dim
            states = shapes.heads * self.state * shapes.head_dim
            return (
                Work(moved[0], flops=positions * (pairs + mixed + 4.0 * states)),
                Work(moved[1], flops=positions * (4.0 * pairs + 3 * mixed + 14 * states)),
            )
        if self.operator == "selective_scan":
            exponentials = float(positions * shapes.channels * (shapes.state + 2))
            return Work(moved[0], exponentials=exponentials), Work(moved[1], exponentials=2 * exponentials)
        return Work(moved[0]), Work(moved[1])


CASES = (
    Case("ssd-both-128", "ssd", "both", 128),
    Case("ssd-both-64", "ssd", "both", 64),
    Case("ssd-forward-128", "ssd", "forward", 128),
    Case("ssd-forward-64", "ssd", "forward", 64),
    Case("selective_scan-both-shared", "selective_scan", "both"),
    Case("selective_scan-both-separate", "selective_scan", "both", separate=True),
    Case("selective_scan-forward", "selective_scan", "forward"),
    Case("short_conv-both", "short_conv", "both"),
)


def select_cases(names: Sequence[str]) -> list[Case]:
    """The cases of these names, or whose names begin so; all where none is named.

    Raises:
        ConfigError: no case has such a name.
    """
    chosen: dict[str, Case] = {}
    for name in names:
        found = {case.name: case for case in CASES if case.name.startswith(name)}
        if not found:
            known = [case.name for case in CASES]
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"there is no case {name!r}; there are {', '.join(known)}{meant}")
        chosen |= found
    return list(chosen.values()) if names else list(CASES)


def _step_bias(uniform: Tensor) -> Tensor:
    """Biases whose softplus is spread evenly on a log scale over 0.001 to 0.1, as Mamba starts with."""
    steps = torch.exp(-6.9 + 4.6 * uniform)
    return steps + torch.log(-torch.expm1(-steps))
