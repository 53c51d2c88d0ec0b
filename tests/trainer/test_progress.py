"""Proves what a person sees: few permanent lines, a live line on a terminal only, an honest time left, or pure JSON."""

import io
import json
import sys

import pytest

from trainer.progress import LINES, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_row(step: int, **more: float | str) -> dict[str, float | str]:
    """Step `step` of 100 tokens (2 rows of 50) that took 2 s; half a second more per step is not training."""
    return {
        "step": step,
        "tokens": step * 100,
        "time/run_s": step * 2.5,
        "time/step_s": 2.0,
        "speed/tokens_per_s": 50.0,
        "schedule/rows": 2,
        "schedule/row_length": 50,
        "schedule/rate": 1e-3,
        "optim/grad_norm": 1.0,
        "loss/lm": 3.25,
        **more,
    }


def shown(stream: io.StringIO, steps: int, total: int) -> str:
    progress = Progress(total, total * 100, stream)
    for step in range(1, steps + 1):
        progress.step(make_row(step))
    return stream.getvalue()


@pytest.mark.parametrize("steps", [1, 7, 40, 79, 1000, 12345])
def test_a_run_has_few_lines_whatever_its_length(steps: int) -> None:
    lines = shown(io.StringIO(), steps, steps).splitlines()
    assert min(steps, LINES) <= len(lines) <= 2 * LINES
    assert lines[-1].startswith(f"step {steps}/{steps}")
    assert max(map(len, lines)) < 120


def test_only_a_terminal_gets_a_live_line() -> None:
    plain, live = shown(io.StringIO(), 50, 4000), shown(Terminal(), 50, 4000)
    assert plain == "", "no line is due before step 100"
    assert live.count("\r\033[K") == 50
    assert "\n" not in live


def test_a_permanent_line_replaces_the_live_one() -> None:
    stream = Terminal()
    progress = Progress(4000, 400_000, stream)
    progress.step(make_row(1))
    progress.say("saved")
    assert stream.getvalue().endswith("\r\033[Ksaved\n")


def test_a_validation_is_always_told() -> None:
    stream = io.StringIO()
    progress = Progress(4000, 400_000, stream)
    progress.step(make_row(3, **{"validation/loss": 2.5, "validation/bits_per_byte": 1.25, "indexer/recall": 0.5}))
    assert "held out 2.500 nats 1.250 bits/byte" in stream.getvalue()
    assert stream.getvalue().endswith("recall 0.50\n")


def test_the_terms_of_the_loss_are_told_where_there_are_any() -> None:
    stream = io.StringIO()
    more = {"loss/mtp": 4.5, "loss/indexer": 0.125, "router/load_max_ratio": 1.5}
    Progress(1, 100, stream).step(make_row(1, **more))
    assert "loss 3.250  mtp 4.500  indexer 0.125  load 1.50  rate 1.0e-03  norm 1.00  50 tok/s" in stream.getvalue()


@pytest.mark.parametrize(("step", "total", "left"), [(2, 12, "0:22"), (30, 67, "1:32"), (1000, 3000, "1:23:19")])
def test_the_time_left_counts_what_is_not_training(step: int, total: int, left: str) -> None:
    """The first step is told 2 s after the beginning, every further one 2.5 s later."""
    stream = io.StringIO()
    progress = Progress(total, total * 100, stream)
    progress.step(make_row(1))
    progress.step(make_row(step, **{"validation/loss": 1.0, "validation/bits_per_byte": 1.0}))
    assert f"left {left}  | held out" in stream.getvalue()


def test_a_resumed_run_counts_its_own_time_only() -> None:
    stream = io.StringIO()
    Progress(20, 2000, stream).step(make_row(10, **{"time/run_s": 2.0}))
    assert stream.getvalue().rstrip().endswith("left 0:20")


def test_json_is_one_object_per_step_and_words_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(4000, 400_000, sys.stdout, as_json=True)
    progress.say("run x")
    for step in (1, 2):
        progress.step(make_row(step))
    progress.step({"step": 3, "optim/grad_norm": float("nan"), "router/load_LE": [[1, 2]]})
    out, err = capsys.readouterr()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert rows == [make_row(1), make_row(2), {"step": 3, "optim/grad_norm": "NaN", "router/load_LE": [[1, 2]]}]
    assert err == "run x\n"
