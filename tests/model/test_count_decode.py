"""Proves that a decoding step makes the products that are counted, and that a cache has the bytes that are counted."""

import itertools
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.cache import allocate
from model.config import AttentionMode
from model.count_decode import cache_bytes, decode_flops
from model.decode import prefill, step
from model.transformer import Transformer
from tests.model.released import released_config
from tests.model.test_count import SMALL, filled_model

MODES: tuple[AttentionMode, ...] = ("dense", "indexer_warmup", "sparse")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return filled_model(SMALL)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [24, 41, 64, 97, 150])
def test_a_step_makes_the_products_that_are_counted(model: Transformer, context: int, mode: AttentionMode) -> None:
    """Torch's own count, at contexts that fill the window: a step always reads all of it."""
    assert context >= SMALL.sliding_window
    token_BT = torch.arange(context).unsqueeze(0) % SMALL.vocab_size
    cache, _ = prefill(model, token_BT[:, :-1], [context - 1], limit=context, mode=mode)
    with FlopCounterMode(display=False) as counted:
        step(model, cache, token_BT[:, -1])
    assert counted.get_total_flops() == sum(decode_flops(SMALL, context, mode).values())


@pytest.mark.parametrize("mode", MODES)
def test_attention_per_token_is_window_and_entries(mode: AttentionMode) -> None:
    pair, score = 4 * SMALL.num_attention_heads * SMALL.head_dim, 2 * SMALL.index_n_heads * (SMALL.index_head_dim + 1)
    for context in (1, 3, 4, 16, 17, 1000):
        blocks = context // 4
        chosen = min(blocks, SMALL.index_topk) if mode == "sparse" else blocks
        expected = Counter(
            window_attention=5 * pair * min(context, SMALL.sliding_window),
            csa_attention=2 * pair * chosen,
            hca_attention=2 * pair * (context // 16),
            indexer_scores=2 * score * blocks if mode == "sparse" else 0,
        )
        found = decode_flops(SMALL, context, mode)
        assert {part: found.get(part, 0) for part in expected} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_cache_has_the_bytes_that_are_counted(mode: AttentionMode, dtype: torch.dtype) -> None:
    for config, (rows, limit) in itertools.product((SMALL, released_config("debug")), ((1, 1), (3, 97), (2, 1024))):
        cache = allocate(config, rows, limit, mode, dtype, torch.device("cpu"))
        assert cache.size_bytes() == rows * cache_bytes(config, limit, mode, dtype.itemsize).total


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_released_models_caches(name: str) -> None:
    """On torch's meta device, which allocates nothing."""
    config = released_config(name)
    cache = allocate(config, 1, 2**20, "sparse", torch.bfloat16, torch.device("meta"))
    counted = cache_bytes(config, 2**20, "sparse", 2)
    assert cache.size_bytes() == counted.total
    # By hand: per token and layer 512 / 4 + 128 / 4 numbers in CSA, 512 / 128 in HCA.
    csa, hca = (config.attention_ratios.count(ratio) for ratio in (4, 128))
    assert counted.entries + counted.index_keys == 2 * 2**20 * (csa * 160 + hca * 4)


def test_decoding_leaves_the_cache_at_its_size(model: Transformer) -> None:
    cache, _ = prefill(model, torch.zeros(2, 5, dtype=torch.int64), [5, 2], limit=40, mode="sparse")
    before = cache.size_bytes()
    for _ in range(30):
        step(model, cache, torch.zeros(2, dtype=torch.int64))
    assert cache.size_bytes() == before == 2 * cache_bytes(SMALL, 40, "sparse", 4).total
