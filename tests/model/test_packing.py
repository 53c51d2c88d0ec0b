"""Proves exact packing and causality in fp64: a packed row equals its documents run apart, forwards and backwards.

Window, compressed blocks, indexer, RoPE and MTP all restart with each document; padding and neighbours change nothing,
whatever the mode. Lengths go around the window and the rates of both compressors.
"""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from model import losses, sight
from model.config import AttentionMode
from model.losses import count
from model.transformer import Transformer
from tests.model.observing import LossWeights, Rows, build, differences, observe, pack, stack
from tests.oracles.cases import documents

WEIGHTS = LossWeights(mtp=0.3, balance=0.1, indexer=1.0)
VOCAB = 61
LAYERS = ([0, 4, 8, 4, 0], [8, 4, 0, 0], [4, 8, 0])
"""Window only, CSA, HCA with rate 8 in three orders; the last entry is the MTP block's."""
WINDOW = 5

ROUNDING = 1e-11
"""The same sums over other shapes, in float64: 1e-14 measured, relative to values of size 1."""

LENGTHS = {
    "single tokens": (1, 1, 2, 1),
    "around the CSA rate 4": (3, 4, 5, 8, 1),
    "around window 5 and HCA rate 8": (5, 7, 8, 9, 6),
    "primes": (2, 13, 5, 17, 3),
    "a long one between short ones": (1, 31, 6),
}
PER_TOKEN = ("logits", "mtp_logits", "last_hidden", "hidden", "router_index", "index_topk")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in every row, so that their borders fall inside documents."""
    monkeypatch.setattr(sight, "CHUNK", 7)
    monkeypatch.setattr(losses, "CHUNK", 6)


@cache
def model(seed: int) -> Transformer:
    """Every feature, at sizes of the seed."""
    return build(seed, sliding_window=WINDOW, compress_ratios=LAYERS[seed % 3])


def together(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What several observations give as one: values of tokens in a row, sums and gradients added."""
    result = {}
    for name in dict.fromkeys(name for part in parts for name in part if "_count" not in name):
        values = [part[name] for part in parts if name in part]
        result[name] = torch.cat(values) if name.split(".")[0] in PER_TOKEN else torch.stack(values).sum(0)
    return result


def counts_of(rows: Rows) -> losses.TermCounts:
    return count(rows.target_BT, rows.document_BT, rows.position_BT)


def apart(model: Transformer, ids: list[list[int]], mode: AttentionMode, whole: Rows) -> dict[str, Tensor]:
    """The documents one at a time, with the denominators of the whole row."""
    return together([observe(model, pack([document]), mode, WEIGHTS, counts_of(whole)) for document in ids])


@pytest.mark.parametrize("mode", ["indexer_warmup", "sparse"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_packed_row_equals_its_documents_apart(lengths: str, mode: AttentionMode) -> None:
    seed = list(LENGTHS).index(lengths)
    ids = documents(seed, LENGTHS[lengths], VOCAB)
    whole = pack(ids, padding=seed, filler=9)
    found = observe(model(seed), whole, mode, WEIGHTS)
    assert not differences(found, apart(model(seed), ids, mode, whole), ROUNDING)


def test_the_comparison_sees_a_leak_between_documents() -> None:
    """Negative control: one document of 8 is not the two documents of 4 it could be cut into."""
    (one,) = documents(1, [8], VOCAB)
    whole, halves = pack([one]), [one[:4], one[4:]]
    found = observe(model(1), whole, "sparse", WEIGHTS)
    wrong = differences(found, apart(model(1), halves, "sparse", whole), ROUNDING)
    assert {"logits", "lm_sum", "hidden.0", "index_topk.1", "grad.layers.0.attn.wkv.weight"} <= set(wrong)


@pytest.mark.parametrize("mode", ["indexer_warmup", "sparse"])
def test_the_order_of_the_documents_does_not_matter(mode: AttentionMode) -> None:
    ids = documents(3, (9, 4, 14, 1, 6), VOCAB)
    order = [2, 0, 4, 3, 1]
    found = observe(model(3), pack([ids[d] for d in order], padding=2), mode, WEIGHTS)
    straight = observe(model(3), pack(ids, padding=2), mode, WEIGHTS)
    lengths = [len(document) for document in ids]
    for name, value in straight.items():
        if name.split(".")[0] in PER_TOKEN:
            inner = [n - 1 for n in lengths] if name in ("mtp_logits", "hidden.mtp", "router_index.mtp") else lengths
            pieces = value.split(inner)
            straight[name] = torch.cat([pieces[d] for d in order])
    assert not differences(found, straight, ROUNDING)


@pytest.mark.parametrize("mode", ["indexer_warmup", "sparse"])
def test_rows_of_a_batch_are_independent(mode: AttentionMode) -> None:
    rows = [
        pack(documents(seed, lengths, VOCAB), padding=23 - sum(lengths))
        for seed, lengths in enumerate([(23,), (5, 8, 9), (1, 12, 3)])
    ]
    batch = stack(rows)
    found = observe(model(4), batch, mode, WEIGHTS)
    one_by_one = together([observe(model(4), row, mode, WEIGHTS, counts_of(batch)) for row in rows])
    assert not differences(found, one_by_one, ROUNDING)


@pytest.mark.parametrize("mode", ["indexer_warmup", "sparse"])
def test_the_content_of_padding_changes_nothing(mode: AttentionMode) -> None:
    ids = documents(5, (10, 7), VOCAB)
    one, other = (observe(model(5), pack(ids, padding=11, filler=token), mode, WEIGHTS) for token in (0, 44))
    assert not differences(one, other, ROUNDING)
    without = observe(model(5), pack(ids), mode, WEIGHTS)
    assert not differences(one, without, ROUNDING)


def test_dense_attention_is_the_indexer_s_warm_up_without_the_indexer() -> None:
    rows = pack(documents(6, (18, 3, 9), VOCAB), padding=4)
    dense, warm_up = (observe(model(6), rows, mode, WEIGHTS) for mode in ("dense", "indexer_warmup"))
    own = ("index_topk", "indexer", "recall", "total")
    others = {name: v for name, v in warm_up.items() if not name.startswith(own) and ".indexer." not in name}
    assert not differences(dense, others, 0.0), "not one bit may differ"
    assert not any("indexer_sum" in name for name in dense)
    indexer = [name for name in dense if name.startswith("grad.") and ".indexer." in name]
    assert indexer
    assert not any(dense[name].any() for name in indexer)
    assert all(warm_up[name].any() for name in indexer)


@pytest.mark.parametrize("mode", ["dense", "indexer_warmup", "sparse"])
@pytest.mark.parametrize("seed", [7, 8])
def test_a_token_changes_nothing_before_it(seed: int, mode: AttentionMode) -> None:
    """Row t of a batch has token t changed, and nothing else; the last row is unchanged."""
    ids = documents(seed, (6, 17), VOCAB)
    rows = stack([pack([[*ids[0]], [*ids[1]]])] * 24)
    token_BT = rows.token_BT.clone()
    token_BT[range(23), range(23)] = (token_BT[range(23), range(23)] + 1) % VOCAB
    with torch.no_grad():
        output = model(seed)(token_BT, rows.document_BT, rows.position_BT, mode=mode)
        logits_BTV, mtp_BTV = (model(seed).logits(h) for h in (output.h_BTD, output.mtp_h_BTD))
    moved_BT = (logits_BTV - logits_BTV[-1]).abs().amax(-1)
    mtp_moved_BT = (mtp_BTV - mtp_BTV[-1]).abs().amax(-1)
    for t in range(23):
        first, last = (0, 6) if t < 6 else (6, 23)  # the document of token t
        assert not (moved_BT[t, :t] > ROUNDING).any()
        assert not (moved_BT[t, last:] > ROUNDING).any()
        assert moved_BT[t, t] > 1e-3
        # Position t - 1 of the MTP branch sees the embedding of token t. The last of a document is never used.
        assert not (mtp_moved_BT[t, : max(t - 1, 0)] > ROUNDING).any()
        assert not (mtp_moved_BT[t, last:22] > ROUNDING).any()
        assert t == first or mtp_moved_BT[t, t - 1] > 1e-3


def test_equal_scores_select_the_earlier_block() -> None:
    """So that a choice never depends on what else is in the row: all scores are 0 here."""
    seeded = build(9, sliding_window=WINDOW, compress_ratios=[4, 0], num_hash_layers=0, index_topk=3)
    with torch.no_grad():
        seeded.layers[0].attn.indexer.weights_proj.weight.zero_()
    lengths = (6, 29, 5)
    found = observe(seeded, pack(documents(9, lengths, VOCAB)), "sparse", WEIGHTS)["index_topk.0"].tolist()
    visible = [(t + 1) // 4 for n in lengths for t in range(n)]
    assert found == [[s if s < n else -1 for s in range(3)] for n in visible]
