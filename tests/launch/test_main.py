"""Proves that the command finds its verb, puts users' mistakes in one line, keeps the tracebacks of bugs, and refuses
folders that have our names and are not ours."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import main as commands
from launch.arguments import parse
from launch.main import FOLDERS, VERBS, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"keel {verb}" in capsys.readouterr().out


def test_help_needs_no_package() -> None:
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from launch.main import main; "
    code += f"sys.exit(main(['--help']) or sum(main([verb, '--help']) for verb in {VERBS!r}))"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_an_unknown_verb_is_met_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"keel: error: VERB = trian: expected one of {', '.join(VERBS)}; did you mean train?\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("a.b = 3: expected 4"), 2, "keel: error: a.b = 3: expected 4\n"),
        (ValueError("text = two\nlines: expected one"), 2, "keel: error: text = two lines: expected one\n"),
        (
            FileNotFoundError(2, "no", "here.txt"),
            2,
            "keel: error: file = here.txt: expected a file or folder that exists\n",
        ),
        (PermissionError(13, "no", "a"), 2, "keel: error: file = a: expected a file or folder that may be used\n"),
        (OSError(36, "no", "aa"), 2, "keel: error: file = aa: expected a file or folder that has a shorter name\n"),
        (KeyboardInterrupt(), 130, "keel: interrupted\n"),
        (SystemExit(3), 3, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(commands, "_dispatch", _raiser(error))
    assert main(["train"]) == code
    assert capsys.readouterr().err == said


BUGS = [ValueError("too many values to unpack (expected 2)"), KeyError("x"), TypeError("y"), OSError(5, "no", "a")]


@pytest.mark.parametrize("error", BUGS)
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_dispatch", _raiser(error))
    with pytest.raises(type(error)):
        main(["train"])


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "launch"])
@pytest.mark.parametrize("kind", ["package", "module"])
def test_a_foreign_folder_of_our_name_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    place = tmp_path / name / "__init__.py" if kind == "package" else tmp_path / f"{name}.py"
    place.parent.mkdir(exist_ok=True)
    place.touch()
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from launch.main import main; "
    code += f"sys.path[:0] = [{str(tmp_path)!r}]; sys.exit(main(['config', 'show']))"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"keel: error: {name} = {tmp_path}")
    assert ended.stderr.count("\n") == 1


def test_our_own_folders_are_accepted() -> None:
    commands.refuse_foreign_folders()


def test_flags_and_words_are_told_apart() -> None:
    flags = {"--new": bool, "--tokens": int, "--rate": float, "--prompt": str}
    given = parse(["a=1", "--tokens", "3", "--rate=0.5", "--prompt", "--new", "--new", "~b"], flags, "")
    assert given.words == ("a=1", "~b")
    assert given.flags == {"--new": True, "--tokens": 3, "--rate": 0.5, "--prompt": "--new"}
    assert parse([], flags, "").flags == {"--new": False, "--tokens": None, "--rate": None, "--prompt": None}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "x"], "--tokens = x: expected an integer"),
        (["--tokens=x"], "--tokens = x: expected an integer"),
        (["--rate", "x"], "--rate = x: expected a number"),
        (["--tokens"], "--tokens = : expected an integer after it"),
        (["--new=1"], "--new = 1: expected --new without a value"),
        (["--tokns", "3"], "--tokns = : expected one of --new, --tokens, --rate, --help; did you mean --tokens?"),
    ],
)
def test_wrong_flags_are_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said.replace('?', '[?]')}$"):
        parse(words, {"--new": bool, "--tokens": int, "--rate": float}, "")


def _raiser(error: BaseException) -> Callable[[list[str]], int]:
    def raise_it(words: list[str]) -> int:
        raise error

    return raise_it
