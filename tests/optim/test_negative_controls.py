"""Deliberate mistakes in the optimizer: each makes the check that the real one passes fail."""

import itertools
from collections.abc import Callable

import pytest
import torch

from optim import adamw, groups, muon, newton_schulz, optimizer
from optim.iterations import FAST
from tests.optim import checks
from tests.optim.checks import check_against_oracle

Patch = Callable[[pytest.MonkeyPatch], None]


def _average_momentum(patch: pytest.MonkeyPatch) -> None:
    def lookahead(momentum: torch.Tensor, gradient: torch.Tensor, mu: float) -> torch.Tensor:
        momentum.mul_(mu).add_(gradient, alpha=1 - mu)
        return gradient.add(momentum, alpha=mu)

    patch.setattr(muon, "lookahead", lookahead)


def _no_nesterov(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(muon, "lookahead", lambda momentum, gradient, mu: momentum.mul_(mu).add_(gradient).clone())


def _decayed_gradient(patch: pytest.MonkeyPatch) -> None:
    def lookahead(momentum: torch.Tensor, gradient: torch.Tensor, mu: float) -> torch.Tensor:
        momentum.add_(gradient).mul_(mu)
        return gradient.add(momentum, alpha=mu)

    patch.setattr(muon, "lookahead", lookahead)


def _smaller_side(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(muon, "update_scale", lambda rows, columns, config: config.update_rms * min(rows, columns) ** 0.5)


def _moonlight_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(muon, "update_scale", lambda rows, columns, config: 0.2 * max(rows, columns) ** 0.5)


def _five_fast_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(newton_schulz, "COEFFICIENTS", (FAST,) * 5)


def _no_exact_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(newton_schulz, "COEFFICIENTS", (FAST,) * 10)


def _no_decay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(groups, "decay", lambda kind, config: 0.0)


def _decayed_vectors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(groups, "decay", lambda kind, config: 0.1)


def _coupled_decay(patch: pytest.MonkeyPatch) -> None:
    real = muon.update

    def update(weights, directions, rates, config):
        real(weights, [d + 0.1 * w for d, w in zip(directions, weights, strict=True)], rates, config)

    patch.setattr(muon, "update", update)


def _decay_without_rate(patch: pytest.MonkeyPatch) -> None:
    real = muon.update

    def update(weights, directions, rates, config):
        real(weights, directions, rates, config)
        for weight in weights:
            weight.mul_(0.999)

    patch.setattr(muon, "update", update)


def _joined_series(patch: pytest.MonkeyPatch) -> None:
    real = checks.members

    def members() -> list[groups.Member]:
        whole = groups.Member(name="series", parameter="series", start=0, stop=6, kind="matrix", group="compressor")
        return [one for one in real() if one.parameter != "series"] + [whole]

    parts = checks.members()
    patch.setattr(optimizer.groups, "check", lambda known, config: None)
    init = optimizer.Optimizer.__init__
    patch.setattr(
        optimizer.Optimizer,
        "__init__",
        lambda self, parameters, given, config: init(self, parameters, members(), config),
    )
    assert len(parts) > len(members())


def _joint_norm(patch: pytest.MonkeyPatch) -> None:
    real = newton_schulz.orthogonalize

    def together(batch: torch.Tensor) -> torch.Tensor:
        return real(batch.flatten(0, 1).unsqueeze(0)).view_as(batch)

    patch.setattr(muon, "orthogonalize", together)


def _no_rate_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(groups, "rate_scale", lambda group, config: 1.0)


def _no_bias_correction(patch: pytest.MonkeyPatch) -> None:
    real = adamw.update
    patch.setattr(adamw, "update", lambda *args, **kwargs: real(*args, **{**kwargs, "step": 10_000}))


def _swapped_betas(patch: pytest.MonkeyPatch) -> None:
    real = adamw.update

    def update(weight, gradient, first, second, **kwargs):
        return real(weight, gradient, first.mul_(1.01), second, **kwargs)

    patch.setattr(adamw, "update", update)


MISTAKES: dict[str, Patch] = {
    name.strip("_"): patch for name, patch in list(globals().items()) if name.startswith("_") and callable(patch)
}


def test_there_are_many_and_the_check_passes_without_them() -> None:
    check_against_oracle()
    assert len(MISTAKES) >= 15


def test_no_two_mistakes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that leave the same weights would be one control with two names."""
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, mistake in MISTAKES.items():
        with monkeypatch.context() as patch:
            mistake(patch)
            parameters = checks.tensors(0)
            steps = optimizer.Optimizer(parameters, checks.members(), checks.CONFIG)
            for step in range(3):
                steps.step(checks.tensors(step + 1), rate=checks.RATE)
        weights[name] = parameters
    for left, right in itertools.combinations(weights, 2):
        differences = [(weights[left][name] - weights[right][name]).abs().max() for name in checks.SHAPES]
        # Both are fp64: what is the same but for its rounding differs by less than 1e-12.
        assert max(differences) > 1e-9, (left, right)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[name](monkeypatch)
    with pytest.raises(AssertionError):
        check_against_oracle()
