"""Which parameter has which formats: a recipe of rules, resolved for a model at a number of tokens."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

from model.config import ModelConfig, require
from model.inventory import released_tensors
from model.logical import locate
from trainer.precision.config import THEN, PrecisionConfig, RuleConfig
from trainer.precision.elements import Format


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """Of one parameter and the operands of its three products; None, or no format: the run's type.

    weight: what the master is rounded to, one after the other. See `RuleConfig`.
    """

    rule: str = ""
    weight: tuple[Format, ...] = ()
    input: Format | None = None
    grad: Format | None = None
    dgrad_weight: Format | None = None
    wgrad_input: Format | None = None
    wgrad_grad: Format | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing has a format."""
        return not self.weight and self.has_plain_products

    @property
    def has_plain_products(self) -> bool:
        """Whether no operand but the weight has a format."""
        return all(one is None for one in (self.input, self.grad, self.dgrad_weight, self.wgrad_input, self.wgrad_grad))

    def operands(self) -> tuple[str, ...]:
        """The formats of weight, with dgrad's own if it has one, input, grad, wgrad_input and wgrad_grad; "-": none."""
        weight = THEN.join(one.name for one in self.weight) or "-"
        if self.dgrad_weight is not None:
            weight += f" dgrad {self.dgrad_weight.name}"
        names = (one.name if one else "-" for one in (self.input, self.grad, self.wgrad_input, self.wgrad_grad))
        return weight, *names


PLAIN = Formats()


@dataclass(frozen=True, kw_only=True, slots=True)
class LookedAt:
    """What attention looks at: the indexer's q and k, keys and entries; None: the run's type."""

    index: Format | None = None
    entries: Format | None = None


class Recipe:
    """The rules of a run and what they say of each parameter of its model.

    Raises ValueError for a rule that names no parameter, or one that is computed in a higher type by the model's
    definition and can have no format.
    """

    def __init__(self, config: PrecisionConfig, model: ModelConfig) -> None:
        self._config = config
        self._able = dict(_parameters(model))
        self._named = {name: self._names(name, rule) for name, rule in config.rules.items()}
        self._check_experts()
        channels = model.index_head_dim
        if config.index.format:
            key = "precision.index.format"
            require(
                channels & (channels - 1) == 0,
                key,
                config.index.format,
                f'"", as index_head_dim={channels} is no power of two',
            )

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """The numbers of tokens from which on other formats hold, 0 first."""
        looked_at = (one for one in (self._config.index, self._config.entries) if one.format)
        return tuple(sorted({0, *(rule.from_tokens for rule in (*self._config.rules.values(), *looked_at))}))

    def stage(self, tokens: int) -> int:
        """The stage, as its first number of tokens, of a step that begins after `tokens`."""
        return max(start for start in self.stages if start <= tokens)

    def at(self, tokens: int) -> Mapping[str, Formats]:
        """By parameter, all of the model's, what holds in a step that begins after `tokens`."""
        found = dict.fromkeys(self._able, PLAIN)
        for name, rule in self._config.rules.items():
            if rule.from_tokens <= tokens:
                found |= dict.fromkeys(self._named[name], self._formats(name, rule))
        return found

    def looked_at(self, tokens: int) -> LookedAt:
        """What holds of keys and entries in a step that begins after `tokens`."""
        index, entries = self._config.index, self._config.entries
        of = self._config.format
        return LookedAt(
            index=of(index.format) if index.from_tokens <= tokens else None,
            entries=of(entries.format) if entries.from_tokens <= tokens else None,
        )

    def rounded(self) -> set[str]:
        """The parameters that at some time are not just their masters cast."""
        return {name for start in self.stages for name, formats in self.at(start).items() if formats.weight}

    @property
    def is_plain(self) -> bool:
        """Whether nothing has a format at any time."""
        parameters = all(formats.is_plain for start in self.stages for formats in self.at(start).values())
        return parameters and all(self.looked_at(start) == LookedAt() for start in self.stages)

    def hash(self) -> str:
        """Of all that the recipe says; the same where the same bits come out."""
        said = {
            start: {name: _said(replace(one, rule="")) for name, one in self.at(start).items()}
            | _said(self.looked_at(start))
            for start in self.stages
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def _names(self, name: str, rule: RuleConfig) -> list[str]:
        found = [parameter for parameter in self._able if any(fnmatchcase(parameter, glob) for glob in rule.parameters)]
        key = f"precision.rules.{name}.parameters"
        require(bool(found), key, list(rule.parameters), "names of this model's parameters; none matches")
        if not self._formats(name, rule).is_plain:
            unable = next((parameter for parameter in found if not self._able[parameter]), None)
            expected = f"no {unable}, which is stored and computed in bf16 or fp32 (spec 7.2)"
            require(unable is None, key, list(rule.parameters), expected)
        return found

    def _check_experts(self) -> None:
        """One product serves the three matrices of a layer's experts."""
        for start in self.stages:
            table = self.at(start)
            for name in (name for name in table if name.endswith(".ffn.experts.w1")):
                first = table[name]
                for other in (name.removesuffix("1") + number for number in "23"):
                    alike = replace(table[other], rule=first.rule) == first
                    key = f"precision.rules.{table[other].rule or first.rule}.parameters"
                    require(
                        alike, key, other, f"the same formats for w1, w2 and w3 of a layer's experts, as {name} has"
                    )

    def _formats(self, name: str, rule: RuleConfig) -> Formats:
        of = self._config.format
        chain = [one for part in rule.weight.split(THEN) if (one := of(part))]
        weight = (*chain[:1], *(replace(one, floor=0.0) for one in chain[1:]))
        return Formats(
            rule=name,
            weight=weight,
            input=of(rule.input),
            grad=of(rule.grad),
            dgrad_weight=of(rule.dgrad_weight),
            wgrad_input=of(rule.wgrad_input),
            wgrad_grad=of(rule.wgrad_grad),
        )


def _said(formats: Formats | LookedAt) -> dict[str, object]:
    """What has a format, so that a hash does not know of keys that are not used."""
    return {key: one for key, one in asdict(formats).items() if one}


def _parameters(model: ModelConfig) -> Iterator[tuple[str, bool]]:
    """Every parameter, and whether it may have a format: where the released checkpoint has one."""
    for spec in released_tensors(model, experts=1):
        if spec.kind != "buffer":
            yield locate(spec.name).parameter, spec.stored in ("F8_E4M3", "FP4")
