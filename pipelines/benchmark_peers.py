"""Other people's kernels beside ours: mamba-ssm, flash-linear-attention and causal-conv1d, each timed in a process of its own.

`python -m genossm.pipelines.benchmark_peers REQUEST.json RESULTS.jsonl` is that process: a peer that crashes or hangs
ends itself alone. Peers are imported from the folders of $PEER_PATH (unpacked packages, extensions beside them) or from
where they are installed. Nothing of theirs is copied here; each is run as its users run it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genossm.pipelines.benchmark_cases import Case, Shapes
from genossm.pipelines.benchmark_timing import Measured, Run, Stopwatch, measure_passes, release, sentence

SSD_CHUNK = 256
"""mamba-ssm's own default for its Mamba-2 block."""


@dataclass(frozen=True)
class Peer:
    """One way in which others compute a case: inputs are first brought, untimed, to the layout that it works in."""

    label: str
    package: str
    module: str
    function: str
    operator: str
    direction: str
    prepare: Callable[[Sequence[Tensor]], list[Tensor]]
    run: Callable[[Callable[..., Any], Sequence[Tensor]], list[Tensor]]

    def fits(self, case: Case) -> bool:
        """Whether it computes what `case` does."""
        return self.operator == case.operator and self.direction == case.direction


def as_they_are(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs themselves."""
    return list(inputs)


def mamba_ssd(scan: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """mamba-ssm's SSD, one direction."""
    x, dt, A, B, C, D, bias = inputs
    y: Tensor = scan(x, dt, A, B, C, SSD_CHUNK, D=D, dt_bias=bias, dt_softplus=True)
    return [y]


def mamba_ssd_both(scan: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Two scans, the second of every flipped input, its output flipped back."""
    x, dt, A, B, C, D, bias = inputs
    flipped = [x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D, bias]
    return [mamba_ssd(scan, inputs)[0] + mamba_ssd(scan, flipped)[0].flip(1)]


def channels_first(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of selective_scan as mamba-ssm takes them: (batch, channels, length)."""
    x, dt, A, B, C, D, bias = inputs
    sequences = [tensor.transpose(1, 2).contiguous() for tensor in (x, dt, B, C)]
    return [*sequences[:2], A, *sequences[2:], D, bias]


def mamba_scan(scan: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """mamba-ssm's selective scan, one direction."""
    x, dt, A, B, C, D, bias = inputs
    y: Tensor = scan(x, dt, A, B, C, D, None, bias, True)
    return [y]


def channels_first_of_each(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same with a set for each direction: x, D, then dt, A, B, C and bias of the forward and of the reverse scan."""
    x, dt, A, B, C, D, bias = inputs
    separate = dt.dim() == 4

    def one(tensor: Tensor, way: int) -> Tensor:
        return tensor[..., way] if separate else tensor

    # A shared tensor is listed once, so that its gradient is summed, as for our kernel.
    pieces = [x.transpose(1, 2).contiguous(), D]
    for way in (0, 1) if separate else (0,):
        sequences = [one(tensor, way).transpose(1, 2).contiguous() for tensor in (dt, B, C)]
        pieces += [sequences[0], one(A, way).contiguous(), *sequences[1:], one(bias, way).contiguous()]
    return pieces


def mamba_scan_both(scan: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Two selective scans, the second of every flipped input, its output flipped back."""
    x, D, dt, A, B, C, bias = inputs[:7]
    other = inputs[7:] or inputs[2:7]
    forward = mamba_scan(scan, [x, dt, A, B, C, D, bias])[0]
    dt, A, B, C, bias = other
    flipped = [x.flip(-1), dt.flip(-1), A, B.flip(-1), C.flip(-1), D, bias]
    return [forward + mamba_scan(scan, flipped)[0].flip(-1)]


def simple_gla_inputs(inputs: Sequence[Tensor]) -> list[Tensor]:
    """q, k (one for each head), v and log decays, as simple_gla takes them."""
    x, dt, A, B, C, _, bias = inputs
    heads = x.shape[2]
    steps = torch.nn.functional.softplus(dt.float() + bias)
    q, k = (tensor.expand(-1, -1, heads, -1).contiguous() for tensor in (C, B))
    return [q, k, (x * steps[..., None]).to(x.dtype), steps * A]


def simple_gla(scan: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """flash-linear-attention's scan of one decay a head; it has no both directions, no D and no step sizes.

    Version 0.6 refuses the gradient on Hopper with Triton 3.4 to 3.7.0, whose compiler it found to be wrong there; it is
    timed all the same.
    """
    products: Any = importlib.import_module("fla.ops.common.chunk_o")
    if hasattr(products, "TRITON_ABOVE_3_7_1"):
        products.TRITON_ABOVE_3_7_1 = True
    y: Tensor = scan(*inputs, scale=1.0)[0]
    return [y]


def convolution_first(inputs: Sequence[Tensor]) -> list[Tensor]:
    """x (batch, channels, length) and the filters and biases of both directions."""
    x, weight, bias = inputs
    parts = [weight[0], weight[1], bias[0], bias[1]]
    return [x.transpose(1, 2).contiguous(), *(part.contiguous() for part in parts)]


def convolution_last(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same, x of that shape but stored channels last."""
    return [inputs[0].transpose(1, 2), *convolution_first(inputs)[1:]]


def convolve_both(convolve: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Two causal convolutions, the second of the flipped input, its output flipped back."""
    x, forward, reverse, bias, other_bias = inputs
    y: Tensor = convolve(x, forward, bias, activation="silu")
    z: Tensor = convolve(x.flip(2), reverse, other_bias, activation="silu")
    return [y, z.flip(2)]


def convolve_twice(convolve: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Two causal convolutions without a flip: less than what both directions take."""
    x, forward, reverse, bias, other_bias = inputs
    return [
        convolve(x, forward, bias, activation="silu"),
        convolve(x, reverse, other_bias, activation="silu"),
    ]


_SSD = ("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", "ssd")
_S6 = ("mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "selective_scan")
_FLA = ("fla", "fla.ops.simple_gla", "chunk_simple_gla", "ssd")
_CONV = ("causal_conv1d", "causal_conv1d", "causal_conv1d_fn", "short_conv")
PEERS = (
    Peer("mamba-ssm, two + flips", *_SSD, "both", as_they_are, mamba_ssd_both),
    Peer("mamba-ssm", *_SSD, "forward", as_they_are, mamba_ssd),
    Peer("mamba-ssm, two + flips", *_S6, "both", channels_first_of_each, mamba_scan_both),
    Peer("mamba-ssm", *_S6, "forward", channels_first, mamba_scan),
    Peer("causal-conv1d, two + flips", *_CONV, "both", convolution_first, convolve_both),
    Peer("causal-conv1d, channels last, two + flips", *_CONV, "both", convolution_last, convolve_both),
    Peer("causal-conv1d, two, no flips", *_CONV, "both", convolution_first, convolve_twice),
    Peer("fla simple_gla, q and k a head", *_FLA, "forward", simple_gla_inputs, simple_gla),
)


@dataclass(frozen=True)
class Request:
    """What a process is to time: peers of one package and operator, on these cases and lengths."""

    package: str
    operator: str
    cases: list[dict[str, Any]]
    shapes: dict[str, int]
    lengths: dict[str, list[int]]
    device: str
    dtype: str
    budget_s: float
    host_bound_below: int
    warm_slice: tuple[int, int] | None = None


def main(request_path: Path, results_path: Path) -> None:
    """Time what the request names and append each result to the file, one JSON object a line."""
    request = Request(**json.loads(request_path.read_text()))
    sys.path[:0] = [path for path in os.environ.get("PEER_PATH", "").split(os.pathsep) if path]
    os.environ.setdefault("FLA_TILELANG", "0")
    cases = [Case(**case) for case in request.cases]
    if torch.device(request.device).type == "cuda":
        torch.cuda.set_device(request.device)
    with results_path.open("a") as results:

        def write(kind: str, content: object) -> None:
            results.write(json.dumps({kind: content}) + "\n")
            results.flush()

        peers = [p for p in PEERS if (p.package, p.operator) == (request.package, request.operator)]
        try:
            version = find(request.package)
            if request.warm_slice is not None:
                share_autotuning(*request.warm_slice)
            functions = {peer: load(peer) for peer in peers}
        except Exception as error:
            write("absent", sentence(error))
            return
        write("version", version)
        for row in measure(request, cases, functions):
            write("row", dataclasses.asdict(row))


def find(package: str) -> str:
    """The version of a package, made importable without running its __init__.py, which pulls in optional parts.

    Raises:
        ImportError: it is not there.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"no package {package!r} in $PEER_PATH or installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    text = (folder / "__init__.py").read_text() if (folder / "__init__.py").is_file() else ""
    if package == "mamba_ssm":
        stub = types.ModuleType(package)
        stub.__path__ = [str(folder)]
        sys.modules[package] = stub
    version = re.search(r"""^__version__ = ["']([^"']+)""", text, re.MULTILINE)
    return version[1] if version else "unknown"


def load(peer: Peer) -> Callable[..., Any]:
    """The peer's function."""
    function: Callable[..., Any] = getattr(importlib.import_module(peer.module), peer.function)
    return function


def share_autotuning(index: int, processes: int) -> None:
    """Compile only every `processes`-th configuration of each kernel here; the others do the rest, into one cache."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    plain = tuner.__init__

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **options: Any) -> None:
        every = list(configs or [])
        part = every[index::processes] if len(every) > 2 else every
        # The last configuration of a list is a small one, which fits where a share of large ones may not.
        plain(
            self,
            fn,
            arg_names,
            part if not part or every[-1] in part else [*part, every[-1]],
            *rest,
            **options,
        )

    tuner.__init__ = init


def measure(
    request: Request, cases: Sequence[Case], functions: dict[Peer, Callable[..., Any]]
) -> Iterator[Measured]:
    """Every peer on every case that it fits; a failure is a row that says why. Warming yields nothing."""
    device, dtype = torch.device(request.device), getattr(torch, request.dtype)
    shapes = Shapes(**request.shapes)
    watch = Stopwatch(device, request.budget_s)
    for case in cases:
        for length in request.lengths[case.name]:
            for peer, function in functions.items():
                if not peer.fits(case):
                    continue
                run: Run = partial(peer.run, function)
                inputs: list[Tensor] = []
                try:
                    inputs = peer.prepare(case.inputs(shapes, length, dtype, device))
                    if request.warm_slice is not None:
                        warm(run, inputs)
                    else:
                        yield measure_passes(
                            watch,
                            run,
                            inputs,
                            case=case.name,
                            length=length,
                            by=peer.label,
                            host_bound=length <= request.host_bound_below,
                            catch=True,
                        )
                except Exception as error:
                    yield Measured(case.name, length, peer.label, problem=sentence(error))
                del inputs
                release(device)


def warm(run: Run, inputs: Sequence[Tensor]) -> None:
    """One forward and one backward pass, which compile and tune."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = run(leaves)
    torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
