"""Proves that laps are the time between marks, and that rates and memory of the machine are of the right size."""

import time
from pathlib import Path

import pytest
import torch

from model.transformer import Transformer
from tests.runs import tiny
from trainer import machine
from trainer.laps import Laps
from trainer.pool import RowPool

CPU = torch.device("cpu")


def test_laps_are_the_seconds_between_marks() -> None:
    laps = Laps(CPU)
    for seconds in (0.02, 0.0, 0.01):
        time.sleep(seconds)
        laps.mark()
    first, second, third = laps.seconds()
    assert first >= 0.02
    assert 0 <= second < first
    assert third >= 0.01


def test_the_rate_is_the_fastest_product_times_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that is said to take 1 s once and 0.25 s twice, on two threads."""
    clock = iter([0.0, 0.0, 1.0, 1.0, 1.25, 1.25, 1.5, 9.0] * 2)
    monkeypatch.setattr(machine, "SIDES", {"cpu": 4})
    monkeypatch.setattr(machine, "SECONDS", 1.5)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    pool = RowPool(Transformer(tiny.model()), 1)
    monkeypatch.setattr(pool, "views", (pool.model, pool.model))
    assert machine.product_rate(pool, CPU, torch.float32) == 2 * (2 * 4**3 / 0.25)


def test_the_measured_rate_is_one_that_a_processor_can_have() -> None:
    rate = machine.product_rate(RowPool(Transformer(tiny.model()), 2), CPU, torch.float32)
    assert 1e8 < rate < 1e14


def test_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t 9 kB\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "status")
    assert machine.memory(CPU) == {"memory/peak_bytes": 2 << 20, "memory/rss_bytes": 1 << 20}


def test_a_tensor_is_in_the_memory_of_this_process() -> None:
    held = torch.ones(1 << 24)
    assert all(size >= held.nbytes for size in machine.memory(CPU).values())


def test_without_proc_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "none")
    assert machine.memory(CPU) == {}
