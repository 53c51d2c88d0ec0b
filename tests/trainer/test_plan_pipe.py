"""Proves that the plan of a pipeline adds up to the whole model, and that its times are those of the schedule.

Memory and traffic are held to real ranks in tests/dist/test_plan_total.py and tests/dist/test_plan_traffic.py.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from launch.compose import compose
from model.count import depth_flops, parameters, training_flops
from trainer import plan_pipe
from trainer.config import TrainConfig
from trainer.parallel.orders import forward_order
from trainer.parallel.stages import parts, usual_row
from trainer.plan import plan
from trainer.plan_parallel import Layout
from trainer.plan_rows import stream_bytes

DEEP = ["recipe=debug", "model=small", "threads=1"]
LAYOUTS = {
    "1f1b": ["parallel.pipe=2"],
    "dualpipev": ["parallel.pipe=2", "parallel.schedule=dualpipev"],
    "with experts": ["parallel=pipe4"],
    "owners": ["parallel.pipe=3", "parallel.data=4", "parallel.owners_limit=2"],
}


def configured(words: Sequence[str]) -> TrainConfig:
    return compose([*DEEP, *words]).config


def planned(words: Sequence[str]) -> Layout:
    return plan(configured(words)).layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_pipe_ranks_together_have_the_whole_model(name: str) -> None:
    """The embedding twice, where first and last chunk are on different ranks."""
    config, layout = configured(LAYOUTS[name]), planned(LAYOUTS[name])
    counts, pipeline = parameters(config.model), layout.pipeline
    assert pipeline is not None
    twice = counts.main["embedding"] if config.parallel.schedule == "1f1b" else 0
    assert sum(chunk.parameters for chunk in pipeline.chunks) == counts.total + twice
    flops = training_flops(config.model, usual_row(config.schedule), "sparse").total
    assert sum(chunk.passes.total for chunk in pipeline.chunks) == flops
    assert sum(pipeline.share_of(rank) for rank in range(pipeline.ranks)) == pytest.approx(1)
    assert [layer for chunk in pipeline.chunks for layer in chunk.layers] == list(range(config.model.num_hidden_layers))
    mesh = layout.mesh
    owned = sum(len(role.ranks) * role.load.elements for role in layout.roles)
    experts = counts.main["experts"] + counts.mtp["experts"]
    assert owned == experts + mesh.data // mesh.owners * (counts.total + twice - experts)
    for role in layout.roles:
        assert {mesh.place(rank).pipe for rank in role.ranks} == {role.pipe}
    assert sorted(rank for role in layout.roles for rank in role.ranks) == list(range(mesh.size))
    assert [role.pipe for role in layout.largest_by_pipe] == list(range(mesh.pipe))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_column_sends_is_its_part_of_the_traffic(name: str) -> None:
    config, layout = configured(LAYOUTS[name]), planned(LAYOUTS[name])
    assert layout.pipeline is not None
    for played, traffic, stage in zip(layout.pipeline.played, layout.traffic, plan(config).stages, strict=True):
        sent = {one.name: one.sent_bytes for one in traffic if one.kind == "send"}
        assert sent["streams"] == sent["gradients of streams"]
        assert sum(played.sent_bytes) * config.parallel.data == sum(sent.values())
        size = stream_bytes(config, stage.last.row_length)
        assert size == stage.last.row_length * config.model.hc_mult * config.model.hidden_size * 4
        ends = 1 if config.parallel.schedule == "1f1b" else 2
        assert played.sent_bytes[0] == ends * played.rows * size
    rounded = replace(config, parallel=replace(config.parallel, reduction="fast", stream="bf16"))
    assert 2 * stream_bytes(rounded, 512) == stream_bytes(config, 512)


def test_a_bubble_is_that_of_the_passes_and_the_wait() -> None:
    config = configured(LAYOUTS["1f1b"])
    stage, layout = plan(config).stages[-1], planned(LAYOUTS["1f1b"])
    assert layout.pipeline is not None
    found = layout.pipeline.played[-1]
    run = plan_pipe.play(config, stage.last, stage.last.rows)
    assert found.rows == stage.last.rows
    assert found.bubble == pytest.approx(run.bubble)
    assert found.bubbles == pytest.approx(run.bubbles)
    # The dearest rank waits for the first forward and for the last backward pass of the other, and no more.
    costs = plan_pipe.profile(config, stage.last, parts(config.parallel, config.model, usual_row(config.schedule)))
    other = min(range(2), key=layout.pipeline.share_of)
    assert run.end == found.rows * max(map(sum, zip(costs.forward, costs.backward, strict=True))) + (
        costs.forward[other] + costs.backward[other]
    )
    assert costs.forward == tuple(chunk.passes.forward for chunk in layout.pipeline.chunks)
    assert costs.backward == tuple(chunk.passes.backward for chunk in layout.pipeline.chunks)


def test_layers_that_are_computed_again_take_a_third_pass() -> None:
    config, again = (configured([*LAYOUTS["1f1b"], *words]) for words in ([], ["recompute=[block]"]))
    step, parts_of = plan(config).stages[-1].last, parts(config.parallel, config.model, usual_row(config.schedule))
    once, twice = (plan_pipe.profile(one, step, parts_of) for one in (config, again))
    end = depth_flops(config.model, step.row_length, "sparse").end.forward
    assert twice.forward == once.forward
    assert twice.backward == (once.backward[0] + once.forward[0], once.backward[1] + once.forward[1] - end)
    warm_up = replace(step, attention="indexer_warmup")
    longer, usual = (plan_pipe.profile(one, warm_up, parts_of).backward for one in (again, config))
    assert all(0 < one < other for one, other in zip(usual, longer, strict=True))


@pytest.mark.parametrize("name", ["1f1b", "dualpipev", "owners"])
def test_many_rows_last_as_long_as_when_all_are_played(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*LAYOUTS[name], "schedule.batch.tokens=163840", "schedule.batch.ramp_tokens=0"]
    whole = planned(words).pipeline
    monkeypatch.setattr(plan_pipe, "MOST_PLAYED", 0)
    part = planned(words).pipeline
    assert whole is not None
    assert part is not None
    for all_rows, some in zip(whole.played, part.played, strict=True):
        assert some.rows == all_rows.rows > 24
        assert some.bubble == pytest.approx(all_rows.bubble, rel=1e-9)
        assert some.sent_bytes == all_rows.sent_bytes
        assert some.in_flight == all_rows.in_flight


def test_rows_in_flight_are_what_makes_the_first_rank_dear() -> None:
    """1F1B: four, three, two and one row; a rank's memory has that many rows of its layers."""
    layout = planned(["parallel.pipe=4", "parallel.stages=[1,1,1,5]"])
    assert layout.pipeline is not None
    assert layout.pipeline.played[-1].in_flight == (4, 3, 2, 1)
    kept = [of[layout.dearest].activations for of in layout.rows]
    alike = planned(["parallel.pipe=2", "parallel.stages=[1,7]"]).rows[0][layout.dearest].activations
    assert 2 * alike == kept[0]


def test_a_schedule_of_other_orders_has_another_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_backward(*given: object) -> object:
        return forward_order(*given)  # type: ignore[arg-type]

    expected = planned(LAYOUTS["1f1b"]).pipeline
    monkeypatch.setattr(plan_pipe, "training_order", no_backward)
    assert planned(LAYOUTS["1f1b"]).pipeline != expected
