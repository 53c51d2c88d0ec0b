"""Proves the hand-written backward passes around a layer by finite differences: mHC sites, RMSNorm, clamped SwiGLU."""

import pytest
import torch
from torch import Tensor

from model import experts, layers, mhc
from tests.model.mistakes import mistake
from tests.model.test_backward import CLOSE, check, random, see

SITE = {"iterations": 3, "hc_eps": 1e-3, "norm_eps": 1e-3}


def site_inputs() -> tuple[Tensor, ...]:
    """Streams [1, 3, 2, 5] and fn, base, scale of a site."""
    return random(1, 3, 2, 5, seed=1), random(8, 10, seed=2), random(8, seed=3), random(3, seed=4)


def check_entering() -> None:
    for output in range(3):
        check(lambda *x, i=output: mhc.enter(*x, **SITE)[i], *site_inputs())


def test_entering_a_layer() -> None:
    """Also equal to the equations that it joins, forwards and backwards."""
    check_entering()
    inputs = x_BTND, fn, base, scale = site_inputs()
    product, rms_inverse = mhc.product_and_rms(x_BTND, fn, SITE["norm_eps"])
    pre, post, comb = mhc.gates(product * rms_inverse, base, scale, 2, SITE["iterations"], SITE["hc_eps"])
    apart, joined = (mhc.collapse(x_BTND, pre), post, comb), mhc.enter(*inputs, **SITE)
    gradients = [torch.autograd.grad(sum(one.sin().sum() for one in each), inputs) for each in (apart, joined)]
    for one, other in zip((*apart, *gradients[0]), (*joined, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def check_leaving() -> None:
    check(mhc.expand, random(1, 3, 2, 5), random(1, 3, 5), random(1, 3, 2), random(1, 3, 2, 2, seed=1))


def test_leaving_a_layer() -> None:
    check_leaving()


def check_rms_norm() -> None:
    check(lambda x, w: layers.rms_normalize(x, w, 1e-3), random(2, 3, 5), random(5))
    check(lambda x: layers.rms_normalize(x, None, 1e-3), random(2, 3, 5))


def test_rms_norm() -> None:
    check_rms_norm()


def check_swiglu() -> None:
    gate, up, weight = 2 * random(5, 4), 2 * random(5, 4, seed=1), random(5)
    assert bool((gate > 1.5).any())
    assert bool((up.abs() > 1.5).any())
    check(lambda *x: experts.clamped_swiglu(*x, 1.5), gate, up, weight)
    check(lambda *x: experts.clamped_swiglu(*x, None, 1.5), gate, up)


def test_clamped_swiglu() -> None:
    check_swiglu()


WRONG = {
    "entering a layer": (check_entering, mistake("mhc._Enter.backward", ("rms_inverse**3", "rms_inverse"))),
    "leaving a layer": (check_leaving, mistake("mhc._Expand.backward", ("(comb_BTNN, grad)", "(comb_BTNN.mT, grad)"))),
    "RMSNorm": (check_rms_norm, mistake("layers._RMSNorm.backward", ("(grad - normal.mul_(mean))", "(1 * grad)"))),
    "clamped SwiGLU": (
        check_swiglu,
        mistake("experts._ClampedSwiGLU.backward", ("(sigmoid, silu,", "(sigmoid, sigmoid,")),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backward_pass_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    see(*WRONG[name], monkeypatch)
