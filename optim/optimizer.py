"""The optimizer of a run: Muon for matrices, AdamW for the rest, fp32 masters, one global clip.

Parameters of lower precision, and those that are rounded to a format, have an fp32 master that is updated and copied
back; others are their own master.
A frozen group is left as it is, its momentum and its count of updates too. On many processes each has an optimizer of
the tensors it owns; the norm and the figures are of all of them (`Totals`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim import adamw, clip, groups, muon
from optim.config import OptimConfig
from optim.groups import Member

Totals = Callable[[Mapping[str, Sequence[float]]], dict[str, float]]
"""By key, the sum of the numbers of all processes, rounded once; every process calls it with the same keys or fewer."""


def own_totals(numbers: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """`Totals` of one process."""
    return {key: math.fsum(values) for key, values in numbers.items()}


OfMaster = Callable[[str, Tensor], Tensor]
"""The weights of a member, from its parameter's name and its master; the result is cast to the parameter's type."""


def as_it_is(parameter: str, master: Tensor) -> Tensor:
    """`OfMaster` of weights that are no more than cast."""
    return master


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateStats:
    """norm: before the clip. clip_scale: factor applied. update_rms: by group, of the change without decay."""

    norm: float
    clip_scale: float
    update_rms: dict[str, float]


class Optimizer:
    """Updates `parameters` (by name) as `members` say; `members` hold each element of each parameter once.

    parallel_map: like `map`, may run the batches of matrices side by side; none depends on another. known: all groups
    that there are, default those of the members. totals, counted: how figures become those of all processes, and the
    members that this one tells of, default all (others may own the same). of_master: how weights come from masters,
    rounded: the parameters of which this is more than a cast.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        members: Sequence[Member],
        config: OptimConfig,
        parallel_map: Callable[..., Iterable[None]] = map,
        *,
        known: Collection[str] | None = None,
        totals: Totals = own_totals,
        counted: Collection[str] | None = None,
        of_master: OfMaster = as_it_is,
        rounded: Collection[str] = (),
    ) -> None:
        groups.check({member.group for member in members} if known is None else known, config)
        groups.check_cover(members, parameters)
        self.config = config
        self._map, self._totals = parallel_map, totals
        self.members = tuple(members)
        self._counted = tuple(member for member in members if counted is None or member.name in counted)
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._of_master = of_master
        self._rounded = {name for name in parameters if name.partition("[")[0] in rounded}
        self._masters = {
            name: _master(parameter, apart=name in self._rounded) for name, parameter in self._parameters.items()
        }
        self._kind = {member.parameter: member.kind for member in members}
        self._group = {member.parameter: member.group for member in members}
        self._state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if self._kind[name] == "matrix":
                self._state[f"momentum/{name}"] = torch.zeros_like(master)
            else:
                self._state[f"exp_avg/{name}"] = torch.zeros_like(master)
                self._state[f"exp_avg_sq/{name}"] = torch.zeros_like(master)
                self._state[f"updates/{name}"] = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, rate: float, frozen_groups: Collection[str] = ()) -> UpdateStats:
        """Clip and apply one step's gradients (at least fp32, by parameter name) at learning rate `rate`.

        Every parameter outside the frozen groups must have a gradient. Raises FloatingPointError, nothing changed,
        when a gradient is not finite.
        """
        frozen = {*frozen_groups, *self.config.freeze}
        active = {name: gradients[name] for name in self._parameters if self._group[name] not in frozen}
        told = [member for member in self._counted if member.parameter in active]
        norm = self._norm(active, told)
        scale = clip.clip_scale(norm, self.config.clip_norm)
        clipped = {name: gradient * scale for name, gradient in active.items()} if scale != 1 else active
        self._step_matrices(clipped, rate)
        changes = self._step_others(clipped, rate)
        self.write(active)
        return UpdateStats(norm=norm, clip_scale=scale, update_rms=self._rms(told, changes, rate))

    @torch.no_grad()
    def write(self, names: Collection[str]) -> None:
        """Make the weights of these parameters, or spans, from their masters; nothing of those that are their own."""
        for name, parameter in self._parameters.items():
            if name in names and name not in self._rounded and self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])
        for member, weight, master in self.masters():
            name = member.parameter
            if name in self._rounded and (name in names or name.partition("[")[0] in names):
                weight.copy_(self._of_master(name, master))

    def master(self, parameter: str) -> Tensor:
        """What is updated of a parameter: its master, or itself."""
        return self._masters[parameter]

    def masters(self, *, told: bool = False) -> Iterator[tuple[Member, Tensor, Tensor]]:
        """Member, weight and master of all that have a master of their own; told: that this process tells of."""
        for member in self._counted if told else self.members:
            weight, master = self._parameters[member.parameter], self._masters[member.parameter]
            if master is not weight:
                yield member, member.view(weight), member.view(master)

    def _norm(self, gradients: Mapping[str, Tensor], told: Sequence[Member]) -> float:
        sums = {member.name: clip.square_sums(member.view(gradients[member.parameter])) for member in told}
        every = [value for of_member in sums.values() for value in of_member]
        return clip.norm_of(self._totals({"squares": every})["squares"], sums)

    def _rms(self, told: Sequence[Member], changes: Mapping[str, Tensor], rate: float) -> dict[str, float]:
        """RMS by group of what was added to the weights, decay apart.

        An orthogonal matrix has min(R, C) singular values 1: its change's sum of squares follows from its scale.
        """
        numbers: dict[str, list[float]] = defaultdict(list)
        for member in told:
            part = member.view(self._parameters[member.parameter])
            numbers[f"size/{member.group}"].append(part.numel())
            if member.kind == "matrix":
                rows, columns = part.shape
                scale = muon.update_scale(rows, columns, self.config.muon) * self._rate(member.parameter, rate)
                numbers[f"change/{member.group}"].append(scale**2 * min(rows, columns))
            else:
                numbers[f"change/{member.group}"] += clip.square_sums(member.view(changes[member.parameter]))
        totals = self._totals(numbers)
        sizes = {key.removeprefix("size/"): size for key, size in totals.items() if key.startswith("size/")}
        return {group: math.sqrt(totals[f"change/{group}"] / size) for group, size in sorted(sizes.items())}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The group and the weight, as the model computes with it, of each member that this process tells of."""
        for member in self._counted:
            yield member.group, member.view(self._parameters[member.parameter])

    def state_dict(self) -> dict[str, Tensor]:
        """All state by flat name: momentum/, exp_avg/, exp_avg_sq/, updates/ and, where they exist, master/ tensors."""
        own = {f"master/{name}": m for name, m in self._masters.items() if m is not self._parameters[name]}
        return self._state | own

    def _rate(self, name: str, rate: float) -> float:
        return rate * groups.rate_scale(self._group[name], self.config)

    def _step_matrices(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        names = [name for name in gradients if self._kind[name] == "matrix"]
        momentum = self.config.muon.momentum
        directions = {
            name: muon.lookahead(self._state[f"momentum/{name}"], gradients[name], momentum) for name in names
        }
        by_shape: dict[torch.Size, list[Member]] = defaultdict(list)
        for member in self.members:
            if member.parameter in directions:
                by_shape[member.view(directions[member.parameter]).shape].append(member)
        parts: list[tuple[list[Tensor], list[Tensor], list[float]]] = []
        for same in by_shape.values():
            weights = [member.view(self._masters[member.parameter]) for member in same]
            views = [member.view(directions[member.parameter]) for member in same]
            rates = [self._rate(member.parameter, rate) for member in same]
            parts += [(weights[part], views[part], rates[part]) for part in muon.batches(weights)]
        for _ in self._map(lambda part: muon.update(part[0], part[1], part[2], self.config.muon), parts):
            pass

    def _step_others(self, gradients: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
        """The change of each tensor, decay apart."""
        changes = {}
        for name, gradient in gradients.items():
            if self._kind[name] == "matrix":
                continue
            updates = self._state[f"updates/{name}"].add_(1)
            changes[name] = adamw.update(
                self._masters[name],
                gradient,
                self._state[f"exp_avg/{name}"],
                self._state[f"exp_avg_sq/{name}"],
                step=int(updates),
                rate=self._rate(name, rate),
                weight_decay=groups.decay(self._kind[name], self.config),
                config=self.config.adamw,
            )
        return changes


def _master(parameter: Tensor, *, apart: bool) -> Tensor:
    """The tensor that is updated: the parameter itself, or its copy in at least fp32, always where it is apart."""
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter.clone() if apart else parameter
    return parameter.float()
