"""What the tests of many ranks share: the steps that one process takes, and a run that one process made."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist import ranks, sessions
from tests.dist.ranks import Case, Steps
from tests.runs import tiny
from tests.runs.conftest import brief_measurement, corpus, settings_of_torch
from trainer.folder import RunFolder
from trainer.parallel.mesh import Mesh
from trainer.run import train

SOONER = (
    "test_backends.py::test_each_view",
    "test_backends.py::test_each_rank_has_the_weights_of_the_step[expert]",
    "test_check.py::test_a_right_layout",
    "test_corruption.py::test_two_replicas",
    "test_fast.py::test_sums_of_owners",
    "test_fast.py::test_buckets",
    "test_kill.py::test_killed_three",
    "test_many_ranks.py::test_a_rank_speaks",
    "test_mistakes.py::test_a_mistake_is_seen[experts_averaged]",
    "test_mistakes.py::test_a_mistake_is_seen[embedding_not_added_between_the_ends]",
    "test_mistakes.py::test_a_mistake_is_seen[a_rank_dropped_from_the_norm]",
    "test_order.py",
    "test_parity.py::test_ten_steps[",
    "test_pipeline.py::test_1f1b",
    "test_pipeline.py::test_dualpipev",
    "test_pipeline_faults.py",
    "test_plan_traffic.py::test_pipe_ranks",
    "test_precision.py::test_recipes",
    "test_precision.py::test_the_bits_of_one_process[data2-expert2-owners2-turning]",
    "test_resume.py::test_stages",
)
"""Where the names of those begin that the quick run has, one of each kind; all others here are slow."""

__all__ = ["brief_measurement", "corpus", "settings_of_torch"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is not in SOONER: many processes take many seconds."""
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and not f"{item.path.name}::{item.name}".startswith(SOONER):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def alone() -> Callable[[Case], Steps]:
    """The steps of a case on one process, taken once for all tests."""
    taken: dict[str, Steps] = {}

    def steps_of(case: Case) -> Steps:
        key = repr((case.rows, case.dtype, case.changes))
        if key not in taken:
            taken[key] = ranks.take_alone(case)
        return taken[key]

    return steps_of


@pytest.fixture(scope="session")
def run_alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The finished run of `sessions.config` on one process; tests only read it."""
    config = sessions.config(corpus, tmp_path_factory.mktemp("alone"), Mesh())
    assert train(config) == 0
    return tiny.only_run(Path(config.runs_dir))
