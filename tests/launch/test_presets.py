"""Proves that flash and pro have the released keys and the published recipe, and debug and small every feature."""

from bisect import bisect_left
from dataclasses import asdict
from typing import Any

import pytest

from launch.compose import compose
from optim.config import OptimConfig
from trainer.config import TrainConfig
from trainer.schedule import plan

T = 10**12

# Keys and values of the two released config.json files, written down apart from configs/.
COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "compress_rope_theta": 160000.0,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "max_position_embeddings": 1048576,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "rope_theta": 10000.0,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
FLASH = COMMON | {
    "hidden_size": 4096,
    "index_topk": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_hidden_layers": 43,
    "o_groups": 8,
    "q_lora_rank": 1024,
    "routed_scaling_factor": 1.5,
    "compress_ratios": (0, 0, *(4, 128) * 20, 4, 0),
}
PRO = COMMON | {
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
    "compress_ratios": (128, 128, *(4, 128) * 29, 4, 0),
}


@pytest.fixture(scope="module")
def recipes() -> dict[str, TrainConfig]:
    return {name: compose([f"recipe={name}"]).config for name in ("debug", "flash", "pro")}


@pytest.mark.parametrize(("name", "released"), [("flash", FLASH), ("pro", PRO)])
def test_the_model_is_the_released_one(recipes: dict[str, TrainConfig], name: str, released: dict[str, Any]) -> None:
    assert asdict(recipes[name].model) == released
    assert len(released["compress_ratios"]) == released["num_hidden_layers"] + 1
    assert recipes[name].precision.dtype == "bf16"
    assert recipes[name].data.tokenizer.kind == "deepseek"


@pytest.mark.parametrize(
    ("name", "tokens", "peak", "final", "rows", "first_rows", "dense"),
    [("flash", 32 * T, 2.7e-4, 2.7e-5, 18432, 3686, T), ("pro", 33 * T, 2.0e-4, 2.0e-5, 23040, 4608, 3 * T // 2)],
)
def test_the_schedule_is_the_published_one(
    recipes: dict[str, TrainConfig],
    name: str,
    tokens: int,
    peak: float,
    final: float,
    rows: int,
    first_rows: int,
    dense: int,
) -> None:
    schedule = recipes[name].schedule
    assert (schedule.total_tokens, schedule.rate.peak, schedule.rate.final) == (tokens, peak, final)
    assert schedule.batch.tokens == rows * 4096
    assert schedule.batch.start_tokens == first_rows * 4096
    assert schedule.batch.start_tokens / schedule.batch.tokens == pytest.approx(1 / 5, rel=1e-3)
    assert schedule.batch.ramp_tokens * 1000 == tokens * 15
    assert schedule.rate.decay_start_tokens * 10 == tokens * 7
    assert [stage.value for stage in schedule.row_length] == [4096, 16384, 65536, 1048576]
    assert [(stage.from_tokens, stage.value) for stage in schedule.attention] == [
        (0, "dense"),
        (dense, "indexer_warmup"),
        (schedule.attention[2].from_tokens, "sparse"),
    ]
    assert schedule.row_length[2].from_tokens == dense, "sparse attention comes with rows of 64K"
    assert [(stage.from_tokens, stage.value) for stage in schedule.mtp_weight] == [(0, 0.3), (tokens * 7 // 10, 0.1)]


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_warm_up_ends_after_2000_steps(recipes: dict[str, TrainConfig], name: str) -> None:
    schedule = recipes[name].schedule
    steps = plan(schedule)
    assert steps[2000].tokens == schedule.rate.warmup_tokens
    assert steps[1998].rate < steps[1999].rate == schedule.rate.peak


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_indexer_warms_up_as_in_v32(recipes: dict[str, TrainConfig], name: str) -> None:
    """V3.2 2.1: 1000 steps of 16 rows of 128K tokens at 1e-3; here of 32 rows of 64K."""
    schedule = recipes[name].schedule
    steps = plan(schedule)
    first = bisect_left(range(len(steps)), True, key=lambda step: steps[step].attention != "dense")
    sparse = bisect_left(range(len(steps)), True, key=lambda step: steps[step].attention == "sparse")
    assert sparse - first == 1000
    warm_up = steps[first:sparse]
    assert {(step.rows, step.row_length, step.rate) for step in warm_up} == {(32, 65536, 1e-3)}
    assert {step.rows * step.row_length for step in warm_up} == {16 * 131072}
    assert steps[first - 1].tokens < schedule.attention[1].from_tokens <= steps[first].tokens
    assert steps[sparse].tokens == schedule.attention[2].from_tokens
    assert steps[sparse].rows == schedule.batch.tokens // 65536


def test_the_optimizer_file_shows_the_class_defaults(recipes: dict[str, TrainConfig]) -> None:
    assert all(config.optim == OptimConfig() for config in recipes.values())


@pytest.mark.parametrize("name", ["debug", "small"])
def test_the_small_models_have_every_feature(name: str) -> None:
    model = compose([f"model={name}"]).config.model
    assert set(model.attention_ratios) >= {0, 4}
    assert any(ratio > 4 for ratio in model.attention_ratios)
    assert 0 < model.num_hash_layers < model.num_hidden_layers
    assert model.num_nextn_predict_layers == 1
    assert model.num_experts_per_tok < model.n_routed_experts


def test_the_debug_run_goes_through_every_stage(recipes: dict[str, TrainConfig]) -> None:
    config = recipes["debug"]
    steps = list(plan(config.schedule))
    assert list(dict.fromkeys(step.attention for step in steps)) == ["dense", "indexer_warmup", "sparse"]
    assert list(dict.fromkeys(step.mtp_weight for step in steps)) == [0.3, 0.1]
    assert len({step.rows for step in steps}) > 1, "the batch grows"
    blocks = config.schedule.row_length[-1].value // 4
    assert config.model.index_topk < blocks, "the indexer has to choose"
