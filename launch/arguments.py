"""Words of a verb's command line: `--flags` belong to the verb, everything else is handed on in its order."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

EXPECTED: Mapping[type, str] = MappingProxyType({int: "an integer", float: "a number", str: "a text", list: "a text"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Values of the flags (False, None, or for a list [], where not given) and the other words."""

    flags: Mapping[str, Any]
    words: tuple[str, ...]


def parse(argv: Sequence[str], flags: Mapping[str, type], usage: str) -> Arguments:
    """Split a verb's words; a flag of type bool takes no value, others take `--flag X` or `--flag=X`.

    A flag of type list may be given several times, with a text each time; of another the last value counts.
    `--help` prints `usage` and raises SystemExit(0). Raises ValueError "--flag = value: expected ...".
    """
    values: dict[str, Any] = {flag: {bool: False, list: []}.get(kind) for flag, kind in flags.items()}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            print(usage.strip())
            raise SystemExit(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        flag, separator, text = word.partition("=")
        if flag not in flags:
            raise _unknown(flag, text, flags)
        if flags[flag] is bool:
            if separator:
                raise ValueError(f"{flag} = {text}: expected {flag} without a value")
            values[flag] = True
            continue
        if not separator and not rest:
            raise ValueError(f"{flag} = : expected {EXPECTED[flags[flag]]} after it")
        value = text if separator else rest.pop(0)
        values[flag] = [*values[flag], value] if flags[flag] is list else _convert(flag, value, flags[flag])
    return Arguments(flags=values, words=tuple(words))


def _convert(flag: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{flag} = {text}: expected {EXPECTED[kind]}") from None


def _unknown(flag: str, text: str, flags: Mapping[str, type]) -> ValueError:
    known = [*flags, "--help"]
    close = difflib.get_close_matches(flag, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return ValueError(f"{flag} = {text}: expected one of {', '.join(known)}{hint}")
