"""Proves that map and legend of `model/__init__.py` hold: the named functions exist, shape letters are explained."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("model", "optim", "trainer", "data")
TEXT = importlib.import_module("model").__doc__ or ""
SUFFIX = re.compile(r"[a-z]\w*_([A-Z][A-Z0-9]*)")
"""A name in lower case that ends in shape letters; 1 stands for a dimension of that size."""


def legend() -> list[str]:
    """The explained letters, in order."""
    lines = [line for line in TEXT.splitlines() if line.startswith("    ")]
    return [letter for line in lines for letter in re.findall(r"(?<!\S)([A-Z]) (?=[a-z]|RoPE)", line)]


def names(path: Path) -> Iterator[str]:
    """Variables, arguments and attributes of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""


def letters(package: str) -> dict[str, str]:
    """Letter -> one name of the package that ends in it."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        for name in names(path):
            match = SUFFIX.fullmatch(name)
            found |= dict.fromkeys(match[1] if match else "", f"{path.relative_to(ROOT)}: {name}")
    return found


def resolve(path: str) -> object:
    """The module, function or method that a dotted path names; raises AttributeError or ImportError."""
    parts = path.split(".")
    found: object = importlib.import_module(".".join(parts[:2]))
    for part in parts[2:]:
        found = getattr(found, part)
    return found


def named() -> list[str]:
    return re.findall(r"`(model\.[\w.]+)`", TEXT)


def test_the_map_names_many_functions() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    functions = [path for row in rows for path in re.findall(r"`(model\.[\w.]+)`", row)]
    assert len(functions) >= len(rows[1:-1]) >= 12
    assert set(functions) < set(named())


@pytest.mark.parametrize("path", named())
def test_what_the_map_names_exists(path: str) -> None:
    found = resolve(path)
    in_table = any(f"`{path}`" in line for line in TEXT.splitlines() if line.startswith("|"))
    assert isinstance(found, FunctionType if in_table else ModuleType)
    assert found.__doc__


def test_a_function_that_is_gone_is_noticed() -> None:
    with pytest.raises(AttributeError):
        resolve("model.mhc.mixture")
    with pytest.raises(ImportError):
        resolve("model.hyper.mixes")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_shape_letter_is_in_the_legend(package: str) -> None:
    unknown = {letter: name for letter, name in letters(package).items() if letter not in [*legend(), *"0123456789"]}
    assert not unknown


def test_the_legend_explains_each_letter_once() -> None:
    assert len(legend()) == len(set(legend()))
    assert len(legend()) >= 20


def test_shape_suffixes_are_found(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text("def f(x_BTY, CSA_RATIO):\n    y_PD = self.weight_VD\n")
    found = [match[1] for name in names(tmp_path / "sample.py") if (match := SUFFIX.fullmatch(name))]
    assert sorted(found) == ["BTY", "PD", "VD"]
