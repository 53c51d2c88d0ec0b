"""Copies of our files with deliberate mistakes in their text, for the negative controls."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def mistaken(folder: Path, module: ModuleType, changes: tuple[tuple[str, str], ...]) -> ModuleType:
    """A copy of the module's file with pieces of its text replaced; each piece must occur exactly once."""
    file = Path(str(module.__file__))
    text = file.read_text(encoding="utf-8")
    for piece, instead in changes:
        assert text.count(piece) == 1, f"{piece!r} occurs {text.count(piece)} times, expected 1"
        text = text.replace(piece, instead)
    path = folder / f"mistaken_{file.name}"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = copy
    spec.loader.exec_module(copy)
    return copy
