"""Proves that the documents are true where a machine can tell: links, paths, commands, error lines, Python examples."""

import ast
import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import compose as composing
from launch import device, export, main, report, resume, runs, sample, status, train
from launch import test as test_verb
from launch.compose import CONFIGS, compose
from tests.test_style import DOORS
from trainer import checkpoint, metrics
from trainer.pieces import whole

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
WITH_COMMANDS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = ("configs", "launch", "trainer", "model", "optim", "data", "tests", "docs", "benchmarks", ".ci")
SUFFIXES = ("", ".py", ".yaml", ".md", ".txt", ".toml", ".sh")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def slugs(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> Iterator[str]:
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = path.parent / file if file else path
        if not place.exists():
            yield f"{name(path)}: {target}: no such file"
        elif anchor and anchor not in slugs(place):
            yield f"{name(path)}: {target}: no such heading"


def missing_paths(path: Path) -> Iterator[str]:
    """Paths in backticks. A door may be named before there is a file behind it; `optim/grad_norm` is a metric."""
    doors = {door.removesuffix("*.py") for places in DOORS.values() for door in places}
    for text in CODE.findall(prose(path)):
        looks = PATH.fullmatch(text) and "..." not in text and Path(text).suffix in SUFFIXES
        if looks and text not in doors and not metrics.is_known(text) and not any(ROOT.glob(text)):
            yield f"{name(path)}: `{text}` does not exist"


def commands(path: Path) -> Iterator[tuple[str, str]]:
    """Every `./keel ...` in a block or in backticks, and the error line below it in a block, else ""."""
    text = path.read_text(encoding="utf-8")
    for block in FENCE.findall(text):
        lines = block[1].splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if line.removeprefix("$ ").startswith("./keel"):
                yield line.removeprefix("$ "), following if following.startswith("keel: error:") else ""
    for code in CODE.findall(prose(path)):
        if code.startswith("./keel ") and "..." not in code:
            yield code, ""


def cases() -> list[tuple[str, str, str]]:
    found = [(name(path), command, error) for path in WITH_COMMANDS for command, error in commands(path)]
    return list(dict.fromkeys(found))


@pytest.fixture
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All verbs up to where the work would begin: words are parsed, flags known, configurations composed."""
    configs, run = tmp_path / "configs", tmp_path / "run"
    shutil.copytree(CONFIGS, configs)
    run.mkdir()
    (run / "config.yaml").write_text(configuration())
    (run / "provenance.json").write_text("{}")
    monkeypatch.setattr(composing, "CONFIGS", configs)
    monkeypatch.setattr(device, "prepare", lambda chosen: None)
    for module in (resume, sample, runs, report, status, export):
        monkeypatch.setattr(module, "find_run", lambda word: run)
    monkeypatch.setattr(train, "find_crash", lambda word: run)
    monkeypatch.setattr("trainer.report.read.newest", lambda runs_dir: run)
    monkeypatch.setattr("trainer.debug.replay.replay", lambda *args, **kwargs: 0)
    monkeypatch.setattr("launch.attempts.start", lambda words, size, restarts: 0)
    monkeypatch.setattr("trainer.run.train", lambda *args, **kwargs: 0)
    monkeypatch.setattr("trainer.run.resume", lambda *args, **kwargs: 0)
    for verb in ("import_folder", "export_source"):
        monkeypatch.setattr(f"trainer.released.verbs.{verb}", lambda *args, **kwargs: ((), {"tensors": 0}))
    monkeypatch.setattr("trainer.sample.sample_run", lambda *args, **kwargs: (1, iter([])))
    monkeypatch.setattr(test_verb, "_pytest", lambda *args: (0, "nothing"))
    monkeypatch.setattr(test_verb, "checks", dict)


@functools.cache
def configuration() -> str:
    """A run's config.yaml: a JSON object is one, too."""
    return json.dumps(asdict(compose([]).config))


def words(command: str) -> list[str]:
    """The words after `./keel`, up to a comment, a pipe or a redirection."""
    found = shlex.split(command, comments=True)[1:]
    ends = [i for i, word in enumerate(found) if word in ("|", ">", "2>", "&&", ";")]
    return found[: ends[0]] if ends else found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_and_paths_exist(path: Path) -> None:
    found = [*broken_links(path), *missing_paths(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("document", "command", "error"), cases())
@pytest.mark.usefixtures("stubbed")
def test_commands_are_understood(document: str, command: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main.main(words(command))
    said = capsys.readouterr().err
    assert (code, said.strip()) == ((2, error) if error else (0, "")), f"{document}: {command}"


def test_there_are_commands_and_errors_to_check() -> None:
    assert len(cases()) >= 40
    assert sum(bool(error) for _, _, error in cases()) >= 8


@pytest.mark.usefixtures("stubbed")
def test_a_wrong_command_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        "./keel trian",
        "./keel train model.hiden_size=1",
        "./keel sample RUN --seeds 2",
        "./keel plan recipe=x",
    ):
        assert main.main(words(wrong)) == 2
        assert "did you mean" in capsys.readouterr().err or "recipe" in wrong


def test_wrong_links_and_paths_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_docs.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One thing\n[a](b.md) [c](page.md#one-thing) [d](#two) `model/gone.py` `model/...` `trainer/engine.py`\n"
    )
    assert list(broken_links(page)) == ["page.md: b.md: no such file", "page.md: #two: no such heading"]
    assert list(missing_paths(page)) == ["page.md: `model/gone.py` does not exist"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=name)
def test_python_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a run as the examples name it, and the repository's own tests/golden."""
    run = tmp_path / "runs" / "debug-7f3a"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "validation/loss": 3.5}\n')
    tensors = {"model/embed.weight": torch.ones(2), "optimizer/x": torch.ones(1)}
    checkpoint.save(run / "checkpoints", 72, whole(tensors), {})
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    for language, code in FENCE.findall(path.read_text(encoding="utf-8")):
        if language == "python":
            seen: dict[str, Any] = {}
            exec(compile(ast.parse(code), name(path), "exec"), seen)
            assert seen.get("held_out", {2: 3.5}) == {2: 3.5}
            assert list(seen.get("weights", ["embed.weight"])) == ["embed.weight"]


def test_the_dashboard_page_has_the_table_of_metrics() -> None:
    page = (ROOT / "docs" / "dashboards.md").read_text(encoding="utf-8").replace("\\|", "|")
    table = (metrics.METRICS | metrics.FAMILIES).items()
    assert "".join(f"| `{metric}` | {text} |\n" for metric, text in table) in page
