"""From masters to the weights that a model computes with: rounded once per optimizer step, where a matrix is owned.

A weight with a format holds the format's numbers in the run's type, so that everything that knows tensors goes on
knowing them: checksums, checkpoints, hand-out. FP4 goes through FP8 (R 5.2.1): master -> e2m1 -> e4m3, the second
without loss where the scales of a tile allow it (`qat.py`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.precision.formats import rounded
from trainer.precision.recipe import Formats, Recipe


class Weights:
    """The formats of every parameter at a time of the run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._start = recipe.stages[0]
        self.table: Mapping[str, Formats] = recipe.at(self._start)

    def enter(self, tokens: int) -> set[str]:
        """What holds from `tokens` on; returns the parameters of which the formats have changed."""
        start, before = self.recipe.stage(tokens), self.table
        if start == self._start:
            return set()
        self._start, self.table = start, self.recipe.at(start)
        return {name for name, formats in self.table.items() if formats != before[name]}

    def of_master(self, parameter: str, master: Tensor) -> Tensor:
        """The weights of a logical matrix, from its fp32 master; `parameter`: its name, or that of a span of it."""
        weight = master
        for format in self.table[parameter.partition("[")[0]].weight:
            weight = rounded(weight, format)
        return weight

    @torch.no_grad()
    def round(self, parameter: str, weight: Tensor) -> None:
        """Make a logical matrix, which is its own master so far, one of weights, in place."""
        if self.table[parameter].weight:
            weight.copy_(self.of_master(parameter, weight.float()))
