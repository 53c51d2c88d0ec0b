"""Do its ranks come on together? From their beats: who has no sign of life, who is slow, what was started again."""

from trainer.ranks import SILENT_S, stragglers, suspects
from trainer.report.numbers import count
from trainer.report.read import Run
from trainer.report.verdict import Reason, Verdict, judge


def together(run: Run) -> Verdict | None:
    """The verdict while a run goes on and its ranks beat; else only what was started again, if anything was."""
    reasons: list[Reason] = []
    if run.state == "running" and run.beats:
        now = run.now.timestamp()
        silent = {one.rank: now - one.time for one in run.beats}
        mute = [one for one in run.beats if silent[one.rank] > SILENT_S]
        if mute or all(one.age_s + silent[one.rank] > one.limit_s for one in run.beats):
            reasons += [Reason(level="bad", text=text) for text in suspects(run.beats, silent)]
        reasons += [
            Reason(level="look", text=f"{one.name} is slow: {times:.1f} times the work of the others in a step")
            for one, times in stragglers(run.beats)
        ]
        if not reasons and len(run.beats) > 1:
            reasons.append(Reason(level="good", text=f"{count(len(run.beats))} ranks, all of them beat"))
    if run.restarts:
        last = run.restarts[-1]
        times = f"started again {count(len(run.restarts))} time{'s' * (len(run.restarts) > 1)}"
        reasons.append(Reason(level="look", text=f"{times}, the last time because {last['reason']}"))
    return judge("together", reasons) if reasons else None
