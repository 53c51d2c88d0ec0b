"""The passes of a stage's rows, part by part, as a pipeline's schedule asks for them (`trainer.engine.Passes`).

A stage runs the same functions on a row as one process does, `row.forward` and `row.measure`, through its own layers;
it draws the row's ids itself, so that streams alone travel. A rank without a row in the last round takes part in the
other ranks' exchanges of tokens and hands on zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import Batch
from model.config import AttentionMode
from model.transformer import Transformer
from trainer import row
from trainer.laps import Laps, PassLaps
from trainer.parallel.expert import stand_by
from trainer.row import Passed, RowSums, Weights

PickRow = Callable[[int], Batch | None]
"""The row of a turn, as a batch of one on the device; None where this rank has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The part of a model that passes go through. shape: of the streams; travels: their type between stages."""

    model: Transformer
    shape: tuple[int, ...]
    travels: torch.dtype

    def enter(self, x_BTND: Tensor | None) -> Tensor | None:
        """What has arrived, as the model computes with it."""
        return None if x_BTND is None else x_BTND.to(self.model.dtype)

    def leave(self, x_BTND: Tensor | None, loss: Tensor) -> Tensor:
        """What goes on: the streams, or the loss behind the last layer."""
        return loss if x_BTND is None else x_BTND.to(self.travels)

    def nothing(self, layers: range) -> Tensor:
        """What goes on where there is no row."""
        end = layers.stop == self.model.config.num_hidden_layers
        return torch.zeros(() if end else self.shape, dtype=self.travels, device=self.model.device)


class Measuring:
    """Forward passes alone. parts: what the layers here have found, by turn."""

    def __init__(self, stage: Stage, pick: PickRow, mode: AttentionMode) -> None:
        self._stage, self._pick, self._mode = stage, pick, mode
        self._found: dict[tuple[int, int], RowSums] = {}

    def forward(self, turn: int, layers: range, x_BTND: Tensor | None) -> Tensor:
        """See `trainer.engine.Passes`."""
        one = self._pick(turn)
        if one is None:
            stand_by(self._stage.model, layers, backward=False)
            return self._stage.nothing(layers)
        passed = row.measure(self._stage.model, one, self._mode, self._stage.enter(x_BTND), layers)
        self._found[turn, layers.start] = row.sums(passed, one)
        return self._stage.leave(passed.output.x_BTND, passed.lm)

    def backward(self, turn: int, layers: range, grad_BTND: Tensor | None) -> None:
        """There is none."""
        raise AssertionError("a measurement has no backward pass")

    def sums(self, turn: int) -> RowSums | None:
        """What all layers here have found in the row of a turn; None where there was none."""
        parts = [part for (of, _), part in self._found.items() if of == turn]
        return row.join(parts) if parts else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Underway:
    """A row between its forward and its backward pass. sent: what went on; x_BTND: what had arrived, a leaf."""

    one: Batch | None
    passed: Passed | None
    sent: Tensor
    end: Tensor | None
    x_BTND: Tensor | None
    laps: Laps


class Learning(Measuring):
    """Forward and backward passes. begin: called before a backward pass; finish: after it, with what was found.

    What a row's backward pass leaves in `grad` is for `finish` to take.
    """

    def __init__(
        self,
        stage: Stage,
        pick: PickRow,
        mode: AttentionMode,
        weights: Weights,
        *,
        begin: Callable[[int], None],
        finish: Callable[[int, RowSums | None], None],
    ) -> None:
        super().__init__(stage, pick, mode)
        self._weights, self._begin, self._finish = weights, begin, finish
        self._underway: dict[tuple[int, int], _Underway] = {}
        self.laps: list[PassLaps] = []

    def forward(self, turn: int, layers: range, x_BTND: Tensor | None) -> Tensor:
        """See `trainer.engine.Passes`."""
        stage, laps, one = self._stage, Laps(self._stage.model.device), self._pick(turn)
        if one is None:
            end = stand_by(stage.model, layers, backward=self._mode != "indexer_warmup")
            passed, sent = None, stage.nothing(layers)
            end = end if end.requires_grad else None
        else:
            passed = row.forward(stage.model, one, self._mode, self._weights, stage.enter(x_BTND), layers)
            sent = stage.leave(passed.output.x_BTND, passed.lm)
            # In the warm-up stage each stage has a loss of its own and no gradient comes back.
            end = passed.end if self._mode == "indexer_warmup" or passed.output.x_BTND is None else sent
        laps.mark()
        self._underway[turn, layers.start] = _Underway(
            one=one, passed=passed, sent=sent, end=end, x_BTND=x_BTND, laps=laps
        )
        return sent.detach()

    def backward(self, turn: int, layers: range, grad_BTND: Tensor | None) -> None:
        """See `trainer.engine.Passes`."""
        this = self._underway.pop((turn, layers.start))
        laps = Laps(self._stage.model.device)
        self._begin(turn)
        if this.end is not None:
            torch.autograd.backward(this.end, grad_BTND if this.end is this.sent else None)
        if this.x_BTND is not None and this.x_BTND.grad is None:
            this.x_BTND.grad = torch.zeros_like(this.x_BTND)
        laps.mark()
        if this.passed is not None and this.one is not None:
            self._found[turn, layers.start] = row.sums(this.passed, this.one)
        self._finish(turn, self._found.get((turn, layers.start)))
        laps.mark()
        if this.one is not None:
            self.laps.append(PassLaps(forward=this.laps, backward=laps))
