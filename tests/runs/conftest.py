"""What the tests of whole runs share: a corpus, the run over it, and torch's settings as they were before."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import children, tiny
from trainer import machine
from trainer.folder import RunFolder
from trainer.run import train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up texts; token files and the tokenizer are made once for all tests."""
    return tiny.write_corpus(tmp_path_factory.mktemp("tiny") / "corpus")


@pytest.fixture(scope="package", autouse=True)
def brief_measurement() -> Iterator[None]:
    """The machine's rate is measured at every start and decides nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "SECONDS", children.RATE_S)
        yield


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The finished run of `tiny.config` that nobody touched; tests only read it."""
    config = tiny.config(corpus, tmp_path_factory.mktemp("whole"))
    assert train(config) == 0
    return tiny.only_run(Path(config.runs_dir))


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """A run fixes the thread count and switches deterministic algorithms on: undone for the tests after it."""
    threads, deterministic = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filling
