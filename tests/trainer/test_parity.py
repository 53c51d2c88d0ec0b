"""Proves that a scaled configuration keeps its features, made-up rows are packed rows, and no change is missed."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from launch.compose import compose
from model.config import CSA_RATIO, ModelConfig
from trainer.config import ParallelConfig, TrainConfig
from trainer.parallel.mesh import Mesh
from trainer.parity import check, scale
from trainer.parity.layout import MOST_RANKS, scaled_layout
from trainer.parity.take import Outcome
from trainer.schedule import plan

RECIPES = ("recipe=debug", "recipe=debug model=small", "recipe=flash", "recipe=pro")
OUTCOME = Outcome(
    figures=[{"loss/lm": 5.0, "optim/grad_norm": 1.0}, {"loss/lm": 4.0, "loss/indexer": 0.5, "optim/grad_norm": 1.0}],
    weights={"embed.weight[0:4]": "a", "layers.0.ffn.experts.1.w1.weight": "b"},
    state={"momentum/layers.0.ffn.experts.1.w1.weight": "c"},
    odd=[],
    parameters=8,
)


def config(recipe: str, layout: str = "parallel=cpu4") -> TrainConfig:
    return compose([*recipe.split(), layout]).config


def features(model: ModelConfig) -> dict[str, object]:
    ratios = model.attention_ratios
    return {
        "window": 0 in ratios,
        "csa": CSA_RATIO in ratios,
        "hca": any(ratio not in (0, CSA_RATIO) for ratio in ratios),
        "hashed": model.num_hash_layers > 0,
        "learned": model.num_hash_layers < model.num_hidden_layers,
        "mtp": model.num_nextn_predict_layers,
        "yarn": model.rope_scaling,
        "streams": model.hc_mult,
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_scaled_configuration_has_the_features_and_the_layout(recipe: str) -> None:
    given = config(recipe)
    small = scale.scaled(given)
    assert features(small.model) == features(given.model)
    for kept in ("precision", "recompute", "optim", "loss", "parallel", "init", "threads", "seed"):
        assert getattr(small, kept) == getattr(given, kept)
    plans = plan(small.schedule)
    assert len(plans) == scale.STEPS
    indexed = CSA_RATIO in small.model.attention_ratios
    assert {one.attention for one in plans} == ({"dense", "indexer_warmup", "sparse"} if indexed else {"dense"})
    assert all(one.rows % given.parallel.data for one in plans), "in some round a rank has no row"


@pytest.mark.parametrize(
    ("given", "experts", "small"),
    [
        ((2, 2), 8, (2, 2)),
        ((3, 3), 6, (3, 3)),
        ((6, 2), 8, (2, 2)),
        ((256, 64), 256, (4, 4)),
        ((1024, 16), 384, (4, 4)),
        ((12, 3), 6, (4, 2)),
        ((10, 5), 10, (2, 2)),
        ((6, 1), 8, (3, 1)),
        ((10, 5), 15, (3, 3)),
        ((7, 1), 8, (4, 1)),
        ((7, 7), 14, (4, 2)),
    ],
)
def test_a_layout_comes_down_to_one_machine_with_its_axes(
    given: tuple[int, int], experts: int, small: tuple[int, int]
) -> None:
    """Never to one process, which is compared with itself."""
    data, expert = given
    found = scaled_layout(ParallelConfig(data=data, expert=expert), experts)
    assert (found.data, found.expert) == small
    assert found.data <= MOST_RANKS


@pytest.mark.parametrize(
    ("pipe", "data", "schedule", "small"),
    [(16, 32, "1f1b", (2, 2)), (2, 1, "1f1b", (2, 1)), (8, 2, "dualpipev", (2, 2)), (2, 1, "dualpipev", (2, 1))],
)
def test_stages_come_down_to_two_with_layers_and_rows_for_them(
    pipe: int, data: int, schedule: Literal["1f1b", "dualpipev"], small: tuple[int, int]
) -> None:
    """As many layers as chunks, and for DualPipeV two rows for each of its ranks' chunks."""
    found = scaled_layout(ParallelConfig(pipe=pipe, data=data, schedule=schedule), 8)
    assert (found.pipe, found.data, found.stages) == (*small, ())
    words = [f"parallel.pipe={pipe}", f"parallel.data={data}", f"parallel.schedule={schedule}"]
    little = scale.scaled(replace(compose(["recipe=flash", "threads=1", *words]).config, parallel=found))
    assert little.model.num_hidden_layers >= found.chunks
    assert found.chunks * found.data <= plan(little.schedule).fewest_rows().rows


def test_made_up_rows_are_packed_rows_and_a_function_of_their_number() -> None:
    rows = scale.MadeUpRows(seed=7)
    batch = rows.rows(0, 3, 20)
    alone = rows.rows(0, 5, 1)
    for name in ("token_BT", "target_BT", "document_BT", "position_BT"):
        assert torch.equal(getattr(batch, name)[2:3], getattr(alone, name))
        assert len(getattr(rows.rows(0, 3, 0), name)) == 0
    assert not torch.equal(batch.token_BT, scale.MadeUpRows(seed=8).rows(0, 3, 20).token_BT)
    for token_T, target_T, document_T, position_T in zip(
        batch.token_BT, batch.target_BT, batch.document_BT, batch.position_BT, strict=True
    ):
        for place in range(scale.ROW_LENGTH):
            first = place == 0 or document_T[place] != document_T[place - 1]
            assert position_T[place] == (0 if first else position_T[place - 1] + 1)
            goes_on = place + 1 < scale.ROW_LENGTH and document_T[place + 1] == document_T[place] != -1
            assert target_T[place] == (token_T[place + 1] if goes_on else -1)
    assert int(batch.document_BT.max()) >= 1
    assert bool((batch.document_BT == -1).any())


def test_equal_outcomes_are_alike() -> None:
    verdict = check.compare(OUTCOME, OUTCOME)
    assert verdict.alike
    assert {term.name: term.steps for term in verdict.terms} == {
        "loss/lm": 2, "optim/grad_norm": 2, "loss/indexer": 1
    }  # fmt: skip


CHANGES = {
    "last bit": {"figures": [OUTCOME.figures[0], OUTCOME.figures[1] | {"loss/lm": math.nextafter(4.0, 5.0)}]},
    "no number": {"figures": [OUTCOME.figures[0], OUTCOME.figures[1] | {"optim/grad_norm": math.nan}]},
    "missing": {"figures": [OUTCOME.figures[0], {"loss/lm": 4.0, "optim/grad_norm": 1.0}]},
    "one more": {"figures": [OUTCOME.figures[0] | {"loss/indexer": 0.5}, OUTCOME.figures[1]]},
    "weight": {"weights": OUTCOME.weights | {"embed.weight[0:4]": "x"}},
    "weight missing": {"weights": {"embed.weight[0:4]": "a"}},
    "state": {"state": {"momentum/layers.0.ffn.experts.1.w1.weight": "x"}},
    "replicas": {"odd": ["embed.weight[0:4]"]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name: str) -> None:
    verdict = check.compare(OUTCOME, replace(OUTCOME, **CHANGES[name]))
    assert not verdict.alike
    parity = check.Parity(against_one=verdict, again=None, parameters=8)
    text = list(check.lines(config("recipe=debug"), parity))
    assert not parity.kept
    assert text[-1] == "verdict: NOT the same bits as one process"
    assert len([line for line in text if "first in step" in line or "embed.weight" in line or "momentum/" in line]) or (
        name == "weight missing"
    )


def test_the_fast_path_is_held_to_itself() -> None:
    other = check.compare(OUTCOME, replace(OUTCOME, **CHANGES["weight"]))
    same = check.compare(OUTCOME, OUTCOME)
    assert check.Parity(against_one=other, again=same, parameters=8).kept
    assert not check.Parity(against_one=same, again=other, parameters=8).kept


def test_layouts_of_the_group_are_meshes() -> None:
    assert config("recipe=debug", "parallel=cpu4").parallel.mesh == Mesh(data=4, expert=2, owners=4)
