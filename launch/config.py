"""`keel config`: show a configuration and where it comes from, compare two, copy a recipe to edit."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import arguments

HELP = "show, compare or copy configurations"
USAGE = f"""
keel config show [--origin] [--json] [KEY=VALUE ...]
keel config diff [--json] A B
keel config cp RECIPE NEW

{HELP}.

  show    the whole configuration of these overrides; --origin says where each value was set
  diff    the keys in which two differ; A and B are recipes, run folders or config.yaml files
  cp      copy configs/recipe/RECIPE.yaml to NEW.yaml beside it, to be edited and used as recipe=NEW
  --json  the same as JSON
"""
ORIGIN_COLUMN = 60


def main(argv: list[str]) -> int:
    """Run one of show, diff, cp."""
    given = arguments.parse(argv, {"--origin": bool, "--json": bool}, USAGE)
    actions = {"show": _show, "diff": _diff, "cp": _cp}
    action = given.words[0] if given.words else ""
    if action not in actions:
        raise ValueError(f"keel config = {action}: expected one of {', '.join(actions)}")
    actions[action](given.words[1:], given.flags)
    return 0


def render(tree: Mapping[str, Any], origin: Mapping[str, str] | None = None, prefix: str = "") -> list[str]:
    """YAML lines of nested values, each leaf on one line; with `origin`, a comment behind it."""
    lines = []
    indent = "  " * prefix.count(".")
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:", *render(value, origin, f"{prefix}{name}.")]
        else:
            line = f"{indent}{name}: {json.dumps(value)}"
            lines.append(line if origin is None else f"{line:<{ORIGIN_COLUMN}}  # {origin[f'{prefix}{name}']}")
    return lines


def _show(words: Sequence[str], flags: Mapping[str, Any]) -> None:
    from launch import schema
    from launch.compose import compose
    from trainer.config import TrainConfig
    from trainer.leaves import flatten

    composition = compose(words)
    tree = asdict(composition.config)
    origin = {
        key: composition.origin.get(key) or f"default ({schema.owner_file(TrainConfig, key.split('.'))})"
        for key in flatten(tree)
    }
    if flags["--json"] and flags["--origin"]:
        leaves = {key: {"value": value, "origin": origin[key]} for key, value in flatten(tree).items()}
        print(json.dumps(leaves, indent=2))
    elif flags["--json"]:
        print(json.dumps(tree, indent=2))
    else:
        print("\n".join(render(tree, origin if flags["--origin"] else None)))


def _diff(words: Sequence[str], flags: Mapping[str, Any]) -> None:
    from trainer.leaves import flatten

    if len(words) != 2:
        raise ValueError(
            f"keel config diff = {' '.join(words)}: expected two recipes, run folders or config.yaml files"
        )
    first, second = (flatten(asdict(_configuration(word))) for word in words)
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if flags["--json"]:
        print(json.dumps({key: [first.get(key), second.get(key)] for key in keys}, indent=2))
        return
    for key in keys:
        print(f"{key}: {_side(first, key)} -> {_side(second, key)}")


def _side(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "(absent)"


def _configuration(word: str) -> Any:
    from launch.compose import choices, compose, read
    from launch.runs import CONFIG_FILE, find_run

    if word in choices("recipe"):
        return compose([f"recipe={word}"]).config
    path = Path(word)
    return read(path if path.is_file() else find_run(word) / CONFIG_FILE)


def _cp(words: Sequence[str], flags: Mapping[str, Any]) -> None:
    from launch.compose import CONFIGS, choices

    if len(words) != 2:
        raise ValueError(f"keel config cp = {' '.join(words)}: expected a recipe and a new name")
    source, name = words
    if source not in choices("recipe"):
        raise ValueError(f"RECIPE = {source}: expected one of {', '.join(choices('recipe'))}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name in choices("recipe"):
        raise ValueError(f"NEW = {name}: expected a name of small letters and digits that is no recipe yet")
    target = CONFIGS / "recipe" / f"{name}.yaml"
    text = (CONFIGS / "recipe" / f"{source}.yaml").read_text(encoding="utf-8")
    target.write_text(re.sub(r"(?m)^name: .*$", f"name: {name}", text), encoding="utf-8")
    print(f"{target}: edit it, then keel train recipe={name}")
