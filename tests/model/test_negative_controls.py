"""Proves that the tests see mistakes: each of these, made on purpose, changes what the golden set is compared with.

The check is the one of test_golden.py (`golden.wrong`); the model as it stands passes it.
"""

import pytest

from tests.model import golden
from tests.model.mistakes import Mistake, mistake
from tests.model.mistakes_attention import ATTENTION, COMPRESSOR, INDEXER, MHC, ROPE, VISIBILITY
from tests.model.mistakes_experts import EXPERTS, LOSSES, MTP, ROUTER

MISTAKES = MHC | VISIBILITY | ATTENTION | ROPE | COMPRESSOR | INDEXER | ROUTER | EXPERTS | MTP | LOSSES
CLEAR = 1e-6
"""Every mistake moves some number by this much, far above the limit of 1e-11; the least measured is 5e-5."""


@pytest.mark.parametrize("name", ["none", *MISTAKES])
def test_a_mistake_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Mistake | None = MISTAKES.get(name)
    if made is not None:
        made.make(monkeypatch)
    wrong = golden.wrong("sparse") or golden.wrong("dense")
    if made is None:
        assert not wrong
    else:
        assert wrong
        assert max(wrong.values()) > CLEAR


def test_a_mistake_is_undone_with_its_patch() -> None:
    with pytest.MonkeyPatch.context() as patch:
        MISTAKES["comb untransposed"].make(patch)
        assert golden.wrong("sparse")
    assert not golden.wrong("sparse")


def test_a_mistake_in_text_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="occurs 0 times"):
        mistake("mhc.expand", ("no such text", "")).make(monkeypatch)


def test_there_are_many() -> None:
    assert len(MISTAKES) >= 60
