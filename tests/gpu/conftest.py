"""What GPU tests share: the processes of pytest-xdist have one device's memory between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def exact() -> Iterator[None]:
    """Convolutions and LSTMs to float32 accuracy, where torch's default is TF32; matrix products are, by default.

    And one CPU thread, for the processes of run.sh are as many as the cores.
    """
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    operators = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before, threads = [operator.fp32_precision for operator in operators], torch.get_num_threads()
    for operator in operators:
        operator.fp32_precision = "ieee"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for operator, precision in zip(operators, before, strict=True):
        operator.fp32_precision = precision
