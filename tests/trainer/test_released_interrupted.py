"""Proves that a conversion that was broken off goes on: whole files stay, others are written again."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.main import main
from tests.trainer import released_folder as made
from tests.trainer.test_released_refused import folder, refused
from trainer.released.source import ReleasedFolder

__all__ = ["folder"]
FILE = "rank-00000.safetensors"


def after(calls: int, function: Callable[..., Any], happens: Callable[[], object]) -> Callable[..., Any]:
    """The function, before whose every call beyond so many something happens."""
    left = calls

    def call(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            happens()
        return function(*arguments)

    return call


def interrupted() -> None:
    raise KeyboardInterrupt


def test_a_full_disk_keeps_whole_files_and_the_same_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After half a megabyte there is no room; later the two files that were whole are not written again."""
    monkeypatch.chdir(folder.parent)
    assert main(["import", "released", "import"]) == 0
    capsys.readouterr()
    words, pwrite, room = ["export", "import", "out", "--shard-bytes", "200000"], os.pwrite, 500_000

    def limited(file: int, content: memoryview, start: int) -> int:
        nonlocal room
        room -= content.nbytes
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, content, start)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        assert refused(words, capsys) == (
            "OUT = out: expected a disk that takes it (No space left on device); "
            ".writing-out keeps what is whole, the same command goes on with it"
        )
    assert sorted(os.listdir()) == [".writing-out", "import", "released"]
    lines = Path(".writing-out/journal.jsonl").read_text().splitlines()
    whole = [json.loads(line)["file"]["name"] for line in lines[1:]]
    before = {name: (Path(".writing-out") / name).stat() for name in whole}
    assert len(whole) == 2
    assert refused([*words[:-1], "300000"], capsys) == (
        "OUT = out: expected no unfinished folder .writing-out of something else; delete it, or give its words again"
    )
    content = bytearray((Path(".writing-out") / whole[1]).read_bytes())
    content[-1] ^= 1
    (Path(".writing-out") / whole[1]).write_bytes(content)
    assert main(words) == 0
    assert f"{whole[0]} is there already" in capsys.readouterr().err
    assert (Path("out") / whole[0]).stat().st_mtime_ns == before[whole[0]].st_mtime_ns
    assert (Path("out") / whole[1]).stat().st_mtime_ns != before[whole[1]].st_mtime_ns, "it was damaged meanwhile"
    assert made.stored_bytes(Path("out")) == made.stored_bytes(folder)
    assert sorted(os.listdir()) == ["import", "out", "released"]
    rows = [json.loads(line)["name"] for line in Path("out/report.jsonl").read_text().splitlines()]
    assert len(rows) == len(set(rows)) == len(made.numbers(made.tensors(made.config())))


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_kill_at_any_file_is_gone_on_from(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken off before any of its changes to the disk, like a kill: the same command makes the same folder."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("trainer.released.imported.FILE_BYTES", 2_000_000)
    if verb == "export":
        assert main(["import", "released", "import"]) == 0
    words = {"import": ["import", "released", "out"], "export": ["export", "import", "out", "--shard-bytes", "400000"]}
    fsync, left = os.fsync, 0

    def killed(file: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        fsync(file)

    monkeypatch.setattr(os, "fsync", killed)
    ends = []
    while not Path("out").exists():
        left = len(ends)
        ends.append(main(words[verb]))
    assert len(ends) > 8
    assert set(ends) == {130}, "the last one when all was done but syncing the new name"
    assert ".writing-out" not in os.listdir()
    assert "journal.jsonl" not in os.listdir("out")
    left = 1000
    if verb == "import":
        assert main(["export", "out", "back"]) == 0
    assert made.stored_bytes(Path("back" if verb == "import" else "out")) == made.stored_bytes(folder)


def test_two_do_not_write_one_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    Path(".writing-out").mkdir()
    with Path(".writing-out/journal.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = refused(["import", "released", "out"], capsys)
    assert line == "OUT = out: expected a folder that no other process is writing"
    assert sorted(os.listdir()) == [".writing-out", "released"]


def test_a_file_that_was_broken_off_takes_no_room_from_the_same_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk that is just large enough: what is written anew is not counted as taken."""
    monkeypatch.chdir(folder.parent)
    assert main(["import", "released", "whole"]) == 0
    disk_bytes = (Path("whole") / FILE).stat().st_size

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=disk_bytes - sum(one.stat().st_size for one in path.glob("*.safetensors")))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", after(20, os.pwrite, interrupted))
        assert main(["import", "released", "out"]) == 130
    assert (Path(".writing-out") / FILE).stat().st_size > 0
    capsys.readouterr()
    assert main(["import", "released", "out"]) == 0, capsys.readouterr().err
    assert (Path("out") / FILE).read_bytes() == (Path("whole") / FILE).read_bytes()


def test_a_source_that_cannot_be_read_for_a_while_costs_nothing_that_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("trainer.released.imported.FILE_BYTES", 500_000)
    with monkeypatch.context() as patch:
        gone = after(100, ReleasedFolder.stored_rows, lambda: Path("released").rename("away"))
        patch.setattr(ReleasedFolder, "stored_rows", gone)
        line = refused(["import", "released", "out"], capsys)
    assert line.startswith("file = released/model-0000")
    assert ": expected a file that can be read (No such file or directory); .writing-out keeps what is whole" in line
    Path("away").rename("released")
    assert main(["import", "released", "out"]) == 0
    assert f"{FILE} is there already" in capsys.readouterr().err


def test_a_folder_of_somebody_else_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    Path(".writing-out").mkdir()
    Path(".writing-out/notes.txt").write_text("mine")
    line = refused(["import", "released", "out"], capsys)
    assert line.startswith("OUT = out: expected no unfinished folder .writing-out of something else")
    assert Path(".writing-out/notes.txt").read_text() == "mine"
    shutil.rmtree(".writing-out")
    Path(".writing-out").write_text("mine")
    line = refused(["import", "released", "out"], capsys)
    assert line == "OUT = out: expected a disk that takes it (File exists: .writing-out)"
    assert Path(".writing-out").read_text() == "mine"
