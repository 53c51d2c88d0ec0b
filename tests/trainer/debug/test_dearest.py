"""Proves that memory.json's list of what is alive has named tensors and leaks, and needs no look at other threads."""

import torch
from torch import Tensor

from tests.trainer import steps
from trainer.debug import dearest, profile


def test_what_was_allocated_and_kept_is_listed_by_its_operation_and_what_was_freed_is_not() -> None:
    pool = steps.make_parts(steps.make_batch(rows=1)).pool
    named, kept = {"weight": torch.ones(3, 5, dtype=torch.bfloat16)}, list[Tensor]()
    with profile._recording(pool, cuda=False) as recorded:
        kept.append(torch.ones(40, 20) @ torch.ones(20, 30))
        named["state"] = torch.zeros(7, dtype=torch.int64)
        torch.ones(9000)
    # What PyTorch keeps for itself is a few bytes.
    found = [entry for entry in dearest.alive(named, recorded) if entry["bytes"] >= 30]
    assert found == [
        {"name": None, "bytes": 4 * 40 * 30, "allocated_by": "aten::mm"},
        {"name": "state", "bytes": 56, "shape": "7", "dtype": "int64"},
        {"name": "weight", "bytes": 30, "shape": "3x5", "dtype": "bfloat16"},
    ]
    kept.clear()
