"""Proves that a conversion takes the memory of a part of a tensor, not of a tensor, a file or the model.

Measured as the system sees it, in a process of its own: how far the most memory it ever had rises above what a small
folder took.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer import released_folder as made
from trainer.released.layout import SLAB_SIZE

ROOT = Path(__file__).resolve().parents[2]
SLAB_BYTES = 4 * SLAB_SIZE
SLABS = 28
"""Copies of a slab, or fewer bytes, that a conversion and torch's memory of freed ones take."""
MEASURE = """
import json, sys
from pathlib import Path
from trainer.released import verbs
small, large, out = map(Path, sys.argv[1:])
silent = lambda line: None
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
found = []
for folder, name in ((small, "small"), (large, "large")):
    verbs.import_folder(folder, out / f"{name}-import", silent)
    found.append(peak())
for name in ("small", "large"):
    verbs.export_source(verbs.Source(checkpoint=out / f"{name}-import"), out / f"{name}-out", silent)
    found.append(peak())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("experts", "vocab_size"), [(2, 16000), (12, 61)])
def test_memory_is_that_of_a_part_of_a_tensor(experts: int, vocab_size: int, tmp_path: Path) -> None:
    """Tensors of 130 MB in fp32 and experts of 25 MB, in one file of 210 MB, which is 490 MB in fp32; many experts."""
    keys = made.config(
        hidden_size=2048, moe_intermediate_size=3072, n_routed_experts=experts, vocab_size=vocab_size,
        num_hidden_layers=1, compress_ratios=[0], num_nextn_predict_layers=0,
    )  # fmt: skip
    small = made.write(tmp_path / "small", made.config(), made.tensors(made.config()))
    large = made.write(tmp_path / "large", keys, made.tensors(keys), files=1)
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    small_import, large_import, _, large_export = json.loads(ended.stdout)
    assert made.stored_bytes(tmp_path / "large-out") == made.stored_bytes(large)
    expert_bytes = 4 * 2048 * 3072
    assert large_import - small_import < SLABS * SLAB_BYTES
    assert large_export - small_import < SLABS * SLAB_BYTES + expert_bytes
