"""Deliberate mistakes of owners: in the norm, the update, the new weights and what is restored; see mistakes.py."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model import names
from optim import clip, muon
from trainer.build import Built
from trainer.parallel import world
from trainer.parallel.owners import Handout, Ownership
from trainer.parallel.world import World

Patch = pytest.MonkeyPatch
WEIGHT = "layers.0.attn.wo_b.weight"
"""A matrix that rank 0 owns on two ranks."""


# norm and update


def a_rank_dropped_from_the_norm(patch: Patch) -> None:
    _totals(patch, lambda self, key, values: [] if key == "squares" and self.rank == 1 else values)


def squares_rounded_on_each_rank(patch: Patch) -> None:
    """To fp32, as if they were added up by the network."""
    patch.setattr(world, "exact_parts", lambda numbers: [torch.tensor(math.fsum(numbers)).item()])


def _totals(patch: Patch, change: Callable[[World, str, Sequence[float]], Sequence[float]]) -> None:
    totals = World.totals

    def totals_of_changed(self: World, numbers: Mapping[str, Sequence[float]]) -> dict[str, float]:
        return totals(self, {key: change(self, key, values) for key, values in numbers.items()})

    patch.setattr(World, "totals", totals_of_changed)


def every_owner_of_the_same_is_counted(patch: Patch) -> None:
    patch.setattr(Ownership, "counted", lambda self: {member.name for member in self.members()})


def clip_by_the_own_norm(patch: Patch) -> None:
    """What is told is the right norm."""
    norm_of, scale, own = clip.norm_of, clip.clip_scale, []

    def norm_and_note(total: float, sums: Mapping[str, Sequence[float]]) -> float:
        own[:] = [math.sqrt(math.fsum(value for of_member in sums.values() for value in of_member))]
        return norm_of(total, sums)

    patch.setattr(clip, "norm_of", norm_and_note)
    patch.setattr(clip, "clip_scale", lambda norm, limit: scale(own[0], limit))


def an_owner_updates_twice(patch: Patch) -> None:
    update = muon.update

    def twice(*arguments: Any) -> None:
        update(*arguments)
        if dist.get_rank() == 1:
            update(*arguments)

    patch.setattr(muon, "update", twice)


# weights


def one_weight_is_not_handed_out(patch: Patch) -> None:
    publish = Ownership.publish

    def all_but_one(self: Ownership, parameters: Any, changed: Any, *ways: Any) -> Any:
        return publish(self, parameters, set(changed) - {WEIGHT}, *ways)

    patch.setattr(Ownership, "publish", all_but_one)


def a_rank_keeps_the_weights_before(patch: Patch) -> None:
    begin = Handout.begin

    def begin_and_lose(self: Handout, parameters: Mapping[str, Tensor], changed: Collection[str]) -> None:
        before = {name: tensor.clone() for name, tensor in parameters.items()}
        begin(self, parameters, changed)
        if dist.get_rank() == 1:
            parameters[WEIGHT].copy_(before[WEIGHT])

    patch.setattr(Handout, "begin", begin_and_lose)


# restoring


def momentum_of_another_owner(patch: Patch) -> None:
    """Two ranks swap the momentum of the first spans that have one shape and are not the same."""

    def swap(built: Built) -> None:
        own = {name: tensor for name, tensor in built.parts.optimizer.state_dict().items() if "momentum" in name}
        left, right = built.parts.world.gather(own)
        pairs = [
            (one, other)
            for one, tensor in left.items()
            for other, its in right.items()
            if tensor.shape == its.shape and not torch.equal(tensor, its)
        ]
        one, other = pairs[0]
        name, theirs = (one, right[other]) if dist.get_rank() == 0 else (other, left[one])
        own[name].copy_(theirs)

    _after_restoring(patch, swap)


def masters_from_the_weights(patch: Patch) -> None:
    """What bf16 has lost of the masters is lost."""

    def forget(built: Built) -> None:
        for name, tensor in built.parts.optimizer.state_dict().items():
            if name.startswith("master/"):
                tensor.copy_(tensor.bfloat16())

    _after_restoring(patch, forget)


def biases_of_one_rank_not_restored(patch: Patch) -> None:
    def forget(built: Built) -> None:
        for name, tensor in names.tensors(built.parts.model).items():
            if name.endswith("gate.bias") and dist.get_rank() == 1:
                tensor.zero_()

    _after_restoring(patch, forget)


def _after_restoring(patch: Patch, spoil: Callable[[Built], None]) -> None:
    restore = Built.restore
    patch.setattr(Built, "restore", lambda self, saved: (restore(self, saved), spoil(self)))
