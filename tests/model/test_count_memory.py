"""Proves that the bytes counted for a row are those that its forward pass keeps, for each mode, type and recomputation.

Oracle: every storage that the training of a row makes is followed (tests/model/test_memory.py); at the end of the
forward pass those alive are what is kept. All sizes differ, so that no letter can stand for another.
"""

from collections.abc import Callable, Collection, Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from data.batch import Batch
from model import count_kept, losses
from model.config import AttentionMode, InitConfig, ModelConfig
from model.count_memory import kept_bytes, phases
from model.init import initialize
from model.logical import logical_tensors
from model.transformer import Transformer
from tests.model.test_memory import Storages
from tests.runs import tiny
from trainer import row
from trainer.config import Recomputed
from trainer.laps import Laps
from trainer.parallel.recompute import apply_recompute
from trainer.step import frozen_groups, learn, train_only

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "compress_ratios": (0, 4, 8, 4, 6, 0),
    "num_attention_heads": 6,
    "head_dim": 10,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 14,
    "o_groups": 3,
    "o_lora_rank": 9,
    "index_n_heads": 5,
    "index_head_dim": 12,
    "index_topk": 3,
    "n_routed_experts": 7,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 11,
    "num_hash_layers": 2,
    "hc_mult": 3,
}
MODEL = tiny.model(**SIZES)
WITHOUT_MTP = tiny.model(**SIZES | {"compress_ratios": (0, 4, 8, 4, 6), "num_nextn_predict_layers": 0})
WITHOUT_WINDOW_LAYERS = tiny.model(**SIZES | {"compress_ratios": (4, 8, 4, 8, 8, 0)})
BYTES = {torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}
SCALARS = 200
"""Bytes that are not counted: a few numbers per layer, measured 30 to 100."""
RECOMPUTED: tuple[tuple[Recomputed, ...], ...] = (
    (),
    ("attention",),
    ("experts",),
    ("attention", "experts"),
    ("block",),
    ("attention", "block"),
)


class _Done(Exception):
    """The forward pass is over; what follows is not asked for."""


class _Meter(Laps):
    """Notes what is alive at each lap, the first of which is the beginning."""

    def __init__(self, storages: Storages) -> None:
        self.storages, self.alive = storages, []
        super().__init__(torch.device("cpu"))

    def mark(self) -> None:
        self.alive.append(self.storages.alive_bytes())
        if len(self.alive) > 1:
            raise _Done


def make_row(length: int) -> Batch:
    """Three documents and some padding."""
    draw = torch.Generator().manual_seed(length)
    token_BT = torch.randint(0, tiny.VOCABULARY, (1, length + 1), generator=draw)
    document_T = torch.arange(length) * 4 // length
    position_T = torch.arange(length) - torch.searchsorted(document_T, document_T)
    return Batch(
        token_BT=token_BT[:, :-1].clone(),
        target_BT=token_BT[:, 1:].clone(),
        document_BT=document_T.masked_fill(document_T == 3, -1).unsqueeze(0),
        position_BT=position_T.unsqueeze(0),
        source_B=torch.zeros(1, dtype=torch.int64),
    )


def nothing(model: Transformer) -> Sequence[Tensor]:
    """Leaves a model as it is."""
    return ()


def measure(
    config: ModelConfig,
    length: int,
    mode: AttentionMode,
    recompute: Collection[Recomputed],
    dtype: torch.dtype,
    change: Callable[[Transformer], Sequence[Tensor]] = nothing,
) -> int:
    """Bytes alive at the end of a row's forward pass, as a step runs it, parameters and the row apart.

    change: the model before, and returns what else is apart.
    """
    model = Transformer(config, dtype)
    initialize(model, InitConfig(), 1)
    model.share_weights()
    apply_recompute(model, tuple(recompute))
    groups: dict[str, str] = {one.parameter: one.group for one in logical_tensors(config)}
    train_only(model, groups, frozen_groups(mode, groups))
    one = make_row(length)
    weights = row.weigh(row.count_rows(one), mtp=0.3, balance=1e-4, indexer=1.0)
    given: list[Tensor] = [*change(model), *model.parameters(), *model.buffers(), one.token_BT, one.target_BT]
    given += [one.document_BT, one.position_BT]
    with Storages(apart=given) as storages:
        meter = _Meter(storages)
        with pytest.raises(_Done):
            learn(model, one, mode, weights, meter)
    return meter.alive[1]


def check(
    config: ModelConfig, length: int, mode: AttentionMode, recompute: Collection[Recomputed], dtype: torch.dtype
) -> None:
    kept = measure(config, length, mode, recompute, dtype)
    counted = sum(kept_bytes(config, length, mode, recompute, BYTES[dtype]).values())
    assert 0 <= kept - counted <= SCALARS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", get_args(AttentionMode))
@pytest.mark.parametrize("recompute", RECOMPUTED, ids="+".join)
def test_kept_bytes_are_counted(recompute: tuple[Recomputed, ...], mode: AttentionMode, dtype: torch.dtype) -> None:
    check(MODEL, 61, mode, recompute, dtype)


@pytest.mark.parametrize("mode", get_args(AttentionMode))
@pytest.mark.parametrize("config", [MODEL, WITHOUT_MTP, WITHOUT_WINDOW_LAYERS], ids=["all", "no MTP", "no window"])
def test_other_lengths_and_models(config: ModelConfig, mode: AttentionMode) -> None:
    check(config, 8, mode, (), torch.bfloat16)
    check(config, 150, mode, ("attention",), torch.bfloat16)
    check(config, 64, mode, (), torch.float64)


def test_phases_take_every_parameter_once() -> None:
    for config in (MODEL, WITHOUT_MTP):
        names = [name for name, _ in Transformer(config).named_parameters()]
        found = phases(config, 64, "sparse", (), 2)
        for name in names:
            assert sum(name.startswith(phase.trains) for phase in found) == 1, name


@pytest.mark.parametrize("recompute", RECOMPUTED[1:], ids="+".join)
def test_what_was_not_kept_is_there_again_when_it_is_needed(recompute: tuple[Recomputed, ...]) -> None:
    """Phase by phase at least what the phase keeps less, and no more than a block would keep."""
    whole, less = (phases(MODEL, 64, "sparse", again, 2) for again in ((), recompute))
    for one, other in zip(whole, less, strict=True):
        assert (one.trains, one.working) == (other.trains, other.working)
        assert other.again >= one.kept.total() - other.kept.total()
        assert other.again < 3 * max(phase.kept.total() for phase in whole)
    assert sum(phase.again for phase in less) > 0 == sum(phase.again for phase in whole)


def test_logits_are_counted_in_the_chunks_that_there_are() -> None:
    assert count_kept.LOGIT_ROWS == losses.CHUNK


MISTAKES = {
    "an index of 4 bytes": ("INDEX_BYTES", 4),
    "islands of 2 bytes": ("FP32_BYTES", 2),
    "masks of 0 bytes": ("MASK_BYTES", 0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count_kept, *MISTAKES[mistake])
    with pytest.raises(AssertionError):
        check(MODEL, 61, "sparse", (), torch.bfloat16)


def test_another_recomputation_is_caught() -> None:
    kept = measure(MODEL, 61, "sparse", ("attention",), torch.bfloat16)
    for wrong in RECOMPUTED:
        counted = sum(kept_bytes(MODEL, 61, "sparse", wrong, 2).values())
        assert (0 <= kept - counted <= SCALARS) == (wrong == ("attention",))
