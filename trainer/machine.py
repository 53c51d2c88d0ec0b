"""What the machine gives: its rate of matrix products, and the memory that the process holds."""

import time
from pathlib import Path

import torch
from torch import Tensor

from trainer.pool import RowPool

SIDES = {"cpu": 512, "cuda": 8192}
"""Sides of the square matrices: measured no slower than 256 and 1024 on a CPU with AVX-512."""
SECONDS = 0.15
"""How long products are repeated; the fastest counts, for a ceiling should not depend on what else the machine does."""
_STATUS = Path("/proc/self/status")


def product_rate(pool: RowPool, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products in `dtype`, on all of a pool's threads at once; takes well under a second."""
    side = SIDES[device.type]
    rates = pool.plain_map(lambda _: _fastest(torch.full((side, side), 0.5, dtype=dtype, device=device)), pool.views)
    total = sum(rates)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return total


def _fastest(x: Tensor) -> float:
    result = torch.mm(x, x)
    _wait(result.device)
    best, begun = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) - begun < SECONDS:
        torch.mm(x, x, out=result)
        _wait(result.device)
        best = min(best, time.perf_counter() - start)
    return 2 * x.shape[0] ** 3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> dict[str, int]:
    """`memory/peak_bytes` and `memory/rss_bytes`; what the system does not tell (no /proc) is left out."""
    lines = _STATUS.read_text().splitlines() if _STATUS.is_file() else []
    fields = {key: text for key, _, text in (line.partition(":") for line in lines)}
    names = {"memory/rss_bytes": "VmRSS", "memory/peak_bytes": "VmHWM"}
    found = {name: int(fields[key].split()[0]) * 1024 for name, key in names.items() if key in fields}
    return found | ({"memory/peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})
