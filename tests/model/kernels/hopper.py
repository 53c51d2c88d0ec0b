"""Compiles kernels for NVIDIA Hopper on a machine without a GPU; a program, because the interpreter is per process.

Twins are called on tensors of the device `meta`, forwards and backwards; a launch compiles, for the types and sizes at
hand, and does nothing more. Prints one JSON line per kernel: what its cubin needs. Whose: the argument, a module with
CALLS, or those of the model.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Hopper:
    """What triton asks of a driver in order to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


def compile_only() -> dict[str, Any]:
    """From now on launches compile for Hopper and do not run; returns where the compiled kernels will be, by name."""
    driver.set_active(Hopper())
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_and_keep(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor)}
        kind = "bf16" if torch.bfloat16 in dtypes else "fp32"
        compiled[f"{self.module.removeprefix('model.kernels.')}.{self.fn.__name__} {kind} {kernel.hash[:8]}"] = kernel

    JITFunction.run = compile_and_keep
    return compiled


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (where registers spill) and of a program's static shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def lines(compiled: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One description per compiled kernel."""
    for name, kernel in compiled.items():
        used = resources(kernel.asm["cubin"])
        yield {
            "kernel": name,
            "registers": used["REG"],
            "stack": used["STACK"] + used["LOCAL"],
            "shared": kernel.metadata.shared,
            "warps": kernel.metadata.num_warps,
            "tensor_cores": "mma" in kernel.asm["ptx"],
        }


def main() -> None:
    calls = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "tests.model.kernels.calls")
    compiled = compile_only()
    for call in calls.CALLS:
        for dtype in (torch.bfloat16, torch.float32):
            call(dtype)
    for line in lines(compiled):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
