"""Does a job that fails end soon, and is the cause named rightly? A campaign of planted faults.

    python -m benchmarks.failures [--tries N] [--seed N] [--file FILE] [--layout "KEY=VALUE ..."] ... [--fault NAME ...]

Each try is a whole run of a tiny model on real processes, as `keel train` starts them, one of which has one fault:
killed (SIGKILL) or stopped (SIGSTOP) at a random instant or in a step, a bug in the forward or the backward pass, a
loss that is no number, memory that it does not get, a full disk, a port that is taken, a lock that is never given, a
rank that is slow. Rank, step, instant and whether `restarts=1` is set are drawn. "seconds": from the fault to the
line that names the cause. "named": that line names this rank. "whole": with restarts=1, the run came to its end
afterwards. FILE keeps the tries: the table is of all that are in it, so a campaign can be taken in parts, each with its
own seed.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks import report
from benchmarks.faults import FAULTS
from tests.dist import ranks as ranks_of_tests
from tests.dist import sessions
from tests.runs import tiny
from trainer import ranks
from trainer.folder import RunFolder
from trainer.parallel.mesh import Mesh

LAYOUTS = (
    "parallel.data=2", "parallel.data=4 parallel.expert=2", "parallel.pipe=2", "parallel.pipe=2 parallel.data=2",
    "parallel.pipe=4",
)  # fmt: skip
HANGS_S = 300.0
"""A try that has not ended after so long counts as a hang."""
PATIENCE = "patience_s=5"
STEPS, START_S = 8, 6.0
SLOW_TOKENS = "schedule.total_tokens=7000"
INSTANTS = ("kill", "stop")
DEEP = {"num_hidden_layers": 4, "compress_ratios": (4, 8, 4, 8, 0)}
"""Sizes of the model where there are middle stages."""
REFUSED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Try:
    """What became of one. place: the rank's coordinates; seconds: None where the fault did not come."""

    layout: str
    fault: str
    place: str
    restarts: int
    hung: bool
    seconds: float | None
    named: bool
    whole: bool
    said: str


def main() -> None:
    """Take the tries and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layout", action="append", default=[])
    parser.add_argument("--fault", nargs="*", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--file", type=Path)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    layouts, faults = given.layout or list(LAYOUTS), given.fault
    with tempfile.TemporaryDirectory(prefix="keel-failures-") as folder:
        corpus = tiny.write_corpus(Path(folder) / "corpus")
        tries = []
        for number in range(given.tries):
            # Every fault meets every layout before one comes again.
            layout, fault = layouts[number // len(faults) % len(layouts)], faults[number % len(faults)]
            tries.append(take(corpus, Path(folder) / f"{number}", layout, fault, draw))
            if given.file:
                with given.file.open("a") as file:
                    file.write(json.dumps(asdict(tries[-1])) + "\n")
            print(f"{number + 1}: {summary(tries[-1])}", file=sys.stderr, flush=True)
    if given.file:
        tries = [Try(**json.loads(line)) for line in given.file.read_text().splitlines()]
    print(report.heading("benchmarks.failures", f"{len(tries)} tries, {PATIENCE}"))
    print(table(tries))
    print(f"\n{by_role(tries)}")


def take(corpus: Path, folder: Path, layout: str, fault: str, draw: random.Random) -> Try:
    """One run with one fault."""
    folder.mkdir()
    mesh = mesh_of(layout)
    rank = 0 if fault == "port" else draw.randrange(mesh.size)
    restarts = draw.choice((0, 1)) if fault != "slow" else 0
    plan = {"fault": fault, "rank": rank, "step": draw.randint(1, STEPS), "row": 0, "told": str(folder / "told")}
    if fault in INSTANTS and draw.random() < 0.5:
        plan["after_s"] = draw.uniform(0.0, START_S)
    more = [SLOW_TOKENS] if fault == "slow" else []
    model = ranks_of_tests.model(**(DEEP if mesh.pipe > 2 else {}))
    words = tiny.words(sessions.config(corpus, folder / "runs", Mesh(), model=model))
    # Enough rows that every data rank has one in every step.
    words += ["schedule.batch.start_tokens=128", "schedule.batch.tokens=192", "schedule.total_tokens=1400"]
    words += [*layout.split(), PATIENCE, f"restarts={restarts}", *more]
    code, said, cause_at = run(plan, words, folder)
    assert code != REFUSED, said
    told = folder / "told"
    happened = float(told.read_text()) if told.exists() else None
    runs = list((folder / "runs").glob("[!.]*"))
    whole = len(runs) == 1 and RunFolder(runs[0]).is_finished()
    place = ranks.coordinates(mesh, rank)
    named = names(fault, rank, place, said)
    seconds = None if happened is None or cause_at is None else cause_at - happened
    if fault == "slow":
        slow = [one.rank for one, _ in ranks.stragglers(ranks.read(runs[0] / "ranks"))] if runs else []
        named, seconds = slow == [rank], 0.0
    return Try(
        layout=layout, fault=fault, place=f"rank {rank} ({place})", restarts=restarts, hung=code is None,
        seconds=seconds, named=named, whole=whole, said=said,
    )  # fmt: skip


def run(plan: dict[str, object], words: Sequence[str], folder: Path) -> tuple[int | None, str, float | None]:
    """Exit code, None if it had to be killed; what was said on stderr, and when the cause was."""
    command = [sys.executable, "-m", "benchmarks.faults", json.dumps(plan), "train", *words]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)
    said: list[str] = []
    at: list[float] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if re.match(r"keel: (rank|all ranks|the run hangs)", line):
                at.append(time.time())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        code: int | None = process.wait(HANGS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    listener.join(10)
    return code, "".join(said), at[0] if at else None


def names(fault: str, rank: int, place: str, said: str) -> bool:
    """Whether the first line about the cause names this rank and nobody else."""
    first = next((line for line in said.splitlines() if re.match(r"keel: (rank|all ranks|the run hangs)", line)), "")
    if fault == "nan":
        return f"rank {rank} ({place})" in first
    if fault == "disk":
        return f"rank {rank}: " in first
    return bool(re.match(rf"keel: (the run hangs: )?rank {rank}\b", first))


def mesh_of(layout: str) -> Mesh:
    """The mesh of a layout's keys."""
    sizes = {key: int(size) for key, size in re.findall(r"parallel\.(pipe|data|expert)=(\d+)", layout)}
    return Mesh(**sizes)


def roles(layout: str, place: str) -> list[str]:
    """What the ranks of a try's place are for, by its coordinates."""
    mesh = mesh_of(layout)
    at = {axis: int(index) for axis, index in re.findall(r"(\w+) (\d+)", place)}
    found = []
    if mesh.pipe > 1:
        stage = at["pipe"]
        found += ["first stage" if stage == 0 else "last stage" if stage == mesh.pipe - 1 else "middle stage"]
    if mesh.expert > 1:
        found += ["expert owner"]
    return found or ["data rank"]


def summary(one: Try) -> str:
    """A line about a try; all that was said where it went wrong."""
    seconds = "no fault" if one.seconds is None else f"{one.seconds:.1f} s"
    text = f"{one.layout}  {one.fault}  {one.place}  restarts={one.restarts}  {seconds}"
    good = not one.hung and (one.seconds is None or one.named) and (one.whole or not one.restarts)
    text += f"{'  HUNG' * one.hung}  {'named' if one.named else 'not named'}{'  whole' * one.whole}"
    return text if good else f"{text}\n{one.said}"


def table(tries: Sequence[Try]) -> str:
    """Counts by layout and fault."""
    groups: dict[tuple[str, ...], list[Try]] = {}
    for one in tries:
        groups.setdefault((one.layout.replace("parallel.", ""), one.fault), []).append(one)
    return counts(("layout", "fault"), groups)


def by_role(tries: Sequence[Try]) -> str:
    """Counts by what the rank at fault was for, and fault: a rank with two roles is in both."""
    groups: dict[tuple[str, ...], list[Try]] = {}
    for one in tries:
        for role in roles(one.layout, one.place):
            groups.setdefault((role, one.fault), []).append(one)
    return counts(("role", "fault"), dict(sorted(groups.items())))


def counts(keys: tuple[str, ...], groups: Mapping[tuple[str, ...], Sequence[Try]]) -> str:
    """A table with a row for each group of tries."""
    head = (*keys, "tries", "came", "named", "hangs", "seconds", "most", "restarted", "whole")
    rows = []
    for key, group in groups.items():
        came = [one for one in group if one.seconds is not None]
        seconds = sorted(one.seconds for one in came if one.seconds is not None)
        again = [one for one in came if one.restarts]
        rows.append(
            (
                *key, f"{len(group)}", f"{len(came)}",
                f"{sum(one.named for one in came)}", f"{sum(one.hung for one in group)}",
                f"{median(seconds):.1f}" if seconds else "", f"{max(seconds):.1f}" if seconds else "",
                f"{len(again)}", f"{sum(one.whole for one in again)}",
            )
        )  # fmt: skip
    return report.table([head, *rows])


if __name__ == "__main__":
    main()
