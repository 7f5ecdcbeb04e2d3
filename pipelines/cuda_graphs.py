"""A model's work on a CUDA device as CUDA graphs: recorded once for batches of one shape, then launched as a whole.

At 1,024 positions a layer's kernels take a few microseconds each, and launching them one by one from Python takes longer
than running them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from genossm.device_lock import DEVICE_LOCK
from genossm.models.accessibility import AccessibilityModel
from genossm.models.mlp import MixtureOfExperts
from genossm.progress import say

WARM_UP = 3
"""Runs before the recording: kernels are compiled, libraries choose their algorithms, workspaces are made."""


def why_no_graph(model: AccessibilityModel, device: torch.device) -> str | None:
    """Why the model's work cannot be recorded, or None where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if any(isinstance(module, MixtureOfExperts) for module in model.modules()):
        return "with a mixture of experts the host has to know how many positions each expert gets"
    return None


def why_no_training_graph(model: AccessibilityModel, device: torch.device) -> str | None:
    """Why training steps of the model cannot be recorded, or None where they can."""
    reason = why_no_graph(model, device)
    if reason is None and model.config.encoder.checkpoint:
        return "layers are computed again in the backward pass (checkpoint)"
    return reason


class GraphedTraining:
    """`model(tokens)` with gradients to the parameters, as a graph each for the forward and the backward pass.

    The first batch decides the shape; batches of other shapes run kernel by kernel. Dropout follows torch.manual_seed as it
    does without graphs. Gradients are written to the same memory in each step: they must be used before the next one.

    Args:
        model: in training mode, on its device; not compiled.
        record: whether to use graphs at all.
    """

    def __init__(self, model: AccessibilityModel, *, record: bool = True) -> None:
        self._model = model
        self._record_first = record
        self._shape: torch.Size | None = None
        self._graphed: nn.Module | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Raw outputs, as the model gives them."""
        if not torch.is_grad_enabled() or not self._model.training:
            return cast("Tensor", self._model(tokens))
        if self._record_first and self._shape is None:
            self._record(tokens)
        run = self._graphed if self._graphed is not None and tokens.shape == self._shape else self._model
        return cast("Tensor", run(tokens))

    def _record(self, tokens: Tensor) -> None:
        self._shape = tokens.shape
        reason = why_no_training_graph(self._model, tokens.device)
        if reason is not None:
            if tokens.is_cuda:
                say(f"CUDA graphs are not used: {reason}")
            return
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        random = torch.cuda.get_rng_state(tokens.device)
        with _without_cast_cache(tokens.device), _unwarned(), DEVICE_LOCK, _recording_on(tokens.device):
            apart = _Apart(self._model)
            torch.cuda.make_graphed_callables(apart, (tokens.clone(),), num_warmup_iters=WARM_UP)
        # The recorded outputs hold on to autograd's nodes that add up gradients, which belong to the stream of torch's warm-up
        # and would allocate gradients there: whoever gets that stream next overwrote them while they were in use here.
        apart.outputs.detach_()
        self._graphed = apart
        torch.cuda.set_rng_state(random, tokens.device)
        with torch.no_grad():  # the runs before the recording have moved the running statistics
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])


class _Apart(nn.Module):
    """The model as another module: of that, and not of the model, torch replaces `forward`."""

    outputs: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        self.outputs = self.model(tokens).clone()  # a view could not be detached in place
        return self.outputs


class GraphedPrediction:
    """`model.predict(tokens)` as a graph, for the shape and the autocast of the first call; others run kernel by kernel.

    Args:
        model: in evaluation mode, on its device.
    """

    def __init__(self, model: AccessibilityModel) -> None:
        self._model = model
        self._tokens: Tensor | None = None
        self._values: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Values (batch, bins, tracks). They are overwritten by the next call: copy what is kept."""
        if not tokens.is_cuda:
            return self._model.predict(tokens)
        with torch.cuda.device(tokens.device):  # a graph is of the current device
            return self._predict(tokens)

    def _predict(self, tokens: Tensor) -> Tensor:
        if self._tokens is None:
            self._record(tokens)
        assert self._tokens is not None
        if self._graph is None or self._values is None or tokens.shape != self._tokens.shape:
            return self._model.predict(tokens)
        self._tokens.copy_(tokens, non_blocking=True)
        self._graph.replay()
        return self._values

    def _record(self, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        if why_no_graph(self._model, tokens.device):
            return
        with _without_cast_cache(tokens.device):
            aside = torch.cuda.Stream(tokens.device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(tokens.device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._model.predict(self._tokens)
            torch.cuda.current_stream(tokens.device).wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with DEVICE_LOCK, _recording_on(tokens.device), torch.cuda.graph(self._graph):
                self._values = self._model.predict(self._tokens)


def _without_cast_cache(device: torch.device) -> torch.autocast:
    """Autocast as it is, without its cache of cast weights, which would outlive a recording."""
    return torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )


@contextmanager
def _recording_on(device: torch.device) -> Iterator[None]:
    """With a stream of this device for torch to record on, which otherwise takes one of the first device recorded on."""
    before = torch.cuda.graph.default_capture_stream
    torch.cuda.graph.default_capture_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.cuda.graph.default_capture_stream = before


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without torch's warning that its own warm-up and its recording are of two streams."""
    switch = getattr(
        torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None
    )  # torch >= 2.10
    if switch is not None:
        switch(False)
    try:
        yield
    finally:
        if switch is not None:
            switch(True)
