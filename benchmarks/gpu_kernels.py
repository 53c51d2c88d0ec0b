"""How close does each kernel come to what the chip can do, and how much faster is it than plain PyTorch?

    python -m benchmarks.gpu_kernels [--device cuda|cpu] [--quick] [--repetitions N]

First the chip's ceilings, measured. Then every kernel at V4-Flash's sizes, one row of 4096 tokens, bf16: milliseconds
forwards and backwards, their floor, max(bytes / copy, FLOP / product rate), the share of it that the kernel reaches
(100 % is the floor), and the plain function's time on the same inputs. "apart" is the largest difference between the
two results over the largest number; for selections, the share of queries that chose other slots. A kernel that fails
is named with its error, the others go on, and the exit code is 1.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu, report
from benchmarks.gpu_cases import TINY, Case, Sizes, cases

COLUMNS = ("kernel", "forward ms", "floor ms", "reaches", "plain ms", "backward ms", "floor ms", "reaches", "plain ms")


def main() -> int:
    """Print the ceilings, the table of kernels and the formulas of its floors; 1 if a kernel failed."""
    where = gpu.place(__doc__)
    sizes, dtype = (TINY, torch.float32) if where.device.type == "cpu" else (Sizes(), torch.bfloat16)
    if where.quick and where.device.type == "cuda":
        sizes = Sizes(T=512)
    found = gpu.ceilings(where)
    torch.manual_seed(0)
    rows, notes, failed = [], [], 0
    for case in cases(sizes, where.device, dtype):
        notes.append(f"{case.name:<22}{case.formula}")
        try:
            rows.append((*_row(case, where, found), f"{_apart(case):.1e}"))
        except Exception as error:
            rows.append((case.name, "failed", *["-"] * len(COLUMNS[1:])))
            notes.append(f"{'':<22}failed: {type(error).__name__}: {error}")
            failed = 1
    print(report.heading("benchmarks.gpu_kernels", f"{sizes}, {dtype}", where.device.type))
    print(found.lines())
    print(f"\n{report.table([(*COLUMNS, 'apart'), *rows])}")
    print("\nelements moved forwards; backwards. FLOP are two per multiply-add of the products")
    print("\n".join(notes))
    return failed


def _row(case: Case, where: gpu.Place, found: gpu.Ceilings) -> tuple[str, ...]:
    cells = [case.name]
    for step, time in enumerate((_forward, _backward)):
        if step and not case.learns:
            return (*cells, *["-"] * 4)
        floor_s = found.floor_s(moved_bytes=case.moved[step], flop=case.flop[step], products=case.products)
        kernel_s, plain_s = (where.seconds(time(function, case)) for function in (case.kernel, case.plain))
        cells += [_ms(kernel_s), _ms(floor_s), f"{floor_s / kernel_s:.0%}", _ms(plain_s)]
    return tuple(cells)


def _forward(function: Callable[..., Any], case: Case) -> Callable[[], object]:
    return lambda: function(*case.inputs)


def _backward(function: Callable[..., Any], case: Case) -> Callable[[], object]:
    results = _results(function, case)
    given = [torch.randn_like(result) for result in results]
    return lambda: torch.autograd.grad(results, case.inputs, given, retain_graph=True)


def _results(function: Callable[..., Any], case: Case) -> tuple[Tensor, ...]:
    result = function(*case.inputs)
    return result if isinstance(result, tuple) else (result,)


@torch.no_grad()
def _apart(case: Case) -> float:
    found, expected = (_results(function, case)[0] for function in (case.kernel, case.plain))
    if not expected.is_floating_point():
        return float((found.sort(-1).values != expected.sort(-1).values).any(-1).float().mean())
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


if __name__ == "__main__":
    sys.exit(main())
