"""The folder of a run, and the lock that lets one process at a time train in it.

    runs/NAME-7f3a/   config.yaml overrides.txt provenance.json dirty.patch history.jsonl metrics.jsonl lock
                      checkpoints/ samples/ logs/ ranks/ wandb/, later also crashes/ profile/ (trainer/debug)

`7f3a` is the beginning of the configuration's identity; a second run of the same configuration gets `-2`. Secrets are
taken out of all of it (redact.py); the identity is of the configuration as given.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer import durable, journal, redact
from trainer.config import check_name
from trainer.leaves import flatten
from trainer.provenance import Commit

FINISHED = "finished"
_FOLDERS = ("checkpoints", "samples", "logs", "ranks", "wandb")
_ID_DIGITS = 4
_ABSENT = "absent"


def identity(config: Mapping[str, Any]) -> str:
    """SHA-256 over the resolved configuration: equal exactly when every key has the same value, in any order.

    Not how failures are met. Not the layout, which changes no bit of a run on the exact path: so a run goes on with
    other ranks and threads.
    """
    config = {key: value for key, value in config.items() if key not in ("restarts", "patience_s")}
    parallel = config.get("parallel", {})
    if parallel.get("reduction") == "exact":
        config = {key: value for key, value in config.items() if key not in ("parallel", "threads")}
    content = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


class RunFolder:
    """An existing run folder. Reading it needs no lock; everything that writes is for the holder of `lock`."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when `path` is not a run folder."""
        try:
            self.provenance: dict[str, Any] = json.loads((path / "provenance.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"run = {path}: expected a run folder with a provenance.json ({error})") from error
        self.path = path
        self.done = 0
        """Steps done: those before `begin`, and those that `append_metrics` told of since."""
        self._lock: int | None = None
        self._metrics: journal.Journal | None = None

    @property
    def run_id(self) -> str:
        """The run's name for trackers: the folder's name and a random part, the same for every resume."""
        return self.provenance["run_id"]

    @property
    def config_identity(self) -> str:
        """`identity` of the configuration that the run was created with."""
        return self.provenance["config_identity"]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def history(self) -> list[dict[str, Any]]:
        """One row per start and, unless the process was killed, one per end."""
        return journal.read(self.path / "history.jsonl")

    def is_finished(self) -> bool:
        """Whether the last thing that happened here was the end of training."""
        rows = self.history()
        return bool(rows) and rows[-1].get("reason") == FINISHED

    def lock(self) -> None:
        """Takes the folder for this process until `release` or its death; raises ValueError if another has it."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"run = {self.path}: expected a run that no other process is training (process {holder} is)"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor

    def release(self) -> None:
        """Closes the metrics and gives the lock back; does nothing the second time."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def changed_keys(self, config: Mapping[str, Any]) -> list[str]:
        """Where a resolved configuration differs from the one the run was created with: "KEY was VALUE, is VALUE"."""
        saved = _lines(yaml.safe_load((self.path / "config.yaml").read_text()))
        now = _lines(redact.values(config))
        keys = [key for key in (saved | now) if saved.get(key, _ABSENT) != now.get(key, _ABSENT)]
        return [f"{key} was {saved.get(key, _ABSENT)}, is {now.get(key, _ABSENT)}" for key in keys]

    def begin(
        self,
        kind: Literal["start", "resume"],
        step: int,
        about: Mapping[str, Any],
        changes: Sequence[str] = (),
    ) -> None:
        """Notes that training goes on from `step`, and drops metrics of later steps, so that they read as one run.

        "start" drops them all: without a checkpoint, step 0 comes again too. about: more of this session.
        changes: what differs from before.
        """
        dropped = journal.keep(self.path / "metrics.jsonl", lambda row: kind == "resume" and row["step"] <= step)
        self._metrics = journal.Journal(self.path / "metrics.jsonl")
        self.done = step
        row = {"event": kind, "step": step, "steps_again": dropped, **about}
        self._note(row | ({"changes": list(changes)} if changes else {}))

    def end(self, reason: str, step: int, results: Mapping[str, float] | None = None) -> None:
        """Notes why training stopped at `step`: FINISHED, a signal's name, or the error; and what was measured then."""
        row = {"event": "end", "step": step, "reason": redact.in_text(reason)}
        self._note(row | ({"results": dict(results)} if results else {}))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one row, which has a `step`; it survives a kill from now on, a power cut after `sync_metrics`."""
        assert self._metrics is not None, "begin() opens the metrics"
        assert "step" in row, "begin() drops rows by their step"
        self._metrics.append(row)
        self.done = row["step"]

    def sync_metrics(self) -> None:
        """Puts all rows on the disk; before a checkpoint of step s is submitted, so that no row up to s can be lost."""
        assert self._metrics is not None, "begin() opens the metrics"
        self._metrics.sync()

    def _note(self, row: Mapping[str, Any]) -> None:
        log = journal.Journal(self.path / "history.jsonl")
        log.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), **row})
        log.close()


class Followed(RunFolder):
    """The run folder as ranks other than the first have it: they read it, and one rank writes for all."""

    def lock(self) -> None:
        """The first rank has the lock for all."""

    def begin(
        self, kind: Literal["start", "resume"], step: int, about: Mapping[str, Any], changes: Sequence[str] = ()
    ) -> None:
        """Writes nothing."""
        self.done = step

    def end(self, reason: str, step: int, results: Mapping[str, float] | None = None) -> None:
        """Writes nothing."""

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Writes nothing."""
        self.done = row["step"]

    def sync_metrics(self) -> None:
        """There is nothing to sync."""


def create(
    runs_dir: Path,
    name: str,
    config: Mapping[str, Any],
    overrides: Sequence[str],
    facts: Mapping[str, Any],
    commit: Commit,
) -> RunFolder:
    """Makes a new run folder and returns it locked; it appears under its name complete or not at all.

    `config` is the resolved configuration as plain dicts, lists and scalars, `facts` comes from `provenance.facts`.
    Raises ValueError for a name that cannot be a folder's, OSError when the folder cannot be made.
    """
    check_name(name)
    config_identity = identity(config)
    runs_dir.mkdir(parents=True, exist_ok=True)
    working = runs_dir / f".creating-{name}-{secrets.token_hex(4)}"
    working.mkdir()
    try:
        path = _free_path(runs_dir, f"{name}-{config_identity[:_ID_DIGITS]}")
        about = {
            "run_id": f"{path.name}-{secrets.token_hex(3)}",
            "config_identity": config_identity,
            "commit": commit.commit,
            "dirty": commit.dirty,
            **facts,
        }
        _fill(working, config, overrides, about, commit.patch)
        run = RunFolder(working)
        run.lock()
        working.rename(path)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    durable.sync(runs_dir)
    run.path = path
    return run


def config_text(config: Mapping[str, Any]) -> str:
    """The content of config.yaml: a resolved configuration without its secrets."""
    return yaml.safe_dump(redact.values(config), sort_keys=False, allow_unicode=True)


def find_unfinished(runs_dir: Path, name: str, config_identity: str) -> RunFolder | None:
    """The latest run of this name and configuration that has not finished, whether it is being trained or not."""
    pattern = re.compile(rf"{re.escape(name)}-{config_identity[:_ID_DIGITS]}(?:-(\d+))?")
    numbered = []
    for path in runs_dir.iterdir() if runs_dir.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and (path / "provenance.json").is_file():
            numbered.append((int(match[1] or 1), RunFolder(path)))
    for _, run in sorted(numbered, key=lambda item: item[0], reverse=True):
        if run.config_identity == config_identity and not run.is_finished():
            return run
    return None


def _lines(tree: Mapping[str, Any]) -> dict[str, str]:
    """Every value of nested sections as one line of YAML, by its dotted key."""
    return {key: _line(value) for key, value in flatten(tree).items()}


def _line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def _free_path(runs_dir: Path, name: str) -> Path:
    path, number = runs_dir / name, 1
    while path.exists():
        number += 1
        path = runs_dir / f"{name}-{number}"
    return path


def _fill(
    path: Path, config: Mapping[str, Any], overrides: Sequence[str], about: Mapping[str, Any], patch: str
) -> None:
    for folder in _FOLDERS:
        (path / folder).mkdir()
    for file in ("history.jsonl", "metrics.jsonl"):
        (path / file).touch()
    texts = {
        "config.yaml": config_text(config),
        "overrides.txt": "".join(f"{redact.override(line)}\n" for line in overrides),
        "dirty.patch": patch,
        "provenance.json": json.dumps(redact.values(about), indent=1) + "\n",
    }
    for file, text in texts.items():
        durable.write(path / file, text.encode())
