"""Proves that state only goes where it belongs: another name, shape or type is refused and nothing is copied."""

import pytest
import torch

from optim.optimizer import Optimizer
from optim.state import copy_exactly
from tests.optim.checks import CONFIG, members, tensors

WRONG = {
    "missing": (lambda state: state.pop("momentum/wide"), r"momentum/wide = nothing: expected a tensor"),
    "extra": (lambda state: state.update(more=torch.zeros(1)), r"more = a tensor: expected none of this name"),
    "row": (
        lambda state: state.update({"momentum/wide": state["momentum/wide"][:1]}),
        r"momentum/wide = float32 \[1, 8\]: expected float32 \[5, 8\]",
    ),
    "transposed": (
        lambda state: state.update({"momentum/wide": state["momentum/wide"].T}),
        r"momentum/wide = float32 \[8, 5\]: expected float32 \[5, 8\]",
    ),
    "number": (
        lambda state: state.update({"exp_avg/vector": torch.tensor(1.0)}),
        r"exp_avg/vector = float32 \[\]: expected float32 \[4\]",
    ),
    "rounded": (
        lambda state: state.update({"momentum/wide": state["momentum/wide"].bfloat16()}),
        r"momentum/wide = bfloat16 \[5, 8\]: expected float32 \[5, 8\]",
    ),
    "count": (
        lambda state: state.update({"updates/table": torch.tensor(3.0)}),
        r"updates/table = float32 \[\]: expected int64 \[\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_state_that_does_not_fit_is_refused_whole(name: str) -> None:
    parameters = tensors(0, torch.float32)
    optimizer = Optimizer(parameters, members(), CONFIG)
    optimizer.step(tensors(1, torch.float32), rate=0.1)
    before = {key: value.clone() for key, value in optimizer.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    change, message = WRONG[name]
    change(state)
    with pytest.raises(ValueError, match=rf"^optimizer state {message}$"):
        copy_exactly(optimizer.state_dict(), state, "optimizer state")
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state_dict().items())


def test_what_fits_is_copied_bit_for_bit() -> None:
    targets = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}
    values = {"b": torch.tensor(7), "a": torch.randn(3, 2).T}
    copy_exactly(targets, values, "state")
    assert all(torch.equal(targets[name], values[name]) for name in targets)


def test_torch_itself_would_copy_all_of_these_shapes_and_types() -> None:
    """The reason for the check: copy_ broadcasts and casts."""
    target = torch.zeros(5, 8)
    for value in (torch.ones(1, 8), torch.ones(()), torch.ones(5, 8, dtype=torch.bfloat16)):
        target.copy_(value)
