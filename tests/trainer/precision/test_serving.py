"""Proves that a model alone, as `keel sample` and a replay have it, computes as the run whose weights it has."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.runs import tiny
from tests.trainer.precision.recipes import recipe
from trainer.build import build_model, restore_model
from trainer.config import SampleConfig, TrainConfig
from trainer.device import settle
from trainer.folder import RunFolder
from trainer.precision.config import PrecisionConfig
from trainer.precision.serving import serve
from trainer.run import train
from trainer.sample import open_checkpoint, sample_run

CPU = torch.device("cpu")
SAMPLE = SampleConfig(tokens=24, temperature=1.0)


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of a tiny run in FP8 with FP4 experts."""
    return tiny.config(corpus, tmp_path_factory.mktemp("serving"), precision=recipe("fp8_fp4"), sample=SAMPLE)


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> RunFolder:
    """The run, finished, which has written a sample."""
    assert train(config) == 0
    return tiny.only_run(Path(config.runs_dir))


def test_a_sample_from_the_checkpoint_is_the_run_s_own(config: TrainConfig, run: RunFolder) -> None:
    """The same seed, the same text: weights and products are those of the run's last step."""
    (written,) = (run.path / "samples").glob("*.txt")
    _, pieces = sample_run(config, run, [SAMPLE.prompt], SAMPLE, seed=config.seed)
    assert "".join(piece.text for piece in pieces) == written.read_text()


def test_products_are_served_by_the_tokens_seen(config: TrainConfig, run: RunFolder) -> None:
    """Experts in FP4 from a number of tokens on are plain FP8 before; without rules all is plain."""
    settle(config)
    model = build_model(config, CPU)
    restore_model(model, open_checkpoint(run, None))
    linear = model.layers[0].attn.wq_a
    x = torch.randn(5, linear.weight.shape[1]).bfloat16()
    plain = F.linear(x, linear.weight)
    assert serve(model, recipe("fp8_fp4", "bf16", 100), 99).weights.table["layers.0.ffn.experts.w1"].rule == "linears"
    assert serve(model, recipe("fp8_fp4", "bf16", 100), 100).weights.table["layers.0.ffn.experts.w1"].rule == "experts"
    assert not torch.equal(linear(x), plain)
    served = build_model(config, CPU)
    restore_model(served, open_checkpoint(run, None))
    serve(served, PrecisionConfig(), 0)
    assert torch.equal(served.layers[0].attn.wq_a(x), plain)
