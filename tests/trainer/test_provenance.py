"""Proves that provenance names the commit and what decides the bits, and nothing about the environment."""

import subprocess
from pathlib import Path

import pytest
import torch

from trainer import provenance


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git checkout with one commit, a remote with a password, and one uncommitted change."""
    folder = tmp_path / "checkout"
    folder.mkdir()

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@example.com", *arguments],
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    (folder / "code.py").write_text("rate = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("remote", "add", "origin", "https://user:PLANTED@example.com/x.git")
    (folder / "code.py").write_text("rate = 2\napi_key = 'PLANTED'\n")
    (folder / "untracked.txt").write_text("PLANTED\n")
    return folder


def test_the_commit_and_the_patch_of_tracked_files(repository: Path) -> None:
    found = provenance.commit(repository)
    assert found.commit is not None
    assert len(found.commit) == 40
    assert found.dirty
    assert "-rate = 1\n+rate = 2\n" in found.patch
    assert "PLANTED" not in found.patch


def test_a_clean_checkout_has_no_patch(repository: Path) -> None:
    subprocess.run(["git", "-C", str(repository), "checkout", "-q", "code.py"], check=True)
    found = provenance.commit(repository)
    assert (found.dirty, found.patch) == (False, "")


def test_a_patch_is_cut_at_its_cap(repository: Path) -> None:
    (repository / "code.py").write_text("x\n" * provenance.PATCH_BYTES)
    patch = provenance.commit(repository).patch
    assert provenance.PATCH_BYTES - 100 < len(patch) < provenance.PATCH_BYTES + 100
    assert "\n+x\n[cut here: the first 10485" in patch


def test_only_the_top_of_a_repository_counts(repository: Path, tmp_path: Path) -> None:
    (repository / "vendor").mkdir()
    nothing = provenance.Commit(commit=None, dirty=False, patch="")
    assert provenance.commit(repository / "vendor") == nothing
    assert provenance.commit(tmp_path) == nothing


def test_a_machine_without_git_has_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(repository).commit is None


def test_facts_say_what_decides_the_bits() -> None:
    facts = provenance.facts(device="cpu", dtype="bf16")
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["deterministic"] == torch.are_deterministic_algorithms_enabled()
    assert (facts["device"], facts["dtype"], facts["keel"]) == ("cpu", "bf16", "0.1.0")
    assert all(facts[key] for key in ("python", "numpy", "safetensors", "device_name"))


@pytest.mark.parametrize("key", ["torch", "cpu_capability", "threads", "device", "dtype", "deterministic", "kernels"])
def test_each_difference_that_breaks_bits_is_a_line(key: str) -> None:
    facts = provenance.facts(device="cpu", dtype="bf16")
    assert provenance.compare(facts, dict(facts)) == []
    assert provenance.compare({**facts, key: "other"}, facts) == [
        f"{key}: the checkpoint was made with other, this process has {facts[key]}"
    ]
    without = {name: value for name, value in facts.items() if name != key}
    assert len(provenance.compare(without, facts)) == 1


def test_other_versions_and_the_name_of_a_cpu_do_not_matter_but_the_name_of_a_gpu_does() -> None:
    facts = provenance.facts(device="cpu", dtype="bf16")
    other = {**facts, "python": "3.99", "numpy": "9", "device_name": "another"}
    assert provenance.compare(other, facts) == []
    assert len(provenance.compare({**other, "device": "cuda"}, {**facts, "device": "cuda"})) == 1
