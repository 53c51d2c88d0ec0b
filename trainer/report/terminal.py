"""Where a run stands, for a terminal: a few lines with colours, or one plain line per change for a file."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from trainer.report.numbers import duration, moment, percent, short, size
from trainer.report.read import Run
from trainer.report.schedule import last_step_at, seconds_left, tokens_per_s
from trainer.report.verdict import Level
from trainer.report.verdicts import verdicts

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32
BAR_WIDTH = 60
_STYLES = {"good": "32", "look": "33", "bad": "31", "strong": "1", "faint": "2", "curve": "36"}
_SIGNS: Mapping[Level, str] = {"good": "✓", "look": "!", "bad": "✗"}
_CURVES = (
    ("loss", "loss/lm", "nats"),
    ("mtp", "loss/mtp", "nats"),
    ("indexer", "loss/indexer", "nats"),
    ("held out", "validation/loss", "nats"),
    ("grad norm", "optim/grad_norm", ""),
    ("fullest expert", "router/load_max_ratio", "x mean"),
    ("speed", "speed/tokens_per_s", "tok/s"),
)


def view(run: Run, colours: bool) -> str:
    """All of it, ready to print."""

    def style(text: str, kind: str) -> str:
        return f"\033[{_STYLES[kind]}m{text}\033[0m" if colours else text

    share = min(run.tokens / run.total_tokens, 1.0)
    filled = round(BAR_WIDTH * share)
    lines = [
        f"{style(run.name, 'strong')}  {run.state}  step {run.step} of {run.total_steps}  "
        f"{short(run.tokens)} of {short(run.total_tokens)} tokens",
        f"{style('━' * filled, 'curve')}{style('─' * (BAR_WIDTH - filled), 'faint')}  {percent(share)}{_left(run)}",
        "",
    ]
    for label, name, unit in _CURVES:
        if (value := run.last(name)) is not None:
            spark = style(f"{sparkline([y for _, y in run.series(name)]):<{SPARK_WIDTH}}", "curve")
            lines.append(f"  {label:<14} {short(value, 4):>7}  {spark}  {style(unit, 'faint')}{_beside(run, name)}")
    lines += [f"  {label:<14} {text}" for label, text in _facts(run)]
    for verdict in verdicts(run):
        mark = style(f"{_SIGNS[verdict.level]} {verdict.level:<4}", verdict.level)
        lines.append("")
        lines.append(f"  {style(f'{verdict.question:<13}', 'strong')} {mark}  {verdict.reasons[0].text}")
        worse = [reason for reason in verdict.reasons[1:] if reason.level != "good"]
        lines += [f"  {'':<13} {style(_SIGNS[r.level], r.level)}       {r.text}" for r in worse]
    return "\n".join(lines)


def line(run: Run) -> str:
    """One plain line: for logs, where `--follow` prints one whenever a step has ended."""
    parts = [run.name, run.state, f"step {run.step}/{run.total_steps}", f"tokens {short(run.tokens)}"]
    parts += [f"{label} {short(value, 4)}" for label, name, _ in _CURVES if (value := run.last(name)) is not None]
    parts += [f"{one.question}: {one.level}" for one in verdicts(run)]
    left = seconds_left(run)
    return "  ".join([*parts, *([f"left {duration(left)}"] if left is not None and run.state == "running" else [])])


def as_dict(run: Run) -> dict[str, Any]:
    """The same for machines; numbers that are not finite are null."""
    left, ended = seconds_left(run), last_step_at(run)
    saved = run.checkpoints[-1] if run.checkpoints else None
    return {
        "run": str(run.path),
        "state": run.state,
        "step": run.step,
        "total_steps": run.total_steps,
        "tokens": run.tokens,
        "total_tokens": run.total_tokens,
        "tokens_per_s": tokens_per_s(run),
        "seconds_left": left if run.state == "running" else None,
        "last_step_at": ended.isoformat() if ended else None,
        "last_checkpoint": {"step": saved.step, "time": saved.time.isoformat()} if saved else None,
        "metrics": {name: _finite(run.last(name)) for name in _scalars(run)},
        "verdicts": {
            one.question: {
                "level": one.level,
                "reasons": [{"level": reason.level, "text": reason.text} for reason in one.reasons],
            }
            for one in verdicts(run)
        },
    }


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """A curve in one line of text, lowest to highest; what is not finite is a "?"."""
    picked = list(values)
    if len(values) > width:
        picked = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    finite = [value for value in picked if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] if math.isfinite(value) else "?" for value in picked)


def _left(run: Run) -> str:
    left = seconds_left(run)
    if run.state != "running" or left is None:
        return ""
    return f", {duration(left)} left, ends at {moment(run.now + timedelta(seconds=left), run.now)}"


def _beside(run: Run, name: str) -> str:
    """What belongs to a curve and is too little for a line of its own."""
    if name == "validation/loss" and (bits := run.last("validation/bits_per_byte")) is not None:
        return f", {bits:.3f} bits per byte"
    if name == "loss/indexer" and (recall := run.last("indexer/recall")) is not None:
        return f", recall {recall:.2f}"
    return ""


def _facts(run: Run) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if run.rows:
        row = run.rows[-1]
        stage = str(row.get("schedule/attention", ""))
        found.append(("rate", f"{short(row['schedule/rate'])}  {stage.replace('_', ' ')}"))
        found.append(("batch", f"{row['schedule/rows']} rows of {row['schedule/row_length']} tokens"))
    if (used := run.last("memory/rss_bytes")) is not None:
        found.append(("memory", size(used)))
    if run.checkpoints:
        saved = run.checkpoints[-1]
        ago = duration((run.now - saved.time).total_seconds())
        found.append(("checkpoint", f"step {saved.step}, {ago} ago"))
    return found


def _scalars(run: Run) -> list[str]:
    latest: dict[str, Any] = {}
    for row in run.rows:
        latest |= row
    texts = ("NaN", "Infinity", "-Infinity")
    return sorted(name for name, value in latest.items() if isinstance(value, int | float) or value in texts)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
