"""Proves that the table of members holds every element of every parameter exactly once, or is refused at build."""

from dataclasses import replace

import pytest
import torch

from optim import groups
from optim.groups import Member
from optim.optimizer import Optimizer
from tests.optim.checks import CONFIG, SHAPES, members, tensors

FIRST, SECOND = 2, 3
"""Places of the two series in `members()`."""


def without(place: int) -> list[Member]:
    found = members()
    del found[place]
    return found


def changed(place: int, **changes: object) -> list[Member]:
    found = members()
    found[place] = replace(found[place], **changes)
    return found


WRONG = {
    "left out at the end": (without(SECOND), r"members of series = rows 0:3: expected all 6"),
    "left out at the start": (without(FIRST), r"series.1 = rows 3:6 of series: expected rows from 0 on, within 6"),
    "left out whole": ([one for one in members() if one.parameter != "table"], r"of table = rows 0:0: expected all 6"),
    "left out one row": (changed(SECOND, start=4), r"series.1 = rows 4:6 of series: expected rows from 3 on"),
    "twice": ([*members(), members()[SECOND]], r"series.1 = rows 3:6 of series: expected rows from 6 on"),
    "overlap": (changed(SECOND, start=2), r"series.1 = rows 2:6 of series: expected rows from 3 on"),
    "past the end": (changed(SECOND, stop=7), r"series.1 = rows 3:7 of series: expected rows from 3 on, within 6"),
    "empty": ([*members(), replace(members()[SECOND], start=6)], r"rows 6:6 of series: expected rows from 6 on"),
    "two experts": ([changed(0, stop=2)[0], *without(0)[1:]], r"experts.0 = rows 0:2 of experts: expected one expert"),
    "unknown parameter": (
        [*members(), replace(members()[FIRST], parameter="seires")],
        r"member series.0 = seires: expected a parameter of the model",
    ),
    "two kinds": (changed(SECOND, kind="table"), r"series, table, compressor: expected matrix, compressor as series.0"),
    "two groups": (changed(SECOND, group="router"), r"series, matrix, router: expected matrix, compressor as series.0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_members_that_do_not_cover_the_parameters_once_are_refused(name: str) -> None:
    wrong, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Optimizer(tensors(0), wrong, CONFIG)


def test_without_the_check_rows_would_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "check_cover", lambda members, parameters: None)
    parameters = tensors(0)
    Optimizer(parameters, without(SECOND), CONFIG).step(tensors(1), rate=0.1)
    assert torch.equal(parameters["series"][3:], tensors(0)["series"][3:])


def test_any_order_of_members_is_taken() -> None:
    groups.check_cover(members()[::-1], {name: torch.zeros(shape) for name, shape in SHAPES.items()})
