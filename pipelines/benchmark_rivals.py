"""What encoders are compared with: the same size with another mixer, a Transformer, and Caduceus' two passes with flips.

`python -m genossm.pipelines.benchmark_rivals ENCODER BINS DEVICE PROCESSES INDEX` compiles mamba-ssm's kernels beforehand.

Letters: B batch, L length, D width, E inner width.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import genossm
from genossm.config import build, to_mapping
from genossm.kernels.arguments import accumulation
from genossm.kernels.short_conv import short_conv
from genossm.kernels.ssd import ssd
from genossm.models.accessibility import AccessibilityModel
from genossm.models.encoder import Encoder, EncoderConfig, Layer, MixerName
from genossm.models.mixers.mamba2 import Bidirectional, Mamba2
from genossm.models.mixers.mixer import Mixer
from genossm.pipelines.benchmark_peers import SSD_CHUNK, find, share_autotuning
from genossm.progress import say
from genossm.run_config import RunConfig

OWN_SIZES: dict[str, dict[str, int]] = {"s4": {"state": 32}, "s4d": {"state": 32}, "mamba": {"state": 16}}
"""States that these mixers usually have; those of the others are a model's own."""
CONV_KERNEL, CONV_DILATIONS = 3, (1, 4, 16, 64)
FUSED: Bidirectional = "fused"
TIED: Bidirectional = "tied"
ABOUT_EQUAL = 0.12
"""Layers with more parameters beyond those wanted are made fewer; where half of that is missing they get MLPs."""

Pass = Callable[[Mamba2, Tensor, int], Tensor]
"""One causal Mamba-2 pass with the parameters of a direction: (mixer, x (batch, length, width), 0 or 1) to its output."""


def layer_parameters(config: EncoderConfig) -> int:
    """The parameters of an encoder's layers, without stem, last norm and decoder."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Encoder(config).layers.parameters())


def sized_like(like: RunConfig, mixer: MixerName, **changes: Any) -> RunConfig:
    """`like` with one mixer in all layers and about as many parameters: the same width, stem, decoder and layers.

    What a mixer lacks goes into a gated MLP after each; where the layers would be too large there are fewer of them, as
    with `conv`, of which a layer holds several dilated convolutions.
    """
    encoder = like.model.encoder
    if set(encoder.pattern) == {mixer} and not changes:
        return like
    wanted, layers = layer_parameters(encoder), len(encoder.pattern)
    sizes: dict[str, Any] = {
        name: min(size, getattr(encoder, name)) for name, size in OWN_SIZES.get(mixer, {}).items()
    }
    if mixer == "conv":
        dilations = next(count for count in (4, 3, 2, 1) if layers % count == 0)
        sizes = {"kernel": CONV_KERNEL, "dilations": CONV_DILATIONS[:dilations]}
    plain: dict[str, Any] = {
        "pattern": (mixer,) * layers,
        "bidirectional": encoder.bidirectional if mixer in ("mamba", "mamba2") else "fused",
        "mlp_ratio": 0.0,
        "experts": 0,
        **sizes,
        **changes,
    }
    candidate = replace(encoder, **plain)
    found = layer_parameters(candidate)
    if found > (1 + ABOUT_EQUAL) * wanted:
        candidate = replace(candidate, pattern=(mixer,) * max(1, round(layers * wanted / found)))
    layers, missing = len(candidate.pattern), wanted - layer_parameters(candidate)
    if missing > ABOUT_EQUAL / 2 * wanted:
        inner = round(
            (missing / layers - encoder.width) / (3 * encoder.width)
        )  # less the norm before the MLP
        candidate = replace(candidate, mlp_ratio=(max(inner, 1) + 0.5) / encoder.width)
    return replace(like, model=replace(like.model, encoder=candidate))


class TwoPasses(Mixer):
    """Caduceus' bidirectional layer (Schiff et al. 2024, section 3.1) with Mamba-2: y = f(x) + flip(g(flip(x))).

    f and g are causal mixers that share their projections; convolution, dt bias, A and D are each one's own. Each runs
    whole, with the projections and the gated norm, so that both are computed twice.

    Args:
        of: a tied `Mamba2`, whose parameters are taken: 0 for f, 1 for g.
        run: what computes one pass; by default our kernels.
    """

    recurrent = True
    state_parameters: tuple[str, ...] = tuple(f"of.{name}" for name in Mamba2.state_parameters)

    def __init__(self, of: Mamba2, run: Pass | None = None) -> None:
        super().__init__()
        if not of.tied:
            raise ValueError(
                "two passes take the parameters of a tied Mamba2, one set for each; this one is fused"
            )
        self.of, self.run = of, run or one_pass

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.run(self.of, x_BLD, 0) + self.run(self.of, x_BLD.flip(1), 1).flip(1)


def one_pass(of: Mamba2, x_BLD: Tensor, way: int) -> Tensor:
    """One causal Mamba-2 with our kernels."""
    y_BLE, gate_BLE = _one_scan(of, x_BLD, way)
    y_BLD: Tensor = of.out_projection(of.norm(y_BLE, gate_BLE))
    return y_BLD


def use_two_passes(model: AccessibilityModel, run: Pass | None = None) -> AccessibilityModel:
    """The model, whose tied Mamba-2 layers now run as two passes."""
    for layer in model.encoder.layers:
        assert isinstance(layer, Layer) and isinstance(layer.mixer, Mamba2)
        layer.mixer = TwoPasses(layer.mixer, run)
    return model


@dataclass(frozen=True)
class Rival:
    """An encoder to measure beside ours.

    Attributes:
        name: for tables.
        config: its shape and training.
        passes: whose kernels run its layers as `TwoPasses`: "ours" or "mamba-ssm"; "" for layers as they are.
        beside: the rival (one of ours, too) whose time is the unit.
    """

    name: str
    config: RunConfig
    passes: str = ""
    beside: str | None = None


def rivals(like: RunConfig) -> list[Rival]:
    """The Transformer beside a Mamba-2 encoder, and beside the same that reads both strands tied weights and two passes."""
    ours = sized_like(like, "mamba2")
    shared = _symmetric(ours, "shared")
    tied = replace(ours.model.encoder, bidirectional="tied", conv_width=4)
    # causal-conv1d takes filters of 2 to 4 positions; 4 is Caduceus' and Mamba-2's
    passes = _symmetric(replace(ours, model=replace(ours.model, encoder=tied)), "shared")
    one, both = "mamba2", "mamba2, shared strands"
    parity = []
    with suppress(ValueError):  # where the weights cannot be tied, as with an even filter
        parity = [Rival("mamba2, tied weights (parity)", _symmetric(ours, "parity"), beside=both)]
    return [
        Rival(one, ours),
        Rival("Transformer", sized_like(like, "attention", window=None), beside=one),
        Rival(both, shared, beside=one),
        *parity,
        Rival("mamba2, two passes + flips, shared strands", passes, "ours", both),
        Rival("the same with mamba-ssm's kernels", passes, "mamba-ssm", both),
    ]


def _symmetric(config: RunConfig, form: Literal["shared", "parity"]) -> RunConfig:
    return replace(config, model=replace(config.model, reverse_complement=form))


# Equality: our one-pass forms against two scans and flips, with the same parameters.


def compare_forms(config: EncoderConfig, length: int, device: torch.device) -> dict[str, float]:
    """How far the forms differ on random inputs, outputs and input gradients: the norm of the difference over the norm.

    `fused` and `tied` are each one form of Mamba-2, computed at once, against scans of the sequence and of the flipped
    one. TwoPasses differs from `tied` in one thing, which is left out here: it normalises the directions apart.
    """
    found = {}
    for form, by_flips in ((FUSED, _fused_by_flips), (TIED, _tied_by_flips)):
        mixer = _mixer(replace(config, bidirectional=form), device)
        flips = partial(by_flips, mixer)
        found[f"{form}: one pass, and two with flips"] = _difference(
            mixer, flips, _features(config, length, device)
        )
    return found


def compare_passes(config: EncoderConfig, length: int, device: torch.device, run: Pass) -> float:
    """The same for the two passes of `run` against those of our kernels."""
    mixer = _mixer(config, device)
    return _difference(TwoPasses(mixer), TwoPasses(mixer, run), _features(config, length, device))


def _difference(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], x_BLD: Tensor) -> float:
    outcomes = []
    weights = torch.randn(x_BLD.shape, generator=torch.Generator().manual_seed(4)).to(x_BLD.device)
    for run in (one, other):
        leaf = x_BLD.clone().requires_grad_()
        y_BLD = run(leaf)
        outcomes.append((y_BLD.detach(), *torch.autograd.grad((y_BLD * weights).sum(), leaf)))
    return max(
        float((a.double() - b.double()).norm() / a.double().norm()) for a, b in zip(*outcomes, strict=True)
    )


def _features(config: EncoderConfig, length: int, device: torch.device) -> Tensor:
    return torch.randn(2, length, config.width, generator=torch.Generator().manual_seed(3)).to(device)


@torch.no_grad()
def _mixer(config: EncoderConfig, device: torch.device) -> Mamba2:
    """The encoder's mixer with random numbers also where it starts with the same for both directions."""
    torch.manual_seed(2)
    mixer = Mamba2(
        config.width,
        state=config.state,
        head_dim=config.head_dim,
        expand=config.expand,
        groups=config.groups,
        conv_width=config.conv_width or 4,
        bidirectional=config.bidirectional,
    )
    for name in ("conv_bias", "D"):
        parameter = getattr(mixer, name)
        parameter.add_(torch.randn_like(parameter) / 4)
    return mixer.to(device)


def _tied_by_flips(of: Mamba2, x_BLD: Tensor) -> Tensor:
    y_BLE, gate_BLE = _one_scan(of, x_BLD, 0)
    y_BLE = y_BLE + _one_scan(of, x_BLD.flip(1), 1)[0].flip(1)
    y_BLD: Tensor = of.out_projection(of.norm(y_BLE, gate_BLE))
    return y_BLD


def _fused_by_flips(of: Mamba2, x_BLD: Tensor) -> Tensor:
    gate_BLE, mixed_BLM, dt = torch.split(of.in_projection(x_BLD), [of.inner, *of.scan_inputs], dim=-1)
    mixed_BLM = short_conv(mixed_BLM, of.conv_weight, of.conv_bias, activation="silu", padding="centered")
    dt_BLH2 = torch.unflatten(dt, -1, (of.heads, 2))
    y_BLE = _scan(of, mixed_BLM, dt_BLH2[..., 0], 0, of.D)
    y_BLE = y_BLE + _scan(of, mixed_BLM.flip(1), dt_BLH2[..., 1].flip(1), 1, None).flip(1)
    y_BLD: Tensor = of.out_projection(of.norm(y_BLE, gate_BLE))
    return y_BLD


def _one_scan(of: Mamba2, x_BLD: Tensor, way: int) -> tuple[Tensor, Tensor]:
    """The scan's output and the gate of one causal pass of a tied mixer, (batch, length, inner) each."""
    gate_BLE, mixed_BLM, dt_BLH = torch.split(of.in_projection(x_BLD), [of.inner, *of.scan_inputs], dim=-1)
    mixed_BLM = short_conv(
        mixed_BLM, of.conv_weight[way], of.conv_bias[way], activation="silu", padding="causal"
    )
    return _scan(of, mixed_BLM, dt_BLH, way, of.D[:, way]), gate_BLE


def _scan(of: Mamba2, mixed_BLM: Tensor, dt_BLH: Tensor, way: int, D: Tensor | None) -> Tensor:
    group_states = of.groups * of.state
    x, B, C = torch.split(mixed_BLM, [of.inner, group_states, group_states], dim=-1)
    y = ssd(
        torch.unflatten(x, -1, (of.heads, of.head_dim)),
        dt_BLH,
        -torch.exp(of.A_log[:, way].to(accumulation(of.A_log.dtype))),
        torch.unflatten(B, -1, (of.groups, of.state)),
        torch.unflatten(C, -1, (of.groups, of.state)),
        D,
        dt_bias=of.dt_bias[:, way],
        dt_softplus=True,
    )
    assert isinstance(y, Tensor)
    return y.flatten(2)


# mamba-ssm's kernels.


def mamba_ssm_pass() -> tuple[Pass, str]:
    """One causal Mamba-2 as mamba-ssm's own block computes it, and its version.

    Raises:
        ImportError: mamba-ssm or causal-conv1d is neither in a folder of $PEER_PATH nor installed.
    """
    earlier = sys.modules.get("mamba_ssm")
    if earlier is not None and earlier.__spec__ is None:
        del sys.modules["mamba_ssm"]  # what `find` leaves behind, and stumbles over the next time
    with _peer_path():
        version = find("mamba_ssm")
        module: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    if getattr(module, "causal_conv1d_fwd_function", None) is None:
        raise ImportError("mamba-ssm's block needs causal-conv1d, which is not in $PEER_PATH or installed")
    block: Callable[..., Tensor] = module.mamba_split_conv1d_scan_combined

    def run(of: Mamba2, x_BLD: Tensor, way: int) -> Tensor:
        return block(
            of.in_projection(x_BLD),
            of.conv_weight[way],
            of.conv_bias[way],
            of.dt_bias[:, way].contiguous(),
            -torch.exp(of.A_log[:, way].float()).contiguous(),
            D=of.D[:, way].contiguous(),
            chunk_size=SSD_CHUNK,
            activation="silu",
            rmsnorm_weight=of.norm.weight,
            rmsnorm_eps=1e-5,
            outproj_weight=of.out_projection.weight,
            headdim=of.head_dim,
            ngroups=of.groups,
            norm_before_gate=False,
        )

    return run, version


class WarmUp(AbstractContextManager["WarmUp"]):
    """Processes that compile the configurations among which mamba-ssm's autotuners choose, into Triton's cache.

    Args:
        processes: how many.
        device: where they run.
    """

    def __init__(self, processes: int, device: torch.device) -> None:
        self.processes, self.device = processes, device
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, config: EncoderConfig, length: int) -> None:
        """Begin, for the shapes of an encoder and a length in bins."""
        home = str(Path(genossm.__file__).resolve().parents[1])  # the same genossm as here
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        words = [json.dumps(to_mapping(config)), str(length), str(self.device), str(self.processes)]
        self._running = [
            subprocess.Popen(
                [sys.executable, "-m", "genossm.pipelines.benchmark_rivals", *words, str(index)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
            for index in range(self.processes)
        ]

    def wait(self, limit_s: float) -> None:
        """Until they are done; those that take longer are ended, and what is left is compiled when it is timed."""
        ends = time.monotonic() + limit_s
        for process in self._running:
            try:
                process.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                say("compiling mamba-ssm's kernels took too long and was ended")
                process.kill()

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.kill()
            process.wait()


def main(arguments: Sequence[str]) -> None:
    """Run one layer's pass forward and backward with a share of the autotuners' configurations."""
    encoder, length, place, processes, index = arguments
    config = build(EncoderConfig, json.loads(encoder), where="the encoder")
    device = torch.device(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    share_autotuning(int(index), int(processes))
    run, _ = mamba_ssm_pass()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        y_BLD = run(_mixer(config, device), _features(config, int(length), device), 0)
    y_BLD.sum().backward()  # type: ignore[no-untyped-call]


@contextmanager
def _peer_path() -> Iterator[None]:
    """The folders of $PEER_PATH stand before all others while something is imported."""
    before = list(sys.path)
    sys.path[:0] = [path for path in os.environ.get("PEER_PATH", "").split(os.pathsep) if path]
    try:
        yield
    finally:
        sys.path[:] = before


if __name__ == "__main__":
    main(sys.argv[1:])
