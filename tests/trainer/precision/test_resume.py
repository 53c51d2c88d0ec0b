"""Proves that runs in FP8 and FP4 resume to the bit, across the turn, too; another recipe is refused or recorded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from tests.runs import tiny
from tests.trainer.checkpoint_samples import same_bits
from tests.trainer.precision.recipes import recipe
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.precision.formats import rounded
from trainer.precision.recipe import Recipe
from trainer.run import resume, train

TOKENS = {4: 160, 5: 224, 6: 320}
"""Seen after so many steps of `tiny.schedule`."""
TURN = 200
"""Tokens after which experts turn to FP4: from the sixth of nine steps on; the fifth leaves the experts alone."""


def tensors(config: TrainConfig) -> dict[str, Tensor]:
    """Of the newest checkpoint."""
    saved = checkpoint.newest_valid(tiny.only_run(Path(config.runs_dir)).checkpoints, print)
    assert saved is not None
    return {name: saved.whole(name) for name in saved.names}


def check_rounded(found: dict[str, Tensor], config: TrainConfig, tokens: int) -> None:
    """Experts' weights are their masters, rounded to what holds after so many tokens."""
    table = Recipe(config.precision, config.model).at(tokens)
    for name in ("layers.0.ffn.experts.w1", "mtp.0.ffn.experts.w2"):
        master = found[f"optimizer/master/{name}"]
        for format in table[name].weight:
            master = rounded(master, format)
        assert same_bits(found[f"model/{name}"], master.bfloat16())


@pytest.mark.parametrize("stop_at", [4, 5, 6])
def test_a_stop_around_the_turn_changes_no_bit(stop_at: int, corpus: Path, tmp_path: Path) -> None:
    """Weights, masters and state after a stop and a resume are those of a run without."""
    of = [
        tiny.config(corpus, tmp_path / name, precision=recipe("fp8_fp4", "bf16", TURN)) for name in ("whole", "halves")
    ]
    assert train(of[0]) == 0
    assert train(of[1], stop_at=stop_at) == 0
    check_rounded(tensors(of[1]), of[1], TOKENS[stop_at])
    assert resume(of[1], tiny.only_run(Path(of[1].runs_dir))) == 0
    whole, halves = map(tensors, of)
    assert whole.keys() == halves.keys()
    assert [name for name in whole if not same_bits(whole[name], halves[name])] == []


def test_another_recipe_is_refused_or_recorded(corpus: Path, tmp_path: Path) -> None:
    """Unless changes are allowed; then the weights are made from the masters again, before the next step."""
    config = tiny.config(corpus, tmp_path / "runs", precision=recipe("fp8"))
    assert train(config, stop_at=3) == 0
    turned, run = replace(config, precision=recipe("fp8_fp4")), tiny.only_run(Path(config.runs_dir))
    with pytest.raises(ValueError, match="precision: the checkpoint was made with"):
        resume(turned, run)
    # The step after is of the indexer's warm-up: it leaves the experts as the resume has made them.
    assert resume(turned, run, stop_at=4, allow_changes=True) == 0
    check_rounded(tensors(turned), turned, 0)
    history = [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]
    assert any("precision" in change for line in history for change in line.get("changes", ()))
