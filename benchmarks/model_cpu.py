"""How fast does the plain model train on a CPU, and how do time and memory grow with the row?

    python -m benchmarks.model_cpu [--lengths T ...] [--rounds N] [--quick]

Forward and backward of one row of one document in fp32 with two threads, the same sizes and weights in every column:
"transformers" is its `deepseek_v4` (`./keel test` installs it; left out where it is absent), "keel" our model with a
product cut between two threads, "2 rows" the same on two rows side by side, one core each, as the trainer does it. Ours
also measures the indexer's KL loss, which transformers has not. Every figure is the median over processes of their own,
which take turns; memory is the growth of the process's largest resident size over the steps.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import report
from model.config import InitConfig, ModelConfig
from model.count import training_flops
from model.init import initialize
from model.losses import cross_entropy_sum
from model.transformer import Transformer
from trainer.pool import RowPool

LENGTHS = (512, 1024, 2048, 4096, 8192)
OURS, ROWS, THEIRS = "keel", "2 rows", "transformers"
DENSE_LIMIT = 4096
"""The longest row for transformers: it keeps dense scores of every layer, 30 GB at 8192."""
MIB = 1 << 20


def config(T: int) -> ModelConfig:
    """18.6 million parameters: 8 layers of every kind of attention, without MTP."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=8,
        compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128),
        num_attention_heads=8,
        head_dim=64,
        qk_rope_head_dim=32,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=64,
        sliding_window=128,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        moe_intermediate_size=256,
        num_hash_layers=2,
        num_nextn_predict_layers=0,
        max_position_embeddings=max(T, 4096),
    )


def main() -> None:
    """Print tokens per second, memory and their growth by row length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure")
    parser.add_argument("--quick", action="store_true", help="rows of 256 and 512 tokens, one round")
    parser.add_argument("--child", nargs=2, metavar=("WHO", "T"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(_measure(given.child[0], int(given.child[1]))))
        return
    lengths, rounds = ((256, 512), 1) if given.quick else (given.lengths, given.rounds)
    who = (OURS, ROWS, *([THEIRS] if find_spec("transformers") else []))
    found = {T: _rounds([name for name in who if name != THEIRS or T <= DENSE_LIMIT], T, rounds) for T in lengths}
    settings = config(max(lengths))
    shapes = (
        f"8 layers, hidden {settings.hidden_size}, fp32, 1 row (2 in column '{ROWS}'), median of {rounds} processes"
    )
    print(report.heading("benchmarks.model_cpu", shapes))
    if THEIRS in who:
        print(f"equal     logits of both models at T = 256: largest difference {_difference():.1e}")
    print("\ntokens per second, forward and backward")
    print(report.table([("T", *who, "keel / transformers"), *(_speeds(T, found[T], who) for T in lengths)]))
    print("\nMiB above the model's own")
    print(report.table([("T", *who, "keel / transformers"), *(_memories(T, found[T], who) for T in lengths)]))
    torch.set_num_threads(2)
    rate = product_rate(1024)
    print(f"\nfloor: model FLOP (matrix products) over the product rate of two threads, {rate / 1e9:.0f} GFLOP/s")
    print(report.table([("T", "GFLOP", "floor s", "keel s", "share"), *(_floor(T, found[T], rate) for T in lengths)]))


def _rounds(who: Sequence[str], T: int, rounds: int) -> dict[str, tuple[float, float]]:
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in who}
    for _ in range(rounds):
        for name in who:
            command = [sys.executable, "-m", "benchmarks.model_cpu", "--child", name, str(T)]
            runs[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(
                f"{name}, T = {T}: {runs[name][-1][0]:.3f} s, {runs[name][-1][1]:,.0f} MiB", file=sys.stderr, flush=True
            )
    return {name: (_median(values, 0), _median(values, 1)) for name, values in runs.items()}


def _median(values: Sequence[tuple[float, float]], index: int) -> float:
    return statistics.median(value[index] for value in values)


def _measure(who: str, T: int) -> tuple[float, float]:
    """Median seconds of a step, and MiB that the process grew by."""
    torch.set_num_threads(1 if who == ROWS else 2)
    token_BT = torch.randint(0, config(T).vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    step = _their_step(token_BT[:1]) if who == THEIRS else _our_step(token_BT if who == ROWS else token_BT[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds, begun = [], time.perf_counter()
    step()
    while not seconds or (time.perf_counter() - begun < 5) or (len(seconds) < 3 and time.perf_counter() - begun < 60):
        seconds.append(report.timed(step))
    return statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _model(T: int) -> Transformer:
    model = Transformer(config(T), torch.float32)
    initialize(model, InitConfig(), 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def _our_step(token_BT: Tensor) -> Callable[[], None]:
    pool = RowPool(_model(token_BT.shape[1]), len(token_BT))

    def row(model: Transformer, token_T: Tensor) -> None:
        output = model(token_T.unsqueeze(0))
        cross_entropy_sum(output.h_BTD[:, :-1], model.head.weight, token_T[None, 1:]).backward()

    return lambda: [None for _ in pool.map(row, token_BT)].clear()


def _their_step(token_BT: Tensor) -> Callable[[], None]:
    from benchmarks.transformers_model import build

    model = build(_model(token_BT.shape[1]))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def row() -> None:
        logits_BTV = model(token_BT, use_cache=False).logits
        F.cross_entropy(logits_BTV[0, :-1], token_BT[0, 1:], reduction="sum").backward()

    return row


def _difference() -> float:
    from benchmarks.transformers_model import build

    torch.set_num_threads(1)
    model, token_BT = _model(256), torch.arange(256).unsqueeze(0)
    with torch.no_grad():
        return float((model.logits(model(token_BT).h_BTD) - build(model)(token_BT).logits).abs().max())


def _speeds(T: int, found: dict[str, tuple[float, float]], who: Sequence[str]) -> tuple[str, ...]:
    speeds = {name: (2 if name == ROWS else 1) * T / seconds for name, (seconds, _) in found.items()}
    ratio = f"{speeds[OURS] / speeds[THEIRS]:.1f}" if THEIRS in speeds else "-"
    return (f"{T}", *(f"{speeds[name]:,.0f}" if name in speeds else "-" for name in who), ratio)


def _memories(T: int, found: dict[str, tuple[float, float]], who: Sequence[str]) -> tuple[str, ...]:
    ratio = f"{found[OURS][1] / found[THEIRS][1]:.2f}" if THEIRS in found else "-"
    return (f"{T}", *(f"{found[name][1]:,.0f}" if name in found else "-" for name in who), ratio)


def product_rate(side: int) -> float:
    """FLOP per second of a product of fp32 square matrices on torch's threads, the best of a second."""
    a, seconds, begun = torch.ones(side, side), [], time.perf_counter()
    while time.perf_counter() - begun < 1:
        seconds.append(report.timed(lambda: a @ a))
    return 2 * side**3 / min(seconds)


def _floor(T: int, found: dict[str, tuple[float, float]], rate: float) -> tuple[str, ...]:
    flop = training_flops(config(T), T, "sparse").total
    floor, seconds = flop / rate, found[OURS][0]
    return (f"{T}", f"{flop / 1e9:.1f}", f"{floor:.3f}", f"{seconds:.3f}", f"{floor / seconds:.0%}")


if __name__ == "__main__":
    main()
