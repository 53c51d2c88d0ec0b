"""Ranks that hold and own as on a mesh but speak with nobody: enough to build what each of them has."""

from types import SimpleNamespace
from typing import cast

import torch

from data.open import Data
from trainer.build import build
from trainer.config import TrainConfig
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import Group, World
from trainer.step import Parts


def world(mesh: Mesh, rank: int) -> World:
    """A rank's world whose groups have no handles."""

    def group(ranks: tuple[int, ...]) -> Group:
        return Group(ranks=ranks, index=ranks.index(rank))

    return World(
        mesh=mesh,
        place=mesh.place(rank),
        data=group(mesh.data_group(rank)),
        expert=group(mesh.expert_group(rank)),
        replicas=group(mesh.replica_group(rank)),
        owners=group(mesh.owner_group(rank)),
        same_owners=group(mesh.same_owner_group(rank)),
    )


def parts(config: TrainConfig, rank: int) -> Parts:
    """What a rank of the configuration's mesh builds."""
    data = cast(Data, SimpleNamespace(train=None))
    return build(config, data, torch.device("cpu"), world(config.parallel.mesh, rank)).parts
