"""Proves tracking: readable offline, one run over two sessions, no secret in any file, and never in training's way."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from trainer import tracking
from trainer.config import TrackingConfig
from trainer.tracking import Tracker

RUN_ID = "debug-7f3a-0a1b2c"
CONFIG = {"model": {"hidden_size": 8}, "rate": 1e-3}
KEY = "PLANTED0" * 5


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home without netrc, no WANDB_ variables, and no wandb service left over, whoever runs the tests."""
    home = tmp_path / "home"
    home.mkdir()
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    yield
    wandb.teardown()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def inspect(folder: Path, *flags: str) -> str:
    """What `wandb leet inspect` reads from the latest session's file."""
    latest = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, latest]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def session(folder: Path, config: TrackingConfig, first: int, last: int, lines: list[str]) -> Tracker:
    tracker = Tracker(folder, config, CONFIG, RUN_ID, lines.append)
    for step in range(first, last + 1):
        tracker.log(step, {"tokens": step * 1024, "loss/lm": 8 / step, "router/load_max_ratio": 1.5})
    tracker.close()
    return tracker


def test_two_sessions_offline_are_one_run_and_silent(run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    for first, last in ((1, 4), (3, 6)):
        assert session(run_folder, TrackingConfig(), first, last, lines).mode == "offline"
        time.sleep(1)  # wandb names a session's folder by the second
    assert lines == []
    assert capfd.readouterr() == ("", "")
    assert len(list(run_folder.glob(f"wandb/offline-run-*-{RUN_ID}/run-{RUN_ID}.wandb"))) == 2


@pytest.mark.slow
def test_leet_reads_the_summary_and_the_history_of_a_resumed_session(run_folder: Path) -> None:
    session(run_folder, TrackingConfig(), 3, 6, [])
    summary = json.loads(inspect(run_folder, "--summary"))
    assert (summary["run_id"], summary["project"], summary["state"]) == (RUN_ID, "keel", "finished")
    assert (summary["summary"]["tokens"], summary["step"], summary["config"]) == (6144, 6, CONFIG)
    records = [json.loads(line) for line in inspect(run_folder).splitlines()]
    history = [record["history"] for record in records if record["type"] == "history"]
    assert len(history) == 4
    assert "loss/lm" in json.dumps(history[0])
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert {m["glob_name"]: m["step_metric"] for m in metrics if "glob_name" in m} == {"*": "tokens"}


def test_off_is_off(run_folder: Path) -> None:
    assert session(run_folder, TrackingConfig(wandb="off"), 1, 2, []).mode == "off"
    assert list(run_folder.iterdir()) == []


PLANTED = """
import os, sys
from pathlib import Path
from trainer.config import TrackingConfig
from trainer.tracking import Tracker
config = {"path": "s3://user:PLANTED@bucket/x", "hub_token": "PLANTED", "rate": 1.0}
tracker = Tracker(Path(sys.argv[1]), TrackingConfig(wandb="offline"), config, "debug-1", print)
tracker.log(1, {"tokens": 1, "loss": 2.0})
print("a line of output PLANTED")
print("an error line PLANTED", file=sys.stderr)
tracker.close()
print(tracker.mode)
"""


def test_no_secret_of_environment_arguments_remotes_or_output_is_in_any_file(run_folder: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for arguments in (["init", "-q"], ["remote", "add", "origin", "https://user:secret@PLANTED.example/x.git"]):
        subprocess.run(["git", "-C", str(checkout), *arguments], check=True)
    (checkout / "train.py").write_text(PLANTED)
    (checkout / "requirements.txt").write_text("PLANTED==1\n")
    root = Path(tracking.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "HUB_TOKEN": "PLANTED", "WANDB_API_KEY": KEY, "PLANTED": "x"}
    done = subprocess.run(
        [sys.executable, "train.py", run_folder, "--token=PLANTED", "--url=https://u:PLANTED@host"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "offline"
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if b"PLANTED" in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("console", "off"),
        ("disable_code", True),
        ("disable_git", True),
        ("x_disable_meta", True),
        ("x_disable_machine_info", True),
        ("x_disable_stats", True),
        ("x_save_requirements", False),
    ],
)
def test_each_switch_is_off_though_several_guard_the_same_secret(setting: str, value: object) -> None:
    assert getattr(tracking._settings(), setting) == value


# when wandb cannot


def test_online_without_a_key_is_refused(run_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"tracking\.wandb = online: expected an API key"):
        Tracker(run_folder, TrackingConfig(wandb="online"), CONFIG, RUN_ID, pytest.fail)


@pytest.mark.parametrize("place", ["variable", "netrc", "nowhere"])
def test_a_key_is_found_where_wandb_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    if place == "variable":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    if place == "netrc":
        (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
        (tmp_path / "home" / ".netrc").chmod(0o600)
    assert tracking._has_key() is (place != "nowhere")


def test_with_a_key_but_no_server_auto_goes_on_offline_and_online_is_refused(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_INIT_TIMEOUT_S", 1)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    lines: list[str] = []
    assert session(run_folder, TrackingConfig(), 1, 3, lines).mode == "offline"
    assert len(lines) == 1
    assert "wandb cannot track this run online: " in lines[0]
    assert "\n" not in lines[0]
    assert len(list(run_folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    with pytest.raises(ValueError, match=r"tracking\.wandb = online: expected a server that answers"):
        Tracker(run_folder, TrackingConfig(wandb="online"), CONFIG, RUN_ID, pytest.fail)
    assert not [path for path in run_folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_key_that_is_none_is_reported_and_the_run_is_tracked_offline(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    lines: list[str] = []
    assert session(run_folder, TrackingConfig(), 1, 1, lines).mode == "offline"
    assert len(lines) == 1


def test_a_failure_while_logging_is_reported_once_and_training_goes_on(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    tracker = Tracker(run_folder, TrackingConfig(), CONFIG, RUN_ID, lines.append)
    service = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
    for process in service.stdout.split():
        os.kill(int(process), 9)
    deadline = time.monotonic() + 20
    while not lines and time.monotonic() < deadline:
        tracker.log(1, {"tokens": 1, "loss/lm": 1.0})
        time.sleep(0.05)
    tracker.log(2, {"tokens": 2, "loss/lm": 1.0})
    tracker.close()
    assert len(lines) == 1
    assert lines[0].startswith("wandb failed, this run goes on without it: ")
    assert tracker.mode == "off"
