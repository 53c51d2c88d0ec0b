"""What all tests share: one thread unless a test wants more, the markers, the folder of fixtures, quick children."""

import multiprocessing
import os
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
if not torch.cuda.is_available():
    # Both are read once, on import, and a test file that needs deepspeed imports triton with it.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"

ROOT = Path(__file__).resolve().parent.parent
CHILDREN = ("tests.runs.children", "tests.trainer.crews", "tests.dist.sessions")
"""What tests do in other processes. One server forks them all, so it must know of everything before it starts."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked `slow` without --all; skip what is marked `gpu` where there is none."""
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    need_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if need_gpu and not _has_gpu():
        for item in need_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU that torch can use"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The fixtures that lie beside the repository; without them a test is skipped, in CI (CI=true) it fails."""
    path = ROOT.parent / "shared"
    if path.is_dir():
        return path
    reason = "the folder `shared` beside the repository is not there"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Children that start in milliseconds: they are forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *CHILDREN])
    return context


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
