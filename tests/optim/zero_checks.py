"""What an assignment of owners must hold, and models to assign: one set of checks for the real one and for mistakes."""

from collections import Counter
from collections.abc import Sequence

from launch.compose import compose
from model.logical import logical_tensors, parameter_shapes
from optim import zero
from optim.groups import Member
from trainer.members import members

Shapes = dict[str, tuple[int, ...]]


def member(name: str, rows: int, kind: str, start: int = 0, parameter: str | None = None) -> Member:
    stop = start + rows
    return Member(name=name, parameter=parameter or name, start=start, stop=stop, kind=kind, group="attention")


def stacked_experts(layers: int, experts: range) -> list[Member]:
    """In the order of the model: by layer, expert and kind."""
    return [
        member(f"layers.{layer}.experts.{e}.{kind}", 1, "matrix", e, f"layers.{layer}.experts.{kind}")
        for layer in range(layers)
        for e in experts
        for kind in ("w1", "w2", "w3")
    ]


def rows_of(shapes: Shapes) -> dict[str, int]:
    return {name: shape[0] for name, shape in shapes.items()}


def check_cover(members: Sequence[Member], owners: Sequence[int], number: int, shapes: Shapes) -> None:
    """The spans of all owners hold every row of every parameter once; one owner's never touch each other."""
    seen = Counter[tuple[str, int]]()
    for owner in range(number):
        found = zero.spans([one for one, of in zip(members, owners, strict=True) if of == owner])
        borders = [(span.parameter, border) for span in found for border in (span.start, span.stop)]
        assert len(borders) == len(set(borders))
        seen.update((span.parameter, row) for span in found for row in range(span.start, span.stop))
    assert seen == Counter({(name, row): 1 for name, shape in shapes.items() for row in range(shape[0])})


def check_tables(members: Sequence[Member], owners: Sequence[int], number: int) -> None:
    """A table's parts lie with the owners in order, and their numbers differ by one at most."""
    for name in {one.parameter for one in members if one.kind == "table"}:
        parts = sorted((one.start, of) for one, of in zip(members, owners, strict=True) if one.parameter == name)
        of_parts = [of for _, of in parts]
        assert of_parts == sorted(of_parts)
        counts = [of_parts.count(owner) for owner in range(number)]
        assert max(counts) - min(counts) <= 1


def check_matrices(members: Sequence[Member], owners: Sequence[int], number: int, shapes: Shapes) -> None:
    """No owner of a matrix has more of FLOP or bytes than twice the mean and the largest matrix, in shares.

    When a matrix is placed, some owner's two shares add up to at most 2 / number.
    """
    matrices = [one for one in members if one.kind == "matrix"]
    whole_flop = sum(zero.update_flop(one, shapes) for one in matrices)
    whole_bytes = sum(zero.state_bytes(one, shapes) for one in members)
    largest = max(
        (
            max(zero.update_flop(one, shapes) / whole_flop, zero.state_bytes(one, shapes) / whole_bytes)
            for one in matrices
        ),
        default=0.0,
    )
    kinds = [[one.kind for one, of in zip(members, owners, strict=True) if of == owner] for owner in range(number)]
    without_vectors = [(one, of) for one, of in zip(members, owners, strict=True) if one.kind != "vector"]
    held = zero.loads([one for one, _ in without_vectors], shapes, [of for _, of in without_vectors], number)
    for load, own in zip(held, kinds, strict=True):
        if "matrix" in own:
            share = max(load.flop / whole_flop, load.state_bytes / whole_bytes)
            assert share <= 2 / number + largest + 1e-12  # rounding of the shares themselves


def check_vectors(members: Sequence[Member], owners: Sequence[int], number: int, shapes: Shapes) -> None:
    """Who holds more than the mean of the bytes by more than the largest vector has no vector."""
    size = [load.state_bytes for load in zero.loads(members, shapes, owners, number)]
    vectors = [(one, of) for one, of in zip(members, owners, strict=True) if one.kind == "vector"]
    for _, of in vectors:
        assert size[of] <= sum(size) / number + max(zero.state_bytes(one, shapes) for one, _ in vectors)


def check_dense(members: Sequence[Member], owners: Sequence[int], number: int, shapes: Shapes) -> None:
    check_cover(members, owners, number, shapes)
    check_tables(members, owners, number)
    check_matrices(members, owners, number, shapes)
    check_vectors(members, owners, number, shapes)


def check_experts(members: Sequence[Member], owners: Sequence[int], number: int) -> None:
    """Spec 5.3: all w2, then all w3, then all w1, in equal parts one after the other, no matrix cut."""
    by_name = dict(zip((one.name for one in members), owners, strict=True))
    flat = [by_name[one.name] for kind in ("w2", "w3", "w1") for one in members if one.parameter.endswith(kind)]
    assert len(flat) == len(members)
    assert flat == sorted(flat)
    counts = [flat.count(owner) for owner in range(number)]
    assert max(counts) - min(counts) <= 1


def fixed() -> tuple[list[Member], Shapes]:
    """A few large matrices first, many small ones, a table and vectors."""
    shapes: Shapes = {f"matrix{at}": (8, 8) for at in range(9)} | {"matrix9": (24, 24), "matrix10": (24, 24)}
    shapes |= {"table": (130, 3)} | {f"vector{at}": (20,) for at in range(6)}
    kinds = {name: name.rstrip("0123456789") for name in shapes}
    return zero.cut([member(name, shapes[name][0], kinds[name]) for name in shapes], rows_of(shapes)), shapes


def dense(recipe: str) -> tuple[list[Member], Shapes]:
    config = compose([f"recipe={recipe}"]).config.model
    found = [member for member in members(logical_tensors(config)) if member.group != "experts"]
    return found, parameter_shapes(config)
