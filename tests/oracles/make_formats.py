"""Oracle: makes tests/golden/formats.safetensors, by which anybody can check codes and scales of FP8 and FP4.

    python -m tests.oracles.make_formats

rewrites it, with the same bits on the same machine. For each of INPUTS `NAME.x` (fp32 or bf16), and for each of FORMATS
`NAME.FORMAT.codes`, one byte per number, and `NAME.FORMAT.exponents`, one per block.
"""

import itertools
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.formats import FLOORS, encode, middles, numbers

FILE = Path(__file__).parents[1] / "golden" / "formats.safetensors"

FORMATS = {
    "e4m3_1x128": ("e4m3", (1, 128), FLOORS["e4m3"]),
    "e4m3_128x1": ("e4m3", (128, 1), FLOORS["e4m3"]),
    "e4m3_128x128": ("e4m3", (128, 128), FLOORS["e4m3"]),
    "e4m3_128x128.no_floor": ("e4m3", (128, 128), 0.0),
    "e4m3_1x64": ("e4m3", (1, 64), FLOORS["e4m3"]),
    "e2m1_1x32": ("e2m1", (1, 32), FLOORS["e2m1"]),
}
"""Element, block, floor of amax."""


def ulp_up(x: Tensor) -> Tensor:
    """The next larger fp32 numbers."""
    return (x.view(torch.int32) + 1).view(torch.float32)


def ulp_down(x: Tensor) -> Tensor:
    """The next smaller fp32 numbers, of positive ones."""
    return (x.view(torch.int32) - 1).view(torch.float32)


def ties(element: str) -> Tensor:
    """Rows of 32: the largest, so that the scale is known, then halves between neighbours and one ulp beside them."""
    middle = torch.tensor(middles(element), dtype=torch.float32)
    around = torch.cat((middle, ulp_up(middle), ulp_down(middle), torch.tensor(numbers(element))))
    both = torch.cat((around, -around))
    rows = torch.cat((both, both.new_zeros(-len(both) % 31))).view(-1, 31)
    return torch.cat((torch.full((len(rows), 1), numbers(element)[-1]), rows), dim=1)


def edges(element: str) -> Tensor:
    """Rows of 2: an amax of largest * 2^k, and one ulp beside it, for all k where that is an fp32 number."""
    largest = numbers(element)[-1]
    sizes = torch.tensor([largest * 2.0**k for k in range(-150, 122) if largest * 2.0**k < 2.0**128])
    amax = torch.cat((sizes, ulp_up(sizes), ulp_down(sizes[sizes > 0])))
    return torch.stack((-amax, amax / 3), dim=1)


def specials() -> Tensor:
    """Blocks of 32 of zeros, subnormal numbers, the largest and smallest, infinities and NaN beside plain ones."""
    x = torch.randn(6, 160, generator=torch.Generator().manual_seed(1))
    x[0, :64], x[0, 64:96] = 0.0, -0.0
    x[1] *= 2.0**-130
    x[2, :32] *= 2.0**-149
    x[2, 40], x[2, 70] = 2.0**-149, torch.finfo(torch.float32).max
    x[3, 5], x[3, 40], x[3, 100] = math.inf, -math.inf, math.nan
    x[4, 64:] *= 1e-6
    x[5] *= torch.logspace(-30, 30, 160)
    return x


def inputs() -> dict[str, Tensor]:
    """All inputs by name. Ragged: no multiple of a block in either dim."""
    draw = torch.Generator().manual_seed(0)
    normal, few = torch.randn(129, 40, generator=draw), torch.randn(20, 150, generator=draw)
    return {
        "normal": normal,
        "normal_bf16": few.bfloat16(),
        "wide": few * torch.randn(20, 150, generator=draw).mul(9).exp2(),
        "tiny": few[:3] * 2.0**-138,
        "specials": specials(),
        "ties_e4m3": ties("e4m3"),
        "ties_e2m1": ties("e2m1"),
        "edges_e4m3": edges("e4m3"),
        "edges_e2m1": edges("e2m1"),
    }


def golden() -> dict[str, Tensor]:
    """The contents of the file, computed anew."""
    found = {f"{name}.x": x for name, x in inputs().items()}
    for (name, x), (of, what) in itertools.product(inputs().items(), FORMATS.items()):
        codes, exponents = encode(x.tolist(), *what)
        found[f"{name}.{of}.codes"] = torch.tensor(codes, dtype=torch.uint8)
        found[f"{name}.{of}.exponents"] = torch.tensor(exponents, dtype=torch.uint8)
    return found


def main() -> None:
    """Rewrite the file."""
    save_file(golden(), FILE)


if __name__ == "__main__":
    main()
