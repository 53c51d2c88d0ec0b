"""The held-out loss, on the same rows every time, and the bigram model it is compared with."""

from dataclasses import dataclass
from typing import Any

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
from trainer.pool import RowPool
from trainer.row import RowSums


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The validation rows, and how many bytes of text each token id stands for."""

    batch: Batch
    byte_count_V: Tensor

    def measure(self, pool: RowPool, mode: AttentionMode, world: World = ALONE) -> dict[str, Any]:
        """The metrics named validation/* and indexer/*; the model is not changed. All ranks call this alike."""
        device = pool.model.embed.weight.device
        target_BT = self.batch.target_BT
        mine = rows_of(world.place.data, world.mesh.data, len(target_BT))

        def measure(model: Transformer, index: int | None) -> RowSums | None:
            if index is None:
                return stand_by(model, backward=False)
            return row.measure(model, row.pick(self.batch, index, device), mode)

        turns = [index for index in mine if index is not None or world.expert.size > 1]
        measured = zip(turns, pool.map(measure, turns), strict=True)
        own = {index: sums for index, sums in measured if index is not None and sums is not None}
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
