"""What the benchmarks of a GPU share: its clock, its ceilings, and the words of the command line.

On a CPU (`--device cpu --quick`) everything runs too, kernels in Triton's interpreter: that shows that the programs
work, and its times mean nothing.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import report
from launch.device import prepare


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where and how to measure. `quick`: tiny sizes, one repetition. parts: of the benchmark, those to run."""

    device: torch.device
    quick: bool
    repetitions: int
    parts: Sequence[str] = ()

    @property
    def seconds(self) -> Callable[[Callable[[], object]], float]:
        """Median seconds of an action after two warm-up calls, by the GPU's own clock where there is one."""
        return self._on_gpu if self.device.type == "cuda" else self._on_cpu

    def _on_gpu(self, action: Callable[[], object]) -> float:
        for _ in range(2):
            action()
        spans = []
        for _ in range(self.repetitions):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3

    def _on_cpu(self, action: Callable[[], object]) -> float:
        return statistics.median(report.timed(action) for _ in range(self.repetitions))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the chip gave here: bytes read and written per second of a copy; FLOP per second of products by type.

    fp8: e4m3 with one scale per tensor, or why there is no number.
    """

    copy: float
    bf16: float
    fp32: float
    fp8: float | str

    def lines(self) -> str:
        """The ceilings as text."""
        fp8 = self.fp8 if isinstance(self.fp8, str) else f"{self.fp8 / 1e12:.4g} TFLOP/s"
        return "\n".join(
            [
                f"copy      {self.copy / 1e9:.4g} GB/s, bytes read and written",
                f"bf16      {self.bf16 / 1e12:.4g} TFLOP/s",
                f"fp32      {self.fp32 / 1e12:.4g} TFLOP/s, no TF32",
                f"fp8       {fp8}",
            ]
        )

    def floor_s(self, *, moved_bytes: float, flop: float, products: str) -> float:
        """Seconds below which no kernel can be: max(bytes / copy, FLOP / product rate)."""
        return max(moved_bytes / self.copy, flop / (self.bf16 if products == "bf16" else self.fp32))


def place(description: str | None, parts: Sequence[str] = ()) -> Place:
    """Reads --device, --quick and --repetitions, and --only of a benchmark with parts; on a CPU chooses Triton's
    interpreter, before triton is imported."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repetition")
    parser.add_argument("--repetitions", type=int, default=20)
    if parts:
        parser.add_argument("--only", nargs="+", choices=parts, default=parts, help=f"of {', '.join(parts)}")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected an NVIDIA GPU that this torch can use; --device cpu --quick tries it out")
    if given.device == "cpu":
        if not given.quick:
            parser.error("--device cpu: expected --quick with it; real sizes are for a GPU")
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    prepare(given.device)
    # No TF32 for what is meant to be fp32.
    torch.backends.cuda.matmul.allow_tf32 = False
    return Place(
        device=torch.device(given.device),
        quick=given.quick,
        repetitions=1 if given.quick else given.repetitions,
        parts=given.only if parts else (),
    )


def ceilings(where: Place) -> Ceilings:
    """Measure them: a copy of 1 GiB, products of 8192 x 8192 (quick: 1 MiB, 128 x 128)."""
    count, side = (1 << 20, 128) if where.quick else (1 << 30, 8192)
    source = torch.ones(count // 4, device=where.device)
    target = torch.empty_like(source)
    copy = 2 * count / where.seconds(lambda: target.copy_(source))
    rates = {}
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        a = torch.randn(side, side, device=where.device).to(dtype)
        rates[name] = 2 * side**3 / where.seconds(lambda a=a: a @ a)
    return Ceilings(copy=copy, bf16=rates["bf16"], fp32=rates["fp32"], fp8=_fp8(where, side))


def _fp8(where: Place, side: int) -> float | str:
    a = torch.randn(side, side, device=where.device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=where.device)

    def product() -> Tensor:
        return torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    try:
        product()
    except RuntimeError as error:
        return f"not measured: {str(error).splitlines()[0]}"
    return 2 * side**3 / where.seconds(product)


def wait(where: Place) -> float:
    """The time, once the device has done what it was told."""
    if where.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
