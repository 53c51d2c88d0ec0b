"""Proves that every kernel compiles for NVIDIA Hopper at V4-Flash's sizes, for bf16 and fp32, and fits the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.parallel.apply import SEAMS

SHARED_BYTES = 227 * 1024
"""Shared memory that one program may have on compute capability 9.0 (CUDA programming guide, technical tables)."""
SPILL_BYTES = 64
"""Of a thread's registers to memory: a few; more would be a tile chosen too large."""


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.model.kernels.hopper"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {seam.kernel.split(".")[0] for seam in SEAMS} == {line["kernel"].split(".")[0] for line in found}
    assert [line for line in found if line["shared"] > SHARED_BYTES or line["stack"] > SPILL_BYTES] == []
    mhc = [line for line in found if line["kernel"].startswith(("enter.", "expand."))]
    assert mhc
    assert not [line for line in mhc if line["tensor_cores"]], "fp32 islands have no TF32 products"
