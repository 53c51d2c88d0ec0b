"""The three verdicts on a run, in the order in which they are shown."""

from trainer.report.health import healthy
from trainer.report.learning import learning
from trainer.report.read import Run
from trainer.report.schedule import on_schedule
from trainer.report.verdict import Verdict


def verdicts(run: Run) -> tuple[Verdict, ...]:
    """learning, healthy, on schedule."""
    if not run.rows:
        return (on_schedule(run),)
    return learning(run), healthy(run), on_schedule(run)
