"""Proves that `keel test` hands pytest's words on, finds pytest's own summary, and fails when any check fails."""

from pathlib import Path

import pytest

from launch import test as verb


@pytest.mark.parametrize(
    ("lines", "summary"),
    [
        (["== 3 passed in 0.12s ==\n"], "3 passed in 0.12s"),
        (
            ["\x1b[32m=== \x1b[1m3 passed\x1b[0m, \x1b[33m1 skipped\x1b[0m\x1b[32m in 61.02s (0:01:01)\x1b[0m ===\n"],
            "3 passed, 1 skipped in 61.02s (0:01:01)",
        ),
        (["1 failed, 2 passed, 3 deselected in 1.00s\n", "later\n"], "1 failed, 2 passed, 3 deselected in 1.00s"),
        (["no tests ran in 0.01s\n"], "no tests ran in 0.01s"),
        (["Traceback\n", "in 3 s\n"], "pytest gave no summary"),
        ([], "pytest gave no summary"),
    ],
)
def test_the_summary_is_pytest_s_own(lines: list[str], summary: str) -> None:
    assert verb.summary_of(lines) == summary


def test_words_go_on_to_pytest_and_workers_can_be_chosen() -> None:
    assert verb.pytest_words(["--all", "-k", "x"])[3:7] == ["-n", "2", "--dist", "worksteal"]
    assert verb.pytest_words(["--all", "-k", "x"])[-3:] == ["--all", "-k", "x"]
    for words in (["-n", "0"], ["-n4"], ["--numprocesses=1"], ["-p", "no:xdist"]):
        assert verb.pytest_words(words)[3:5] != ["-n", "2"]


@pytest.mark.parametrize(("code", "good", "expected"), [(0, True, 0), (0, False, 1), (5, True, 5), (1, False, 1)])
def test_all_fails_if_anything_fails(
    code: int, good: bool, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "_run", lambda name, command, root: good or name != "pyrefly")
    monkeypatch.setattr(verb, "_pytest", lambda argv, root, environment: (code, "3 passed in 0.12s"))
    assert verb.main(["--all"]) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "keel test: 3 passed in 0.12s"
    assert f"pyrefly {'ok' if good else 'FAILED'}" in lines[-2]


def test_without_all_only_pytest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(verb, "_run", lambda name, command, root: pytest.fail(name))
    monkeypatch.setattr(verb, "_pytest", lambda argv, root, environment: (seen.append(environment) or 0, "ok"))
    assert verb.main(["tests/launch"]) == 0
    assert seen[0]["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_a_real_run_ends_with_the_summary(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    code = verb.main(["-n", "0", "-q", "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path / "test_one.py")])
    assert code == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("keel test: 1 passed in ")
