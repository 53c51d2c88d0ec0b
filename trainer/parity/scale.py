"""A configuration scaled down until a laptop runs it in seconds, with every feature that it has still on."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.config import TokenizerConfig
from model.config import CSA_RATIO, AttentionMode, ModelConfig
from trainer.config import ParallelConfig, ProfileConfig, SampleConfig, TrainConfig
from trainer.schedule_config import (
    AttentionStage,
    BatchConfig,
    MtpWeightStage,
    RateConfig,
    RowLengthStage,
    ScheduleConfig,
)

ROW_LENGTH, VOCABULARY, HCA_RATIO = 64, 256, 16
STEPS = 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 4,
    "moe_intermediate_size": 32,
}
"""In place of the model's own where those are larger; the head's channels and those that depend on them always."""


def scaled(config: TrainConfig) -> TrainConfig:
    """The same recipe with a small model and a schedule of STEPS steps; layout and precision as they are."""
    model = scaled_model(config.model, config.parallel.expert, config.parallel.chunks)
    return replace(
        config,
        model=model,
        schedule=_schedule(config.schedule, config.parallel, indexed=CSA_RATIO in model.attention_ratios),
        data=replace(config.data, tokenizer=TokenizerConfig(kind="deepseek")),
        sample=SampleConfig(tokens=0),
        profile=ProfileConfig(),
    )


def scaled_model(model: ModelConfig, expert_ranks: int, chunks: int = 1) -> ModelConfig:
    """One layer of each kind of attention in the model's order, at least one of each kind of routing, MTP as it is.

    More of them where the layers are cut into more chunks.
    """
    ratios = [ratio if ratio in (0, CSA_RATIO) else HCA_RATIO for ratio in dict.fromkeys(model.attention_ratios)]
    hashed = min(model.num_hash_layers, 1)
    learned = model.num_hash_layers < model.num_hidden_layers
    ratios += ratios[-1:] * (max(hashed + learned, chunks) - len(ratios))
    chosen = min(model.num_experts_per_tok, 2)
    sizes: dict[str, Any] = {key: min(getattr(model, key), size) for key, size in SIZES.items()}
    # Channels of heads are cut in groups and halves: all of them together, or none fits.
    sizes |= {key: SIZES[key] for key in ("num_attention_heads", "head_dim", "qk_rope_head_dim", "o_groups")}
    sizes |= {key: SIZES[key] for key in ("index_head_dim", "moe_intermediate_size", "hidden_size", "vocab_size")}
    return replace(
        model,
        **sizes,
        num_hidden_layers=len(ratios),
        compress_ratios=(*ratios, *[0] * model.num_nextn_predict_layers),
        num_hash_layers=hashed if learned else len(ratios),
        n_routed_experts=expert_ranks * -(-4 // expert_ranks),
        num_experts_per_tok=chosen,
    )


def _schedule(given: ScheduleConfig, parallel: ParallelConfig, *, indexed: bool) -> ScheduleConfig:
    """STEPS steps: batches that grow and divide by no number of ranks, every stage of attention, the recipe's rates.

    Its own schedule's tokens would take forever; rates, weights and the order of the stages are the recipe's.
    """
    rows = max(2, parallel.chunks) * parallel.data + 1
    total = STEPS * rows * ROW_LENGTH
    stages: list[AttentionMode] = ["dense", "indexer_warmup", "sparse"] if indexed else ["dense"]
    return ScheduleConfig(
        total_tokens=total,
        rate=RateConfig(
            peak=given.rate.peak, final=given.rate.final, warmup_tokens=total // 6, decay_start_tokens=total // 2
        ),
        batch=BatchConfig(tokens=rows * ROW_LENGTH, start_tokens=rows * ROW_LENGTH),
        row_length=(RowLengthStage(from_tokens=0, value=ROW_LENGTH),),
        attention=tuple(
            AttentionStage(from_tokens=at * total // len(stages), value=stage) for at, stage in enumerate(stages)
        ),
        mtp_weight=(MtpWeightStage(from_tokens=0, value=given.mtp_weight[0].value),),
        indexer_warmup_rate=given.indexer_warmup_rate,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeUpRows:
    """Rows of several documents, a function of the seed and the row's number: what a layout reads, any other reads."""

    seed: int
    source_names: tuple[str, ...] = ("made up",)

    def rows(self, segment: int, first: int, count: int) -> Batch:
        """As `data.stream.Stream.rows`."""
        made = [self._row(segment, number) for number in range(first, first + count)]
        columns = zip(*made, strict=True) if made else [()] * 4
        token_BT, target_BT, document_BT, position_BT = (_stack(column) for column in columns)
        source_B = torch.zeros(count, dtype=torch.int64)
        return Batch(
            token_BT=token_BT, target_BT=target_BT, document_BT=document_BT, position_BT=position_BT, source_B=source_B
        )

    def _row(self, segment: int, number: int) -> tuple[np.ndarray, ...]:
        draw = np.random.default_rng((self.seed, segment, number))
        token_T = draw.integers(3, VOCABULARY, ROW_LENGTH)
        filled = int(draw.integers(ROW_LENGTH // 2, ROW_LENGTH + 1))
        cuts = np.sort(draw.integers(1, filled, 2))
        document_T = np.searchsorted(cuts, np.arange(ROW_LENGTH), side="right")
        document_T[filled:] = -1
        target_T = np.where(document_T == np.append(document_T[1:], -2), np.append(token_T[1:], 0), -1)
        target_T[filled - 1 :] = -1
        starts = np.flatnonzero(np.diff(document_T, prepend=-2))
        position_T = np.arange(ROW_LENGTH) - np.repeat(starts, np.diff(np.append(starts, ROW_LENGTH)))
        return token_T, target_T, document_T, position_T


def _stack(rows: tuple[np.ndarray, ...]) -> Tensor:
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, ROW_LENGTH, dtype=torch.int64)
