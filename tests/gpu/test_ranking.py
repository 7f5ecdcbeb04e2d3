"""Metrics that are counted on a CUDA device: those of the CPU, without a wait in any batch."""

from __future__ import annotations

import pytest
import torch

from genossm.ranking import BatchedMetrics, Measure, Ranking

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_counting_waits_for_nothing_and_gives_what_the_cpu_gives() -> None:
    measures: list[Measure] = ["rank", "log_pearson", "rank", "pearson"]
    random = torch.Generator("cuda").manual_seed(1)
    here, there = BatchedMetrics(measures, exact_bytes=1), BatchedMetrics(measures, exact_bytes=1)
    for step in range(5):
        values = torch.rand(4, 3_072, 4, generator=random, device="cuda")
        targets = (torch.rand(4, 3_072, 4, generator=random, device="cuda") < values**3).float()
        mask = torch.rand(4, 3_072, 4, generator=random, device="cuda") < 0.9
        here.add(values.cpu(), targets.cpu(), mask.cpu())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first batch is kept, on the host
        try:
            there.add(values, targets, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert there.finite()
    for one, other in zip(here.results(), there.results(), strict=True):
        if isinstance(one, Ranking):
            assert isinstance(other, Ranking)
            assert (other.auprc, other.auroc) == pytest.approx((one.auprc, one.auroc), abs=2e-5)
            assert other.threshold == pytest.approx(one.threshold, abs=1e-2)
        else:
            assert other == pytest.approx(one, abs=1e-6)
