"""A recipe as a table: which parameters of which group have which formats, and what a number of them costs in bytes."""

from dataclasses import dataclass

from model.config import ModelConfig
from model.inventory import Group, released_tensors
from model.logical import locate
from optim.groups import aligned
from trainer.precision.config import PrecisionConfig
from trainer.precision.elements import coded_bytes
from trainer.precision.recipe import Formats, LookedAt, Recipe

HEAD = ("group", "rule", "weight", "input", "grad", "wgrad input", "wgrad grad", "parameters", "bytes held", "sent")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The parameters of one group with the same formats. held, sent: bytes of all of them, as weights and on their way
    from their owners; parameters: how many numbers.
    """

    group: Group
    formats: Formats
    parameters: int
    held: int
    sent: int


def lines(config: PrecisionConfig, model: ModelConfig, tokens: int, element_bytes: int) -> list[Line]:
    """What holds from `tokens` on; element_bytes: of the run's type, in which weights are held."""
    table = Recipe(config, model).at(tokens)
    found: dict[tuple[Group, Formats], Line] = {}
    for spec in released_tensors(model, experts=1):
        if spec.kind == "buffer":
            continue
        formats = table[locate(spec.name).parameter]
        copies = model.n_routed_experts if spec.group == "experts" else 1
        held = spec.size * (max(element_bytes, 4) if spec.is_island else element_bytes)
        sent = coded_bytes(spec.shape, formats.weight[0]) if formats.weight else held
        key = spec.group, formats
        before = found.get(key, Line(group=spec.group, formats=formats, parameters=0, held=0, sent=0))
        found[key] = Line(
            group=spec.group,
            formats=formats,
            parameters=before.parameters + copies * spec.size,
            held=before.held + copies * held,
            sent=before.sent + copies * sent,
        )
    return list(found.values())


def render(config: PrecisionConfig, model: ModelConfig, element_bytes: int) -> str:
    """All stages of the recipe, one table each; "-" is the run's type, or fp32 where the model computes in that."""
    recipe = Recipe(config, model)
    blocks = []
    for start in recipe.stages:
        rows = [_row(line) for line in lines(config, model, start, element_bytes)]
        title = [f"from {start:,} tokens on"] if len(recipe.stages) > 1 else []
        blocks += [*title, aligned([HEAD, *rows], left=set(range(7))), *_looked_at(recipe.looked_at(start))]
    return "\n".join([*blocks, f"recipe {recipe.hash()}"])


def _row(line: Line) -> tuple[str, ...]:
    each = (f"{size / line.parameters:.3f}" for size in (line.held, line.sent))
    return line.group, line.formats.rule or "-", *line.formats.operands(), f"{line.parameters:,}", *each


def _looked_at(holds: LookedAt) -> list[str]:
    index = f"the indexer's q and k, after the Hadamard rotation: {holds.index.name}" if holds.index else ""
    entries = f"keys and compressed entries, but for rotated channels: {holds.entries.name}" if holds.entries else ""
    return [line for line in (index, entries) if line]
