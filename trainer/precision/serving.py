"""Who multiplies what at the model's precision seams, in each part of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.attention import GroupedLinear
from model.experts import Experts
from model.layers import Linear
from model.logical import logical_tensors
from model.moe import MoE
from model.transformer import Transformer
from trainer.parallel.expert import ExpertDispatcher
from trainer.precision import backends
from trainer.precision.config import PrecisionConfig
from trainer.precision.entries import Roundings
from trainer.precision.health import Seen, Watch, seen
from trainer.precision.recipe import Recipe
from trainer.precision.weights import Weights
from trainer.precision.wire import Codes

SEAMS: dict[type[nn.Module], tuple[str, str, str]] = {
    Linear: ("matmul", "weight", "linear"),
    GroupedLinear: ("matmul", "weight", "side_by_side"),
    Experts: ("grouped_matmul", "w1", "grouped"),
}
"""By kind of module: its seam, the parameter whose formats hold in it, which of a back end's `Products` serves."""
UPWARD = 2
"""Products of an expert that take a token: w1 and w3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seam:
    """One seam of one module. plain: what served there before."""

    module: nn.Module
    attribute: str
    parameter: str
    function: str
    plain: Callable[..., Any]


class Precision:
    """The formats of weights and products of all views of a model, as they are at a time of the run.

    groups: of the parameters. watches: by group, what notes are taken of its operands. backend: who multiplies.
    """

    def __init__(
        self, weights: Weights, views: Sequence[Transformer], groups: Mapping[str, str], backend: str = "emulated"
    ) -> None:
        self.weights, self._products = weights, backends.products_of(backend)
        self.watches = {group: Watch() for group in sorted(set(groups.values()))}
        self._groups = groups
        self._seams = [
            _Seam(
                module=module,
                attribute=attribute,
                parameter=f"{name}.{weight}",
                function=function,
                plain=getattr(module, attribute),
            )
            for view in views
            for name, module in view.named_modules()
            for kind, (attribute, weight, function) in SEAMS.items()
            if isinstance(module, kind) and f"{name}.{weight}" in groups
        ]
        self._dispatchers = [
            (module.dispatcher, f"{name}.experts.w1")
            for view in views
            for name, module in view.named_modules()
            if isinstance(module, MoE) and isinstance(module.dispatcher, ExpertDispatcher)
        ]
        self._roundings = Roundings(views, self.watches)
        self._roundings.enter(weights.recipe.looked_at(weights.recipe.stages[0]))
        self._serve()

    def enter(self, tokens: int) -> set[str]:
        """What holds from `tokens` on; returns the parameters whose weights must be made from their masters again."""
        changed = self.weights.enter(tokens)
        self._roundings.enter(self.weights.recipe.looked_at(tokens))
        if changed:
            self._serve()
        return changed

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, notes are taken of all operands that are rounded; those of before are forgotten."""
        for watch in self.watches.values():
            watch.on = True
            watch.notes.clear()
        try:
            yield
        finally:
            for watch in self.watches.values():
                watch.on = False

    def seen(self) -> dict[str, list[Seen]]:
        """By GROUP.OPERAND, what the notes of this process say; they are gone then."""
        found = {}
        for group, watch in self.watches.items():
            found |= {f"{group}.{operand}": of for operand, of in seen(watch.notes).items()}
            watch.notes.clear()
        return found

    def _serve(self) -> None:
        for seam in self._seams:
            formats, serving = self.weights.table[seam.parameter], seam.plain
            if not formats.has_plain_products:
                serving = getattr(self._products, seam.function)(formats, self.watches[self._groups[seam.parameter]])
            setattr(seam.module, seam.attribute, serving)
        for dispatcher, parameter in self._dispatchers:
            taken, watch = self.weights.table[parameter].input, self.watches[self._groups[parameter]]
            dispatcher.codes = Codes(format=taken, watch=watch, times=UPWARD) if taken else None


def serve(model: Transformer, config: PrecisionConfig, tokens: int) -> Precision:
    """Set the products of a model by itself, whose weights are rounded already, to what holds after `tokens`."""
    weights = Weights(Recipe(config, model.config))
    weights.enter(tokens)
    groups = {one.parameter: one.group for one in logical_tensors(model.config)}
    return Precision(weights, [model], groups, backends.of_run(config, weights.recipe, model.device))
