"""The forward passes of a step, watched at the model's seams: how mHC mixes the streams, how often SwiGLU clamps.

The seams (`Block.enter`, `Experts.swiglu`, `SharedExpert.swiglu`) are wrapped for the time of one step: the functions
behind them, kernels too, get what they always get and their results go on unchanged, and nothing is left on the model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.block import Block
from model.experts import Experts, SharedExpert
from model.transformer import Transformer
from trainer.parallel.expert import StandBy
from trainer.parallel.world import ALONE, World

if TYPE_CHECKING:
    from trainer.parallel.pipeline import Pipeline


class Pass:
    """What one forward pass of one row has shown so far; sums are tensors, so that nothing waits for a GPU."""

    def __init__(self) -> None:
        self.errors: list[Tensor] = []
        """`stochastic_errors` of each mHC site."""
        self.composite_PNN: Tensor | None = None
        """The product of comb over the main model's sites so far, in fp64."""
        self.clamped: list[Tensor] = []
        """SwiGLU inputs outside the clamp, by call."""
        self.values = 0
        """All SwiGLU inputs."""
        self.first_layer = 0
        """The first of the layers that the pass went through."""

    @torch.no_grad()
    def site(self, comb_BTNN: Tensor, *, main: bool) -> None:
        """Note the residual mix of an mHC site; main: not of the MTP block."""
        comb_PNN = comb_BTNN.detach().flatten(0, 1)
        self.errors.append(stochastic_errors(comb_PNN))
        if main:
            mix_PNN = comb_PNN.double()
            self.composite_PNN = mix_PNN if self.composite_PNN is None else self.composite_PNN @ mix_PNN

    @torch.no_grad()
    def inputs(self, gate: Tensor, up: Tensor, limit: float) -> None:
        """Note the inputs of a SwiGLU: gate is clamped from above, up on both sides."""
        self.clamped.append((gate.detach() > limit).sum() + (up.detach().abs() > limit).sum())
        self.values += gate.numel() + up.numel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a pass has shown, in numbers. errors: the largest of rows and columns. gains: summed over tokens."""

    errors: tuple[float, float]
    gains: tuple[float, float]
    tokens: int
    clamped: int
    values: int


def measure(passes: Sequence[Pass], world: World = ALONE, pipeline: "Pipeline | None" = None) -> dict[str, float]:
    """The metrics mhc/* and experts/* over the rows of a step, padding included; the rows' order changes no bit.

    On many ranks all of them call this alike. Empty where no pass was watched.
    """
    if pipeline is not None:
        _chain(passes, pipeline)
    seen = [one for of_rank in world.gather([_seen(one) for one in passes]) for one in of_rank]
    if not seen:
        return {}
    tokens = sum(one.tokens for one in seen)
    forward, backward = (math.fsum(one.gains[way] for one in seen) / tokens for way in (0, 1))
    return {
        "mhc/row_sum_error": max(one.errors[0] for one in seen),
        "mhc/col_sum_error": max(one.errors[1] for one in seen),
        "mhc/composite_gain": forward,
        "mhc/composite_gain_backward": backward,
        "experts/clamped_ratio": sum(one.clamped for one in seen) / sum(one.values for one in seen),
    }


def _chain(passes: Sequence[Pass], pipeline: "Pipeline") -> None:
    """Where layers are shared out: the product over all of them, in the passes through the last; none in the others.

    It is a product of the stages' products, so its last digits depend on how the layers are cut.
    """
    of_chunk: dict[int, list[Pass]] = {}
    for one in passes:
        if one.composite_PNN is not None:
            of_chunk.setdefault(one.first_layer, []).append(one)
    if not of_chunk:
        return

    def advance(layers: range, before_BPNN: Tensor) -> Tensor:
        return before_BPNN @ stacked[layers.start]

    stacked = {first: torch.stack([_taken(one) for one in some]) for first, some in of_chunk.items()}
    like_BPNN = next(iter(stacked.values()))
    whole_BPNN = pipeline.chain(torch.eye(like_BPNN.shape[-1]).to(like_BPNN).expand_as(like_BPNN), advance)
    for one, whole_PNN in zip(of_chunk.get(pipeline.chunks[-1].start, ()), whole_BPNN, strict=False):
        one.composite_PNN = whole_PNN


def _taken(one: Pass) -> Tensor:
    composite_PNN, one.composite_PNN = one.composite_PNN, None
    assert composite_PNN is not None, "the pass went through an mHC site of the main model"
    return composite_PNN


def _seen(one: Pass) -> Seen:
    rows, columns = torch.stack(one.errors).amax(0).tolist() if one.errors else (0.0, 0.0)
    gain_2P = torch.zeros(2, 0) if one.composite_PNN is None else composite_gains(one.composite_PNN)
    clamped = int(torch.stack(one.clamped).sum()) if one.clamped else 0
    forward, backward = gain_2P.sum(1).tolist()
    return Seen(
        errors=(rows, columns), gains=(forward, backward), tokens=gain_2P.shape[1], clamped=clamped, values=one.values
    )


def stochastic_errors(comb_PNN: Tensor) -> Tensor:
    """[2]: the largest |sum - 1| over all tokens of comb's rows (over k of comb_jk) and of its columns (over j).

    The report's B is comb transposed: its rows are comb's columns.
    """
    return torch.stack([(comb_PNN.sum(axis) - 1).abs().max() for axis in (2, 1)])


def composite_gains(composite_PNN: Tensor) -> Tensor:
    """[2, P]: what all sites together amplify a token's signal at most, and its gradient.

    Source: mHC paper, Amax gain magnitude: of the composite of the report's B, the largest absolute row sum (forward
    signal) and column sum (gradient). Math: X' = comb^T X at every site, so C = comb_1 comb_2 ... carries stream j at
    the bottom to stream k at the top; forward max_k sum_j |C_jk|, backward max_j sum_k |C_jk|. Doubly stochastic: 1.
    """
    size_PNN = composite_PNN.abs()
    return torch.stack([size_PNN.sum(axis).amax(-1) for axis in (1, 2)])


@contextmanager
def watched(models: Sequence[Transformer]) -> Iterator[list[Pass]]:
    """Within the block, each forward pass of the models (threads may run them side by side) adds itself when it ends.

    What a backward pass computes again is not counted twice.
    """
    passes: list[Pass] = []
    with ExitStack() as undo:
        for model in models:
            _watch(model, passes, undo)
        yield passes


def _watch(model: Transformer, passes: list[Pass], undo: ExitStack) -> None:
    running: list[Pass] = []
    """The pass that runs now, if one does."""

    def begin(module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        running[:] = [Pass()]
        layers = named.get("layers")
        running[0].first_layer = 0 if layers is None else layers.start

    def end(*_: Any) -> None:
        passes.append(running.pop())

    for passing in (model, *(module for module in model.modules() if isinstance(module, StandBy))):
        undo.callback(passing.register_forward_pre_hook(begin, with_kwargs=True).remove)
        undo.callback(passing.register_forward_hook(end).remove)
    main = set(model.layers)
    for module in model.modules():
        if isinstance(module, Block):
            _replace(module, "enter", _noting_mix(module.enter, running, main=module in main), undo)
        elif isinstance(module, Experts | SharedExpert):
            _replace(module, "swiglu", _noting_inputs(module.swiglu, running), undo)


def _noting_mix(inner: Callable[..., Any], running: list[Pass], *, main: bool) -> Callable[..., Any]:
    def noted(*arguments: Any, **constants: Any) -> Any:
        u_BTD, post_BTN, comb_BTNN = inner(*arguments, **constants)
        for one in running:
            one.site(comb_BTNN, main=main)
        return u_BTD, post_BTN, comb_BTNN

    return noted


def _noting_inputs(inner: Callable[..., Tensor], running: list[Pass]) -> Callable[..., Tensor]:
    def noted(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
        for one in running:
            one.inputs(gate, up, limit)
        return inner(gate, up, weight, limit)

    return noted


def _replace(module: nn.Module, name: str, value: Callable[..., Any], undo: ExitStack) -> None:
    undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)
