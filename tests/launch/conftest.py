"""Hydra's merge of the files takes most of the time of a composition; here it is done once for each set of choices."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest

from launch import compose as composing

MERGE_FILES = composing._merge_files


@functools.cache
def _merged(choices: tuple[str, ...], configs: Path) -> tuple[Any, dict[str, str]]:
    return MERGE_FILES(list(choices), configs)


@pytest.fixture
def merge_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each set of choices is merged once per process; every test gets its own copy."""
    monkeypatch.setattr(composing, "_merge_files", lambda texts, configs: copy.deepcopy(_merged(tuple(texts), configs)))
