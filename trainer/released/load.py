"""A model from a folder in the released layout, quantised or not."""

from pathlib import Path

import torch

from model import names
from model.logical import locate
from model.transformer import Transformer
from trainer.released.layout import SLAB_SIZE, slabs
from trainer.released.memory import give_back
from trainer.released.source import ReleasedFolder


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Build the model of a folder, any of `layout.VARIANTS`, with the numbers its codes stand for.

    Beside the model there is one slab of a tensor in memory. Raises ValueError as `ReleasedFolder` does.
    """
    source = ReleasedFolder(Path(folder))
    model = Transformer(source.config, dtype)
    mine = names.tensors(model)
    with torch.no_grad():
        for spec in source.specs.values():
            where = locate(spec.name)
            target = where.view(mine[where.parameter])
            for slab in slabs(spec):
                target[slab.start : slab.stop].copy_(source.numbers(spec, slab))
            if spec.size >= SLAB_SIZE:
                give_back()
    return model
