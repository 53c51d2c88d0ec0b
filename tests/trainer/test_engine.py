"""Proves that another DeepSpeed than the known one is refused in one line, and that columns agree with its topology."""

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from model.transformer import Transformer
from tests.dist import ranks
from trainer import engine
from trainer.engine import SENDS, USED, VERSION, OneForwardOneBackward, require_known
from trainer.parallel.mesh import Mesh
from trainer.passes import Stage


def test_the_installed_one_is_known() -> None:
    require_known()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.deepspeed, "__version__", "0.20.0")
    with pytest.raises(
        ValueError, match=r"^deepspeed = 0\.20\.0: expected 0\.19\.8, whose schedules are the known ones$"
    ):
        require_known()


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in USED.items() for name in names])
def test_a_name_that_is_gone_is_told(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DualPipeVEngine inherits some: there it is enough that a parent has lost them."""
    for holder in [owner, *getattr(owner, "__mro__", ())]:
        if name in vars(holder):
            monkeypatch.delattr(holder, name)
    with pytest.raises(
        ValueError, match=rf"^deepspeed = {VERSION}: expected \w+(\.\w+)*\.{name}, which this one lacks$"
    ):
        require_known()


def test_sends_and_receives_are_deepspeeds_own() -> None:
    """Else the door would hold a second implementation, and the pinned version would say nothing."""
    assert all(name not in vars(OneForwardOneBackward) for name in SENDS)
    assert all(name not in vars(engine.DualPipeV) for name in SENDS)


@pytest.mark.parametrize(("pipe", "data"), [(2, 1), (4, 1), (2, 3), (3, 4), (8, 8)])
def test_columns_are_those_of_its_topology(pipe: int, data: int) -> None:
    theirs, mesh = PipeDataParallelTopology(num_pp=pipe, num_dp=data), Mesh(pipe=pipe, data=data)
    for rank in range(mesh.size):
        where = theirs.get_coord(rank)
        assert (where.pipe, where.data) == (mesh.place(rank).pipe, mesh.place(rank).data)
        assert list(mesh.column_group(rank)) in theirs.get_axis_comm_lists("pipe")


def test_what_goes_on_has_the_type_it_travels_in() -> None:
    stage = Stage(model=Transformer(ranks.MODEL), shape=(1, 3, 2, 16), travels=torch.bfloat16)
    assert stage.leave(torch.ones(1, 3, 2, 16), torch.zeros(())).dtype == torch.bfloat16
    assert stage.leave(None, torch.zeros(())).dtype == torch.float32, "a loss is no stream"
    entered = stage.enter(torch.ones(1, 3, 2, 16, dtype=torch.bfloat16))
    assert entered is not None
    assert entered.dtype == torch.float32
    assert (stage.nothing(range(1)).shape, stage.nothing(range(1, 2)).shape) == ((1, 3, 2, 16), ())
