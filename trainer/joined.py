"""A rank from its first beat to its last: joins the others, notes why it fails, says who was missing where it can."""

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

import torch

from trainer import ranks
from trainer.config import TrainConfig
from trainer.heartbeat import SHARED_S, Beat, is_loss
from trainer.parallel.placement import Placement
from trainer.parallel.world import PATIENCE, World, start

SETTLE_S = 3 * SHARED_S
"""After losing another rank this one waits so long for the others' last beats before it says who was missing (ours)."""


@contextmanager
def joined(config: TrainConfig, place: Placement, device: torch.device) -> Iterator[World]:
    """The world of this rank. What ends it by an exception is noted in its beat."""
    mesh = config.parallel.mesh
    beat = Beat(place, ranks.coordinates(mesh, place.rank), config.patience_s)
    beat.start()
    try:
        patience = max(PATIENCE, timedelta(seconds=config.patience_s))
        with closing(start(mesh, place, device, patience, beat)) as world:
            try:
                yield world
            except BaseException as error:
                # Before the connections are closed, which makes the others fail.
                failed(beat, error)
                raise
    except BaseException as error:
        beat.fail(error)
        raise
    finally:
        beat.close()


def failed(beat: Beat, error: BaseException) -> bool:
    """Note why this rank ends; where nobody watches it, say who it lost.

    True where this rank only lost another and its supervisor knows more: then the run's history is for that to write.
    """
    beat.fail(error)
    if not is_loss(error):
        return False
    if beat.place.folder or beat.shared is None:
        return bool(beat.place.folder)
    time.sleep(SETTLE_S)
    now = time.time()
    beats = ranks.read(beat.shared)
    silent = {one.rank: now - one.time for one in beats}
    for found in ranks.suspects([one for one in beats if one.rank != beat.place.rank], silent, SETTLE_S):
        print(f"keel: rank {beat.place.rank} has lost the others; {found}", file=sys.stderr, flush=True)
    return False
