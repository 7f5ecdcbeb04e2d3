"""The running average of a model's weights, kept up without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """Exponential average of parameters and buffers (whole numbers: those of the last update).

    After n updates an average keeps min(decay, (1 + n) / (10 + n)) of itself: it forgets what the weights were at first, and is
    of use before 1 / (1 - decay) updates. torch's `AveragedModel` asks the device at each update how many there were, and
    updates whole numbers one by one.

    Args:
        model: on the device it is trained on by the first update.
        decay: share of the average in its update, later on; the first update copies.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self._updates: int | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        if self._updates is None:  # a resumed training has an average
            self._updates = int(self.n_averaged)
        own, current = _tensors(self.module), _tensors(model)
        averaged = [index for index, tensor in enumerate(own) if tensor.is_floating_point() and self._updates]
        copied = [index for index in range(len(own)) if index not in set(averaged)]
        if averaged:
            kept = min(self.decay, (1 + self._updates) / (10 + self._updates))
            torch._foreach_lerp_(
                [own[index] for index in averaged], [current[index] for index in averaged], 1 - kept
            )
        if copied:
            torch._foreach_copy_([own[index] for index in copied], [current[index] for index in copied])
        self._updates += 1
        self.n_averaged += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
