"""Deliberate mistakes in the model, each a small change of one function's text, for the negative controls.

A mistake names a function of `model` and what to write instead of a piece of it. A piece that no longer occurs exactly
once is an error: whoever rewrites the function writes its mistakes anew.
"""

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from types import FunctionType

import pytest


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """`function` as module.name or module.Class.name below `model`; pieces of its text and their replacements."""

    function: str
    changes: tuple[tuple[str, str], ...]

    def make(self, patch: pytest.MonkeyPatch) -> None:
        """Give the function the changed code, wherever it has been imported to, until the patch is undone."""
        function, module = self._find()
        text = textwrap.dedent(inspect.getsource(function))
        for piece, instead in self.changes:
            assert text.count(piece) == 1, f"{self.function}: {piece!r} occurs {text.count(piece)} times, expected 1"
            text = text.replace(piece, instead)
        defined: dict[str, FunctionType] = {}
        exec(compile(text, f"<mistake in {self.function}>", "exec"), dict(vars(module)), defined)
        patch.setattr(function, "__code__", inspect.unwrap(defined[function.__name__]).__code__)

    def _find(self) -> tuple[FunctionType, object]:
        name, *path = self.function.split(".")
        module = found = importlib.import_module(f"model.{name}")
        for attribute in path:
            found = getattr(found, attribute)
        return inspect.unwrap(found), module


def mistake(function: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(function=function, changes=changes)
