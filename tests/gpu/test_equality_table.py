"""The table of tolerances on a CUDA device: every mixer and encoder gives what it gives on the CPU in the same dtype.

tests/test_equality_table.py goes through the rest of it. In float64 torch's own operators run, in float32 Triton's where
there are any; sizes are those of tests/gpu/test_mixers.py and tests/gpu/test_encoder.py, as compiling takes most of the time.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu import test_encoder, test_mixers
from tests.tolerances import DTYPES, LENGTHS, OUTPUT, Outcome, assert_agree

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact")]

DEVICE = "cuda"
SMALL = 1e-2
"""Instead of the table's: of a softmax over a single key the gradient should be zero. The CPU leaves 2e-8 of the largest one
in float32, which is 2e-5 of a thousandth of it, and another kernel something else."""
ENCODERS = {**test_encoder.MIXERS, **test_encoder.HYBRIDS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", test_mixers.MIXERS)
def test_a_mixer_gives_what_the_cpu_gives(name: str, dtype: torch.dtype) -> None:
    mixer, on_cpu = (test_mixers.make(name, dtype, device) for device in (DEVICE, "cpu"))
    for length in LENGTHS:
        got, expected = (test_mixers.run(each, length) for each in (mixer, on_cpu))
        assert got[OUTPUT].device.type == DEVICE
        assert_agree(got, expected, "device", dtype, small=SMALL)


def run_encoder(case: str, dtype: torch.dtype, device: str) -> Outcome:
    outcome = test_encoder.run(test_encoder.small(**ENCODERS[case]).to(device, dtype))
    return {OUTPUT: outcome.pop("features"), **outcome}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_gives_what_the_cpu_gives(case: str, dtype: torch.dtype) -> None:
    got, expected = (run_encoder(case, dtype, device) for device in (DEVICE, "cpu"))
    assert got[OUTPUT].device.type == DEVICE
    assert_agree(got, expected, "device", dtype, small=SMALL)
