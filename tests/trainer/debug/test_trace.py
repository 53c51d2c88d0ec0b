"""Proves that the first tensor that is not finite, and its documents, are the ones where a fault was made."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data.batch import Batch
from model.config import AttentionMode
from tests.trainer import steps
from tests.trainer.checkpoint_samples import same_bits
from trainer import row
from trainer.debug import documents
from trainer.debug.fault import NonFinite, require_finite
from trainer.debug.finding import Finding, find, table
from trainer.debug.trace import Event, trace
from trainer.parallel.reduce import LIMIT
from trainer.step import Parts, frozen_groups, learn, train_only, train_step

BATCH = steps.make_batch()
ROW = 1
TOKEN = 9
MODULES = ("layers.0.attn.wq_a", "layers.1.attn.wo_b", "layers.0.ffn.shared_experts.w2", "mtp.0.e_proj")


def one_row() -> Batch:
    return row.pick(BATCH, ROW, steps.CPU)


def weights() -> row.Weights:
    return row.weigh(row.count_rows(BATCH), mtp=0.3, balance=1e-4, indexer=1.0)


def events_of(parts: Parts, mode: AttentionMode = "sparse") -> list[Event]:
    train_only(parts.model, parts.groups, frozen_groups(mode, parts.groups))
    return trace(parts.model, one_row(), mode, weights())


def finding_of(parts: Parts, mode: AttentionMode = "sparse") -> Finding:
    found = find(events_of(parts, mode))
    assert found is not None
    return found


def document_at(token: int) -> int:
    return int(one_row().document_BT[0, token])


def documents_of(found: Finding) -> set[int]:
    return {document_at(token) for token in found.tokens}


def set_weight(parts: Parts, name: str, value: float) -> None:
    with torch.no_grad():
        parts.model.get_parameter(name).view(-1)[-1] = value


@pytest.mark.parametrize("what", ["attention", "experts", "block"])
def test_what_is_computed_again_is_told_of_once(what: str) -> None:
    plain, again = (steps.make_parts(BATCH, recompute=recompute) for recompute in ((), (what,)))
    told = [[(event.name, event.largest) for event in events_of(parts)] for parts in (plain, again)]
    assert sorted(told[0]) == sorted(told[1])


@pytest.mark.parametrize("mode", ["dense", "indexer_warmup", "sparse"])
def test_a_healthy_row_has_no_finding(mode: AttentionMode) -> None:
    parts = steps.make_parts(BATCH)
    events = events_of(parts, mode)
    assert find(events) is None
    assert {event.phase for event in events} == {"weight", "forward", "loss", "backward"}
    assert all(parameter.grad is None for parameter in parts.model.parameters())


def test_watching_changes_no_bit_and_leaves_no_hook() -> None:
    parts = steps.make_parts(BATCH)
    model = parts.model

    def learned() -> tuple[row.RowSums, dict[str, Tensor]]:
        sums = learn(model, one_row(), "sparse", weights())
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad(set_to_none=True)
        return sums, gradients

    sums, gradients = learned()
    events = events_of(parts)
    losses = {event.name: event.largest for event in events if event.phase == "loss"}
    assert losses == {"loss/lm": sums.lm, "loss/mtp": sums.mtp}
    seen = {event.name: event for event in events if event.tensor.startswith("gradient of weight")}
    assert seen.keys() == {f"gradient of weight {name}" for name in gradients}
    for name, gradient in gradients.items():
        assert seen[f"gradient of weight {name}"].largest == float(gradient.abs().max())
    again = learned()[1]
    assert all(same_bits(again[name], gradients[name]) for name in gradients)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "name",
    ["layers.0.attn.wkv.weight", "layers.1.ffn.experts.w2", "layers.1.hc_attn_fn", "mtp.0.h_proj.weight", "hc_head_fn"],
)
def test_a_weight_is_named(name: str, value: float) -> None:
    parts = steps.make_parts(BATCH)
    set_weight(parts, name, value)
    found = finding_of(parts)
    assert (found.event.phase, found.event.name) == ("weight", f"weight {name}")
    assert found.event.found == f"{value:g}"
    layer = {"layers.0": "layer 0, ", "layers.1": "layer 1, ", "mtp.0.h_": "MTP block, "}.get(name[:8], "")
    assert str(found).startswith(f"{layer}weight {name}: {value:g} at [")


def poisoned_product(of_input: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """F.linear with NaN in the output, or in the gradient of the input, at TOKEN."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad[:, TOKEN, 2] = math.nan
            return grad

    def product(x: Tensor, weight: Tensor) -> Tensor:
        if of_input:
            return F.linear(Poison.apply(x), weight)
        y = F.linear(x, weight).clone()
        y[:, TOKEN, 2] = math.inf
        return y

    return product


@pytest.mark.parametrize("module", MODULES)
def test_an_output_is_named_with_its_document(module: str) -> None:
    parts = steps.make_parts(BATCH)
    parts.model.get_submodule(module).matmul = poisoned_product(of_input=False)
    found = finding_of(parts)
    assert (found.event.phase, found.event.name) == ("forward", f"output of {module}")
    assert (found.event.index, found.event.bad, found.tokens) == ((0, TOKEN, 2), 1, (TOKEN,))
    assert found.before is not None
    assert found.before.name == f"input of {module}"


@pytest.mark.parametrize("module", MODULES)
def test_a_gradient_is_named_with_its_document(module: str) -> None:
    parts = steps.make_parts(BATCH)
    parts.model.get_submodule(module).matmul = poisoned_product(of_input=True)
    found = finding_of(parts)
    assert found.event.phase == "backward"
    assert f"gradient of input of {module}" in (found.event.name, *found.same)
    assert (found.event.index, found.tokens) == ((0, TOKEN, 2), (TOKEN,))


@pytest.mark.parametrize(("value", "told"), [(math.nan, "nan"), (2 * LIMIT, "32768")])
def test_the_gradient_of_a_weight_is_named_without_a_document(value: float, told: str) -> None:
    parts = steps.make_parts(BATCH)
    weight = parts.model.get_parameter("layers.1.attn.compressor.wkv.weight")
    weight.register_hook(lambda gradient: torch.full_like(gradient, value))
    found = finding_of(parts)
    assert found.event.name == "gradient of weight layers.1.attn.compressor.wkv.weight"
    assert (found.event.found, found.tokens) == (told, ())


@pytest.mark.parametrize("branch", [0, 1])
def test_a_loss_is_named_with_its_documents(branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of either branch is NaN where one target occurs."""
    parts, heads = steps.make_parts(BATCH), row.heads
    wanted = int(one_row().target_BT[0, TOKEN])

    def spoiled(model: Any, output: Any, one: Batch) -> tuple[Tensor, Tensor]:
        losses = list(heads(model, output, one))
        if (one.target_BT == wanted).any():
            losses[branch] = losses[branch] * math.nan
        return losses[0], losses[1]

    monkeypatch.setattr(row, "heads", spoiled)
    found = finding_of(parts)
    assert found.event.name == ("loss/lm", "loss/mtp")[branch]
    with_target = {document_at(t) for t in range(steps.LENGTH) if int(one_row().target_BT[0, t]) == wanted}
    assert documents_of(found) == with_target


def test_only_documents_with_the_token_of_a_bad_embedding_are_named() -> None:
    one, parts = one_row(), steps.make_parts(BATCH)
    for token in one.token_BT[0, :6].tolist():
        with torch.no_grad():
            kept = float(parts.model.embed.weight[token, 0])
            parts.model.embed.weight[token, 0] = math.inf
        found = finding_of(parts)
        with torch.no_grad():
            parts.model.embed.weight[token, 0] = kept
        assert found.event.name == "weight embed.weight"
        assert found.event.index == (token, 0)
        places = (one.token_BT[0] == token).nonzero().flatten().tolist()
        assert found.tokens == tuple(places)


def test_documents_lie_where_their_tokens_are() -> None:
    for number in range(steps.ROWS):
        one = row.pick(BATCH, number, steps.CPU)
        spans = documents.spans(one)
        assert [t for span in spans for t in range(span.start, span.stop)] == (
            one.document_BT[0] >= 0
        ).nonzero().flatten().tolist()
        for piece, span in enumerate(spans):
            part = documents.cut(one, span)
            assert set(part.document_BT.flatten().tolist()) == {piece}
            assert part.position_BT[0].tolist() == list(range(span.stop - span.start))


def test_the_table_has_every_module_and_marks_the_first() -> None:
    parts = steps.make_parts(BATCH)
    set_weight(parts, "layers.1.attn.wo_b.weight", math.inf)
    events = events_of(parts)
    found = find(events)
    assert found is not None
    lines = table(events, found.event)
    called = {
        name
        for name, module in parts.model.named_modules()
        if name and next(module.parameters(False), None) is not None
    }
    assert called <= {line.split("|")[1].strip() for line in lines if line.startswith("|")}
    (marked,) = [line for line in lines if "**first**" in line]
    assert marked.startswith("| layers.1.attn.wo_b ")
    assert lines[-1].startswith("losses (sums over the row, nats): loss/lm nan")


def spoil_rows(monkeypatch: pytest.MonkeyPatch, spoiled: set[int], **changes: float) -> None:
    """The losses of these rows of BATCH are replaced."""
    learn_well = row.learn

    def spoil(model: Any, one: Batch, *rest: Any) -> row.RowSums:
        sums = learn_well(model, one, *rest)
        number = next(n for n in range(steps.ROWS) if torch.equal(one.token_BT[0], BATCH.token_BT[n]))
        return replace(sums, **changes) if number in spoiled else sums

    monkeypatch.setattr(row, "learn", spoil)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_with_a_bad_row_is_not_applied_and_its_first_bad_row_is_told(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = steps.make_parts(BATCH, threads=threads)
    before = steps.all_tensors(parts)
    spoil_rows(monkeypatch, {1, 3}, lm=math.nan)
    with pytest.raises(NonFinite, match=r"step 1, row 2 of 4: loss/lm: expected finite values, found nan") as caught:
        train_step(parts, steps.make_plan(), lambda: False)
    assert caught.value.fault.index == 1
    assert steps.changed(before, steps.all_tensors(parts)) == set()
    assert all(weight.grad is None for view in parts.pool.views for weight in view.parameters())


def test_every_loss_is_looked_at() -> None:
    sums = learn(steps.make_parts(BATCH).model, one_row(), "sparse", weights())
    require_finite(sums)
    spoiled = {
        "loss/lm": replace(sums, lm=math.inf),
        "loss/mtp": replace(sums, mtp=math.nan),
        "loss/balance of layer 2": replace(sums, balance_L=(*sums.balance_L[:-1], math.nan)),
        "loss/indexer of layer 0": replace(sums, indexer_L=(math.nan, *sums.indexer_L[1:])),
    }
    for name, bad in spoiled.items():
        with pytest.raises(FloatingPointError, match=f"{name}: expected finite values"):
            require_finite(bad)
