"""Do symmetric products, the Gram form or bf16 make Newton-Schulz faster, and are they as exact?

    python -m benchmarks.newton_schulz [--device cuda|cpu] [--quick] [--repetitions N]

Ten iterations X <- a X + b (X X^T) X + c (X X^T)^2 X for V4-Flash's shapes, the smaller side first:

- plain: `optim.newton_schulz.orthogonalize`, what training uses, fp32 without TF32;
- symmetric: X X^T and its square by a Triton kernel that computes the tiles on and below the diagonal and writes each
  twice: half the FLOP of two products of three;
- Gram: with G = X X^T and Q = a + b G + c G^2, which commute, X <- Q X and G <- Q^2 G, so the products in the loop have
  the smaller side only; the Q are multiplied up, and X once at the end. Small singular values enter squared;
- bf16: plain in bf16, sums in fp32.

"spectrum" is the least and largest singular value of the result for a matrix whose own fall from 1 to 1e-3; all would
be 1. Nothing of this is adopted: a form is only if it is measured faster and as exact.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import gpu, report
from optim import newton_schulz
from optim.iterations import COEFFICIENTS, iterations_flop

SHAPES = {"expert": (2048, 4096), "wq_b": (1024, 32768), "wkv": (512, 4096), "square": (4096, 4096)}
TINY = {"wide": (32, 128), "square": (32, 32)}
COLUMNS = ("matrix", "form", "ms", "TFLOP/s of plain", "spectrum")


def main() -> None:
    """Print ceilings, then time and exactness by shape and form."""
    where = gpu.place(__doc__)
    shapes = TINY if where.quick else SHAPES
    found = gpu.ceilings(where)
    torch.manual_seed(0)
    rows = [cells for name, (R, C) in shapes.items() for cells in _rows(f"{name} {R} x {C}", R, C, where)]
    print(report.heading("benchmarks.newton_schulz", f"{shapes}", where.device.type))
    print(found.lines())
    print(f"\n{report.table([COLUMNS, *rows])}")


def _rows(name: str, R: int, C: int, where: gpu.Place) -> list[tuple[str, ...]]:
    y_RC = _matrix(R, C, where.device)
    flop, cells = iterations_flop(R, C), []
    for form, function in FORMS.items():
        seconds = where.seconds(lambda function=function: function(y_RC))
        values = torch.linalg.svdvals(function(y_RC).double())
        spectrum = f"{values.min():.4f} to {values.max():.4f}"
        cells.append((name, form, f"{seconds * 1e3:.3f}", f"{flop / seconds / 1e12:.4g}", spectrum))
    return cells


def _matrix(R: int, C: int, device: torch.device) -> Tensor:
    """A random R x C matrix with singular values from 1 to 1e-3, evenly spaced in their logarithm."""
    left, right = (torch.linalg.qr(torch.randn(n, R, device=device)).Q for n in (R, C))
    return (left * torch.logspace(0, -3, R, device=device)) @ right.T


def plain(y_RC: Tensor) -> Tensor:
    """What training uses."""
    return newton_schulz.orthogonalize(y_RC.unsqueeze(0))[0]


def bf16(y_RC: Tensor) -> Tensor:
    """The same iterations in bf16."""
    x_RC = (y_RC / y_RC.norm()).bfloat16()
    for a, b, c in COEFFICIENTS:
        gram_RR = x_RC @ x_RC.T
        factor_RR = torch.addmm(gram_RR, gram_RR, gram_RR, beta=b, alpha=c)
        x_RC = torch.addmm(x_RC, factor_RR, x_RC, beta=a)
    return x_RC


def symmetric(y_RC: Tensor) -> Tensor:
    """The same iterations in fp32, the two symmetric products at half their FLOP."""
    from benchmarks.symmetric import product

    x_RC = y_RC / y_RC.norm()
    for a, b, c in COEFFICIENTS:
        gram_RR = product(x_RC, None, alpha=1.0, beta=0.0)
        factor_RR = product(gram_RR, gram_RR, alpha=c, beta=b)
        x_RC = torch.addmm(x_RC, factor_RR, x_RC, beta=a)
    return x_RC


def gram(y_RC: Tensor) -> Tensor:
    """All iterations on G = X X^T; their product is applied to X at the end."""
    x_RC = y_RC / y_RC.norm()
    gram_RR = x_RC @ x_RC.T
    identity_RR = torch.eye(len(x_RC), device=x_RC.device)
    total_RR = identity_RR
    for a, b, c in COEFFICIENTS:
        q_RR = torch.addmm(gram_RR, gram_RR, gram_RR, beta=b, alpha=c).add_(identity_RR, alpha=a)
        total_RR = q_RR @ total_RR
        gram_RR = q_RR @ (q_RR @ gram_RR)
    return total_RR @ x_RC


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"plain": plain, "symmetric": symmetric, "Gram": gram, "bf16": bf16}


if __name__ == "__main__":
    main()
