"""What a run ran on: versions, device, commit. No environment, no command line, no names of hosts or remotes."""

import importlib.metadata
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from trainer import redact

CHECKOUT = Path(__file__).resolve().parents[1]
BITS_DEPEND_ON = (
    "torch", "cpu_capability", "threads", "device", "device_name", "dtype", "deterministic", "kernels", "reduction",
    "precision",
)  # fmt: skip
"""Facts that must be the same for a resumed run to have the bits of the uninterrupted one (measured: engine notes)."""
PATCH_BYTES = 1 << 20
_GIT_TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """The state of a git checkout; `patch` holds the changes to tracked files, at most PATCH_BYTES of them."""

    commit: str | None
    dirty: bool
    patch: str


def versions() -> dict[str, str]:
    """Versions of everything that computes or stores."""
    return {
        "keel": _keel_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "safetensors": importlib.metadata.version("safetensors"),
    }


def facts(*, device: str, dtype: str, kernels: str = "off", reduction: str = "exact") -> dict[str, Any]:
    """Versions and what else decides the bits of a run on `device` ("cpu", "cuda", "cuda:0") computing in `dtype`.

    kernels: what serves in place of plain functions, as `trainer.parallel.apply.describe_kernels` says it. reduction:
    how ranks add their gradients, with the layout where bits depend on it.
    Call it after the thread count and deterministic algorithms are set: it records what torch reports.
    """
    kind = torch.device(device).type
    return {
        **versions(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": kind,
        "device_name": torch.cuda.get_device_name(device) if kind == "cuda" else _processor_name(),
        "dtype": dtype,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "kernels": kernels,
        "reduction": reduction,
    }


def differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The facts that differ and after which bits may, too; an empty list keeps the promise.

    The device's name counts only for GPUs: on CPUs the instruction set decides.
    """
    keys = [key for key in BITS_DEPEND_ON if key != "device_name" or now.get("device") != "cpu"]
    return [key for key in keys if saved.get(key) != now.get(key)]


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each of the facts that are `differing`."""
    return [
        f"{key}: the checkpoint was made with {saved.get(key)}, this process has {now.get(key)}"
        for key in differing(saved, now)
    ]


def commit(checkout: Path = CHECKOUT) -> Commit:
    """The commit and the uncommitted changes of `checkout`; no commit when it is not the top of a git repository."""
    top = _git(checkout, "rev-parse", "--show-toplevel")
    head = _git(checkout, "rev-parse", "--verify", "HEAD")
    if top is None or head is None or Path(top.strip()).resolve() != checkout.resolve():
        return Commit(commit=None, dirty=False, patch="")
    status = _git(checkout, "status", "--porcelain", "--untracked-files=no") or ""
    patch = _git(checkout, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short") or ""
    return Commit(commit=head.strip(), dirty=status.strip() != "", patch=redact.in_text(_capped(patch)))


def _capped(patch: str) -> str:
    """Whole lines only: half a line could hide from `redact` that it has credentials in it."""
    content = patch.encode()
    if len(content) <= PATCH_BYTES:
        return patch
    kept = content[: content.rfind(b"\n", 0, PATCH_BYTES) + 1]
    return f"{kept.decode()}[cut here: the first {len(kept)} of {len(content)} bytes]\n"


def _git(checkout: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git or it refuses."""
    command = ["git", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _keel_version() -> str:
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text())["project"]["version"]
    return importlib.metadata.version("keel-pretrain")


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
