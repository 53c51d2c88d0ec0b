"""Secrets out of what a run writes about itself: values under secret names, credentials in addresses, known key shapes.

Names that merely contain "key" or "token" are common here (`num_key_value_heads`, `bos_token_id`, `total_tokens`), so
such a name hides text but not numbers; a name that *ends* in one of these words (`api_key`, `hub_token`) hides all.
"""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
_SECRET = frozenset(("secret", "secrets", "password", "passwords", "passwd", "pwd", "passphrase", "apikey", "cookie"))
_SECRET |= frozenset(("credential", "credentials", "authorization"))
_MAYBE = frozenset(("key", "keys", "token", "tokens"))
_LAST = frozenset(("key", "token"))
_QUERY = frozenset(("sig", "signature", "auth", "sas", "jwt", "code"))
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_PLAIN = re.compile(r"\s*([-+]?[\d_]*\.?\d*([eE][-+]?\d+)?|true|false|null|none)\s*", re.IGNORECASE)
_USER = re.compile(r"(?<=://)(?!\w[\w.-]*:\d+/)(?:[^/:\s\"'@]{0,99}:[^\s\"']{0,999}|[^/\s\"']{0,999})@")
_PARAMETER = re.compile(r"(?<=[?&;#])([\w.~-]+)=([^&;\s\"'#]+)")
_SHAPE = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[opsur]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|wandb_v\d_\w{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w.-]+)"
    r"|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
_QUOTED_PAIR = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]{1,99})(?P<between>[\"']?\s*[:=]\s*)(?P<value>\"[^\"\n]+\"|'[^'\n]+')"
)
_PAIR = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]{1,99})(?P<between>[\"']?\s*[:=]\s*)(?P<value>\"[^\"\n]+\"|'[^'\n]+'|[^\s,}\]\"']+)"
)


def values(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested configuration, its secrets replaced by `[redacted]`; tuples become lists."""
    return {key: _value(key, value) for key, value in config.items()}


def override(text: str) -> str:
    """A command-line override `key=value` without its secrets, also those inside a value such as `{token: x}`."""
    key, equals, value = text.partition("=")
    if _is_secret(key.rsplit(".", 1)[-1], value):
        return f"{key}{equals}{HIDDEN}"
    return f"{key}{equals}{_PAIR.sub(_hide_pair, in_text(value))}"


def in_text(text: str) -> str:
    """Any text without credentials in addresses, known key shapes, and quoted values under secret names."""
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _PARAMETER.sub(_hide_parameter, text)
    return _QUOTED_PAIR.sub(_hide_pair, _SHAPE.sub(HIDDEN, text))


def _value(name: str, value: Any) -> Any:
    if _is_secret(name, value):
        return HIDDEN
    if isinstance(value, Mapping):
        inherited = f"{name}_" if _words(name) & _MAYBE else ""
        return {key: _value(f"{inherited}{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_value(name, item) for item in value]
    return in_text(value) if isinstance(value, str) else value


def _words(name: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(name))


def _is_secret(name: str, value: Any) -> bool:
    """Whether a value under this name is hidden; None, empty text and truth values never are."""
    if value is None or value == "" or isinstance(value, bool):
        return False
    ordered = [word.lower() for word in _WORD.findall(name)]
    if _SECRET & set(ordered) or (ordered and ordered[-1] in _LAST):
        return True
    return bool(_MAYBE & set(ordered)) and isinstance(value, str) and not _PLAIN.fullmatch(value)


def _hide_pair(match: re.Match[str]) -> str:
    name, between, value = match["name"], match["between"], match["value"]
    return f"{name}{between}{HIDDEN}" if _is_secret(name.rsplit(".", 1)[-1], value) else match[0]


def _hide_parameter(match: re.Match[str]) -> str:
    name, value = match[1], match[2]
    return f"{name}={HIDDEN}" if _is_secret(name, value) or _words(name) & _QUERY else match[0]
