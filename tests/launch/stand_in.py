"""A rank without torch for the tests of the supervisor: notes where it stands, then does what its words say.

stand_in.py FOLDER ACTS [RANK=ACTS ...]     ACTS: NAME:VALUE,NAME:VALUE,... for all ranks, or for one
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(folder: Path, acts: str, *exceptions: str) -> None:
    rank = os.environ["RANK"]
    acts = dict(exception.split("=", 1) for exception in exceptions).get(rank, acts)
    facts = {"pid": os.getpid(), "group": os.getpgid(0), "environment": dict(os.environ)}
    if "helper" in acts:
        facts["helper"] = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]).pid
    if "save" in acts:
        prepare_to_save(folder / f"rank-{rank}.signals", float(acts.partition("save:")[2].partition(",")[0]))
    if "default" in acts:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "ignore" in acts:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / f"rank-{rank}.new").write_text(json.dumps(facts))
    (folder / f"rank-{rank}.new").rename(folder / f"rank-{rank}.json")
    for act in acts.split(","):
        name, _, value = act.partition(":")
        if name == "out":
            print(value, flush=True)
        elif name == "err":
            print(value, file=sys.stderr, flush=True)
        elif name == "sleep":
            time.sleep(float(value))
        elif name == "wait":
            wait_for(folder / value)
        elif name == "read":
            assert sys.stdin.read() == ""
        elif name == "kill":
            os.kill(os.getpid(), signal.Signals[value])
        elif name == "exit":
            sys.exit(int(value))


def prepare_to_save(noted: Path, seconds: float) -> None:
    """As a run does: every signal is noted, the first ends it once it has saved, which takes so long."""

    def stop(number: int, frame: object) -> None:
        with noted.open("a") as file:
            file.write(f"{signal.Signals(number).name}\n")
        if len(noted.read_text().splitlines()) == 1:
            time.sleep(seconds)
            sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
