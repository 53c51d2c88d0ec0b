"""Proves that train, resume and sample hand over a checked configuration, find runs by name, and let no GPU idle."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from launch import attempts, device
from launch.compose import compose
from launch.config import render
from launch.main import main
from launch.placement import VARIABLES
from launch.runs import find_run
from launch.sample import stream
from trainer.parallel.placement import SINGLE, Placement

pytestmark = pytest.mark.usefixtures("merge_once")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Stands in for the trainer and notes how it was called."""
    noted: list[tuple[Any, dict[str, Any]]] = []

    def run(*values: Any, **options: Any) -> int:
        noted.append((values, options))
        return 7

    def sample_run(*values: Any, **options: Any) -> tuple[int, Iterator[Any]]:
        noted.append((values, options))
        rows = range(len(values[2]))
        return 24, (SimpleNamespace(row=row, text=text, last=False) for text in ("one ", "two") for row in rows)

    stand_ins: dict[str, dict[str, Any]] = {
        "trainer.run": {"train": run, "resume": run},
        "trainer.sample": {"sample_run": sample_run},
        "trainer.folder": {"RunFolder": lambda path: SimpleNamespace(path=path)},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(device, "nvidia_driver", lambda: False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return noted


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Stands in for the start of several processes and notes their words and number."""
    noted: list[tuple[list[str], int]] = []

    def start(words: list[str], size: int, restarts: int) -> int:
        noted.append((words, size))
        return 9

    monkeypatch.setattr(attempts, "start", start)
    return noted


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run named debug-1234 with a seed of its own, under the working folder."""
    folder = tmp_path / "runs" / "debug-1234"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("\n".join(render(asdict(compose(["seed=5"]).config))))
    monkeypatch.chdir(tmp_path)
    return Path("runs/debug-1234")


def test_train_hands_over_one_checked_configuration(calls: list[Any]) -> None:
    assert main(["train", "--new", "seed=3", "model.hc_mult=2"]) == 7
    ((config,), options) = calls[0]
    assert config == compose(["seed=3", "model.hc_mult=2"]).config
    assert options == {"new": True, "overrides": ["seed=3", "model.hc_mult=2"], "json": False, "place": SINGLE}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_wrong_configuration_never_reaches_the_trainer(calls: list[Any]) -> None:
    assert main(["train", "model.hc_mlt=2"]) == 2
    assert calls == []


@pytest.mark.parametrize("word", ["debug-1234", "runs/debug-1234", "runs/debug-1234/"])
def test_resume_takes_the_run_s_own_configuration(calls: list[Any], run_folder: Path, word: str) -> None:
    assert main(["resume", word]) == 7
    ((config, folder), options) = calls[0]
    assert config.seed == 5
    assert folder.path == run_folder
    assert options == {"allow_changes": False, "place": SINGLE}


def test_resume_changes_nothing_unless_allowed(
    calls: list[Any], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", "debug-1234", "seed=6"]) == 2
    assert capsys.readouterr().err.startswith("keel: error: overrides = seed=6: expected none")
    assert main(["resume", "debug-1234", "--allow-changes", "seed=6"]) == 7
    ((config, _), options) = calls[0]
    assert (config.seed, options) == (6, {"allow_changes": True, "place": SINGLE})


def test_a_layout_of_several_processes_starts_them(calls: list[Any], started: list[Any]) -> None:
    words = ["train", "--new", "--json", "parallel=cpu2", "seed=3"]
    assert main(words) == 9
    assert (started, calls) == ([(words, 2)], [])


def test_nothing_is_started_for_a_wrong_configuration(calls: list[Any], started: list[Any]) -> None:
    assert main(["train", "parallel=cpu2", "threads=2"]) == 2
    assert (started, calls) == ([], [])


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> Placement:
    """What a process finds that torchrun has started."""
    for name, value in zip(VARIABLES, ("1", "2", "0", "node-0", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    return Placement(rank=1, size=2, local_rank=0, address="tcp://node-0:29500")


def test_one_of_several_processes_trains_in_its_place(
    calls: list[Any], second_of_two: Placement, started: list[Any], run_folder: Path
) -> None:
    assert main(["train", "parallel=cpu2"]) == 7
    assert main(["resume", "debug-1234", "parallel=cpu2"]) == 7
    assert [options["place"] for _, options in calls] == [second_of_two] * 2
    assert started == []


def test_the_environment_must_fit_the_mesh(
    calls: list[Any], second_of_two: Placement, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["train", "parallel=cpu4"], ["resume", "debug-1234"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("keel: error: WORLD_SIZE = 2: expected ")
    assert calls == []


@pytest.mark.parametrize(
    ("layout", "size"),
    [(["parallel=cpu2"], 2), (["parallel.data=3", "threads=1"], 3), (["parallel=cpu4", "parallel.expert=4"], 4)],
)
def test_resume_takes_another_layout(
    calls: list[Any], started: list[Any], run_folder: Path, layout: list[str], size: int
) -> None:
    words = ["resume", "debug-1234", *layout]
    assert main(words) == 9
    assert (started, calls) == ([(words, size)], [])


@pytest.mark.parametrize("layout", [["parallel=single"], ["parallel.data=1", "parallel.expert=1"]])
def test_resume_goes_back_to_one_process(
    calls: list[Any], started: list[Any], run_folder: Path, layout: list[str]
) -> None:
    (run_folder / "config.yaml").write_text("\n".join(render(asdict(compose(["parallel=cpu4", "seed=5"]).config))))
    assert main(["resume", "debug-1234", *layout]) == 7
    ((config, _), _) = calls[0]
    assert (config.parallel.mesh.size, config.seed, config.threads) == (1, 5, 1)
    assert started == []


@pytest.mark.parametrize(
    "words", [["parallel.reduction=fast", "threads=1"], ["parallel=cpu2", "seed=6"], ["model=pro"]]
)
def test_what_changes_bits_is_no_layout(
    calls: list[Any], started: list[Any], run_folder: Path, words: list[str]
) -> None:
    assert main(["resume", "debug-1234", *words]) == 2
    assert (started, calls) == ([], [])


def test_a_layout_decides_bits_where_sums_are_fast(calls: list[Any], started: list[Any], run_folder: Path) -> None:
    fast = compose(["parallel=cpu4", "parallel.reduction=fast"]).config
    (run_folder / "config.yaml").write_text("\n".join(render(asdict(fast))))
    assert main(["resume", "debug-1234", "parallel=cpu2"]) == 2
    assert main(["resume", "debug-1234", "--allow-changes", "parallel=cpu2"]) == 9
    assert [size for _, size in started] == [2]
    assert calls == []


def test_sample_prints_what_the_run_says(
    calls: list[Any], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "debug-1234", "--tokens", "9", "--top-p", "0.5", "--prompt", "x = 1"]) == 0
    assert capsys.readouterr().out == "one two\n"
    ((config, _, prompts, sampling), options) = calls[0]
    assert (sampling.tokens, sampling.top_p, prompts) == (9, 0.5, ["x = 1"])
    assert sampling.temperature == config.sample.temperature
    assert options == {"seed": 5, "at_step": None}


def test_sample_as_json(calls: list[Any], run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--json", "--seed", "8", "--step", "24", "--tokens", "9", "--temperature", "0"]
    assert main(["sample", "debug-1234", *words]) == 0
    settings = {"seed": 8, "tokens": 9, "temperature": 0.0, "top_p": 0.95}
    texts = {"prompts": ["def "], "texts": ["one two"]}
    assert json.loads(capsys.readouterr().out) == {"run": "runs/debug-1234", "step": 24, **settings, **texts}
    assert calls[0][1] == {"seed": 8, "at_step": 24}


def test_several_prompts_are_written_one_below_the_other(
    calls: list[Any], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "debug-1234", "--prompt", "a", "--prompt=b", "--prompt", ""]) == 0
    assert calls[0][0][2] == ["a", "b", ""]
    assert capsys.readouterr().out == "--- 1 of 3\none two\n--- 2 of 3\none two\n--- 3 of 3\none two\n"


def test_a_text_is_printed_as_it_comes_once_those_before_have_ended(capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> Iterator[SimpleNamespace]:
        for row, text, last, shown in (
            (0, "a", False, "a"),
            (1, "x", False, "a"),
            (0, "b", False, "ab"),
            (0, "", True, "ab\n--- 2 of 3\nx"),
            (2, "", True, "ab\n--- 2 of 3\nx"),
            (1, "y", False, "ab\n--- 2 of 3\nxy"),
            (1, "", True, "ab\n--- 2 of 3\nxy\n--- 3 of 3\n"),
        ):
            yield SimpleNamespace(row=row, text=text, last=last)
            printed.append(capsys.readouterr().out)
            assert "".join(printed) == "--- 1 of 3\n" + shown

    printed: list[str] = []
    stream(told(), 3)
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resume", "debug-1243"], "(runs/ has debug-1234); did you mean debug-1234?"),
        (["resume"], "RUN = : expected the folder of a run or its name"),
        (["sample"], "RUN = : expected one run's folder or name"),
        (["sample", "debug-1234", "--top-p", "2"], "top_p = 2.0: expected in (0, 1]"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, calls: list[Any], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert calls == []


def test_without_runs_there_is_nothing_to_suggest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has none yet"):
        find_run("debug", tmp_path)


def test_a_gpu_never_stands_idle_silently(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = SimpleNamespace(__version__="2.13.0+cpu", cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(device, "nvidia_driver", lambda: True)
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "keel: error: device = auto: expected a torch that sees this machine's NVIDIA GPU, not 2.13.0"
    )
    assert "device=cpu" in err
    assert calls == []
    assert main(["train", "device=cpu"]) == 7
    torch.cuda.is_available = lambda: True
    assert main(["train"]) == 7
