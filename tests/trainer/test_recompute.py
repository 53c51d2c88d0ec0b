"""Proves that recomputing changes no bit of loss or gradient, and that less is kept, part by part."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from model.block import TermScales
from model.losses import cross_entropy_sum
from model.transformer import Transformer
from tests.model.observing import build
from tests.model.test_memory import Storages
from tests.oracles.cases import documents
from trainer.config import Recomputed
from trainer.parallel.recompute import apply_recompute

SCALES = TermScales(balance=1e-3, mtp_balance=1e-3, indexer=1e-3)
PARTS: tuple[Recomputed, ...] = ("attention", "experts", "block")


def model() -> Transformer:
    return build(1, torch.float32, compress_ratios=[4, 8, 0], sliding_window=8, hidden_size=16, hc_sinkhorn_iters=2)


def step(model: Transformer) -> tuple[dict[str, torch.Tensor], int]:
    """Loss and gradients by name, and the bytes alive between forward and backward pass."""
    (ids,) = documents(3, [96], model.config.vocab_size)
    token_BT = torch.tensor([ids])
    with Storages() as storages:
        output = model(token_BT, mode="sparse", scales=SCALES)
        loss = cross_entropy_sum(output.h_BTD, model.head.weight, token_BT)
        del output
        kept = storages.alive_bytes()
        loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }, kept


def test_bits_stay_and_less_is_kept() -> None:
    expected, kept_without = step(model())
    kept = {}
    for part in PARTS:
        changed = model()
        apply_recompute(changed, (part,))
        found, kept[part] = step(changed)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), part
    assert all(size < 0.9 * kept_without for size in kept.values()), (kept_without, kept)
    assert kept["block"] < min(kept["attention"], kept["experts"])


def noted(model: Transformer) -> list[StorageWeakRef]:
    """The storages of all queries and selections that the model's attention will make."""
    found: list[StorageWeakRef] = []

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            result = function(*arguments)
            found.extend(StorageWeakRef(one.untyped_storage()) for one in tree_leaves(result))
            return result

        return noting

    for block in model.blocks():
        block.attn.queries, block.attn.select = note(block.attn.queries), note(block.attn.select)
    return found


def test_neither_queries_nor_selections_are_kept() -> None:
    """Each is a tensor of the row by heads or by picks; without recomputation some of them are kept."""
    alive = {}
    for parts in ((), ("attention",)):
        changed = model()
        apply_recompute(changed, parts)
        found = noted(changed)
        output = changed(torch.zeros(1, 96, dtype=torch.int64), mode="sparse", scales=SCALES)
        alive[parts] = sum(not storage.expired() for storage in found)
        assert len(found) == 2 * len(changed.blocks()) + 1, "one of the blocks selects"
        output.h_BTD.sum().backward()
    assert alive[()] > 0
    assert alive["attention",] == 0


def test_a_seam_that_is_not_called_keeps_everything() -> None:
    """Negative control of the measurement."""
    changed = model()
    apply_recompute(changed, ("block",))
    _, kept = step(changed)
    changed.run_block = lambda module, *arguments: module(*arguments)
    assert step(changed)[1] > kept
