"""The progress bar: what an earlier run has done moves it, and does not count as speed."""

from __future__ import annotations

import pytest

from genossm.progress import move, progress


def test_what_was_done_before_is_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=1_000_000, unit="bp") as bar:
        move(bar, 900_000)
        bar.update(1)
        told = bar.format_dict
        assert told["n"] == 900_001 and told["initial"] == 900_000
        assert (told["n"] - told["initial"]) == 1
    assert "900001/1000000" in capsys.readouterr().err
