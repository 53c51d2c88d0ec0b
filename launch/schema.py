"""What the configuration classes say about keys: which exist, what each holds, which one was probably meant.

Plain dataclasses in, words out; nothing here knows Hydra or pydantic.
"""

import difflib
import functools
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LONGEST_VALUE = 120
"""Characters of a value shown in an error; the rest is replaced by dots."""

NAMES_SHOWN = 8
"""Keys of a section listed in an error."""

WORDS: Mapping[Any, str] = types.MappingProxyType(
    {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        types.NoneType: "null",
    }
)


@functools.cache
def fields_of(kind: type) -> Mapping[str, Any]:
    """Field names of a configuration class and their types, in order."""
    return types.MappingProxyType(get_type_hints(kind))


def lookup(kind: Any, path: Sequence[str]) -> Any | None:
    """Type at `path` below a configuration class, None where no such key can exist; dict entries have any name."""
    for name in path:
        kind = _child(_strip_optional(kind), name)
        if kind is None:
            return None
    return kind


def owner_file(kind: Any, path: Sequence[str]) -> str:
    """The source file of the class that has the last name of `path` as its field."""
    owner = kind
    for name in path[:-1]:
        kind = _strip_optional(_child(_strip_optional(kind), name))
        owner = kind if is_dataclass(kind) else owner
    return f"{owner.__module__.replace('.', '/')}.py"


def dict_prefixes(kind: Any, path: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The leading parts of `path` that name an entry of a dict field, e.g. `data.sources.stdlib`."""
    for index, name in enumerate(path):
        stripped = _strip_optional(kind)
        if get_origin(stripped) is dict:
            yield tuple(path[: index + 1])
        kind = _child(stripped, name)


def keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every key that the classes spell out, sections included, as dotted paths."""
    stripped = _strip_optional(kind)
    if is_dataclass(stripped):
        for name, field_type in fields_of(stripped).items():
            yield f"{prefix}{name}"
            yield from keys(field_type, f"{prefix}{name}.")


def nearest(kind: Any, path: Sequence[str]) -> str | None:
    """The existing key most like a misspelt one: each wrong part mended in its place, else the last part elsewhere."""
    return _mend(kind, path) or _same_leaf(kind, path)


def describe(kind: Any) -> str:
    """A type in the words of an error line: "an integer", "one of a, b", "a section with the keys x, y"."""
    if kind in WORDS:
        return WORDS[kind]
    stripped, origin = _strip_optional(kind), get_origin(kind)
    if stripped is not kind:
        return f"{describe(stripped)} or null"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(kind))
    if origin is Literal:
        choices = [show(choice) for choice in get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is tuple:
        return f"a list with {describe(get_args(kind)[0])} in each place"
    if origin is dict:
        return f"named entries, each {describe(get_args(kind)[1])}"
    names = list(fields_of(kind))
    return f"a section with the keys {', '.join(names[:NAMES_SHOWN])}{', ...' if names[NAMES_SHOWN:] else ''}"


def show(value: object) -> str:
    """A value on one line, as YAML would take it; long ones are cut."""
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _strip_optional(kind: Any) -> Any:
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    rest = [option for option in get_args(kind) if option is not types.NoneType]
    return rest[0] if len(rest) == 1 else kind


def _child(kind: Any, name: str) -> Any | None:
    if is_dataclass(kind):
        return fields_of(kind).get(name)
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    if get_origin(kind) is tuple and name.isdigit():
        return get_args(kind)[0]
    return None


def _mend(kind: Any, path: Sequence[str]) -> str | None:
    mended: list[str] = []
    for name in path:
        stripped = _strip_optional(kind)
        if _child(stripped, name) is None:
            siblings = list(fields_of(stripped)) if is_dataclass(stripped) else []
            close = difflib.get_close_matches(name, siblings, n=1)
            if not close:
                return None
            name = close[0]
        mended.append(name)
        kind = _child(stripped, name)
    return ".".join(mended)


def _same_leaf(kind: Any, path: Sequence[str]) -> str | None:
    known = list(keys(kind))
    leaves = [key.rpartition(".")[2] for key in known]
    close = difflib.get_close_matches(path[-1], leaves, n=1, cutoff=0.75)
    return known[leaves.index(close[0])] if close else None
