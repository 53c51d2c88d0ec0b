"""How fast is a checkpoint, and how long does training stand still for it?

    python benchmarks/checkpoint.py [MEBIBYTES]

Tensors of 4 MiB in fp32, in a temporary folder beside the caller. "submit" is what training waits for, first with
fresh memory for the snapshot, then with that of the one before; "sha256" is one core's bound on save and load. A resume
takes "verify", of which each rank does its share, and then "restore", into tensors that are there.
"""

import hashlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainer import checkpoint, provenance
from trainer.pieces import whole
from trainer.reader import Reader, restore
from trainer.writer import Writer


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main(mebibytes: int) -> None:
    """Prints one line per measurement."""
    tensors = {f"tensor.{number}": torch.randn(1 << 20) for number in range(mebibytes // 4)}
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        writer = Writer(folder, keep_last=2, keep_every_steps=0)
        seconds = {
            "sha256": timed(lambda: [hashlib.sha256(tensor.numpy()).digest() for tensor in tensors.values()]),
            "save": timed(lambda: checkpoint.save(folder, 1, whole(tensors), {})),
            "load": timed(lambda: checkpoint.load(folder / "step-000001")),
            "verify": timed(lambda: Reader(folder / "step-000001").verify()),
            "restore": timed(lambda: restore(Reader(folder / "step-000001"), whole(tensors), tensors.keys())),
            "submit, first": timed(lambda: writer.submit(2, whole(tensors), {})),
            "write behind it": timed(writer.wait),
            "submit, later": timed(lambda: writer.submit(3, whole(tensors), {})),
        }
        writer.close()
    print(f"{platform.machine()}, {provenance.facts(device='cpu', dtype='fp32')}")
    print(f"{len(tensors)} tensors, {size:.0f} MB")
    for what, duration in seconds.items():
        print(f"{what:16} {duration:8.3f} s {size / duration:8.0f} MB/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
