"""Is it learning? Held-out and training loss against guessing, against a bigram model, and against themselves."""

import math
from collections.abc import Sequence
from statistics import fmean, pvariance

from trainer.report.numbers import short
from trainer.report.read import Run
from trainer.report.verdict import Level, Reason, Verdict, above, judge

REGRESSION_LOOK_NATS, REGRESSION_BAD_NATS = 0.05, 0.5
"""How far the held-out loss may be above its best: noise of a few rows, and a model that has lost what it knew."""

RISE_LOOK_NATS = 0.05
"""How far the training loss may rise over the last steps, beyond twice the standard error of the two means."""

GAP_LOOK_NATS = 0.3
"""How far the held-out loss may be above the training loss: beyond it the model remembers the text it has seen."""

RECALL_LOOK = 0.5
"""Share of the dense attention's picks that a trained indexer should find."""


def learning(run: Run) -> Verdict:
    """The verdict from a run's rows; in the indexer's warm-up the model stands still, so those rows do not count."""
    rows = [row for row in run.rows if row.get("schedule/attention") != "indexer_warmup"]
    losses = [float(row["loss/lm"]) for row in rows if "loss/lm" in row]
    held_out = [value for _, value in run.series("validation/loss")]
    newest = losses[-len(run.window()) :]
    bigram = run.ended.get("results", {}).get("bigram/loss")
    return judge(
        "learning",
        [
            _finite(losses),
            held_out_course(held_out, run.last("validation/bits_per_byte")),
            against_bigram(held_out[-1], bigram) if held_out and bigram is not None else None,
            against_guessing((held_out or newest or [math.nan])[-1], run.config["model"]["vocab_size"]),
            training_course(newest),
            gap(held_out[-1], fmean(newest)) if held_out and newest else None,
            _recall(run),
        ],
    )


def against_bigram(held_out: float, bigram: float) -> Reason:
    """A model that has learned anything of order is below a bigram model fitted on the whole training text."""
    difference = held_out - bigram
    where = "below" if difference < 0 else "above"
    text = f"held out {abs(difference):.2f} nats {where} the bigram model of the same text ({bigram:.2f})"
    return Reason(level="good" if difference < 0 else "look", text=text)


def against_guessing(loss: float, vocabulary: int) -> Reason | None:
    """Guessing costs ln(vocabulary) nats; None below it, where other reasons say more."""
    uniform = math.log(vocabulary)
    if loss < uniform:
        return None
    return Reason(
        level="bad", text=f"loss {short(loss)} nats: no better than guessing among {vocabulary} tokens ({uniform:.2f})"
    )


def held_out_course(losses: Sequence[float], bits: float | None = None) -> Reason | None:
    """The last held-out loss against the lowest before it; bits: the same loss in bits per byte."""
    if not losses:
        return None
    last = losses[-1]
    said = f"held-out loss {last:.3f} nats" + (f" ({bits:.2f} bits per byte)" if bits is not None else "")
    if len(losses) == 1:
        return Reason(level="good", text=f"{said}, measured once")
    best = min(losses[:-1])
    if last <= best:
        return Reason(level="good", text=f"{said}, its lowest of {len(losses)} measurements")
    level = above(last - best, REGRESSION_LOOK_NATS, REGRESSION_BAD_NATS)
    return Reason(level=level, text=f"{said}, {last - best:.3f} above its lowest")


def training_course(losses: Sequence[float]) -> Reason | None:
    """The mean of the second half of the last steps against that of the first half."""
    half = len(losses) // 2
    if half < 4 or not all(map(math.isfinite, losses)):
        return None
    before, after = losses[:half], losses[half:]
    rise = fmean(after) - fmean(before)
    error = math.sqrt(pvariance(before) / len(before) + pvariance(after) / len(after))
    level: Level = "look" if rise > max(RISE_LOOK_NATS, 2 * error) else "good"
    course = "steady" if abs(rise) < error else "rising" if rise > 0 else "falling"
    amount = "" if course == "steady" else f" by {abs(rise):.2f} nats"
    return Reason(
        level=level, text=f"training loss {fmean(after):.3f} nats, {course}{amount} over the last {len(losses)} steps"
    )


def gap(held_out: float, training: float) -> Reason | None:
    """How much worse the model is on text it has not seen; None while that is small."""
    if held_out - training <= GAP_LOOK_NATS:
        return None
    return Reason(level="look", text=f"held-out loss is {held_out - training:.2f} nats above the training loss")


def recall(first: float, last: float) -> Reason:
    """The indexer's share of right picks, once sparse attention depends on it."""
    level: Level = "good" if last >= RECALL_LOOK else "look"
    course = f", {'up' if last > first else 'down'} from {first:.2f}" if f"{first:.2f}" != f"{last:.2f}" else ""
    return Reason(level=level, text=f"indexer recall {last:.2f}{course}")


def _recall(run: Run) -> Reason | None:
    """Judged only once it was measured under sparse attention; before, the indexer is still learning."""
    rows = [row for row in run.rows if "indexer/recall" in row]
    sparse = bool(rows) and rows[-1].get("schedule/attention") == "sparse"
    return recall(float(rows[0]["indexer/recall"]), float(rows[-1]["indexer/recall"])) if sparse else None


def _finite(losses: Sequence[float]) -> Reason | None:
    wrong = sum(not math.isfinite(loss) for loss in losses)
    return (
        Reason(level="bad", text=f"the training loss is not a number in {wrong} of {len(losses)} steps")
        if wrong
        else None
    )
