"""Proves the logic of the bootstrap, nothing installed: which torch, when a set-up is complete, what is missing."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from launch import device, environment
from launch.environment import Runner, SetupError, locked

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def keel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bootstrap as a module, with its environment in a folder of the test."""
    loader = SourceFileLoader("keel_bootstrap", str(ROOT / "keel"))
    spec = spec_from_loader("keel_bootstrap", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    venv, cache = tmp_path / ".venv", tmp_path / ".cache"
    places = {"VENV": venv, "PYTHON": venv / "python", "STAMP": venv / "keel.json", "DEV_STAMP": venv / "keel-dev.json"}
    places |= {"CACHE": cache, "LOG": cache / "setup.log", "UNFINISHED": cache / "setup.unfinished"}
    for name, path in places.items():
        monkeypatch.setattr(module, name, path)
    for name in ("KEEL_PYTHON", "KEEL_WHEELS", "KEEL_TORCH_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "nvidia_driver", lambda: False)
    return module


def pretend_installed(keel: ModuleType) -> None:
    """What a finished set-up leaves behind, without the packages."""
    keel.VENV.mkdir(exist_ok=True)
    keel.PYTHON.touch()
    (keel.VENV / "pyvenv.cfg").write_text(f"home = x\nversion = {sys.version_info[0]}.{sys.version_info[1]}.0\n")


def test_an_environment_behind_a_link_is_left_alone(keel: ModuleType, tmp_path: Path) -> None:
    """It is another checkout's, and making one here would empty it."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "keel.json").write_text("{}")
    keel.VENV.symlink_to(other)
    with pytest.raises(SetupError, match=r"\.venv = .*: expected a folder of this checkout, not a link to .*other"):
        keel.set_up(False)
    assert (other / "keel.json").read_text() == "{}"
    assert not keel.UNFINISHED.exists()


@pytest.mark.parametrize(
    ("driver", "platform", "build", "why"),
    [
        (True, "linux", "CUDA", "has an NVIDIA driver"),
        (False, "linux", "CPU", "no NVIDIA driver"),
        (False, "darwin", "default", "one build"),
        (True, "win32", "CUDA", "has an NVIDIA driver"),
        (False, "win32", "default", "one build"),
    ],
)
def test_the_machine_decides_the_build(
    keel: ModuleType, monkeypatch: pytest.MonkeyPatch, driver: bool, platform: str, build: str, why: str
) -> None:
    monkeypatch.setattr(keel, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(sys, "platform", platform)
    assert keel.torch_build()[0] == build
    assert why in keel.torch_build()[1]


def test_a_driver_shows_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(device, "DRIVER_FILES", (str(tmp_path / "version"),))
    assert not device.nvidia_driver()
    (tmp_path / "version").touch()
    assert device.nvidia_driver()


def test_a_cpu_build_is_preferred_and_its_own_index_comes_last(keel: ModuleType) -> None:
    index = keel.CPU_INDEX
    assert keel.torch_attempts("CPU", "2.13.0", {}) == [
        ["torch==2.13.0+cpu"],
        ["--no-deps", "--index-url", index, "torch==2.13.0+cpu"],
    ]
    assert keel.torch_attempts("CPU", "2.13.0", {"KEEL_WHEELS": "w"}) == [["torch==2.13.0+cpu"]]
    assert keel.torch_attempts("CUDA", "2.13.0", {}) == [["torch===2.13.0"], ["torch==2.13.0"]]
    assert keel.torch_attempts("default", "2.13.0", {}) == [["torch==2.13.0"]]
    for build in ("CPU", "CUDA", "default"):
        attempts = keel.torch_attempts(build, "2.13.0", {"KEEL_TORCH_INDEX": "there"})
        assert attempts == [["--no-deps", "--index-url", "there", "torch==2.13.0"]]


def test_torch_is_pinned_without_a_local_version(keel: ModuleType) -> None:
    constraints = keel.CONSTRAINTS.read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", keel.pinned("torch", constraints))
    with pytest.raises(SetupError, match="nothing"):
        keel.pinned("nothing", constraints)
    pins = [line for line in constraints.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", pin) for pin in pins), "every line is a full pin"


def test_the_fingerprint_changes_with_all_that_is_installed(
    keel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = keel.fingerprint(False)
    assert first == keel.fingerprint(False) != keel.fingerprint(True)
    monkeypatch.setattr(keel, "nvidia_driver", lambda: True)
    assert keel.fingerprint(False) != first
    monkeypatch.setattr(keel, "nvidia_driver", lambda: False)
    changed = tmp_path / "constraints.txt"
    changed.write_text(f"{keel.CONSTRAINTS.read_text()}one-more==1.0\n")
    monkeypatch.setattr(keel, "CONSTRAINTS", changed)
    assert keel.fingerprint(False) != first


def test_only_a_complete_set_up_is_used(keel: ModuleType) -> None:
    assert not keel.ready(False)
    pretend_installed(keel)
    assert not keel.ready(False)
    keel.write_stamp(keel.STAMP, False, "2.13.0 None")
    assert keel.ready(False)
    assert not keel.ready(True), "the tools of the tests have their own stamp"
    keel.STAMP.write_text(keel.STAMP.read_text()[:-3])
    assert not keel.ready(False), "a torn stamp is none"
    keel.write_stamp(keel.STAMP, False, "2.13.0 None")
    keel.PYTHON.unlink()
    assert not keel.ready(False)


def test_an_interrupted_set_up_is_made_anew_and_a_refused_one_mended(
    keel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def install(runner: Runner, dev: bool, fresh: bool) -> str:
        seen.append(fresh)
        assert keel.UNFINISHED.exists()
        assert not keel.STAMP.exists()
        pretend_installed(keel)
        if len(seen) in (1, 3):
            raise KeyboardInterrupt
        if len(seen) == 2:
            return "2.13.0 None"
        raise SetupError("torch = gone: expected a source")

    monkeypatch.setattr(keel, "install", install)
    with pytest.raises(KeyboardInterrupt):
        keel.set_up(False)
    assert keel.UNFINISHED.exists()
    keel.set_up(False)
    assert keel.ready(False)
    assert not keel.UNFINISHED.exists()
    keel.set_up(False)
    assert seen == [True, True], "what is ready is left alone"
    with pytest.raises(KeyboardInterrupt):
        keel.set_up(True)
    for _ in range(2):
        with pytest.raises(SetupError):
            keel.set_up(True)
    assert seen == [True, True, False, True, True]
    keel.UNFINISHED.unlink()
    with pytest.raises(SetupError):
        keel.set_up(True)
    assert seen[-1] is False
    assert not keel.UNFINISHED.exists(), "pip has undone what it could not finish"


@pytest.mark.parametrize("line", ["version = 3.2.1", "home = x"])
def test_an_environment_of_another_python_is_made_anew(keel: ModuleType, line: str) -> None:
    pretend_installed(keel)
    assert keel.mendable()
    (keel.VENV / "pyvenv.cfg").write_text(f"{line}\n")
    assert not keel.mendable()


def test_a_moved_checkout_is_set_up_anew(keel: ModuleType) -> None:
    pretend_installed(keel)
    keel.STAMP.write_text(json.dumps({"root": "elsewhere"}))
    assert not keel.mendable()


def test_every_dependency_is_looked_for(keel: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    imported = {"hydra-core": "hydra", "pyyaml": "yaml", "import-linter": "importlinter", "pytest-xdist": "xdist"}
    for declared, modules in (
        (project["dependencies"], keel.MODULES),
        (project["optional-dependencies"]["dev"], keel.DEV_MODULES),
    ):
        names = [re.split(r"[<>=\[;]", requirement)[0] for requirement in declared]
        assert {imported.get(name, name.replace("-", "_")) for name in names} == set(modules)
    assert all(find_spec(module) for module in keel.MODULES)


def test_a_given_python_is_checked_and_what_is_missing_is_named(keel: ModuleType) -> None:
    def check(modules: list[str]) -> subprocess.CompletedProcess[str]:
        code = keel.START + keel.check_code(modules) + "print('started', sys.argv[1:])"
        return subprocess.run(
            [sys.executable, "-c", code, "ROOT", "a", "b"], capture_output=True, text=True, check=False
        )

    missing = check(["json", "no_such_one", "nor_this"])
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.endswith("expected the packages of pyproject.toml; missing: no_such_one, nor_this\n")
    assert check(["json"]).stdout == "started ['a', 'b']\n"


def test_help_starts_without_an_environment(keel: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["train", "--help"]):
        assert keel.main(words) == 0
    assert "keel train" in capsys.readouterr().out
    assert not keel.CACHE.exists()


def test_an_old_python_is_told_so() -> None:
    source = (ROOT / "keel").read_text()
    code = f"import sys; sys.version_info = (3, 9, 1); exec(compile({source!r}, 'keel', 'exec'))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "keel: error: python = 3.9: expected 3.11 or newer, as in python3.11 ./keel\n"


def test_a_step_takes_the_first_attempt_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "lock") as lock:
        runner = Runner(tmp_path / "log", lock, steps=2)
        fails, works = (
            [sys.executable, "-c", "print('no'); raise SystemExit(1)"],
            [sys.executable, "-c", "print('yes')"],
        )
        assert runner.run("first", [fails, works], "luck") == "yes"
        with pytest.raises(SetupError, match="set-up = second: expected luck"):
            runner.run("second", [fails], "luck")
    err = capsys.readouterr().err
    assert "keel: [1/2] first: " in err
    assert "    no\n" in err


@pytest.mark.skipif(os.name == "nt", reason="the lock of another process is a POSIX one")
def test_a_second_set_up_waits_for_the_first(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom launch.environment import locked\n"
        f"with locked(Path({str(tmp_path / 'lock')!r})):\n    print('in', flush=True)\n"
    )
    with locked(tmp_path / "lock"):
        other = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert other.stderr is not None
        assert other.stderr.readline() == "keel: another process is setting up; waiting for it\n"
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "in\n"


def test_progress_lines_are_plain_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    environment.say("half", passing=True)
    assert capsys.readouterr().err == "keel: half\n"
