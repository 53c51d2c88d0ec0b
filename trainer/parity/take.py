"""The steps of a comparison on the ranks of one layout, and what they leave: figures, and a hash of every tensor."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from trainer import metrics
from trainer.build import Built, build
from trainer.config import TrainConfig
from trainer.parallel.world import World
from trainer.parity.scale import MadeUpRows
from trainer.step import Parts, train_step

Digests = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """figures: by step and name. weights, state: SHA-256 by logical tensor, of all ranks.

    odd: logical tensors of which replicas have other bits. parameters: of the first rank's part of the model.
    """

    figures: list[dict[str, float]]
    weights: Digests
    state: Digests
    odd: list[str]
    parameters: int


def take(config: TrainConfig, device: torch.device, world: World) -> Outcome:
    """All steps of the configuration over made-up rows, the same on any layout; all ranks call it."""
    data: Any = SimpleNamespace(train=MadeUpRows(seed=config.seed))
    built = build(config, data, device, world)
    figures = []
    for plan in built.plans:
        result = train_step(built.parts, plan, lambda: False)
        assert result is not None, "nobody stops it"
        told = metrics.losses(result.rows, result.counts) | metrics.routing(result.rows, result.counts, result.load_LE)
        told["optim/grad_norm"] = result.update.norm
        figures.append(told | {f"optim/update_rms/{group}": rms for group, rms in result.update.update_rms.items()})
    built.parts.handout.settle()
    return _outcome(built, figures)


def _outcome(built: Built, figures: list[dict[str, float]]) -> Outcome:
    world = built.parts.world
    weights: Digests = {}
    odd: set[str] = set()
    state: Digests = {}
    for of_weights, of_state in world.gather((dict(_weights(built.parts)), dict(_state(built.parts)))):
        odd |= {name for name, digest in of_weights.items() if weights.setdefault(name, digest) != digest}
        odd |= {name for name, digest in of_state.items() if state.setdefault(name, digest) != digest}
    parameters = sum(parameter.numel() for parameter in built.parts.model.parameters())
    return Outcome(figures=figures, weights=weights, state=state, odd=sorted(odd), parameters=parameters)


def _weights(parts: Parts) -> Iterator[tuple[str, str]]:
    """Of every logical tensor that this rank holds, and of the buffers."""
    held = {name: tensor.detach() for name, tensor in parts.model.named_parameters()}
    for member, view in parts.ownership.held():
        yield member.name, digest(view(held[member.parameter]))
    yield from ((name, digest(buffer)) for name, buffer in parts.model.named_buffers())


def _state(parts: Parts) -> Iterator[tuple[str, str]]:
    """Of every logical tensor that this rank owns."""
    state = parts.optimizer.state_dict()
    for member in parts.optimizer.members:
        for kind in ("momentum", "exp_avg", "exp_avg_sq", "master"):
            tensor = state.get(f"{kind}/{member.parameter}")
            if tensor is not None:
                yield f"{kind}/{member.name}", digest(member.view(tensor))


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.tobytes()).hexdigest()
