"""The golden set as the model meets it: one packed row of all documents, with padding, in small chunks."""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import losses, sight
from model.config import AttentionMode
from model.inventory import released_tensors
from model.names import config_from_released, load_released
from model.transformer import Transformer
from tests.model.observing import LossWeights, Rows, differences, observe, pack
from tests.oracles.make_golden import FOLDER

STAGES: dict[str, AttentionMode] = {"sparse": "sparse", "dense": "indexer_warmup"}
"""The oracle's stages, and the mode in which the model computes the same."""

LIMIT = 1e-11
"""Both sides compute in float64 and differ in the order of sums: 1e-14 measured. The mistakes of the negative controls
change some number by 5e-5 or more."""

PADDING = 9
"""Long enough for padding to hold blocks of both rates, CSA 4 and HCA 8."""


def model(dtype: torch.dtype = torch.float64) -> Transformer:
    return load_released(FOLDER, dtype)


@cache
def stored() -> dict[str, Tensor]:
    return load_file(FOLDER / "io.safetensors")


def weights() -> LossWeights:
    mtp, balance, indexer = stored()["loss_weights"].tolist()
    return LossWeights(mtp=mtp, balance=balance, indexer=indexer)


def rows(padding: int = 0) -> Rows:
    """All documents in one row, then padding of token 3."""
    io = stored()
    lengths = io["documents"].bincount().tolist()
    documents, targets = ([part.tolist() for part in io[name].split(lengths)] for name in ("ids", "targets"))
    return pack(documents, targets, padding=padding, filler=3)


@cache
def expected(stage: str) -> dict[str, Tensor]:
    """The stage's values; in the sparse stage a gradient that is not stored is 0."""
    values = {name.removeprefix(f"{stage}."): value for name, value in stored().items() if name.startswith(f"{stage}.")}
    if stage == "sparse":
        for spec in released_tensors(config_from_released(FOLDER)):
            if spec.kind != "buffer":
                values.setdefault(f"grad.{spec.name}", torch.zeros(spec.shape, dtype=torch.float64))
    return values


def wrong(stage: str) -> dict[str, float]:
    """What the model, as it is now, computes otherwise than the oracle: padded, in two chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sight, "CHUNK", 30)
        patch.setattr(losses, "CHUNK", 30)
        found = observe(model(), rows(PADDING), STAGES[stage], weights())
    return differences(found, expected(stage), LIMIT)
