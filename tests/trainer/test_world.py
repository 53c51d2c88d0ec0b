"""Proves how a run's processes are joined: on GPUs all groups are connected at the start, on CPUs nothing is asked for.

torch.distributed is replaced by something that notes what it is asked for: NCCL needs GPUs.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.parallel import world
from trainer.parallel.mesh import Mesh
from trainer.parallel.placement import Placement


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `init_process_group` was given; groups: the backend of each group that was made."""
    found: dict[str, Any] = {"groups": []}
    monkeypatch.setattr(dist, "rendezvous", lambda *given, **named: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **named: found.update(named, backend=backend))

    def new_group(ranks: list[int], timeout: Any, backend: str | None) -> object:
        found["groups"].append((ranks, backend))
        return object()

    monkeypatch.setattr(dist, "new_group", new_group)
    return found


@pytest.mark.parametrize(
    ("device", "backend", "bound"),
    [
        (torch.device("cpu"), "gloo", None),
        (torch.device("cuda"), "cpu:gloo,cuda:nccl", torch.device("cuda", 0)),
        (torch.device("cuda", 3), "cpu:gloo,cuda:nccl", torch.device("cuda", 3)),
    ],
    ids=str,
)
def test_groups_are_connected_at_the_start_on_gpus(
    device: torch.device, backend: str, bound: torch.device | None, asked: dict[str, Any]
) -> None:
    """A device without a number, which `trainer.device.settle` gives to the first process, would be refused."""
    place = Placement(rank=1, size=2, local_rank=1, address="file:///nowhere")
    world.start(Mesh(data=2, owners=2), place, device)
    assert (asked["backend"], asked["device_id"]) == (backend, bound)
    # Only groups of all ranks are gloo's alone: a rank outside would take part in a split that the others do not make.
    assert [ranks for ranks, of in asked["groups"] if of == "gloo"] == [[0, 1], [0, 1]]
    assert [ranks for ranks, of in asked["groups"] if of is None], "those of the axes are of the default's backends"
