"""Proves that the same configuration gives the same bits again, in another process, with any number of threads."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.runs import children, tiny
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.folder import RunFolder

Processes = multiprocessing.context.BaseContext


def run_there(processes: Processes, config: TrainConfig, folder: Path) -> RunFolder:
    """The finished run of a configuration, trained by a process of its own."""
    log = folder.with_suffix(".log")
    child = processes.Process(target=children.train_there, args=(replace(config, runs_dir=str(folder)), log))
    child.start()
    child.join()
    assert child.exitcode == 0, log.read_text()
    return tiny.only_run(folder)


@pytest.fixture(scope="module")
def once(corpus: Path, tmp_path_factory: pytest.TempPathFactory, processes: Processes) -> RunFolder:
    """The run on one thread."""
    folder = tmp_path_factory.mktemp("once")
    return run_there(processes, tiny.config(corpus, folder), folder / "runs")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_again(corpus: Path, tmp_path: Path, processes: Processes, once: RunFolder, threads: int) -> None:
    again = run_there(processes, tiny.config(corpus, tmp_path, threads=threads), tmp_path / "runs")
    tiny.assert_same_run(again, once)
    assert yaml.safe_load((again.path / "config.yaml").read_text())["threads"] == threads
    newest = max(checkpoint.steps(again.checkpoints).items())[1]
    for facts in (again.provenance, checkpoint.load(newest).state["facts"]):
        assert (facts["threads"], facts["deterministic"]) == (1, True), "more than one thread inside an operation"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_the_same_bits_in_every_precision(corpus: Path, tmp_path: Path, processes: Processes, dtype: str) -> None:
    config = tiny.with_dtype(tiny.config(corpus, tmp_path), dtype)
    runs = [
        run_there(processes, replace(config, threads=threads), tmp_path / f"{i}")
        for i, threads in enumerate((1, 2, 2, 5))
    ]
    for run in runs[1:]:
        tiny.assert_same_run(run, runs[0])


def test_another_seed_gives_other_bits(corpus: Path, tmp_path: Path, processes: Processes, once: RunFolder) -> None:
    other = run_there(processes, tiny.config(corpus, tmp_path, seed=2), tmp_path / "runs")
    different = tiny.different_tensors(tiny.final_tensors(once), tiny.final_tensors(other))
    matrices = [name for name in tiny.final_tensors(once) if name.startswith("optimizer/momentum/")]
    assert set(matrices) <= set(different)
    assert tiny.metrics_rows(once) != tiny.metrics_rows(other)
    with pytest.raises(AssertionError):
        tiny.assert_same_run(once, other)
