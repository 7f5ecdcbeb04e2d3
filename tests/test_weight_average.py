"""The running average of weights: its formula, whole numbers, and a training that goes on."""

from __future__ import annotations

import torch
from torch import nn

from genossm.pipelines.weight_average import WeightAverage


def test_it_is_its_formula_and_goes_on_after_a_stop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, decay=0.6)
    expected: dict[str, torch.Tensor] = {}
    for update in range(9):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.randn(tensor.shape) if tensor.is_floating_point() else 1)
        average.update_parameters(model)
        kept = min(0.6, (1 + update) / (10 + update)) if update else 0.0
        for name, tensor in model.state_dict().items():
            mixed = kept * expected.get(name, 0) + (1 - kept) * tensor
            expected[name] = mixed if tensor.is_floating_point() else tensor.clone()
        if update == 4:
            stored = average.state_dict()
            average = WeightAverage(model, decay=0.6)
            average.load_state_dict(stored)
    assert int(average.n_averaged) == 9
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
