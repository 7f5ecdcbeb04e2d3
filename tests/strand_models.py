"""What the tests of exact equivariance share: tracks of both strands, random models, and a little training."""

from __future__ import annotations

import torch
from torch import Tensor

from genossm.models.accessibility import AccessibilityModel
from genossm.models.heads import TrackHead
from genossm.pipelines.training_module import TrainingModule
from genossm.run_config import TrainConfig

MINUS, PLUS = 1, 3
TRACKS = (
    TrackHead("peaks", "peaks", "bce"),
    TrackHead("minus", "signal", "poisson", "sum", mean=2.0, strand="-", partner="plus"),
    TrackHead("occupancy", "signal", "mse", mean=1.0, std=0.5),
    TrackHead("plus", "signal", "poisson", "sum", mean=2.0, strand="+", partner="minus"),
)


@torch.no_grad()
def randomised(model: AccessibilityModel) -> AccessibilityModel:
    """With every weight and running statistic random, none 0 or 1."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))
    model.heads.output.weight.normal_()
    return model


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 5, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def train_a_little(model: AccessibilityModel) -> AccessibilityModel:
    """The running average of the weights over three steps as `train` does them, in evaluation mode."""
    config = TrainConfig(learning_rate=0.02, ema_decay=0.5, warmup_fraction=0.0)
    module = TrainingModule(model, config, total_steps=3).double().train()
    optimizer = module.configure_optimizers()["optimizer"]
    for step in range(3):
        tokens = random_tokens(3, 52, seed=10 + step)
        bins = 52 // model.bin_bp
        targets = torch.randint(0, 2, (3, bins, len(TRACKS))).double()
        optimizer.zero_grad()
        module.training_step((tokens, targets, torch.rand(targets.shape) < 0.9), step).backward()
        optimizer.step()
        module.update_average()
    model.eval()
    return module.validated.eval()


def mirrored(outputs: Tensor) -> Tensor:
    """What the outputs must be on the other strand, written out."""
    return torch.stack([outputs.flip(1)[..., track] for track in (0, PLUS, 2, MINUS)], -1)
