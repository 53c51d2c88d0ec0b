"""Proves that an impossible layout is one line with the arithmetic in it, exit code 2, and that others are composed."""

import pytest

from launch.compose import choices, compose
from launch.main import main
from trainer.parallel.mesh import Mesh

EXPERTS = 8
"""Of the debug model, which these overrides start from."""
IMPOSSIBLE = {
    "threads=1 parallel.data=3 parallel.expert=2": "parallel.expert = 2: expected a divisor of parallel.data=3",
    "threads=1 parallel.data=2 parallel.expert=4": "parallel.expert = 4: expected a divisor of parallel.data=2",
    "threads=1 parallel.data=6 parallel.expert=3": (
        f"parallel.expert = 3: expected a divisor of model.n_routed_experts={EXPERTS}"
    ),
    "threads=1 parallel.data=32 parallel.expert=16": (
        f"parallel.expert = 16: expected a divisor of model.n_routed_experts={EXPERTS}"
    ),
    "threads=2 parallel.data=2 parallel.expert=2": (
        "threads = 2: expected 1 with this parallel section: ranks exchange tokens row by row"
    ),
    "threads=4 parallel.reduction=fast": "threads = 4: expected 1 with this parallel section: sums have an order",
    "parallel.pipe=2": "threads = 2: expected 1 with this parallel section: stages hand on streams row by row",
    "threads=1 parallel.pipe=9": "parallel.pipe = 9: expected at most model.num_hidden_layers=3 chunks",
    "threads=1 parallel.pipe=2 parallel.stages=[1,2,3]": "parallel.stages = [1, 2, 3]: expected 2 positive numbers, "
    "one for each chunk of the pipeline, or none",
    "threads=1 parallel.pipe=2 parallel.stages=[1,1]": "parallel.stages = [1, 1]: expected numbers that add up to "
    "model.num_hidden_layers=3, not 2",
    "threads=1 parallel.pipe=2 parallel.stream=bf16": "parallel.stream = bf16: expected model where "
    "parallel.reduction=exact",
    "parallel.schedule=dualpipev": "parallel.schedule = dualpipev: expected 1f1b where parallel.pipe=1",
    "model=small parallel=pipe2 parallel.data=2 parallel.schedule=dualpipev schedule.batch.start_tokens=3584": (
        "parallel.schedule = dualpipev: expected 1f1b, or twice parallel.pipe=2 rows on each of parallel.data=2 ranks; "
        "step 1 has 7 rows in all"
    ),
    "model=small parallel=pipe2 parallel.schedule=dualpipev schedule.indexer_warmup_batch_tokens=1536": (
        "parallel.schedule = dualpipev: expected 1f1b, or twice parallel.pipe=2 rows on each of parallel.data=1 ranks; "
        "step 46 has 3 rows in all"
    ),
    "parallel.context=4": "parallel.context = 4: expected 1: larger sizes are not there yet",
    "parallel.pipe=0": "parallel.pipe = 0: expected a positive number of ranks",
    "parallel.data=-1": "parallel.data = -1: expected a positive number of ranks",
    "parallel.expert=0": "parallel.expert = 0: expected a positive number of ranks",
    "parallel.owners_limit=0": "parallel.owners_limit = 0: expected a positive number of ranks",
    "parallel.check_every_steps=-1": "parallel.check_every_steps = -1: expected at least 0 (0 never)",
    "parallel.reduction=exakt": "parallel.reduction = exakt: expected one of exact, fast",
    "parallel.dense_reduction=fp16": "parallel.dense_reduction = fp16: expected one of fp32, bf16",
    "parallel=cpu3": "parallel = cpu3: expected one of cpu2, cpu4, cpu8, pipe2, pipe4, single",
}
POSSIBLE = {
    "parallel=single": Mesh(),
    "parallel=cpu2": Mesh(data=2, expert=2, owners=2),
    "parallel=cpu4": Mesh(data=4, expert=2, owners=4),
    "parallel=cpu8": Mesh(data=8, expert=4, owners=8),
    "parallel=pipe2": Mesh(pipe=2),
    "parallel=pipe4": Mesh(pipe=2, data=2, expert=2, owners=2),
    "parallel.data=3": Mesh(data=3, owners=3),
    "threads=1 parallel.data=12 parallel.expert=4": Mesh(data=12, expert=4, owners=12),
    "parallel.data=96": Mesh(data=96, owners=48),
    "parallel.data=67": Mesh(data=67, owners=1),
    "parallel.data=67 parallel.owners_limit=67": Mesh(data=67, owners=67),
    "parallel.data=96 parallel.owners_limit=7": Mesh(data=96, owners=6),
}


@pytest.mark.usefixtures("merge_once")
@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_an_impossible_layout_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    assert capsys.readouterr() == ("", f"keel: error: {IMPOSSIBLE[words]}\n")


@pytest.mark.usefixtures("merge_once")
@pytest.mark.parametrize("words", POSSIBLE)
def test_a_possible_layout_is_its_mesh(words: str) -> None:
    config = compose(words.split()).config
    assert config.model.n_routed_experts == EXPERTS
    assert config.parallel.mesh == POSSIBLE[words]


def test_ranks_that_wait_for_experts_pass_an_empty_row_on() -> None:
    """7 rows on 2 data ranks are 4 rounds for both where experts are shared out: enough for DualPipeV on 2 ranks."""
    words = ["model=small", "parallel=pipe4", "parallel.schedule=dualpipev", "schedule.batch.start_tokens=3584"]
    assert compose(words).config.parallel.chunks == 4
    with pytest.raises(ValueError, match="step 1 has 7 rows in all"):
        compose([*words, "parallel.expert=1"])


def test_every_layout_has_a_test() -> None:
    assert {f"parallel={choice}" for choice in choices("parallel")} <= set(POSSIBLE)
