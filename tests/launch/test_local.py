"""Proves that a run's processes start, speak, stop and fail as one, and that none is left behind.

Whose words are shown, exit codes, signals, what a rank finds in its environment. The ranks are programs without torch.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import local, meeting
from tests.launch.supervised import PATIENCE_S, ROOT, Case, state, wait_until


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    for process in made.started:
        process.kill()
    for number in made.processes():
        os.kill(number, signal.SIGKILL)
    for process in made.started:
        process.communicate()


def test_every_rank_has_its_place_and_only_the_first_is_heard(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("KEPT", "as it was")
    code, out, err = case.run(3, "out:word,err:other word")
    assert (code, out, err) == (0, "word\n", "other word\n")
    facts = case.facts(3)
    found = [fact["environment"] for fact in facts]
    assert [one["RANK"] for one in found] == [one["LOCAL_RANK"] for one in found] == ["0", "1", "2"]
    for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1"), ("OMP_NUM_THREADS", "1")):
        assert {one[name] for one in found} == {value}
    assert len({one["MASTER_PORT"] for one in found}) == 1
    assert 0 < int(found[0]["MASTER_PORT"]) < 65536
    assert {one["KEPT"] for one in found} == {"as it was"}
    assert [fact["group"] for fact in facts] == [fact["pid"] for fact in facts], "a terminal's Ctrl-C would come twice"
    assert list((case.folder / "temporary").iterdir()) == []


def test_what_the_user_has_set_stays(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "other0")
    assert case.run(1, "exit:0")[0] == 0
    found = case.facts(1)[0]["environment"]
    assert (found["OMP_NUM_THREADS"], found["GLOO_SOCKET_IFNAME"]) == ("3", "other0")


@pytest.mark.parametrize(
    ("acts", "code", "name"), [("exit:1", 1, ""), ("exit:7", 7, ""), ("kill:SIGKILL", 137, " (SIGKILL)")]
)
def test_one_that_fails_ends_all_and_is_named(case: Case, acts: str, code: int, name: str) -> None:
    lines = ",".join(f"err:line {number}" for number in range(30))
    ended, out, err = case.run(4, "out:hello,sleep:600", f"1={lines},sleep:0.2,{acts}")
    assert (ended, out) == (code, "hello\n")
    said = err.splitlines()
    assert said[0] == f"keel: rank 1 ended with {code}{name}"
    assert said[1:-1] == [f"    line {number}" for number in range(30 - local.TAIL_LINES, 30)]
    kept = re.fullmatch(r"keel: what the ranks wrote is in (\S+)", said[-1])
    assert kept is not None
    assert (Path(kept[1]) / "rank-2.stdout").read_text() == "hello\n"
    assert case.processes() == []


def test_the_first_rank_is_named_too(case: Case) -> None:
    code, _, err = case.run(2, "sleep:600", "0=err:words,kill:SIGSEGV")
    assert code == 139
    assert err.startswith("words\nkeel: rank 0 ended with 139 (SIGSEGV)\nkeel: what the ranks wrote")
    assert case.processes() == []


def test_who_ignores_sigterm_is_killed_with_what_it_started(case: Case) -> None:
    code, _, err = case.run(3, "ignore,helper,sleep:600", "2=sleep:0.2,exit:3")
    assert code == 3
    assert err.startswith("keel: rank 2 ended with 3\n")
    assert case.processes() == []


def test_the_cause_is_named_and_not_what_followed(case: Case) -> None:
    follower = "wait:rank-2.json,sleep:0.3,err:connection lost,exit:1"
    code, _, err = case.run(3, follower, "2=err:the cause,exit:5", settle_s=PATIENCE_S)
    assert code == 5
    assert "keel: rank 2 ended with 5\n    the cause\n" in err
    assert "rank 0" not in err
    assert "rank 1" not in err


def test_who_ends_without_a_word_leaves_it_to_who_speaks(case: Case) -> None:
    """All ranks have agreed to fail; the first is still writing, and nobody may end it."""
    first = "0=wait:rank-1.json,sleep:0.5,err:keel: error: step 3: a number is none,exit:1"
    code, _, err = case.run(3, "exit:1", first, settle_s=PATIENCE_S)
    assert code == 1
    assert err.startswith("keel: error: step 3: a number is none\nkeel: rank 0 ended with 1\n")


@pytest.mark.parametrize("others", ["err:keel: error: x = 1: expected 2,exit:2", "sleep:600", "ignore,sleep:600"])
def test_a_user_s_mistake_is_said_once(case: Case, others: str) -> None:
    first = "0=sleep:0.1,err:keel: error: x = 1: expected 2,exit:2"
    assert case.run(4, others, first, settle_s=600) == (2, "", "keel: error: x = 1: expected 2\n")
    assert (case.processes(), case.kept()) == ([], [])


def test_a_mistake_that_only_another_rank_sees_is_said(case: Case) -> None:
    code, _, err = case.run(3, "sleep:600", "2=err:keel: error: x = 1: expected 2,exit:2")
    assert code == 2
    assert err.startswith("keel: rank 2 ended with 2\n    keel: error: x = 1: expected 2\n")


@pytest.mark.parametrize("whole_group", [False, True], ids=["kill", "terminal"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once(case: Case, number: signal.Signals, whole_group: bool) -> None:
    """A terminal sends Ctrl-C to all processes of its foreground group."""
    process = case.start(3, "save:1,sleep:600", settle_s=0.1, grace_s=0.1)
    case.facts(3)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (128 + number, "", "")
    assert [case.signals(rank) for rank in range(3)] == [[number.name]] * 3
    assert (case.processes(), case.kept()) == ([], [])


def test_a_second_ctrl_c_kills(case: Case) -> None:
    process = case.start(2, "save:600,sleep:600", "1=ignore,helper,sleep:600", settle_s=PATIENCE_S)
    case.facts(2)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: case.signals(0) == ["SIGTERM"])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (143, "", "")
    assert case.signals(0) == ["SIGTERM"]
    assert case.processes() == []


def test_a_slow_save_is_not_disturbed(case: Case) -> None:
    """SIGTERM went to one rank alone, which tells the others; one of them has much to write."""
    code, out, err = case.run(3, "exit:143", "0=save:0,wait:rank-1.json,sleep:1,out:saved,exit:143", settle_s=0.1)
    assert (code, out, err, case.signals(0)) == (143, "saved\n", "", [])


def test_a_rank_that_has_not_started_yet_is_no_failure(case: Case) -> None:
    """It ends by the signal; another waits for it in vain, and is ended."""
    process = case.start(2, "sleep:600", "0=ignore,sleep:600")
    case.facts(2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (143, "", "")
    assert case.processes() == []


def test_a_failure_while_stopping_is_a_failure(case: Case) -> None:
    process = case.start(2, "save:0.5,sleep:600", "1=ignore,wait:rank-0.signals,err:disk full,exit:1")
    case.facts(2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert err.startswith("keel: rank 1 ended with 1\n    disk full\n")


@pytest.mark.parametrize("ended", [0, 1])
@pytest.mark.parametrize("how", ["save:0,sleep:600", "sleep:600"])
def test_what_follows_from_stopping_is_no_failure(case: Case, ended: int, how: str) -> None:
    """One rank has not begun to train, so it ends at once, and another loses the connection to it."""
    other = "ignore,wait:stopped,sleep:0.3,err:connection lost,exit:1"
    process = case.start(2, how, f"{1 - ended}={other}")
    case.facts(2)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: len(case.processes()) == 1)
    (case.folder / "stopped").touch()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (143, "", "connection lost\n" if ended == 1 else "")
    assert case.kept() == []


def test_ctrl_c_before_ranks_train_is_said_once(case: Case) -> None:
    """They end by the signal itself, without a word."""
    process = case.start(3, "default,sleep:600")
    case.facts(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
    assert (case.processes(), case.kept()) == ([], [])


def test_a_rank_reads_nothing(case: Case) -> None:
    """Else a terminal would stop it: it is none of the foreground's."""
    assert case.run(2, "read") == (0, "", "")


def test_a_supervisor_that_fails_leaves_no_rank(case: Case) -> None:
    before = "local._dying_with_us = lambda: None; local.Ranks.wait = lambda ranks: input() and 1 / 0"
    process = case.start(2, "ignore,sleep:600", before=before)
    case.facts(2)
    _, err = process.communicate("fail\n", timeout=PATIENCE_S)
    assert "ZeroDivisionError" in err
    wait_until(lambda: case.processes() == [])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_no_rank_outlives_a_killed_supervisor(case: Case) -> None:
    process = case.start(3, "ignore,sleep:600")
    case.facts(3)
    assert len(case.processes()) == 3
    process.kill()
    wait_until(lambda: case.processes() == [])


def test_ctrl_z_stops_all_and_fg_goes_on(case: Case) -> None:
    process = case.start(2, "wait:go,exit:0")
    numbers = [process.pid, *(fact["pid"] for fact in case.facts(2))]
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: [state(number) for number in numbers] == ["T"] * 3)
    (case.folder / "go").touch()
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=PATIENCE_S) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is only free")
def test_nobody_is_given_the_port_before_rank_0_listens() -> None:
    with meeting.reserved_port() as port, socket.socket() as thief, socket.socket() as store:
        with pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("0.0.0.0", port))
        store.listen()
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S):
            pass


def test_keel_s_own_ranks_leave_ctrl_c_to_the_system_until_they_train() -> None:
    """Python's own handler waits for the call that is running, which may wait ten minutes for another rank."""
    before_keel = local.START.rpartition("\n")[0]
    code = f"{before_keel}\nassert signal.getsignal(signal.SIGINT) == signal.SIG_DFL"
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, timeout=PATIENCE_S)


def test_keel_s_own_ranks_are_found_from_any_folder(tmp_path: Path) -> None:
    """Also from one that holds a package of our name; help is the cheapest verb."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise AssertionError")
    code = (
        f"import sys; sys.path[0] = {str(ROOT)!r}; from launch.attempts import start; sys.exit(start(['help'], 2, 0))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("keel VERB [--flags]") == 1
