"""Proves that a number which one precision cannot hold is named, and that another precision's replay is finite."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.main import main
from tests.runs import tiny
from tests.runs.planting import WARM_UP_STEP, crash_of, crashed, plant_before
from tests.trainer.precision.recipes import recipe
from trainer.config import TrainConfig


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> TrainConfig:
    return tiny.config(corpus, tmp_path / "runs")


def large_channel(model: Any, size: float) -> None:
    """A channel of the second layer's normalised input is of this size, up or down.

    Embeddings of one size, through a layer that adds nothing, give a normalised stream of +1 and -1 in any precision.
    What uses the channel weighs it by 0; in the warm-up stage no weight here has a gradient.
    """
    first, second = model.layers
    model.embed.weight.copy_(torch.where(model.embed.weight < 0, -1, 1))
    for silent in (first.attn.wo_b.weight, first.ffn.experts.w2, first.ffn.shared_experts.w2.weight):
        silent.zero_()
    second.attn_norm.weight[0] = size
    attn = second.attn
    for user in (attn.wq_a, attn.wkv, attn.compressor.wkv, attn.compressor.wgate):
        user.weight[:, 0] = 0


def overflow_in_bf16(model: Any) -> None:
    """3.4e38 is finite in fp32 (up to 3.403e38) and infinite in bf16 (rounded up from 3.396e38)."""
    large_channel(model, 3.4e38)


def overflow_in_fp8(model: Any) -> None:
    """3.3e38 is finite in bf16; the three bits of E4M3 round it up to 2^128, which is infinite in bf16 and fp32."""
    large_channel(model, 3.3e38)


def test_a_row_that_overflows_in_bf16_is_finite_in_fp32(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plant_before(monkeypatch, WARM_UP_STEP, overflow_in_bf16)
    run, (line, *_) = crashed(tiny.with_dtype(config, "bf16"), capfd)
    assert re.search(r"first not finite: layer 1, output of layers\.1\.attn_norm: -?inf at \[0, 0, 0\]", line)
    words = ["train", "--replay", str(crash_of(run, WARM_UP_STEP))]
    assert main(words) == 0
    assert "reproduced: the same tensor" in capfd.readouterr().out
    assert main([*words, "precision.dtype=fp32"]) == 0
    assert "finite now: the fault does not repeat here" in capfd.readouterr().out


def test_a_row_that_overflows_in_fp8_is_finite_in_bf16(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first linear map that rounds it is named, with the number that was finite before."""
    plant_before(monkeypatch, WARM_UP_STEP, overflow_in_fp8)
    run, (line, *_) = crashed(replace(config, precision=recipe("fp8")), capfd)
    first = r"layer 1, output of layers\.1\.attn\.wq_a: nan at \[0, 0, 0\]"
    assert re.search(rf"first not finite: {first} .*; largest value before it 3\.3e\+38", line)
    words = ["train", "--replay", str(crash_of(run, WARM_UP_STEP))]
    assert main(words) == 0
    assert "reproduced: the same tensor" in capfd.readouterr().out
    assert main([*words, "precision=bf16"]) == 0
    assert "finite now: the fault does not repeat here" in capfd.readouterr().out
