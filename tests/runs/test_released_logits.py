"""Proves that an export computes what the run computes: read by us, codes and all, and by transformers 5.23.

transformers is an independent implementation. Only its test imports it: that takes five seconds.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.main import main
from model import names
from model.config import ModelConfig
from model.logical import locate
from model.transformer import Transformer
from tests.runs import tiny
from tests.trainer import released_folder as made
from tests.trainer.precision.recipes import recipe
from trainer.config import TrainConfig
from trainer.folder import RunFolder
from trainer.precision.config import Precision
from trainer.released.load import load
from trainer.released.source import ReleasedFolder
from trainer.run import train
from trainer.schedule_config import BatchConfig, RowLengthStage


def ids(model: Transformer) -> Tensor:
    """Two rows of 150 tokens."""
    return torch.randint(0, model.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(3))


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ids(model)).h_BTD)


def trained(corpus: Path, runs_dir: Path, dtype: Precision, name: str) -> tuple[TrainConfig, RunFolder]:
    """A finished run of a recipe. One group in wo_a: its blocks are then those of the released tensor."""
    model = tiny.model(o_groups=1)
    config = replace(tiny.config(corpus, runs_dir), model=model, precision=recipe(name, dtype))
    assert train(config) == 0
    return config, tiny.only_run(runs_dir)


def run_weights(run: RunFolder) -> dict[str, Tensor]:
    """The weights that the run computes with, without the masters behind them."""
    saved = tiny.final_tensors(run)
    return {name.removeprefix("model/"): value for name, value in saved.items() if name.startswith("model/")}


def filled(config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Transformer:
    """A model of these weights."""
    model = Transformer(config, dtype)
    with torch.no_grad():
        for name, tensor in names.tensors(model).items():
            tensor.copy_(weights[name])
    return model


def as_stored(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those rounded that the released format stores as bf16."""
    plain = {name for name in weights if made.kind_of(name) == "BF16" and ".experts.w" not in name}
    return {name: value.bfloat16() if name in plain else value for name, value in weights.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "form"), [("fp8", "fp8"), ("fp8_fp4", "released")])
def test_the_codes_are_the_weights_that_the_run_computes_with(
    name: str, form: str, dtype: Precision, corpus: Path, tmp_path: Path
) -> None:
    """Experts in FP8 or FP4, the other large matrices in FP8: every number the same, and so are the logits."""
    config, run = trained(corpus, tmp_path / "runs", dtype, name)
    assert main(["export", str(run.path), str(tmp_path / "out"), "--format", form]) == 0
    weights, kind = run_weights(run), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    exported = load(tmp_path / "out", kind)
    coded = 0
    for spec in ReleasedFolder(tmp_path / "out").specs.values():
        where = locate(spec.name)
        mine, theirs = (where.view(all_[where.parameter]).detach() for all_ in (weights, names.tensors(exported)))
        if spec.stored in ("F8_E4M3", "FP4"):
            assert torch.equal(mine, theirs), spec.name
            coded += 1
    assert coded > 50
    assert torch.equal(logits(exported), logits(filled(config.model, as_stored(weights), kind)))
    rows = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert {row["scales"] for row in rows if "scales" in row} == {"fresh"}


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [128, 8])
def test_transformers_computes_our_logits_from_an_export(ratio: int, corpus: Path, tmp_path: Path) -> None:
    """Window, CSA and HCA layers, of V4's rate and another; hash and learned routing. transformers has no MTP.

    With eight index heads: where all of two heads are negative the score is 0, and of equal scores it takes any.
    """
    from transformers import DeepseekV4ForCausalLM

    model = tiny.model(num_hidden_layers=3, compress_ratios=(0, 4, ratio, 0), index_n_heads=8)
    length, batch = RowLengthStage(from_tokens=0, value=150), BatchConfig(tokens=150, start_tokens=150, ramp_tokens=200)
    rows = tiny.schedule(row_length=(length,), batch=batch)
    assert train(replace(tiny.config(corpus, tmp_path / "runs"), model=model, schedule=rows)) == 0
    run = tiny.only_run(tmp_path / "runs")
    assert main(["export", str(run.path), str(tmp_path / "out"), "--format", "fp32"]) == 0
    theirs, found = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    ours = filled(model, run_weights(run))
    exported = load(tmp_path / "out")
    assert exported.config == model
    assert torch.equal(logits(exported), logits(ours))
    with torch.no_grad():
        their_logits = theirs.eval()(ids(ours), use_cache=False).logits
    # Both in fp32, sums in another order; 1e-4 is what the fixtures allow between fp32 and fp64.
    assert (their_logits - logits(ours)).abs().max() < 1e-4
    assert logits(ours).std() > 0.01
