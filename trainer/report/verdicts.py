"""The verdicts on a run, in the order in which they are shown."""

from trainer.report.crew import together
from trainer.report.health import healthy
from trainer.report.learning import learning
from trainer.report.read import Run
from trainer.report.schedule import on_schedule
from trainer.report.verdict import Verdict


def verdicts(run: Run) -> tuple[Verdict, ...]:
    """learning, healthy, on schedule; together, where ranks have something to say."""
    ranks = together(run)
    more = (ranks,) if ranks is not None else ()
    if not run.rows:
        return on_schedule(run), *more
    return learning(run), healthy(run), on_schedule(run), *more
