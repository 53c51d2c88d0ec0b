"""What does Muon cost beside torch's own Muon, and beside the forward and backward pass it follows?

    python -m benchmarks.muon [--models NAME ...] [--repetitions N] [--rows N] [--quick]

One thread, fp32 weights, the logical matrices of two models: the debug recipe's, and the 18.6 million parameters of
`benchmarks.model_cpu`. "keel" is our optimizer on the matrices alone, its global norm included. "torch" is
`torch.optim.Muon` on the same matrices and gradients. What its options cannot make equal:

- its products are in bf16, ours in fp32;
- one triple of coefficients for all iterations: with as many as ours (10) it has no exact ones at the end;
- its momentum is an average (Nesterov as ours); the directions differ by a factor, which the norm takes out;
- no global norm, one matrix at a time; its rate is set to fall with the shape as ours does ("match_rms_adamw").

"singular values" are those of the update that the optimizer made of random matrices: all would be 1. "floor" is the
FLOP of ten iterations over the measured product rate. "row" is forward and backward of one row of random tokens with
all losses, sparse attention; "share" is Muon's part of a step of --rows such rows.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import model_cpu, report
from data.batch import Batch
from launch.compose import compose
from model.config import InitConfig, ModelConfig
from model.init import initialize
from model.logical import logical_tensors
from model.losses import count
from model.transformer import Transformer
from optim.config import MuonConfig, OptimConfig
from optim.groups import Member
from optim.iterations import iterations_flop
from optim.optimizer import Optimizer
from trainer import row
from trainer.members import members

MODELS: dict[str, tuple[Callable[[int], ModelConfig], int]] = {
    "debug": (lambda T: compose(["recipe=debug"]).config.model, 512),
    "18.6 M": (model_cpu.config, 2048),
}
"""Configuration by row length, and the row length."""
QUICK_LENGTH = 128
COLUMNS = ("model", "matrices", "million", "keel ms", "torch 10 ms", "torch 5 ms", "floor ms", "row ms", "share")
RATE, UPDATE_RMS = 1e-3, 0.2
"""0.2 is the constant of torch's "match_rms_adamw"; ours is set to it, V4's is 0.18."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A logical matrix: its weight, which both optimizers get a copy of, and its gradient."""

    weight: Tensor
    gradient: Tensor


def main() -> None:
    """Print times by model, then the singular values of each optimizer's update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, for the share")
    parser.add_argument("--quick", action="store_true", help="the debug model, short rows, one repetition")
    given = parser.parse_args()
    torch.set_num_threads(1)
    models, repetitions = (["debug"], 1) if given.quick else (given.models, given.repetitions)
    lengths = {name: QUICK_LENGTH if given.quick else MODELS[name][1] for name in models}
    rate = model_cpu.product_rate(512)
    rows = [_row(name, lengths[name], given.rows, rate, repetitions) for name in models]
    shapes = ", ".join(f"{name} with rows of {lengths[name]}" for name in models)
    print(report.heading("benchmarks.muon", f"{shapes}; medians of {repetitions} repetitions"))
    print(f"products  {rate / 1e9:.0f} GFLOP/s, fp32, 512 x 512, one thread")
    print(f"\nmilliseconds; share of a step of {given.rows} rows\n{report.table([COLUMNS, *rows])}")
    print(f"\nsingular values of the update\n{report.table([('matrix', 'keel', 'torch 10', 'torch 5'), *_values()])}")


def _row(name: str, length: int, rows: int, rate: float, repetitions: int) -> tuple[str, ...]:
    config = MODELS[name][0](length)
    model = Transformer(config, torch.float32)
    initialize(model, InitConfig(), 0)
    model.share_weights()
    pass_of_a_row = _pass(model, length)
    pass_of_a_row()
    matrices = _matrices(model)
    actions = {"keel": _keel(model), "torch 10": _torch(matrices, 10), "torch 5": _torch(matrices, 5)}
    for action in actions.values():
        action()
    seconds = report.interleaved(actions | {"row": pass_of_a_row}, repetitions)
    floor = sum(iterations_flop(*matrix.weight.shape) for matrix in matrices) / rate
    times = [seconds["keel"], seconds["torch 10"], seconds["torch 5"], floor, seconds["row"]]
    million = sum(matrix.weight.numel() for matrix in matrices) / 1e6
    share = seconds["keel"] / (seconds["keel"] + rows * seconds["row"])
    return (name, f"{len(matrices)}", f"{million:.1f}", *(f"{one * 1e3:.1f}" for one in times), f"{share:.1%}")


def _pass(model: Transformer, length: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    token_BT = torch.randint(0, model.config.vocab_size, (1, length + 1), generator=generator)
    document_BT, position_BT = torch.zeros(1, length, dtype=torch.int64), torch.arange(length).unsqueeze(0)
    batch = Batch(
        token_BT=token_BT[:, :-1],
        target_BT=token_BT[:, 1:],
        document_BT=document_BT,
        position_BT=position_BT,
        source_B=torch.zeros(1, dtype=torch.int64),
    )
    counts = count(batch.target_BT, document_BT, position_BT)
    weights = row.weigh(counts, mtp=0.3, balance=1e-4, indexer=1.0)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        row.learn(model, batch, "sparse", weights)

    return run


def _members(model: Transformer) -> list[Member]:
    return members(one for one in logical_tensors(model.config) if one.kind == "matrix")


def _matrices(model: Transformer) -> list[Matrix]:
    parameters = dict(model.named_parameters())
    return [
        Matrix(
            weight=member.view(parameters[member.parameter].detach()),
            gradient=member.view(parameters[member.parameter].grad),
        )
        for member in _members(model)
    ]


def _keel(model: Transformer) -> Callable[[], object]:
    matrices, parameters = _members(model), dict(model.named_parameters())
    names = {member.parameter for member in matrices}
    weights = {name: parameters[name].detach().clone() for name in names}
    gradients = {name: parameters[name].grad.clone() for name in names}
    optimizer = Optimizer(weights, matrices, OptimConfig(muon=MuonConfig(update_rms=UPDATE_RMS)))
    return lambda: optimizer.step(gradients, rate=RATE)


def _torch(matrices: Sequence[Matrix], iterations: int) -> Callable[[], object]:
    parameters = [torch.nn.Parameter(matrix.weight.clone()) for matrix in matrices]
    for parameter, matrix in zip(parameters, matrices, strict=True):
        parameter.grad = matrix.gradient.clone()
    optimizer = torch.optim.Muon(
        parameters, lr=RATE, weight_decay=0.1, momentum=0.95, ns_steps=iterations, adjust_lr_fn="match_rms_adamw"
    )
    return optimizer.step


def _values() -> list[tuple[str, ...]]:
    """The least and the largest singular value of the first update of random matrices, by optimizer."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for R, C in ((128, 128), (64, 256), (256, 512)):
        gradient = torch.randn(R, C, generator=generator)
        scale = RATE * UPDATE_RMS * max(R, C) ** 0.5
        found = {name: torch.linalg.svdvals(move(gradient) / scale) for name, move in MOVES.items()}
        rows.append((f"{R} x {C}", *(f"{one.min():.3f} to {one.max():.3f}" for one in found.values())))
    return rows


def _moved_by_keel(gradient: Tensor) -> Tensor:
    weights = {"w": torch.zeros_like(gradient)}
    member = Member(name="w", parameter="w", start=0, stop=len(gradient), kind="matrix", group="w")
    config = OptimConfig(muon=MuonConfig(update_rms=UPDATE_RMS))
    Optimizer(weights, [member], config).step({"w": gradient}, rate=RATE)
    return weights["w"]


def _moved_by_torch(gradient: Tensor, iterations: int) -> Tensor:
    matrix = Matrix(weight=torch.zeros_like(gradient), gradient=gradient)
    parameter = torch.nn.Parameter(matrix.weight)
    parameter.grad = gradient
    torch.optim.Muon([parameter], lr=RATE, ns_steps=iterations, adjust_lr_fn="match_rms_adamw").step()
    return parameter.detach()


MOVES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "keel": _moved_by_keel,
    "torch 10": lambda gradient: _moved_by_torch(gradient, 10),
    "torch 5": lambda gradient: _moved_by_torch(gradient, 5),
}


if __name__ == "__main__":
    main()
