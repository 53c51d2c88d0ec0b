"""What does a generated token cost as the context grows, in time and in cache, and what would it cost without a cache?

    python -m benchmarks.decode [--model NAME] [--contexts T ...] [--forward-limit T] [--quick]

One row is generated from its bos token to the longest context, always the likeliest token, by a model of
configs/model/NAME.yaml with initial values, sparse mode, fp32 on a CPU. "step" is the median of the last tokens before
each context, "forward" the whole forward pass over as many tokens: what a token costs without a cache. "counted" is
`model.count_decode` from the configuration alone. "x" columns are relative to the first row: the shapes of both curves.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import report
from launch.compose import compose
from model.cache import allocate
from model.config import AttentionMode, InitConfig, ModelConfig
from model.count_decode import cache_bytes, decode_flops
from model.decode import prefill, step
from model.init import initialize
from model.transformer import Transformer

MODE: AttentionMode = "sparse"
CONTEXTS, QUICK = (1024, 2048, 4096, 8192, 16384, 32768, 65536), (128, 256, 512)
TIMED = 64
"""Tokens whose median is the time at a context."""
COLUMNS = (
    "context",
    "step ms",
    "tokens/s",
    "x",
    "counted MFLOP",
    "x",
    "forward ms",
    "forward / step",
    "cache bytes",
    "counted",
    "bytes per token",
)


def main() -> None:
    """Print one table, a row for each context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="debug", help="a file of configs/model (default: debug)")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="T", help="default: 1024 to 65536")
    parser.add_argument("--forward-limit", type=int, default=16384, help="no whole forward pass over more tokens")
    parser.add_argument("--quick", action="store_true", help="contexts of up to 512 tokens")
    given = parser.parse_args()
    contexts = sorted(given.contexts or (QUICK if given.quick else CONTEXTS))
    torch.set_num_threads(1)
    config = replace(compose([f"model={given.model}"]).config.model, max_position_embeddings=contexts[-1])
    model = Transformer(config)
    initialize(model, InitConfig(), seed=1)
    token_T, step_s = _generated(model, contexts)
    forward_s = {context: _forward(model, token_T[:context]) for context in contexts if context <= given.forward_limit}
    rows = [_row(config, context, contexts[0], step_s, forward_s) for context in contexts]
    ratios = ", ".join(map(str, config.attention_ratios))
    shapes = (
        f"B 1, D {config.hidden_size}, layers {ratios}, window {config.sliding_window}, top-k {config.index_topk}, "
        f"{MODE}, fp32, one thread; medians of {TIMED} tokens"
    )
    print(report.heading("benchmarks.decode", shapes))
    print()
    print(report.table([COLUMNS, *rows]))


def _generated(model: Transformer, contexts: Sequence[int]) -> tuple[Tensor, dict[int, float]]:
    """The row, as long as the longest context, and the median seconds of a token before each context."""
    token_B = torch.tensor([model.config.bos_token_id])
    cache, logits_BV = prefill(model, token_B.unsqueeze(1), [1], limit=contexts[-1], mode=MODE)
    tokens, seconds, found = [int(token_B)], list[float](), {}

    def advance() -> None:
        nonlocal token_B, logits_BV
        token_B = logits_BV.argmax(-1)
        logits_BV = step(model, cache, token_B)

    while len(tokens) < contexts[-1]:
        seconds.append(report.timed(advance))
        tokens.append(int(token_B))
        if len(tokens) in contexts:
            found[len(tokens)] = statistics.median(seconds[-TIMED:])
            print(f"{len(tokens):,} tokens in {sum(seconds):.0f} s", file=sys.stderr, flush=True)
    return torch.tensor(tokens), found


def _forward(model: Transformer, token_T: Tensor) -> float:
    """Seconds of the whole forward pass and the logits of its last token."""

    @torch.no_grad()
    def whole() -> None:
        model.logits(model(token_T.unsqueeze(0), mode=MODE).h_BTD[:, -1:])

    return report.timed(whole)


def _row(
    config: ModelConfig, context: int, first: int, step_s: dict[int, float], forward_s: dict[int, float]
) -> tuple[str, ...]:
    flops = {length: sum(decode_flops(config, length, MODE).values()) for length in (first, context)}
    held = allocate(config, 1, context, MODE, torch.float32, torch.device("cpu")).size_bytes()
    seconds, whole = step_s[context], forward_s.get(context)
    return (
        f"{context:,}",
        f"{seconds * 1e3:.2f}",
        f"{1 / seconds:,.0f}",
        f"{seconds / step_s[first]:.2f}",
        f"{flops[context] / 1e6:.2f}",
        f"{flops[context] / flops[first]:.2f}",
        "-" if whole is None else f"{whole * 1e3:,.0f}",
        "-" if whole is None else f"{whole / seconds:,.0f}",
        f"{held:,}",
        f"{cache_bytes(config, context, MODE, 4).total:,}",
        f"{held / context:,.0f}",
    )


if __name__ == "__main__":
    main()
