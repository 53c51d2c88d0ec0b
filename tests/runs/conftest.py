"""What the tests of whole runs share: a corpus, and torch's settings as they were before."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import tiny


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up texts; token files and the tokenizer are made once for all tests."""
    return tiny.write_corpus(tmp_path_factory.mktemp("tiny") / "corpus")


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """A run fixes the thread count and switches deterministic algorithms on: undone for the tests after it."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filling


@pytest.fixture(scope="session")
def processes() -> multiprocessing.context.BaseContext:
    """Children that start in milliseconds: they are forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tests.runs.children"])
    return context
