"""The model's logical tensors as the optimizer knows them; without torch, so that plans can be made of them."""

from collections.abc import Iterable

from model.logical import Logical
from optim import zero
from optim.groups import Member


def members(logicals: Iterable[Logical]) -> list[Member]:
    """One member for each, tables in parts."""
    whole = [
        Member(name=one.name, parameter=one.parameter, start=one.start, stop=one.stop, kind=one.kind, group=one.group)
        for one in logicals
    ]
    return zero.cut(whole, {member.parameter: member.stop for member in whole if member.kind == "table"})
