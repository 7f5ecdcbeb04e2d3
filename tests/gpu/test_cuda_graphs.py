"""Training and prediction as CUDA graphs: the same figures as kernel by kernel, for every mixer that can be recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from genossm.models.accessibility import AccessibilityModel, ModelConfig
from genossm.models.decoder import DecoderConfig
from genossm.models.encoder import EncoderConfig, MixerName
from genossm.models.heads import TrackHead
from genossm.models.stem import StemConfig
from genossm.pipelines.cuda_graphs import GraphedPrediction, GraphedTraining
from genossm.pipelines.training_module import TrainingModule
from genossm.run_config import TrainConfig

pytestmark = pytest.mark.gpu

STEM = StemConfig(channels=(16, 32), pool=(2, 4), first_kernel=7, kernel=3)
LENGTH = 2048
FIRST_TEST = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
"""What autograd's thread says in a process whose first test this is."""


def make(name: str, form: str = "augment", **options: object) -> AccessibilityModel:
    torch.manual_seed(1)
    encoder = EncoderConfig(
        width=64, pattern=(name,), stem=STEM, state=16, head_dim=32, window=100, filter_bins=100,
        decoder=DecoderConfig(2), **options,
    )  # type: ignore[arg-type]  # fmt: skip
    heads = [TrackHead("a", "peaks", "bce"), TrackHead("b", "signal", "poisson")]
    config = ModelConfig(encoder, head_hidden=16, reverse_complement=form)  # type: ignore[arg-type]
    return AccessibilityModel(config, heads, window_bp=LENGTH, margin_bp=0).cuda()


def trained(module: TrainingModule, steps: int, batch: int = 3) -> list[float]:
    """Losses of training steps, of which the last has fewer windows."""
    optimizer = module.configure_optimizers()["optimizer"]
    random = torch.Generator("cuda").manual_seed(2)
    losses = []
    for step in range(steps):
        size = batch - (step == steps - 1)
        tokens = torch.randint(0, 5, (size, LENGTH), generator=random, dtype=torch.int8, device="cuda")
        targets = torch.randint(0, 2, (size, LENGTH // 2, 2), generator=random, device="cuda").float()
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.training_step((tokens, targets, torch.ones_like(targets, dtype=torch.bool)), step)
        optimizer.zero_grad()
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        module.update_average()
        losses.append(float(loss.detach()))
    return losses


def weights(module: TrainingModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, "augment") for name in get_args(MixerName)), ("mamba2", "shared"), ("mamba2", "parity")],
)
def test_training_is_the_same(name: str, form: str) -> None:
    model = make(name, form)
    config = TrainConfig(learning_rate=1e-3, warmup_fraction=0.0)
    modules = [
        TrainingModule(copy.deepcopy(model), config, 10).cuda()
        if graphs
        else TrainingModule(
            copy.deepcopy(model), TrainConfig(**{**vars(config), "cuda_graphs": False}), 10
        ).cuda()
        for graphs in (True, False)
    ]
    graphed, plain = (trained(module, 5) for module in modules)
    assert isinstance(modules[0]._forward, GraphedTraining) and modules[0]._forward._graphed is not None
    assert graphed == pytest.approx(plain, rel=2e-2)
    for key, tensor in weights(modules[1]).items():
        if "running" in key or "tracked" in key:
            torch.testing.assert_close(weights(modules[0])[key], tensor, rtol=5e-2, atol=5e-2, msg=key)


@FIRST_TEST
def test_gradients_are_not_overwritten_by_other_streams() -> None:
    """torch has 32 streams and hands them out again: memory of one must not be in use on another."""
    model = make("mamba2").train()
    run = GraphedTraining(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, 5, (2, LENGTH), dtype=torch.int8, device="cuda")
    for _ in range(3):
        run(tokens).square().mean().backward()
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
        optimizer.step()
        shapes = [parameter.shape for parameter in model.parameters()]
        optimizer.zero_grad()
        for _ in range(33):
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                found = [torch.full(shape, torch.nan, device="cuda") for shape in shapes]
        del found
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@FIRST_TEST
def test_dropout_follows_the_seed() -> None:
    model = make("mamba2", dropout=0.5).train()
    run = GraphedTraining(model)
    tokens = torch.randint(0, 5, (2, LENGTH), dtype=torch.int8, device="cuda")

    def outputs(run: Callable[[Tensor], Tensor], seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(tokens).detach().clone()

    first = outputs(run, 1)
    assert torch.equal(outputs(run, 1), first) and not torch.equal(outputs(run, 2), first)
    torch.manual_seed(1)
    assert torch.equal(run(tokens), first)  # the recording has left the state of the generator


def test_a_mixture_of_experts_runs_kernel_by_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    module = TrainingModule(make("mamba2", mlp_ratio=1.0, experts=2), TrainConfig(), 10).cuda()
    assert all(loss < 100 for loss in trained(module, 2))
    assert "CUDA graphs are not used: with a mixture of experts" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["augment", "none"])
def test_prediction_is_the_same(form: str) -> None:
    model = make("mamba2", form).eval()
    graphed = GraphedPrediction(model)
    for size in (3, 3, 2, 3):
        tokens = torch.randint(0, 5, (size, LENGTH), dtype=torch.int8, device="cuda")
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(graphed(tokens), model.predict(tokens), rtol=1e-3, atol=1e-4)


def test_prediction_and_training_on_one_device_after_the_other() -> None:
    """torch records on a stream of the first device that a process has recorded on, unless it is given another one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device only")
    for device in ("cuda:0", "cuda:1"):
        model = make("mamba2", dropout=0.0).eval().to(device)
        graphed = GraphedPrediction(model)
        for size in (3, 3, 2):
            tokens = torch.randint(0, 5, (size, LENGTH), dtype=torch.int8, device=device)
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                torch.testing.assert_close(graphed(tokens), model.predict(tokens), rtol=1e-3, atol=1e-4)
        model.train()
        tokens = torch.randint(0, 5, (3, LENGTH), dtype=torch.int8, device=device)
        plain, recorded = (
            torch.autograd.grad(run(tokens).square().mean(), model.encoder.stem.first.weight)[0].clone()
            for run in (model, GraphedTraining(model))
        )
        torch.testing.assert_close(recorded, plain, rtol=1e-2, atol=1e-4)
