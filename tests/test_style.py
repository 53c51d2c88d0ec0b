"""Proves the house rules that a machine can hold: sizes, docstrings, imports, doors, configuration keys, no private places."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
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
    "triton": ("model/kernels/*.py", "trainer/precision/kernels.py", "optim/kernels.py"),
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
    return sorted({*top, *below, *code_files()})


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Each import of a file, also inside functions, with the dotted module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: imports are absolute"
            yield node, str(node.module)


@pytest.mark.parametrize("path", code_files(), ids=name)
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE, f"{name(path)} has more than {LONGEST_FILE} lines: split it"
    assert text == "" or ast.get_docstring(tree(path)), f"{name(path)} needs a docstring"


@pytest.mark.parametrize("path", [ROOT / "keel", *package_files()], ids=name)
def test_functions_fit_a_screen_and_public_ones_are_explained(path: Path) -> None:
    parsed = tree(path)
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{name(path)}:{node.lineno}: {node.name} has {length} lines"
    for node in parsed.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name(path)}:{node.lineno}: {node.name} needs a docstring"


@pytest.mark.parametrize("path", package_files(), ids=name)
def test_dataclasses_are_frozen_keyword_only_and_slotted(path: Path) -> None:
    for node in ast.walk(tree(path)):
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else []:
            if "dataclass" in ast.unparse(decorator):
                for flag in ("frozen=True", "kw_only=True", "slots=True"):
                    assert flag in ast.unparse(decorator), f"{name(path)}:{node.lineno}: {node.name} needs {flag}"


@pytest.mark.parametrize("path", package_files(), ids=name)
def test_imports_stay_on_their_floor_and_behind_their_door(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    for node, module in imports(path):
        package, where = module.partition(".")[0], f"{name(path)}:{node.lineno}"
        if package in PACKAGES:
            assert package in MAY_IMPORT[floor], f"{where}: {floor} must not import {package}"
        if package in DOORS:
            door = DOORS[package]
            assert any(Path(name(path)).match(pattern) for pattern in door), f"{where}: {package} belongs into {door}"


@pytest.mark.parametrize("path", code_files(), ids=name)
def test_imports_are_by_name_and_without_jaxtyping(path: Path) -> None:
    for node, module in imports(path):
        where = f"{name(path)}:{node.lineno}"
        assert not (isinstance(node, ast.Import) and module in PACKAGES), f"{where}: from {module}.x import y"
        assert module.partition(".")[0] != "jaxtyping", f"{where}: plain Tensor, shape letters in the name"


@pytest.mark.parametrize("path", text_files(), ids=name)
def test_no_open_ends_and_no_private_places(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    unfinished = re.search("TO" + r"DO(?!\(#\d+\))", text)
    assert unfinished is None, f"{name(path)}: an open end has an issue's number, (#12), or is done now"
    machine = re.search(r"(?<![\w.~*>)}])/(?:work|root|opt|home|Users|srv)/\w", text)
    assert machine is None, f"{name(path)} names a place of one machine: {machine}"
    hosts = [host for host in HOSTS if host in text]
    assert hosts == ([HOSTS[2]] if path.name == "keel" else []), f"{name(path)} names the package hosts {hosts}"


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
