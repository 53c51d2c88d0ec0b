"""Proves that secrets are taken out of what a run writes, and that ordinary configuration is left as it is."""

import dataclasses
import time
from typing import Any, get_args, get_type_hints

import pytest

from trainer import redact
from trainer.config import TrainConfig

SECRET = "Zx9SECRETvalue8k2"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://user:{SECRET}@bucket/path",
        f"s3://AKID:ab/{SECRET}+c@bucket/path",
        f"https://{SECRET}@host/x",
        f"https://u:p@{SECRET}@host/x",
        f"https://host/x?token={SECRET}&revision=2",
        f"https://host/x?a=1&X-Amz-Signature={SECRET}",
        f"https://account.blob/x?sv=2024&sig={SECRET}",
        f"use hf_{SECRET} here",
        f"sk-{SECRET}",
        f"ghp_{SECRET}xxx",
        f"Authorization: Bearer {SECRET}",
        f'api_key = "{SECRET}"',
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_credentials_in_text_are_hidden(text: str) -> None:
    assert SECRET not in redact.in_text(text)
    assert SECRET not in redact.override(f"data.sources.x.path={text}")
    assert SECRET not in str(redact.values({"data": {"sources": [{"path": text}]}}))


@pytest.mark.parametrize(
    "text",
    [
        f"hub_token={SECRET}",
        f"+tracking.api_key={SECRET} more",
        "password=12345678",
        f"data.sources.x={{kind: stream, path: a, token: {SECRET}}}",
        f"data.sources.x={{kind: stream, 'secret': '{SECRET}'}}",
        f"storage.keys=[{SECRET},{SECRET}]",
        f"data.key_file={SECRET}",
    ],
)
def test_secret_overrides_are_hidden(text: str) -> None:
    hidden = redact.override(text)
    assert redact.HIDDEN in hidden
    assert SECRET not in hidden
    assert "12345678" not in hidden


@pytest.mark.parametrize(
    "text",
    [
        "data.tokenizer.kind=bpe",
        "data.tokenizer.path=/data/tokenizer.json",
        "schedule.total_tokens=1e6",
        "sample.tokens=128",
        "model.bos_token_id=0",
        "model.num_key_value_heads=1",
        "name=tokens",
        "data.sources.x.path=/data/a=b",
        "data.sources.web={kind: jsonl, path: s3://bucket/x, weight: 2}",
        "data.sources.web.path=http://localhost:8080/a@b",
        "data.sources.web.path=https://host/x?revision=2&page=3",
        "schedule.batch={tokens: 65536, start_tokens: 8192}",
    ],
)
def test_ordinary_overrides_are_left_alone(text: str) -> None:
    assert redact.override(text) == text
    key, _, value = text.partition("=")
    assert redact.values({key: value}) == {key: value}


@pytest.mark.parametrize("piece", ["A1b2", "a:", "://a:b", "x=1&", "token=", "-----BEGIN PRIVATE KEY-----", "eyJa."])
def test_long_lines_take_linear_time(piece: str) -> None:
    start = time.process_time()
    redact.in_text(piece * (100_000 // len(piece)))
    redact.override("x=" + piece * (100_000 // len(piece)))
    assert time.process_time() - start < 5  # measured 0.01 to 0.9 s; a quadratic pattern takes minutes


def test_nested_values_under_secret_names_are_hidden() -> None:
    config = {
        "secrets": {"a": SECRET},
        "api_keys": {"wandb": SECRET, "other": [SECRET]},
        "client": {"hub_token": SECRET, "password": 1234, "token": None, "key": ""},
        "total_tokens": 5,
        "ratios": (0, 4, 128),
    }
    hidden = redact.values(config)
    assert SECRET not in str(hidden)
    assert hidden["client"] == {"hub_token": redact.HIDDEN, "password": redact.HIDDEN, "token": None, "key": ""}
    assert (hidden["total_tokens"], hidden["ratios"]) == (5, [0, 4, 128])


def test_no_field_of_the_configuration_looks_like_a_secret() -> None:
    def names(kind: Any) -> list[tuple[str, Any]]:
        found = []
        for name, hint in get_type_hints(kind).items():
            found.append((name, hint))
            for part in (hint, *get_args(hint)):
                if dataclasses.is_dataclass(part):
                    found += names(part)
        return found

    every = names(TrainConfig)
    assert len(every) > 80
    for name, hint in every:
        value = "some text" if hint is str or str in get_args(hint) else 7
        assert redact.values({name: value}) == {name: value}
