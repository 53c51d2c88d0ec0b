"""From YAML files and command-line words to one frozen TrainConfig: the door to Hydra, OmegaConf and pydantic.

Hydra chooses and merges the files of `configs/` and parses the overrides; the dataclasses say which keys exist, so that
a key with a default can be overridden although no YAML file spells it; pydantic checks strictly, once. Everything a
user can get wrong is a ValueError "key = value: expected ...", and each leaf knows where its value came from.
"""

import difflib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from launch import schema
from trainer.config import TrainConfig
from trainer.leaves import flatten

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PRIMARY = "train"
LAYOUTS, RECIPES = "parallel", "precision"
"""The groups of which a run that goes on, or a replay, may take another choice."""
HYDRA_VERSION_BASE = "1.3"
COMMAND_LINE = "command line"
MISSING = "???"


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """A checked configuration and, for each leaf that something set, what set it; other leaves are class defaults."""

    config: TrainConfig
    origin: Mapping[str, str]


def compose(overrides: Sequence[str], configs: Path = CONFIGS) -> Composition:
    """Compose `configs` with overrides in Hydra's syntax; raises ValueError "key = value: expected ..."."""
    groups = {path.name for path in configs.iterdir() if path.is_dir()}
    parsed = [_parse(text, groups) for text in overrides]
    chosen = [override for override in parsed if _is_choice(override, groups, configs)]
    tree, origin = _merge_files([str(override.input_line) for override in chosen], configs)
    touched: set[str] = set()
    for override in parsed:
        if override not in chosen:
            _apply(tree, override)
            touched |= _touched(override)
    values = _plain(tree)
    origin = {
        leaf: COMMAND_LINE if any(_within(leaf, key) or _within(key, leaf) for key in touched) else origin[leaf]
        for leaf in flatten(values)
    }
    return Composition(config=validate(values), origin=origin)


def read(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A run's own `config.yaml` with overrides on top; of groups only two have choices, else the file is whole.

    A layout sets the keys that its file has, a recipe stands in place of the run's.
    """
    tree, groups = OmegaConf.create(_load(path)), {LAYOUTS, RECIPES}
    parsed = [_parse(text, groups) for text in overrides]
    chosen = [one for one in parsed if one.type is not OverrideType.DEL and _is_choice(one, groups, CONFIGS)]
    for override in chosen:
        merged, origin = _merge_files([str(override.input_line)], CONFIGS)
        if override.key_or_group == RECIPES:
            tree[RECIPES] = merged[RECIPES]
            continue
        for leaf in (leaf for leaf, file in origin.items() if file.startswith(f"{CONFIGS.name}/{LAYOUTS}/")):
            OmegaConf.update(tree, leaf, OmegaConf.select(merged, leaf), force_add=True)
    for override in parsed:
        if override not in chosen:
            _apply(tree, override)
    return validate(_plain(tree))


def choices(group: str, configs: Path = CONFIGS) -> list[str]:
    """The names that a group such as `recipe` offers, sorted."""
    return sorted(path.stem for path in (configs / group).glob("*.yaml"))


def validate(values: Mapping[str, Any]) -> TrainConfig:
    """Plain nested values to a TrainConfig: no unknown key, no conversion but integer to number and list to tuple."""
    for key, value in flatten(values).items():
        if value == MISSING:
            raise ValueError(f"{key} = {MISSING}: expected a value: {_expected(key.split('.'))}")
        _require(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    try:
        # Through JSON text, because there pydantic's strict mode takes an array for a tuple and a mapping for a class.
        return TypeAdapter(TrainConfig).validate_json(json.dumps(values), strict=True, extra="forbid")
    except ValidationError as error:
        raise ValueError(_first_line(error)) from None


def _parse(text: str, groups: Collection[str] = ()) -> Override:
    key, _, value = text.partition("=")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise _malformed(key, value) from None
    key = override.key_or_group
    if not key:
        raise _malformed(text, value)
    if key not in groups and schema.lookup(TrainConfig, key.split(".")) is None:
        raise _unknown(key, value, groups)
    _require(not override.is_sweep_override(), key, value, "one value; a list stands in brackets, a text in quotes")
    _require(override.package is None, f"{key}@{override.package}", value, "a key without a package")
    return override


def _malformed(key: str, value: str) -> ValueError:
    return ValueError(
        f"{key} = {schema.show(value)}: expected KEY=VALUE in Hydra's syntax "
        "(quote a text that has commas, brackets or quotation marks)"
    )


def _is_choice(override: Override, groups: set[str], configs: Path) -> bool:
    """Whether an override picks a file of a group: `model=flash`, or drops a group's choice: `~tracking`."""
    key, value = override.key_or_group, override.value()
    if key not in groups:
        return False
    if override.type is OverrideType.DEL:
        return True
    if isinstance(value, str):
        _require(override.type is OverrideType.CHANGE, f"+{key}", value, f"{key}={value}, without a plus")
        return True
    offered = ", ".join(choices(key, configs))
    _require(schema.lookup(TrainConfig, [key]) is not None, key, value, f"one of {offered}")
    return False


def _touched(override: Override) -> set[str]:
    """The keys that an override sets: its own, or those of the section it merges."""
    key, value = override.key_or_group, override.value()
    if override.type is OverrideType.DEL:
        return set()
    return set(flatten(value, f"{key}.")) if isinstance(value, Mapping) and value else {key}


def _merge_files(choice_texts: list[str], configs: Path) -> tuple[DictConfig, dict[str, str]]:
    """Hydra's merge of the chosen files, and for each leaf the last file that spells it."""
    try:
        with initialize_config_dir(version_base=HYDRA_VERSION_BASE, config_dir=str(configs)):
            tree = hydra_compose(PRIMARY, overrides=choice_texts)
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list(PRIMARY, choice_texts, RunMode.RUN).defaults
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        raise ValueError(f"{group} = {name}: expected one of {', '.join(error.options or [])}") from None
    except HydraException as error:
        raise ValueError(
            f"overrides = {' '.join(choice_texts)}: expected a composition Hydra accepts; it says: "
            f"{schema.show(str(error))}"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"configs = {configs}: expected valid YAML; {schema.show(str(error))}") from None
    origin: dict[str, str] = {}
    for entry in defaults:
        file = configs / f"{entry.config_path}.yaml"
        if not str(entry.config_path).startswith("hydra/"):
            content = {name: value for name, value in _load(file).items() if name != "defaults"}
            prefix = f"{entry.package}." if entry.package else ""
            shown = f"{configs.name}/{entry.config_path}.yaml"
            origin |= dict.fromkeys(flatten(content, prefix), shown)
    OmegaConf.set_struct(tree, False)
    return tree, origin


def _apply(tree: DictConfig, override: Override) -> None:
    """Set or delete one value; a new entry of a dict field needs a `+`, so that a misspelt name is no new entry."""
    key, path = override.key_or_group, override.key_or_group.split(".")
    if override.type is OverrideType.DEL:
        parent = OmegaConf.select(tree, ".".join(path[:-1])) if path[1:] else tree
        _require(parent is not None and path[-1] in parent, f"~{key}", "", "a key that a file or an override sets")
        del parent[path[-1]]
        return
    if override.type is OverrideType.CHANGE:
        for entry in schema.dict_prefixes(TrainConfig, path):
            section, name = ".".join(entry[:-1]), ".".join(entry)
            present = list(OmegaConf.select(tree, section) or {})
            _require(
                entry[-1] in present,
                key,
                override.value(),
                f"an entry of {section} that exists ({', '.join(present) or 'none'}) or a + before the key "
                f"for a new one, +{name}",
            )
    try:
        OmegaConf.update(tree, key, override.value(), merge=True, force_add=True)
    except (OmegaConfBaseException, AssertionError, IndexError, TypeError):
        raise ValueError(
            f"{key} = {schema.show(override.value())}: expected a place that can be set; "
            f"{'.'.join(path[:-1])} is no section with that entry"
        ) from None


def _plain(tree: DictConfig) -> dict[str, Any]:
    try:
        return _container(tree, resolve=True)
    except OmegaConfBaseException as error:
        text = flatten(_container(tree)).get(str(error.full_key))
        raise ValueError(
            f"{error.full_key} = {schema.show(text)}: expected an interpolation that can be resolved; "
            f"{schema.show(str(error).splitlines()[0])}"
        ) from None


def _load(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path.name} = {path}: expected valid YAML; {schema.show(str(error))}") from None
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path.name} = {path}: expected a YAML mapping")
    return _container(content)


def _container(tree: DictConfig, *, resolve: bool = False) -> dict[str, Any]:
    content = OmegaConf.to_container(tree, resolve=resolve)
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items()}


def _first_line(error: ValidationError) -> str:
    """The first of pydantic's errors in our words; unknown keys come first, a misspelt one also reads as missing."""
    found = error.errors(include_url=False)
    worst = next((item for item in found if item["type"] == "unexpected_keyword_argument"), found[0])
    path = [str(part) for part in worst["loc"]]
    if worst["type"].endswith("_type") and schema.lookup(TrainConfig, path) is None:
        path.pop()  # of a key that may hold one of two types, pydantic adds the type it tried
    key = ".".join(path)
    if worst["type"] == "unexpected_keyword_argument":
        return str(_unknown(key, worst["input"]))
    if worst["type"] == "missing":
        return f"{key} = {MISSING}: expected a value: {_expected(path)}"
    if worst["type"] == "value_error":
        return _prefixed(key, str(worst["ctx"]["error"]))
    return f"{key} = {schema.show(worst['input'])}: expected {_expected(path)}"


def _prefixed(section: str, text: str) -> str:
    """A section's own complaint "key = value: expected ..." with the path of that section before the key."""
    return f"{section}.{text}" if section and re.match(r"[\w.]+.* = ", text) else text


def _expected(path: Sequence[str]) -> str:
    kind = schema.lookup(TrainConfig, path)
    assert kind is not None, path
    return schema.describe(kind)


def _unknown(key: str, value: object, groups: Collection[str] = ()) -> ValueError:
    path = key.split(".")
    close = difflib.get_close_matches(key, groups, n=1) if len(path) == 1 else []
    meant = close[0] if close else schema.nearest(TrainConfig, path)
    hint = f"; did you mean {meant}?" if meant else " (keel config show lists them)"
    return ValueError(f"{key} = {schema.show(value)}: expected a key that exists{hint}")


def _within(leaf: str, key: str) -> bool:
    return leaf == key or leaf.startswith(f"{key}.")


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key} = {schema.show(value)}: expected {expected}")
