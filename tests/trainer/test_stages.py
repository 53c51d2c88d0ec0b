"""Proves that stages have every layer once, in order, and that no other cut has a cheaper dearest rank.

Oracles: all cuts of small models, tried one by one; the FLOP of whole rows (`model.count.training_flops`).
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.compose import compose
from model.config import AttentionMode
from model.count import depth_flops, training_flops
from tests.model.released import released_config
from tests.model.test_count import VARIANTS
from trainer.config import ParallelConfig
from trainer.parallel.stages import balanced, chunk_layers, layers_of_rank, usual_row
from trainer.schedule_config import RowLengthStage

MODELS = {name: released_config(name) for name in ("flash", "pro")} | {"debug": compose([]).config.model} | VARIANTS
MODES: tuple[AttentionMode, ...] = ("dense", "indexer_warmup", "sparse")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row_length", [17, 4096])
@pytest.mark.parametrize("name", MODELS)
def test_flop_by_depth_are_those_of_the_row(name: str, row_length: int, mode: AttentionMode) -> None:
    depth = depth_flops(MODELS[name], row_length, mode)
    assert len(depth.layers) == MODELS[name].num_hidden_layers
    passes = sum(depth.layers, depth.end)
    assert passes.forward + passes.backward == training_flops(MODELS[name], row_length, mode).total
    assert passes.backward == 2 * passes.forward or mode != "dense"


def test_layers_of_a_kind_cost_the_same_and_the_end_has_head_and_mtp() -> None:
    model = MODELS["pro"]
    depth = depth_flops(model, 4096, "sparse")
    costs = {ratio: set[int]() for ratio in model.attention_ratios}
    for ratio, layer in zip(model.attention_ratios, depth.layers, strict=True):
        costs[ratio].add(layer.total)
    assert {len(found) for found in costs.values()} == {1}
    heads = 2 * model.vocab_size * model.hidden_size * 6 * 4095
    assert heads < depth.end.total < heads + 2 * max(max(found) for found in costs.values())


def of(schedule: str, pipe: int) -> ParallelConfig:
    return ParallelConfig(pipe=pipe, schedule="dualpipev" if schedule == "dualpipev" else "1f1b")


def cuts(layers: int, chunks: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut layers into chunks of at least one."""
    for borders in itertools.combinations(range(1, layers), chunks - 1):
        yield tuple(end - first for first, end in itertools.pairwise((0, *borders, layers)))


def costs_of(costs: Sequence[int], sizes: Sequence[int]) -> list[int]:
    borders = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return [sum(costs[first:end]) for first, end in borders]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 5), st.booleans())
def test_no_other_cut_is_better(costs: list[int], ranks: int, folded: bool) -> None:
    chunks = ranks * (2 if folded else 1)
    if chunks > len(costs):
        return

    def merit(sizes: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        chunk = costs_of(costs, sizes)
        shares = [chunk[rank] + chunk[-1 - rank] for rank in range(ranks)] if folded else chunk
        return max(shares), sum(cost**2 for cost in chunk), sizes

    assert balanced(costs, ranks, folded=folded) == min(cuts(len(costs), chunks), key=merit)


@pytest.mark.parametrize(("schedule", "pipe"), [("1f1b", 4), ("1f1b", 8), ("dualpipev", 2), ("dualpipev", 16)])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_ranks_of_released_models_are_close_to_their_mean(name: str, schedule: str, pipe: int) -> None:
    parallel = of(schedule, pipe)
    depth = depth_flops(MODELS[name], 65536, "sparse")
    costs = [layer.total for layer in depth.layers]
    costs[-1] += depth.end.total
    ranks = [layers_of_rank(parallel, MODELS[name], 65536, rank) for rank in range(pipe)]
    shares = [sum(costs[layer] for chunk in own for layer in chunk) for own in ranks]
    assert sum(shares) == sum(costs)
    # No cut is closer than what a layer weighs.
    assert max(shares) - sum(costs) / pipe < max(costs[-1], max(costs))
    chunks = chunk_layers(parallel, MODELS[name], 65536)
    assert [layer for chunk in chunks for layer in chunk] == list(range(len(costs)))
    assert {chunk for own in ranks for chunk in own} == set(chunks)


def test_the_end_counts_as_layers_do() -> None:
    """Head and MTP branch are worth layers, so that the last chunk has fewer."""
    chunks = chunk_layers(of("1f1b", 4), MODELS["pro"], 65536)
    assert [len(chunk) for chunk in chunks] == [16, 16, 16, 13]


def test_given_stages_are_taken_as_they_are() -> None:
    parallel = ParallelConfig(pipe=2, schedule="dualpipev", stages=(1, 1, 2, 1))
    model = VARIANTS["all features"]
    assert chunk_layers(parallel, model, 64) == (range(1), range(1, 2), range(2, 4), range(4, 5))
    assert layers_of_rank(parallel, model, 64, 0) == (range(1), range(4, 5))
    assert layers_of_rank(parallel, model, 64, 1) == (range(1, 2), range(2, 4))


def test_one_rank_has_all_layers() -> None:
    assert layers_of_rank(ParallelConfig(), MODELS["flash"], 4096, 0) == (range(MODELS["flash"].num_hidden_layers),)


def test_the_row_length_of_most_tokens_decides() -> None:
    unit = 1000  # tokens, so that a run has as many as its rates ask for
    schedule = replace(compose([]).config.schedule, total_tokens=1000 * unit)

    def usual(*lengths: tuple[int, int]) -> int:
        stages = tuple(RowLengthStage(from_tokens=start * unit, value=value) for start, value in lengths)
        return usual_row(replace(schedule, row_length=stages))

    assert usual((0, 64)) == 64
    assert usual((0, 64), (300, 128), (900, 256)) == 128
    assert usual((0, 64), (500, 128)) == 128
    assert usual((0, 64), (300, 128), (700, 64)) == 64
    assert usual((0, 64), (900, 128), (5000, 256)) == 64


@pytest.mark.parametrize(("schedule", "most"), [("1f1b", 61), ("dualpipev", 30)])
def test_the_dearest_case_takes_less_than_a_second(schedule: str, most: int) -> None:
    started = time.process_time()
    for pipe in (4, 8, most // 2, most):
        chunk_layers(of(schedule, pipe), MODELS["pro"], 65536)
    assert time.process_time() - started < 4
