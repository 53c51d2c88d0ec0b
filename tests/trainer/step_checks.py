"""What is true of one optimizer step, as checks that `test_step.py` makes and `test_step_mistakes.py` sees fail."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data.batch import Batch
from model.losses import mtp_document, mtp_target
from model.names import alias_of
from tests.trainer import steps
from trainer import metrics, row
from trainer.config import LossConfig
from trainer.parallel.reduce import FRACTION_BITS
from trainer.step import Parts, StepResult

BATCH = steps.make_batch()


def gradients_of(parts: Parts) -> dict[str, Tensor]:
    """The sums that the last step's update was made from."""
    return parts.sums.result()


def told(result: StepResult) -> dict[str, float]:
    """The metrics of a step."""
    return metrics.losses(result.rows, result.counts) | metrics.routing(result.rows, result.counts, result.load_LE)


def check_order_of_rows() -> None:
    found = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        parts = steps.make_parts(steps.reorder(BATCH, order))
        found.append((told(steps.take(parts, steps.make_plan())), steps.all_tensors(parts)))
    for metrics_of, tensors in found[1:]:
        assert metrics_of == found[0][0]
        assert steps.changed(tensors, found[0][1]) == set()


def check_leaves() -> None:
    """Gradients are the sum, in integers, of one leaf per row and use, each rounded by itself."""
    parts, plan = steps.make_parts(BATCH), steps.make_plan()
    weights = row.weigh(row.count_rows(BATCH), mtp=plan.mtp_weight, balance=1e-4, indexer=1.0)
    total: dict[str, Tensor] = {}
    leaves: dict[str, int] = {}
    for index in range(steps.ROWS):
        row.learn(parts.model, row.pick(BATCH, index, steps.CPU), plan.attention, weights)
        for name, parameter in parts.model.named_parameters():
            leaf, shared = parameter.grad.double() * 2.0**FRACTION_BITS, alias_of(name) or name
            total[shared] = total.get(shared, 0) + leaf.round().long()
            leaves[shared] = leaves.get(shared, 0) + 1
            parameter.grad = None
    steps.take(parts, plan)
    expected = {name: (value.double() * 2.0**-FRACTION_BITS).float() for name, value in total.items()}
    assert steps.changed(expected, gradients_of(parts)) == set()
    assert {name for name, count in leaves.items() if count != steps.ROWS} == {"embed.weight", "head.weight"}
    assert leaves["embed.weight"] == leaves["head.weight"] == 2 * steps.ROWS


def whole_gradients(parts: Parts, batch: Batch, plan_weight: float) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and loss terms of all rows at once, by autograd over plain formulas: sum / count, nothing attached."""
    model, counted_BT = parts.model, batch.document_BT >= 0
    output = model(batch.token_BT, batch.document_BT, batch.position_BT, mode="sparse")
    tokens, mtp_tokens = int(counted_BT.sum()), int((mtp_document(batch.document_BT) >= 0).sum())
    lm = mean_entropy(output.h_BTD @ model.head.weight.T, batch.target_BT)
    mtp = mean_entropy(output.mtp_h_BTD @ model.head.weight.T, mtp_target(batch.target_BT, batch.document_BT))
    balance = [layer.router.balance_sum for layer in output.layers if layer.router.balance_sum is not None]
    indexer = [layer.indexer.kl_sum for layer in output.layers if layer.indexer is not None]
    seeing = int((counted_BT & (batch.position_BT >= 3)).sum())
    terms = 1e-4 * (sum(balance) / tokens + output.mtp.router.balance_sum / mtp_tokens) + sum(indexer) / seeing
    (lm + plan_weight * mtp + terms).backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        shared = alias_of(name) or name
        if parameter.grad is not None:
            gradients[shared] = gradients.get(shared, 0) + parameter.grad
            parameter.grad = None
    return gradients, {"loss/lm": lm.item(), "loss/mtp": mtp.item(), "loss/indexer": indexer[0].item() / seeing}


def mean_entropy(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=-1)


def check_denominators() -> None:
    parts, plan = steps.make_parts(BATCH, "fp64"), steps.make_plan()
    expected, terms = whole_gradients(parts, BATCH, plan.mtp_weight)
    result = steps.take(parts, plan)
    assert {name: told(result)[name] for name in terms} == pytest.approx(terms, rel=1e-13)
    found = gradients_of(parts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # fp64 sums of about a thousand terms in another order, and four roundings to 2^-48 = 3.6e-15.
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-13, msg=lambda text, n=name: f"{n} {text}"
        )


def check_indexer_warmup() -> None:
    parts = steps.make_parts(BATCH)
    before = steps.all_tensors(parts)
    steps.take(parts, steps.make_plan("indexer_warmup"))
    assert steps.changed(before, steps.all_tensors(parts)) == steps.of_group(parts, "indexer")


def check_bias_rule() -> None:
    """Against loads counted from the experts that the gates chose, row by row."""
    parts, speed = steps.make_parts(BATCH, loss=LossConfig(bias_update_speed=2.0**-10)), 2.0**-10
    loads: dict[str, Tensor] = {}
    documents = {"layers.1": lambda document_BT: document_BT, "mtp.0": mtp_document}
    gate_calls = itertools.count()

    def count(name: str) -> Callable[..., None]:
        def hook(gate: object, inputs: object, route: object) -> None:
            number = next(gate_calls) // len(documents)
            document_BT = BATCH.document_BT[number : number + 1]
            chosen = route.expert_BTK[documents[name](document_BT) >= 0].flatten()
            loads[name] = loads.get(name, 0) + torch.bincount(chosen, minlength=4)

        return hook

    before = steps.all_tensors(parts)
    for name in documents:
        parts.model.get_submodule(f"{name}.ffn.gate").register_forward_hook(count(name))
    steps.take(parts, steps.make_plan())
    for name, load_E in loads.items():
        bias_E = parts.model.get_submodule(f"{name}.ffn.gate").bias
        expected_E = before[f"{name}.ffn.gate.bias"] + speed * torch.sign(load_E.sum() / 4 - load_E)
        assert torch.equal(bias_E, expected_E)
        assert len(set((bias_E - before[f"{name}.ffn.gate.bias"]).sign().tolist())) > 1
