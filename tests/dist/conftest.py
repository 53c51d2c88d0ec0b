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

__all__ = ["brief_measurement", "corpus", "settings_of_torch"]


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
