"""wandb beside metrics.jsonl: charts in the terminal without a network (`wandb leet`), or online where a key is set.

The only file that imports wandb, and only when it is used. What wandb would collect by itself (command line, code, git
remote, packages, machine, console) is switched off: it receives the metrics and the configuration without its secrets.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from trainer import redact
from trainer.config import TrackingConfig

STEP_METRIC = "tokens"
"""The horizontal axis of every chart: runs of other batch sizes stay comparable."""
_INIT_TIMEOUT_S = 15
_FINISH_TIMEOUT_S = 60
"""How long the end of a run waits for uploads; the files stay, and `wandb sync` sends them later."""


class Tracker:
    """One session of a run in wandb; `mode` says which of online, offline and off it became.

    Tracking never stops training: where wandb fails, in `log` too, that is reported once as a line and training goes on
    untracked, metrics.jsonl having everything. Only what the user asked for and cannot have is refused: `online`
    without a key or without a server.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        run_config: Mapping[str, Any],
        run_id: str,
        report: Callable[[str], None],
    ) -> None:
        """Writes under `folder`/wandb as run `run_id`, which stays the same over resumes; takes about a second.

        Raises ValueError naming `tracking.wandb` for an impossible `online`.
        """
        self._report = report
        self._run: Any = None
        self.mode: Literal["online", "offline", "off"] = "off"
        if config.wandb == "off":
            return
        wanted = ("online",) if config.wandb == "online" else ("offline",)
        if config.wandb == "auto" and _has_key():
            wanted = ("online", "offline")
        if config.wandb == "online" and not _has_key():
            raise ValueError("tracking.wandb = online: expected an API key (`wandb login`), or tracking.wandb=offline")
        for mode in wanted:
            try:
                self._run = _start(mode, folder, config.project, redact.values(run_config), run_id)
                self.mode = mode
                return
            except Exception as error:
                if config.wandb == "online":
                    raise ValueError(
                        f"tracking.wandb = online: expected a server that answers: {_line(error)}"
                    ) from error
                report(f"wandb cannot track this run {mode}: {_line(error)}")

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends one row; it needs a `tokens`, and steps must not go back within a session."""
        self._attempt(lambda run: run.log(dict(row), step=step))

    def close(self) -> None:
        """Ends the session; waits at most a minute for uploads."""
        self._attempt(lambda run: run.finish())
        self._run = None

    def _attempt(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            self.mode = "off"
            _abandon()
            self._report(f"wandb failed, this run goes on without it: {_line(error)}")


def _start(
    mode: Literal["online", "offline"], folder: Path, project: str, run_config: dict[str, Any], run_id: str
) -> Any:
    import wandb

    settings = _settings()
    try:
        wandb.setup(settings=settings)
        run = wandb.init(
            mode=mode, dir=folder, project=project, id=run_id, name=run_id,
            resume="allow", config=run_config, settings=settings,
        )  # fmt: skip
    except Exception:
        _abandon()
        raise
    run.define_metric(STEP_METRIC)
    run.define_metric("*", step_metric=STEP_METRIC)
    return run


def _settings() -> Any:
    """Silent, bounded in time, and collecting nothing by itself; each switch that guards a secret is set."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=_FINISH_TIMEOUT_S,
    )


def _abandon() -> None:
    """Ends what is left of wandb, so that it neither holds the run's id nor complains when the process exits."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _has_key() -> bool:
    """Whether wandb has a key from its environment variable, its settings or netrc; asks no server."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    return bool(settings.api_key or wbauth.read_netrc_auth(host=settings.base_url))


def _line(error: Exception) -> str:
    return redact.in_text(" ".join(str(error).split()) or type(error).__name__)
