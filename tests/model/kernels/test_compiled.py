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
    files = {line["kernel"].split(".")[0].split("_")[0] for line in found}  # attend_query and attend_key serve attend
    assert {seam.kernel.split(".")[0] for seam in SEAMS if seam.library == "triton"} == files
    assert [line for line in found if line["shared"] > SHARED_BYTES] == []
    assert [line for line in found if line["stack"] > SPILL_BYTES and not _fp32_product(line["kernel"])] == []
    attention = [
        line for line in found if line["kernel"].startswith(("attend_", "indexer.")) and " bf16 " in line["kernel"]
    ]
    assert [
        line["kernel"] for line in attention if not line["tensor_cores"] and "add_picks" not in line["kernel"]
    ] == []
    mhc = [line for line in found if line["kernel"].startswith(("enter.", "expand."))]
    assert mhc
    assert not [line for line in mhc if line["tensor_cores"]], "fp32 islands have no TF32 products"


def _fp32_product(kernel: str) -> bool:
    """Large products in fp32 run outside the tensor cores and spill; nobody trains V4 with them."""
    return " fp32 " in kernel and kernel.startswith(("attend_", "indexer."))
