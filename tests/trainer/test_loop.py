"""Proves when the loop measures, saves and stops, and that metrics reach the disk before their checkpoint."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import loop
from trainer.config import CheckpointConfig, ParallelConfig, ValidationConfig
from trainer.loop import Outlets, run_steps
from trainer.parallel.world import ALONE
from trainer.stop import Stop

STEPS = 10
SAVE_S, VALIDATION_S = 2e-3, 3e-3
"""What saving and measuring take at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diary:
    """Every outlet of a loop at once: notes what is asked of it, in order."""

    notes: list[tuple[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def append_metrics(self, row: dict[str, Any]) -> None:
        self.notes.append(("row", row["step"]))
        self.rows.append(row)

    def sync_metrics(self) -> None:
        self.notes.append(("sync", None))

    def submit(self, step: int, tensors: object, state: dict[str, Any]) -> None:
        assert state == {"step": step, "facts": {"torch": "x"}}
        self.notes.append(("save", step))
        time.sleep(SAVE_S)

    def begin(self, done: int) -> None:
        self.notes.append(("look", done))

    def after_step(self, done: int, *, saves: bool) -> None:
        self.notes.append(("look before a save" if saves else "look", done))

    def before_update(self) -> None:
        raise AssertionError("the step is a stand-in")

    def before_save(self, done: int) -> None:
        self.notes.append(("verify", done))

    def seconds(self) -> float:
        return 0.0

    def before(self, step: int) -> None:
        self.notes.append(("before", step))

    def after(self, step: int) -> None:
        self.notes.append(("after", step))

    def log(self, step: int, row: dict[str, Any]) -> None:
        self.notes.append(("log", step))

    def step(self, row: dict[str, Any]) -> None:
        self.notes.append(("shown", row["step"]))

    def measure(self, pool: object, mode: str, world: object, pipeline: object) -> dict[str, float]:
        self.notes.append(("measure", mode))
        time.sleep(VALIDATION_S)
        return {"validation/loss": 1.0}

    def of(self, *kinds: str) -> list[Any]:
        """What was noted under these kinds."""
        return [value for kind, value in self.notes if kind in kinds]


def run(
    monkeypatch: pytest.MonkeyPatch, *, first: int = 0, stop_at: int = 99, stop_after: int = 99, cut_at: int = 99
) -> tuple[Diary, int]:
    """A loop of ten empty steps. stop_after: a signal comes in that step; cut_at: that step is interrupted."""
    diary, stop = Diary(), Stop()

    def take(parts: object, plan: SimpleNamespace, stopped: Stop, verify: object) -> SimpleNamespace | None:
        if plan.step == cut_at:
            stop.reason = "SIGTERM"
            return None
        if plan.step + 1 == stop_after:
            stop.reason = "SIGTERM"
        return SimpleNamespace()

    monkeypatch.setattr(loop, "train_step", take)
    monkeypatch.setattr(loop, "Guard", lambda parts, every_steps: diary)
    built = SimpleNamespace(
        plans=[SimpleNamespace(step=step, rows=1, attention="dense") for step in range(STEPS)],
        parts=SimpleNamespace(pool=None, world=ALONE, handout=SimpleNamespace(settle=lambda: None), pipeline=None),
        config=SimpleNamespace(
            validation=ValidationConfig(every_steps=4),
            checkpoint=CheckpointConfig(every_steps=3),
            parallel=ParallelConfig(),
        ),
        pieces=dict,
    )
    outlets = Outlets(folder=diary, writer=diary, tracker=diary, progress=diary, profiler=diary, facts={"torch": "x"})
    observer = SimpleNamespace(
        watching=lambda plan: nullcontext([]),
        row=lambda plan, result, passes, step_s: {"step": plan.step + 1, "time/step_s": step_s},
        held_out=diary,
        product_rate=1e9,
    )
    return diary, run_steps(built, outlets, observer, first, stop, stop_at)


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    diary, done = run(monkeypatch)
    assert done == STEPS
    assert diary.of("row") == diary.of("log") == diary.of("shown") == list(range(1, 11))
    assert diary.of("save") == [3, 6, 9, 10]
    assert len(diary.of("measure")) == 3, "after steps 4, 8 and the last"


def test_metrics_are_synced_before_each_save(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = run(monkeypatch)[0].notes
    for number, note in enumerate(notes):
        if note[0] == "save":
            assert notes[number - 1] == ("sync", None)
            assert ("row", note[1]) in notes[:number]
            assert ("row", note[1] + 1) not in notes[:number]


def test_the_guard_looks_after_the_step_and_verifies_before_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    diary = run(monkeypatch, stop_at=7)[0]
    assert diary.of("look") == [0, 1, 2, 4, 5]
    assert diary.of("look before a save") == [3, 6, 7], "the last step of a session is saved"
    assert diary.of("verify") == [3, 6, 7]
    for number, note in enumerate(diary.notes):
        if note[0] == "save":
            assert diary.notes[number - 2] == ("verify", note[1])


@pytest.mark.parametrize(
    ("options", "done", "saves"),
    [
        ({"stop_at": 4}, 4, [3, 4]),
        ({"stop_at": 6}, 6, [3, 6]),
        ({"stop_at": 0}, 0, []),
        ({"stop_after": 5}, 5, [3, 5]),
        ({"stop_after": 6}, 6, [3, 6]),
        ({"cut_at": 5}, 5, [3, 5]),
        ({"cut_at": 6}, 6, [3, 6]),
        ({"cut_at": 0}, 0, []),
        ({"first": 7}, 10, [9, 10]),
        ({"first": 10}, 10, []),
        ({"first": 6, "cut_at": 6}, 6, []),
    ],
)
def test_a_stop_saves_what_is_new_once(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], done: int, saves: list[int]
) -> None:
    diary, found = run(monkeypatch, **options)
    assert found == done
    assert diary.of("save") == saves
    assert diary.of("row") == list(range(options.get("first", 0) + 1, done + 1))


def test_what_comes_around_a_step_is_told_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving in the row after it, for the row before is on the disk by then; the machine's rate in the first row."""
    rows = {row["step"]: row for row in run(monkeypatch, first=1)[0].rows}
    assert [step for step, row in rows.items() if row["time/save_s"] >= SAVE_S] == [4, 7, 10]
    assert all(row["time/save_s"] == 0 for step, row in rows.items() if step not in (4, 7, 10))
    assert [step for step, row in rows.items() if "time/validation_s" in row] == [4, 8, 10]
    assert all(rows[step]["time/validation_s"] >= VALIDATION_S for step in (4, 8, 10))
    assert [step for step, row in rows.items() if "speed/product_flops_per_s" in row] == [2]
    assert all(row["time/observe_s"] >= 0 and row["time/run_s"] > row["time/step_s"] for row in rows.values())


def test_lists_go_to_the_file_and_not_to_the_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(Diary, "log", lambda self, step, row: logged.append(row))
    monkeypatch.setattr(Diary, "measure", lambda self, pool, mode, *_: {"indexer/recall_L": [None, 0.5]})
    rows = run(monkeypatch)[0].rows
    assert rows[3]["indexer/recall_L"] == [None, 0.5]
    assert len(logged) == STEPS
    assert not any("indexer/recall_L" in row for row in logged)


def test_a_name_that_is_not_in_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Diary, "measure", lambda self, pool, mode, *_: {"loss/lmm": 1.0})
    with pytest.raises(AssertionError, match="loss/lmm"):
        run(monkeypatch)
