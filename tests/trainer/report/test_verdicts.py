"""Proves that each rule of the verdicts changes its mind at its threshold, and that a verdict is its gravest reason."""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tests.trainer.report import made_up
from trainer.report import health, learning, schedule
from trainer.report.verdict import Reason, Verdict, judge
from trainer.report.verdicts import verdicts

Rule = Callable[[float], Reason | None]


def level(reason: Reason | None) -> str:
    return reason.level if reason else "good"


def losses(rise: float) -> list[float]:
    return [3.0 + (rise if i >= 10 else 0) + 0.001 * (i % 2) for i in range(20)]


def spiked(by: float) -> list[float]:
    return [3.0] * 9 + [3.0 + by] + [3.0] * 9


def rows(**values: Any) -> list[dict[str, Any]]:
    """Twenty equal rows."""
    return [{"step": step, "time/step_s": 1.0, **values} for step in range(20)]


def grown(factor: float) -> Reason | None:
    return health.memory_growth([{"memory/rss_bytes": 2**30 * (factor if i > 15 else 1)} for i in range(20)])


def slowed(factor: float) -> Reason | None:
    speeds = [1000.0 / (factor if i >= 12 else 1) for i in range(20)]
    return schedule.slower([{"speed/tokens_per_s": speed} for speed in speeds], 16)


LIMITS: list[tuple[str, Rule, float, float]] = [
    ("regression", lambda x: learning.held_out_course([3.0, 2.0, 2.0 + x]), 0.05, 0.5),
    ("rise", lambda x: learning.training_course(losses(x)), learning.RISE_LOOK_NATS, math.inf),
    ("gap", lambda x: learning.gap(2.0 + x, 2.0), learning.GAP_LOOK_NATS, math.inf),
    ("bigram", lambda x: learning.against_bigram(3.0 + x, 3.0), 0.0, math.inf),
    ("clip", lambda x: health.clipped([1 - x - 0.1, 1 - x + 0.1]), 1 - health.CLIP_SCALE_LOOK, math.inf),
    ("norm", lambda x: health.gradient_spikes([1.0] * 9 + [x]), health.NORM_LOOK, health.NORM_BAD),
    ("spike", lambda x: health.loss_spikes(spiked(x)), health.SPIKE_LOOK_NATS, math.inf),
    ("dead", lambda x: health.dead_experts(max(1000 * x, 0), 1000), 0.0, health.DEAD_BAD),
    ("load", lambda x: health.load([x, x], 256, 6), health.LOAD_LOOK, health.LOAD_BAD),
    ("collapse", lambda x: health.load([x], 8, 4), 0.9 * 2, 0.9 * 2),
    ("mix columns", health.column_sums, health.COLUMN_LOOK, health.COLUMN_BAD),
    ("mix rows", health.row_sums, health.ROW_LOOK, health.ROW_BAD),
    ("gain", health.gain, health.GAIN_LOOK, health.GAIN_BAD),
    ("clamped", health.clamped, health.CLAMPED_LOOK, health.CLAMPED_BAD),
    ("memory", grown, health.GROWTH_LOOK, math.inf),
    ("slower", slowed, schedule.SLOWER_LOOK, schedule.SLOWER_BAD),
    ("silent", lambda x: schedule.silent(x, 1.0), schedule.SILENT_LOOK_S, schedule.SILENT_BAD_S),
    ("silent, long steps", lambda x: schedule.silent(x, 100.0), 1000.0, 5000.0),
    ("waiting", lambda x: schedule.waiting(rows(**{"time/wait_s": x})), schedule.WAIT_LOOK, schedule.WAIT_BAD),
    ("checkpoint", lambda x: schedule.checkpoint_age(1000 + round(100 * x), 1000, 100), 2.0, math.inf),
    ("lost", lambda x: schedule.lost(1e5 * x, 1e5, 1), schedule.LOST_LOOK, schedule.LOST_BAD),
]


@pytest.mark.parametrize(("rule", "look", "bad"), [case[1:] for case in LIMITS], ids=[case[0] for case in LIMITS])
def test_both_sides_of_each_threshold(rule: Rule, look: float, bad: float) -> None:
    step = 0.02 * (look or 0.1)
    assert level(rule(look - step)) == "good"
    assert level(rule(look + step)) == ("bad" if look == bad else "look")
    if bad not in (look, math.inf):
        assert level(rule(bad * 0.98)) == "look"
        assert level(rule(bad * 1.02)) == "bad"


def test_recall_that_is_too_low_and_guessing_are_seen() -> None:
    assert learning.recall(0.3, learning.RECALL_LOOK + 0.01).level == "good"
    assert learning.recall(0.3, learning.RECALL_LOOK - 0.01).level == "look"
    assert learning.against_guessing(math.log(512) - 0.01, 512) is None
    assert level(learning.against_guessing(math.log(512) + 0.01, 512)) == "bad"
    assert level(learning.against_guessing(math.nan, 512)) == "bad"


def test_a_loss_as_far_out_as_its_neighbours_is_no_spike() -> None:
    noisy = [3.0, 3.4, 2.7, 3.3, 2.6, 3.1, 3.9, 2.8, 3.2, 2.9]
    assert health.loss_spikes(noisy) is None
    assert health.loss_spikes([*noisy, 9.0]) is not None


def test_recall_is_judged_under_sparse_attention_only() -> None:
    rows = [made_up.row(step) for step in range(1, 54)]
    assert rows[-1]["schedule/attention"] == "sparse"
    assert "indexer recall" not in texts(verdicts(made_up.run(rows=rows)))
    rows.append(made_up.row(56))
    assert "indexer recall 0.56, up from 0.48" in texts(verdicts(made_up.run(rows=rows)))


def test_a_rise_within_the_noise_is_no_rise() -> None:
    noisy = [3.0, 4.0] * 5 + [3.2, 4.2] * 5
    reason = learning.training_course(noisy)
    assert reason is not None
    assert reason.level == "good"
    assert "steady" in reason.text


def test_few_lost_seconds_are_no_matter() -> None:
    assert level(schedule.lost(50, 100, 2)) == "good"
    assert schedule.lost(50, 100, 0) is None


def test_a_verdict_is_its_gravest_reason_and_names_it_first() -> None:
    good, look, bad = (Reason(level=one, text=one) for one in ("good", "look", "bad"))
    assert judge("q", [good, None, look]).level == "look"
    verdict = judge("q", [good, look, bad, good])
    assert [reason.text for reason in verdict.reasons] == ["bad", "look", "good", "good"]
    assert judge("q", []).level == "look"


def levels(found: tuple[Verdict, ...]) -> dict[str, str]:
    return {verdict.question: verdict.level for verdict in found}


def texts(found: tuple[Verdict, ...]) -> str:
    return "\n".join(reason.text for verdict in found for reason in verdict.reasons)


def test_a_good_run_is_good_with_its_numbers() -> None:
    found = verdicts(made_up.run())
    assert levels(found) == {"learning": "good", "healthy": "good", "on schedule": "good"}
    said = texts(found)
    for words in (
        "dead experts 0 of 16",
        "mHC row sums within 2e-6 of 1",
        "gradient clipped in 0 % of the last 20 steps",
        "finished: 80 of 80 steps, 410 tokens/s",
        "indexer recall 0.80, up from 0.48",
        "held-out loss 2.355 nats (1.57 bits per byte), its lowest of 10 measurements",
    ):
        assert words in said


def test_the_bigram_is_compared_where_the_run_has_fitted_one() -> None:
    told = made_up.history(("start", 0, 0.0), ("end", 80, 1000.0, "finished"))
    told[-1]["results"] = {"bigram/loss": 2.5}
    found = verdicts(made_up.run(told=told))
    assert "0.14 nats below the bigram model of the same text (2.50)" in texts(found)
    told[-1]["results"] = {"bigram/loss": 2.3}
    assert levels(verdicts(made_up.run(told=told)))["learning"] == "look"


def test_a_loss_that_is_no_number_is_bad() -> None:
    wrong = [made_up.row(step) for step in range(1, 41)]
    wrong[-1] |= {"loss/lm": "NaN", "optim/grad_norm": "Infinity"}
    found = verdicts(made_up.run(rows=wrong))
    assert levels(found)["learning"] == levels(found)["healthy"] == "bad"
    assert "not a number in the last 16 steps: loss/lm, optim/grad_norm" in texts(found)


def test_the_indexers_warm_up_is_not_held_against_the_model() -> None:
    warm = [made_up.row(step) for step in range(1, 51)]
    for row in warm[40:]:
        row["loss/lm"] = 4.9
    assert levels(verdicts(made_up.run(rows=warm)))["learning"] == "good"


@pytest.mark.parametrize(
    ("state", "told", "expected", "words"),
    [
        ("running", [("start", 0, 0.0)], "good", "40 of 80 steps, 410 tokens/s, ends at 12:13"),
        ("stopped", [("start", 0, 0.0), ("end", 40, 410.0, "SIGINT")], "look", "stopped after 40 of 80 steps (SIGINT)"),
        (
            "failed",
            [("start", 0, 0.0), ("end", 40, 410.0, "OSError: disk")],
            "bad",
            "failed after 40 of 80 steps: OSError",
        ),
        ("died", [("start", 0, 0.0)], "bad", "its process ended without a word after 40 of 80 steps"),
    ],
)
def test_what_became_of_the_run(state: Any, told: Any, expected: str, words: str) -> None:
    half = [made_up.row(step) for step in range(1, 41)]
    now = made_up.BEGAN + timedelta(seconds=405)
    run = made_up.run(rows=half, told=made_up.history(*told), state=state, now=now)
    reason = schedule.state(run)
    assert reason.level == expected
    assert words in reason.text


def test_time_that_restarts_have_cost() -> None:
    told = made_up.history(("start", 0, 0.0), ("resume", 40, 1000.0), ("end", 80, 1900.0, "finished"))
    resumed = [made_up.row(step) for step in range(1, 81)]
    for row in resumed[40:]:
        row["time/run_s"] -= 400
    run = made_up.run(rows=resumed, told=told)
    assert [(one.first_step, one.kept_s) for one in schedule.sessions(run)] == [(0, 400.0), (40, 400.0)]
    assert "1 restart, 10 min of 23 min 20 s down or repeated" in texts(verdicts(run))
    assert schedule.tokens_per_s(run) == pytest.approx(made_up.TOKENS / made_up.STEP_S)


def test_a_run_without_a_step_has_something_to_say() -> None:
    found = verdicts(made_up.run(rows=[], told=[], state="running"))
    assert [verdict.question for verdict in found] == ["on schedule"]
    assert "0 of 80 steps" in texts(found)
