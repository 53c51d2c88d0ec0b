"""Proves that parameter and FLOP counts are right to the unit.

Oracles: the published totals; the built model (on the meta device for Flash and Pro); torch's flop counter on the
model's own forward and backward pass; loops over positions; the decoding costs of specification 9.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import model.attention
import model.count
from model import indexer
from model.config import CSA_RATIO, AttentionMode, ModelConfig
from model.count import RowFlops, block_pairs, parameters, rule_of_thumb, training_flops, window_pairs
from model.indexer import Indexer
from model.inventory import released_tensors
from model.names import locate, tensors
from model.rope import frequencies, rotation
from model.transformer import Transformer
from model.visibility import layout
from tests.model.released import released_config

PUBLISHED_BILLIONS = {"flash": ("284.33", "6.61", "13.27"), "pro": ("1573.00", "25.84", "48.85")}
"""Main model, MTP block, active per token, in units of 1e9 (spec 1.2)."""

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=5,
    compress_ratios=(0, 4, 16, 4, 16, 0),
    num_attention_heads=6,
    head_dim=20,
    qk_rope_head_dim=8,
    q_lora_rank=14,
    o_groups=2,
    o_lora_rank=10,
    sliding_window=7,
    index_n_heads=3,
    index_head_dim=16,
    index_topk=3,
    n_routed_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=18,
    num_hash_layers=2,
    routed_scaling_factor=1.5,
)
"""Every feature, all sizes different, so that no product can hide behind another."""
VARIANTS = {
    "all features": SMALL,
    "no MTP": replace(SMALL, compress_ratios=SMALL.attention_ratios, num_nextn_predict_layers=0),
    "window only": replace(SMALL, compress_ratios=(0,) * 6),
    "all hashed": replace(SMALL, num_hash_layers=5),
    "two streams": replace(SMALL, hc_mult=2),
}


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_parameters_are_the_published_ones(name: str) -> None:
    counts = parameters(released_config(name))
    figures = (counts.total_main, counts.total_mtp, counts.total_active)
    assert tuple(f"{figure / 1e9:.2f}" for figure in figures) == PUBLISHED_BILLIONS[name]
    assert counts.total == counts.total_main + counts.total_mtp


@pytest.mark.parametrize(("name", "percent"), [("flash", "97.4"), ("pro", "98.4")])
def test_share_of_the_routed_experts(name: str, percent: str) -> None:
    counts = parameters(released_config(name))
    assert f"{100 * (counts.main['experts'] + counts.mtp['experts']) / counts.total:.1f}" == percent


def built_counts(config: ModelConfig) -> tuple[Counter[str], int]:
    """Elements by part of the model as built, `mtp.` before the parts of the MTP block, and those of buffers."""
    with torch.device("meta"):
        built = tensors(Transformer(config))
    sizes = Counter[str]()
    for spec in released_tensors(config, experts=1):
        tensor = built.pop(locate(spec.name).parameter)
        stacked = (config.n_routed_experts,) if spec.group == "experts" else ()
        assert tuple(tensor.shape) == stacked + spec.shape
        assert isinstance(tensor, torch.nn.Parameter) == (spec.kind != "buffer")
        part = ("mtp." if spec.is_mtp else "") + spec.group
        sizes["buffer" if spec.kind == "buffer" else part] += tensor.numel()
    assert not built
    return sizes, sizes.pop("buffer")


def check_against_built(config: ModelConfig) -> None:
    counts = parameters(config)
    sizes, buffers = built_counts(config)
    assert counts.main | {f"mtp.{part}": size for part, size in counts.mtp.items()} == sizes
    assert counts.total == sizes.total()
    assert counts.buffers == buffers


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_built_model(variant: str) -> None:
    check_against_built(VARIANTS[variant])


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_counts_equal_the_built_released_model(name: str) -> None:
    check_against_built(released_config(name))


@pytest.mark.parametrize("end", ["mtp.0.norm.weight", "ffn.gate.bias", "attn_sink", "e_proj.weight", "hc_head_scale"])
def test_a_forgotten_tensor_is_noticed(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [spec for spec in released_tensors(SMALL, experts=1) if not spec.name.endswith(end)]
    monkeypatch.setattr(model.count, "released_tensors", lambda config, *, experts: listed)
    with pytest.raises(AssertionError):
        check_against_built(SMALL)


def test_a_second_head_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = list(released_tensors(SMALL, experts=1))
    listed += [spec for spec in listed if spec.name == "head.weight"]
    monkeypatch.setattr(model.count, "released_tensors", lambda config, *, experts: listed)
    with pytest.raises(AssertionError):
        check_against_built(SMALL)


def test_parameters_are_the_sum_over_every_single_expert() -> None:
    specs = list(released_tensors(SMALL))
    counts = parameters(SMALL)
    assert counts.total == sum(spec.size for spec in specs if spec.kind != "buffer")
    active = [spec for spec in specs if spec.kind != "buffer" and not spec.is_mtp and spec.group != "embedding"]
    unused = [f".experts.{expert}." for expert in range(SMALL.num_experts_per_tok, SMALL.n_routed_experts)]
    assert counts.total_active == sum(spec.size for spec in active if not any(e in spec.name for e in unused))
    assert rule_of_thumb(SMALL, 10) == 60 * counts.total_active


@given(st.integers(1, 70), st.integers(1, 20))
def test_window_pairs_are_the_visible_keys(length: int, window: int) -> None:
    assert window_pairs(length, window) == sum(len(range(max(0, t - window + 1), t + 1)) for t in range(length))


@given(st.integers(1, 70), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 8)))
def test_block_pairs_are_the_complete_blocks(length: int, ratio: int, limit: int | None) -> None:
    complete = [[s for s in range(t + 1) if s * ratio + ratio - 1 <= t][:limit] for t in range(length)]
    assert block_pairs(length, ratio, limit) == sum(len(blocks) for blocks in complete)


@pytest.mark.parametrize("length", [1, 2, 4, 15, 16, 41])
@pytest.mark.parametrize("mode", ["dense", "indexer_warmup", "sparse"])
def test_attention_flops_equal_a_loop_over_positions(length: int, mode: AttentionMode) -> None:
    expected, mtp = Counter[str](), Counter[str]()
    per_key = 4 * SMALL.num_attention_heads * SMALL.head_dim * (1 if mode == "indexer_warmup" else 3)
    per_score = 2 * SMALL.index_n_heads * (SMALL.index_head_dim + 1)
    for t in range(length):
        window = min(t + 1, SMALL.sliding_window)
        blocks, heavy = (t + 1) // 4, (t + 1) // 16
        chosen = min(blocks, SMALL.index_topk) if mode == "sparse" else blocks
        expected["window_attention"] += 5 * per_key * window
        expected["csa_attention"] += 2 * per_key * chosen
        expected["hca_attention"] += 2 * per_key * heavy
        if mode != "dense":
            expected["indexer_scores"] += 2 * per_score * (blocks + 2 * chosen)
        mtp["window_attention"] += per_key * window if t < length - 1 else 0
    flops = training_flops(SMALL, length, mode)
    cores = ("window_attention", "csa_attention", "hca_attention", "indexer_scores")
    assert {part: flops.main[part] for part in cores if part in flops.main} == expected
    assert flops.mtp["window_attention"] == mtp["window_attention"]


def attend_without_products(
    q_BTHC: Tensor, kv_BTC: Tensor, entry_BSC: Tensor | None, sink_H: Tensor, parts: object
) -> tuple[Tensor, Tensor]:
    """Stands in for `attend`: every input gets a gradient, no matrix product is made."""
    o_BTHC = q_BTHC + kv_BTC.unsqueeze(2) + sink_H.unsqueeze(-1)
    if entry_BSC is not None:
        o_BTHC = o_BTHC + entry_BSC.sum(1)[:, None, None]
    return o_BTHC, o_BTHC.detach().sum(-1)


def filled_model(config: ModelConfig) -> Transformer:
    built = Transformer(config)
    with torch.no_grad():
        for tensor in (*built.parameters(), *built.buffers()):
            tensor.copy_(torch.full_like(tensor, 1))
    return built


def without_attention(flops: RowFlops) -> int:
    return flops.total - sum(
        size for parts in (flops.main, flops.mtp) for part, size in parts.items() if part.endswith("_attention")
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_flops_equal_torchs_own_count(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, length = VARIANTS[variant], 37
    monkeypatch.setattr(model.attention, "attend", attend_without_products)
    built = filled_model(config)
    token_BT = torch.arange(length).unsqueeze(0)
    with FlopCounterMode(display=False) as forward:
        output = built(token_BT, mode="dense")
        hidden = [h_BTD for h_BTD in (output.h_BTD, output.mtp_h_BTD) if h_BTD is not None]
        total = torch.stack([built.logits(h_BTD).sum() for h_BTD in hidden]).sum()
    with FlopCounterMode(display=False) as backward:
        total.backward()
    expected = without_attention(training_flops(config, length, "dense"))
    assert forward.get_total_flops() * 3 == expected
    # Per token and site, backwards: `enter` makes a product elementwise (2 N D FLOP less), `expand` the gradients of an
    # elementwise post * y as two products (4 N D more).
    tokens = length * config.num_hidden_layers + (length - 1) * config.num_nextn_predict_layers
    more = 2 * config.hc_mult * config.hidden_size * 2 * tokens
    assert forward.get_total_flops() + backward.get_total_flops() == expected + more


def test_indexer_flops_equal_torchs_own_count() -> None:
    length, blocks = 37, 37 // CSA_RATIO
    module = Indexer(SMALL, torch.float32)
    position_BT = torch.arange(length).unsqueeze(0)
    where = layout(torch.zeros_like(position_BT), position_BT, SMALL.sliding_window, {CSA_RATIO}).blocks[CSA_RATIO]
    turns = [rotation(frequencies(SMALL, compressed=True), p, torch.float32) for p in (position_BT, where.position_BS)]
    h_BTD = torch.ones(1, length, SMALL.hidden_size, requires_grad=True)
    qr_BTQ = torch.ones(1, length, SMALL.q_lora_rank, requires_grad=True)
    with FlopCounterMode(display=False) as linear:
        index = module(h_BTD, qr_BTQ, where, *turns)
        (index.q_BTIJ.sum() + index.k_BSJ.sum() + index.w_BTI.sum()).backward()
    layers = SMALL.attention_ratios.count(CSA_RATIO)
    assert layers * linear.get_total_flops() == training_flops(SMALL, length, "sparse").main["indexer"]
    q, k, w = (x.detach().requires_grad_() for x in (index.q_BTIJ, index.k_BSJ, index.w_BTI))
    with FlopCounterMode(display=False) as scored:
        indexer.scores(q, k, w).sum().backward()
    per_pair = 2 * SMALL.index_n_heads * (SMALL.index_head_dim + 1)
    assert scored.get_total_flops() == 3 * per_pair * length * blocks


def last_position(config: ModelConfig, length: int) -> tuple[int, int]:
    """Forward FLOP of the query at the end of a row: core attention, index scores."""
    longer, shorter = (training_flops(config, n, "sparse").main for n in (length, length - 1))
    cores = ("window_attention", "csa_attention", "hca_attention")
    scores = [training_flops(config, n, "indexer_warmup").main["indexer_scores"] for n in (length, length - 1)]
    return sum(longer[part] - shorter[part] for part in cores) // 3, (scores[0] - scores[1]) // 3


@pytest.mark.parametrize(("name", "core", "scores"), [("flash", 47.2, 45.1), ("pro", 153.3, 64.4)])
def test_decoding_at_a_million_tokens_costs_what_spec_9_derives(name: str, core: float, scores: float) -> None:
    config = released_config(name)
    length = 2**20
    core_flops, score_flops = last_position(config, length)
    # The specification counts a BF16 FLOP twice and an FP4 FLOP half, and leaves out the sum over index heads.
    assert f"{2 * core_flops / 1e9:.1f}" == str(core)
    channels = config.index_head_dim
    assert f"{score_flops * channels / (channels + 1) / 2 / 1e9:.1f}" == str(scores)


def test_top_k_makes_no_difference_where_it_takes_every_block() -> None:
    length = SMALL.index_topk * CSA_RATIO + CSA_RATIO - 1
    dense, sparse = (training_flops(SMALL, length, mode).main for mode in ("dense", "sparse"))
    assert dense == {part: size for part, size in sparse.items() if not part.startswith("indexer")}
    longer = [training_flops(SMALL, length + 1, mode).main["csa_attention"] for mode in ("dense", "sparse")]
    assert longer[0] > longer[1]


def test_flops_without_mtp_and_of_a_single_token() -> None:
    assert training_flops(VARIANTS["no MTP"], 9, "sparse").mtp == {}
    assert sum(training_flops(SMALL, 1, "dense").mtp.values()) == 0
    row = training_flops(SMALL, 9, "dense")
    assert row.per_token * 9 == row.total
    with pytest.raises(ValueError, match="row_length = 0: expected"):
        training_flops(SMALL, 0, "dense")
