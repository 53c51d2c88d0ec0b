"""Proves that a model with every kernel set has the plain model's logits and gradients, every kind of layer in it."""

import copy

import pytest
import torch
from torch import Tensor

from model.config import InitConfig
from model.init import initialize
from model.transformer import Transformer
from tests.model.kernels.twins import HERE
from tests.runs import tiny
from trainer.parallel.apply import SEAMS, apply_kernels
from trainer.parallel.recompute import apply_recompute

DOCUMENTS = (3, 9, 1, 11)


def numbers(model: Transformer) -> dict[str, Tensor]:
    """Logits of a packed row of both branches, and the gradients of their product with fixed random numbers."""
    position = torch.tensor([[t for length in DOCUMENTS for t in range(length)]])
    document = torch.tensor([[d for d, length in enumerate(DOCUMENTS) for _ in range(length)]])
    draw = torch.Generator().manual_seed(5)
    token = torch.randint(0, tiny.VOCABULARY, position.shape, generator=draw)
    output = model(token.to(HERE.device), document.to(HERE.device), position.to(HERE.device), mode="sparse")
    assert output.mtp_h_BTD is not None
    logits = [model.logits(h_BTD) for h_BTD in (output.h_BTD, output.mtp_h_BTD)]
    weights = [torch.randn(one.shape, generator=draw).to(HERE.device) for one in logits]
    sum((one * weight).sum() for one, weight in zip(logits, weights, strict=True)).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"logits": logits[0].detach(), "mtp_logits": logits[1].detach()} | gradients


@pytest.mark.timeout(120)
def test_the_same_numbers() -> None:
    plain = Transformer(tiny.model(hc_mult=4))
    initialize(plain, InitConfig(std=0.3), seed=1)
    plain = plain.to(HERE.device)
    plain.share_weights()
    served = copy.deepcopy(plain)
    apply_kernels(served, SEAMS)  # also what serves in bf16 only: its fp32 is as exact
    expected, found = numbers(plain), numbers(served)
    apply_recompute(served, ("block",))
    served.zero_grad()
    again = numbers(served)
    assert all(torch.equal(again[name], one) for name, one in found.items()), "recomputation changes bits"
    assert expected.keys() == found.keys()
    # Rounding grows through the layers: fp32 against fp64 is as far apart.
    far = {name: ((found[name] - one).abs().max() / one.abs().max()).item() for name, one in expected.items()}
    assert max(far.values()) < 1e-4, far
