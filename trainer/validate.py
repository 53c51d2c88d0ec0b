"""The held-out loss, on the same rows every time, and the bigram model it is compared with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.open import Data
from model.config import AttentionMode
from model.transformer import Transformer
from trainer import metrics, row, together
from trainer.baseline import Bigram, bigram
from trainer.parallel.expert import stand_by
from trainer.parallel.mesh import rows_of
from trainer.parallel.world import ALONE, World
from trainer.passes import Measuring
from trainer.pool import RowPool
from trainer.row import RowSums

if TYPE_CHECKING:
    from trainer.parallel.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The validation rows, and how many bytes of text each token id stands for."""

    batch: Batch
    byte_count_V: Tensor

    def measure(
        self, pool: RowPool, mode: AttentionMode, world: World = ALONE, pipeline: "Pipeline | None" = None
    ) -> dict[str, Any]:
        """The metrics named validation/* and indexer/*; the model is not changed. All ranks call this alike."""
        target_BT = self.batch.target_BT
        mine = rows_of(world.place.data, world.mesh.data, len(target_BT))
        turns = [turn for turn, index in enumerate(mine) if index is not None or world.expert.size > 1]

        def pick(turn: int) -> Batch | None:
            index = mine[turn]
            world.beat.mark("validation")
            return None if index is None else row.pick(self.batch, index, pool.model.device)

        def measure(model: Transformer, turn: int) -> RowSums | None:
            one = pick(turn)
            if one is None:
                stand_by(model, backward=False)
                return None
            return row.sums(row.measure(model, one, mode), one)

        if pipeline is None:
            found = list(pool.map(measure, turns))
        else:
            passes = Measuring(pipeline.stage(target_BT.shape[1]), pick, mode)
            pipeline.measure(passes, turns, target_BT.shape[1])
            found = [passes.sums(turn) for turn in turns]
        by_index = ((mine[turn], sums) for turn, sums in zip(turns, found, strict=True))
        own = {index: sums for index, sums in by_index if index is not None and sums is not None}
        rows, load_LE = together.gather_rows(world, own)
        num_bytes = count_bytes(target_BT, self.byte_count_V)
        return metrics.validation(rows, row.count_rows(self.batch), num_bytes, load_LE)

    def bigram(self, data: Data) -> Bigram:
        """The bigram model of the whole training split on exactly these targets."""
        learned_BT = self.batch.target_BT >= 0
        previous_P, target_P = self.batch.token_BT[learned_BT].numpy(), self.batch.target_BT[learned_BT].numpy()
        return bigram(data.train.documents(), previous_P, target_P, data.tokenizer.vocab_size)


def count_bytes(target_BT: Tensor, byte_count_V: Tensor) -> int:
    """Bytes of text that all targets >= 0 stand for."""
    return int(byte_count_V[target_BT[target_BT >= 0]].sum())


def hold_out(data: Data, rows: int) -> HeldOut:
    """The first `rows` rows of the validation split."""
    byte_count_V = torch.from_numpy(np.asarray(data.tokenizer.byte_counts(), dtype=np.int64))
    return HeldOut(batch=data.validation.rows(0, 0, rows), byte_count_V=byte_count_V)
