"""How much memory does one attention layer need, forwards and backwards, as a row gets longer?

    python -m benchmarks.attention_memory [--model NAME] [--mode dense|indexer_warmup|sparse] [--lengths T ...]

One row of one document through a CSA and an HCA layer of configs/model/NAME.yaml, fp32 on a CPU. "kept" is what the
forward pass leaves alive for the backward pass (its output included), "peak" the most that is alive after any operation
of both; the input, the weights and their gradients are not counted. "T x S scores" is one fp32 score per head, token
and block: what an attention that forms them whole would add for the blocks alone.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import report
from launch.compose import compose
from model.attention import Attention, Place
from model.config import CSA_RATIO, ModelConfig
from model.rope import frequencies, rotation
from model.visibility import layout

LENGTHS = (512, 1024, 2048, 4096, 8192)
COLUMNS = ("T", "kept MiB", "kept KiB per token", "peak MiB", "peak KiB per token", "T x S scores MiB")
MIB, KIB = 1 << 20, 1 << 10


class Storages(TorchDispatchMode):
    """Follows the storage of every tensor that an operation makes; sums those alive after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._alive[reference.cdata] = (reference, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes())
        return result

    def alive_bytes(self) -> int:
        """Bytes of the storages that somebody still holds."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())


def main() -> None:
    """Print one table for each of the two layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="debug", help="a file of configs/model (default: debug)")
    parser.add_argument("--mode", default="sparse", choices=("dense", "indexer_warmup", "sparse"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = compose([f"model={given.model}"]).config.model
    tables = []
    for ratio in _ratios(config):
        kind = "CSA" if ratio == CSA_RATIO else "HCA"
        rows = [_measure(config, ratio, given.mode, T) for T in given.lengths]
        tables.append(f"\n{kind}, one block per {ratio} tokens, {given.mode}\n{report.table([COLUMNS, *rows])}")
    H, C = config.num_attention_heads, config.head_dim
    shapes = f"B 1, D {config.hidden_size}, H {H}, C {C}, window {config.sliding_window}, top-k {config.index_topk}"
    print(report.heading("benchmarks.attention_memory", shapes))
    print("\n".join(tables))


def _ratios(config: ModelConfig) -> Sequence[int]:
    other = sorted(set(config.attention_ratios) - {0, CSA_RATIO})
    if CSA_RATIO not in config.attention_ratios or not other:
        sys.exit(f"--model: expected one with CSA and HCA layers, not compress_ratios {config.compress_ratios}")
    return (CSA_RATIO, other[0])


def _measure(config: ModelConfig, ratio: int, mode: Any, T: int) -> tuple[str, ...]:
    layer = Attention(config, ratio, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
        parameter.grad = torch.zeros_like(parameter)
    h_BTD = torch.randn(1, T, config.hidden_size, generator=generator).requires_grad_()
    place = _place(config, ratio, mode, T)
    with Storages() as storages:
        y_BTD, statistics = layer(h_BTD, place)
        kept = storages.alive_bytes()
        total = y_BTD.sum() if statistics is None else y_BTD.sum() + statistics.kl_sum
        total.backward()
    scores = 4 * config.num_attention_heads * T * (T // ratio)
    peak = storages.peak_bytes
    sizes = (f"{kept / MIB:.2f}", f"{kept / KIB / T:.2f}", f"{peak / MIB:.2f}", f"{peak / KIB / T:.2f}")
    return (f"{T:,}", *sizes, f"{scores / MIB:.2f}")


def _place(config: ModelConfig, ratio: int, mode: Any, T: int) -> Place:
    position_BT = torch.arange(T).unsqueeze(0)
    where = layout(torch.zeros_like(position_BT), position_BT, config.sliding_window, {ratio})
    frequency_R = frequencies(config, compressed=True)
    return Place(
        layout=where,
        token_turn={ratio: rotation(frequency_R, position_BT, torch.float32)},
        block_turn={ratio: rotation(frequency_R, where.blocks[ratio].position_BS, torch.float32)},
        mode=mode,
    )


if __name__ == "__main__":
    main()
