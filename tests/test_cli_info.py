"""`genossm info` against the function it calls: text, JSON, overrides, exit status."""

from __future__ import annotations

import json

import pytest

from genossm.cli import main
from genossm.pipelines.model_info import model_info

SMALL = ["--length-bp", "4096"]


def test_json_equals_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny", *SMALL, "--batch", "2", "--tracks", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    info = model_info("tiny", length_bp=4096, batch_size=2, tracks=3)
    assert result == json.loads(json.dumps(info.to_mapping()))
    assert result["total_parameters"] == sum(result["parameters"].values())
    assert result["receptive_field_bp"] is None and result["training"]["peak"] > result["prediction"]["peak"]


def test_the_text_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny", *SMALL, "--set", "model.encoder.pattern=[mamba2, mamba2]"]) == 0
    text = capsys.readouterr().out
    info = model_info("tiny", length_bp=4096, overrides=["model.encoder.pattern=[mamba2, mamba2]"])
    assert text == info.text() + "\n"
    assert text.startswith(f"tiny: {info.total_parameters:,} parameters\n")
    assert "receptive field: unlimited" in text and "for 1 x 4,096 bp" in text
    assert f"  mamba2, 2 x{info.parameters['mamba2']:>31,}" in text
    assert info.forward_flops is not None and info.training is not None
    assert f"{info.forward_flops / 1e9:,.1f} GFLOP" in text
    assert f"{info.training.kept / 2**20:,.1f} MiB" in text


def test_a_mode_leaves_the_other_out(capsys: pytest.CaptureFixture[str]) -> None:
    for asked, told in (((), "bf16"), (("--predict-in", "float32"), "float32")):
        assert main(["info", "tiny", *SMALL, "--mode", "predict", *asked]) == 0
        text = capsys.readouterr().out
        assert f"prediction memory, {told}" in text and "training" not in text


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["tini"], 1, "there is no shipped configuration 'tini'"),
        (["tiny", "--length-bp", "4100"], 1, "no multiple of the model's bin"),
        (["tiny", "--set", "model.encoder.widht=3"], 1, "did you mean 'width'"),
        (["tiny", "--batch", "0"], 2, "--batch"),
        (["tiny", "--mode", "stream"], 2, "--mode"),
        ([], 2, "CONFIG|RUN"),
    ],
)
def test_wrong_use_is_a_sentence(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", *arguments]) == status
    assert words in capsys.readouterr().err
