"""Proves the house rules that a machine can hold: sizes, docstrings, imports, doors, keys, no private places."""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from launch import schema
from launch.compose import choices, compose
from model.config import ModelConfig
from trainer.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("launch", "trainer", "model", "optim", "data")
LONGEST_FILE = 300
LONGEST_FUNCTION = 60

MAY_IMPORT = {
    "launch": set(PACKAGES),
    "trainer": {"trainer", "model", "optim", "data"},
    "model": {"model"},
    "optim": {"optim"},
    "data": {"data"},
}
DOORS = {
    "hydra": ("launch/compose.py",),
    "omegaconf": ("launch/compose.py",),
    "pydantic": ("launch/compose.py",),
    "deepspeed": ("trainer/engine.py",),
    "transformer_engine": ("trainer/precision/te.py",),
    "datasets": ("data/source.py",),
    "tokenizers": ("data/tokenizer.py",),
    "wandb": ("trainer/tracking.py",),
    "triton": ("model/kernels/*.py", "trainer/precision/kernels.py"),
    "transformers": (),
}
HOSTS = tuple(".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org")))
TEXT_SUFFIXES = {".py", ".yaml", ".toml", ".md", ".txt", ".json", ".sh", ""}


def code_files() -> list[Path]:
    """Every Python file of ours, the bootstrap among them."""
    folders = (*PACKAGES, "tests", "benchmarks")
    return [ROOT / "keel", *sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def package_files() -> list[Path]:
    return [path for path in code_files() if path.relative_to(ROOT).parts[0] in PACKAGES]


def text_files() -> list[Path]:
    """Everything that is read as text: code, configurations, documents, settings."""
    top = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT_SUFFIXES]
    below = [path for folder in ("configs", "docs", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    below = [path for path in below if path.suffix != ".png"]
    return sorted({*top, *below, *code_files()})


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Each import of a file, also inside functions, with the dotted module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + str(node.module)


def wrong_size(path: Path) -> Iterator[str]:
    """A file is short and says what it is; a function fits a screen; what others call is explained."""
    text, package = path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[0] != "tests"
    if text.count("\n") > LONGEST_FILE:
        yield f"{name(path)}: more than {LONGEST_FILE} lines"
    if text and not ast.get_docstring(tree(path)):
        yield f"{name(path)}: no docstring"
    for node in ast.walk(tree(path)) if package else []:
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION:
            yield f"{name(path)}:{node.lineno}: {node.name} has more than {LONGEST_FUNCTION} lines"
    for node in tree(path).body if package else []:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield f"{name(path)}:{node.lineno}: {node.name} needs a docstring"


def wrong_dataclass(path: Path) -> Iterator[str]:
    """Dataclasses are frozen, keyword-only and slotted."""
    for node in ast.walk(tree(path)):
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else []:
            text = ast.unparse(decorator)
            missing = [flag for flag in ("frozen=True", "kw_only=True", "slots=True") if flag not in text]
            if "dataclass" in text and missing:
                yield f"{name(path)}:{node.lineno}: {node.name} needs {', '.join(missing)}"


def wrong_floor(path: Path) -> Iterator[str]:
    """Imports stay on their floor, and outside packages behind their door."""
    floor = path.relative_to(ROOT).parts[0]
    for node, module in imports(path):
        package, where = module.partition(".")[0], f"{name(path)}:{node.lineno}"
        if package in PACKAGES and package not in MAY_IMPORT[floor]:
            yield f"{where}: {floor} must not import {package}"
        if package in DOORS and not any(Path(name(path)).match(door) for door in DOORS[package]):
            yield f"{where}: {package} is imported in {DOORS[package]} only"


def wrong_import(path: Path) -> Iterator[str]:
    """Our generic package names are never imported bare; shapes stand in names, not in types."""
    for node, module in imports(path):
        if isinstance(node, ast.Import) and module in PACKAGES:
            yield f"{name(path)}:{node.lineno}: from {module}.x import y"
        if module.startswith("."):
            yield f"{name(path)}:{node.lineno}: imports are absolute"
        if module.partition(".")[0] == "jaxtyping":
            yield f"{name(path)}:{node.lineno}: plain Tensor, shape letters in the name"


def wrong_text(path: Path) -> Iterator[str]:
    """No open ends without an issue's number, no places of one machine, no package hosts."""
    text = path.read_text(encoding="utf-8")
    if re.search("TO" + r"DO(?!\(#\d+\))", text):
        yield f"{name(path)}: an open end has an issue's number, (#12), or is done now"
    place = re.search(r"(?<![\w.~*>)}])/(?:work|root|opt|home|Users|srv)/\w+", text)
    if place:
        yield f"{name(path)}: names a place of one machine, {place[0]}"
    allowed = [HOSTS[2]] if path.name == "keel" else []
    yield from (
        f"{name(path)}: names the package host {host}" for host in HOSTS if host in text and host not in allowed
    )


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        (wrong_size, code_files),
        (wrong_dataclass, package_files),
        (wrong_floor, package_files),
        (wrong_import, code_files),
        (wrong_text, text_files),
    ],
)
def test_rules(rule: Callable[[Path], Iterator[str]], files: Callable[[], list[Path]]) -> None:
    found = [complaint for path in files() for complaint in rule(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("choice", choices("model"))
def test_model_files_have_the_released_keys(choice: str) -> None:
    written = yaml.safe_load((ROOT / "configs" / "model" / f"{choice}.yaml").read_text(encoding="utf-8"))
    assert set(written) <= {field.name for field in fields(ModelConfig)}


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_recipe_composes_and_sets_only_what_exists(recipe: str) -> None:
    composition = compose([f"recipe={recipe}"])
    assert composition.config.name == recipe
    assert all(schema.lookup(TrainConfig, key.split(".")) is not None for key in composition.origin)


def test_groups_are_fields_of_the_configuration() -> None:
    groups = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    assert groups - {"recipe"} <= {field.name for field in fields(TrainConfig)}


def test_every_test_folder_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_every_folder_of_tests_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest leaves out folders by name, without a word: `dist` is on its own list."""
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    left_out = [name for name in folders for rule in pytestconfig.getini("norecursedirs") if fnmatch(name, rule)]
    assert "dist" in folders
    assert left_out == []
