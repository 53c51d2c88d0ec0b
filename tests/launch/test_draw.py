"""Proves that the drawing of a schedule has every pass in its time on its rank, and names what it shows."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch import draw
from launch.compose import CONFIGS
from launch.main import main
from trainer.parallel.orders import Schedule, training_order
from trainer.parallel.simulate import Profile, Run, simulate

SVG = "{http://www.w3.org/2000/svg}"
PIPE = ["model=small", "threads=1", "parallel.pipe=2"]


def played(schedule: Schedule, ranks: int, rows: int, transfer: float = 0.0) -> Run:
    chunks = ranks if schedule == "1f1b" else 2 * ranks
    profile = Profile(forward=(1.0,) * chunks, backward=(2.0,) * chunks, transfer=transfer)
    return simulate([training_order(schedule, ranks, rank, rows) for rank in range(ranks)], profile)


def boxes(picture: ElementTree.Element, kind: str) -> list[tuple[float, float, float]]:
    """Left, top and width of the boxes of a kind."""
    found = []
    for path in picture.iter(f"{SVG}path"):
        if path.get("class") == kind:
            for box in re.finditer(r"M([\d.]+) ([\d.]+)h([\d.]+)v", path.get("d", "")):
                found.append((float(box[1]), float(box[2]), float(box[3])))
    return found


@pytest.mark.parametrize("transfer", [0.0, 0.5])
def test_every_pass_is_drawn_in_its_time_on_its_rank(transfer: float) -> None:
    run = played("1f1b", 3, 7, transfer)
    picture = ElementTree.fromstring(draw.svg(run, "seven"))
    for kind, letter, size in (("F", "forward", 1), ("B", "backward", 2)):
        of = [[e for e in events if e.computed and e.computed.way == letter] for events in run.events]
        drawn = boxes(picture, kind)[:-1]  # the last one is the legend's
        assert len(drawn) == sum(map(len, of)) == 21
        scale = boxes(picture, "line")[0][2] / run.end
        expected = [
            (62 + e.start * scale, 34 + 26 * rank, size * scale - 0.6) for rank, es in enumerate(of) for e in es
        ]
        for box, there in zip(sorted(drawn), sorted(expected), strict=True):
            assert box == pytest.approx(there, abs=0.1)  # places are rounded to a tenth
    numbers = [text.text for text in picture.iter(f"{SVG}text") if text.get("class", "").startswith("n ")]
    assert sorted(map(int, filter(None, numbers))) == sorted(6 * list(range(7)))


def test_the_way_back_has_colours_of_its_own_and_a_legend() -> None:
    text = draw.svg(played("dualpipev", 2, 6), "<folded>")
    picture = ElementTree.fromstring(text)
    assert {kind: len(boxes(picture, kind)) - 1 for kind in "FBfb"} == dict.fromkeys("FBfb", 12)
    words = [one.text for one in picture.iter(f"{SVG}text")]
    assert {"<folded>", "rank 0", "rank 1", "forward", "backward, on the way back"} <= set(words)
    assert sum(word is not None and word.endswith("idle") for word in words) == 2
    assert "way back" not in draw.svg(played("1f1b", 2, 6), "")
    assert "prefers-color-scheme: dark" in text


def test_sixteen_ranks_and_many_rows_stay_readable() -> None:
    text = draw.svg(played("1f1b", 16, 64), "large")
    picture = ElementTree.fromstring(text)
    assert float(picture.get("width", "")) <= draw.MOST_PX + 200
    assert sum(one.get("class", "").startswith("n ") for one in picture.iter(f"{SVG}text")) == 2 * 16 * 64
    assert len(text) < 200_000


def test_keel_plan_draws_the_schedule_of_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schedule.svg"
    assert main(["plan", *PIPE, "--draw", str(file)]) == 0
    assert "plan of" in capsys.readouterr().out
    picture = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    assert (picture.find(f"{SVG}text").text or "").startswith("debug, 1f1b: 8 ")
    assert len(boxes(picture, "F")) == 2 * 8 + 1


TIMES = {"forward": [1, 2], "backward": [3, 1], "transfer": 0.5}


def test_measured_times_take_the_place_of_flop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "times.json", tmp_path / "a.svg"
    file.write_text(json.dumps(TIMES), encoding="utf-8")
    assert main(["plan", "--json", *PIPE, "--times", str(file), "--draw", str(picture)]) == 0
    pipeline = json.loads(capsys.readouterr().out)["layout"]["pipeline"]
    assert pipeline["measured"] is True
    profile = Profile(forward=(1, 2), backward=(3, 1), transfer=0.5)
    run = simulate([training_order("1f1b", 2, rank, 8) for rank in range(2)], profile)
    assert [stage["bubble"] for stage in pipeline["stages"]] == pytest.approx([run.bubble] * 3)
    words = picture.read_text(encoding="utf-8")
    assert all(f"{share:.1%} idle" in words for share in run.bubbles)
    assert main(["plan", *PIPE, "--times", str(file)]) == 0
    assert "as measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "times",
    [
        {},
        [1],
        TIMES | {"forward": [1]},
        TIMES | {"forward": "12"},
        TIMES | {"backward": [1, 0]},
        TIMES | {"backward": [1, float("nan")]},
        TIMES | {"transfer": -1},
        TIMES | {"transfer": True},
        TIMES | {"transfers": 1},
    ],
)
def test_times_that_are_none_are_refused(times: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "times.json"
    file.write_text(json.dumps(times), encoding="utf-8")
    assert main(["plan", *PIPE, "--times", str(file)]) == 2
    told = "expected forward and backward, 2 positive numbers each, and transfer, a number from 0 on"
    assert capsys.readouterr() == ("", f"keel: error: --times = {file}: {told}\n")


def test_the_drawings_of_the_documents_are_what_their_commands_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (CONFIGS.parent / "docs" / "parallelism.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\./keel plan (.+) --draw (docs/drawings/\S+\.svg)$", page, re.MULTILINE)
    shown = re.findall(r"!\[[^\]]+\]\((drawings/\S+)\)", page)
    assert [f"docs/{name}" for name in shown] == [name for _, name in commands]
    for words, name in commands:
        assert main(["plan", *words.split(), "--draw", str(tmp_path / "new.svg")]) == 0
        assert (tmp_path / "new.svg").read_bytes() == (CONFIGS.parent / name).read_bytes(), name
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--draw=a.svg"], "--draw = a.svg: expected a pipeline, parallel.pipe above 1"),
        (["--times=a.json"], "--times = a.json: expected a pipeline, parallel.pipe above 1"),
        ([*PIPE, "--times=a.json"], "--times = a.json: expected a file of JSON ([Errno 2]"),
        ([*PIPE, "--draw", "none/a.svg"], "--draw = none/a.svg: expected a file that can be written (No such file"),
    ],
)
def test_what_cannot_be_drawn_or_read_is_refused(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
