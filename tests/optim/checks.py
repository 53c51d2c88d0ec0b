"""The optimizer beside the oracle over several steps: one check for the positive test and for every planted mistake."""

import torch
from torch import Tensor

from optim.config import AdamWConfig, MuonConfig, OptimConfig
from optim.groups import Member
from optim.optimizer import Optimizer
from tests.oracles.muon import AdamTensor, MuonMatrix

STEPS = 6
RATE = 0.05
CONFIG = OptimConfig(
    muon=MuonConfig(),
    adamw=AdamWConfig(eps=1e-8),
    clip_norm=1e9,
    rate_scale={"compressor": 0.5},
)


def members() -> list[Member]:
    """Two experts, a tensor of two series, a tall and a wide matrix, a table and a vector."""
    whole = {"wide": (5, "router"), "tall": (9, "attention")}
    result = [
        Member(name=f"experts.{e}", parameter="experts", start=e, stop=e + 1, kind="matrix", group="experts")
        for e in range(2)
    ]
    result += [
        Member(name=f"series.{i}", parameter="series", start=3 * i, stop=3 * i + 3, kind="matrix", group="compressor")
        for i in range(2)
    ]
    result += [
        Member(name=name, parameter=name, start=0, stop=rows, kind="matrix", group=group)
        for name, (rows, group) in whole.items()
    ]
    result.append(Member(name="table", parameter="table", start=0, stop=6, kind="table", group="embedding"))
    result.append(Member(name="vector", parameter="vector", start=0, stop=4, kind="vector", group="norms"))
    return result


SHAPES = {"experts": (2, 4, 6), "series": (6, 8), "wide": (5, 8), "tall": (9, 4), "table": (6, 3), "vector": (4,)}


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }


def check_against_oracle() -> None:
    """STEPS steps on every kind of tensor in fp64 equal the oracle's, which sees each logical matrix by itself."""
    parameters = tensors(0)
    optimizer = Optimizer(parameters, members(), CONFIG)
    oracles = {
        one.name: (MuonMatrix if one.kind == "matrix" else AdamTensor)(one.view(parameters[one.parameter]))
        for one in members()
    }
    for step in range(STEPS):
        gradients = tensors(step + 1)
        optimizer.step(gradients, rate=RATE)
        for one in members():
            gradient = one.view(gradients[one.parameter])
            rate = RATE * (0.5 if one.group == "compressor" else 1.0)
            oracle = oracles[one.name]
            if isinstance(oracle, MuonMatrix):
                oracle.step(gradient, rate, mu=0.95, decay=0.1, rms=0.18)
            else:
                decay = 0.1 if one.kind == "table" else 0.0
                oracle.step(gradient, rate, beta1=0.9, beta2=0.95, eps=1e-8, decay=decay)
    for one in members():
        difference = (one.view(parameters[one.parameter]) - oracles[one.name].weight).abs().max()
        # Both sides are fp64; the smallest deliberate mistake moves a weight by more than 1e-4.
        assert difference < 1e-9, (one.name, difference)
