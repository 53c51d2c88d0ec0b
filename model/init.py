"""Initial values, in one table. Each tensor draws from its own generator, keyed by seed and released name.

So a tensor's values depend neither on the other tensors nor on which process makes it.
| tensor                                            | value                                  | source            |
|---------------------------------------------------|----------------------------------------|-------------------|
| matrices, embedding, head, mHC fn                 | normal, mean 0, InitConfig.std (0.006) | V3 report; ours   |
| norm weights                                      | 1                                      | usual             |
| hc_*_scale                                        | InitConfig.hc_scale (0.01)             | mHC paper Table 5 |
| hc_*_base, attn_sink, compressor ape, router bias | 0                                      | ours              |
| tid2eid                                           | balanced, K distinct experts per token | ours              |
"""

import hashlib

import torch
from torch import Tensor

from model import names
from model.config import InitConfig
from model.inventory import TensorSpec, released_tensors
from model.transformer import Transformer


def initialize(model: Transformer, config: InitConfig, seed: int) -> None:
    """Fill every parameter and buffer that is here with its initial value, in place."""
    mine = names.tensors(model)
    with torch.no_grad():
        for spec in released_tensors(model.config):
            where = names.locate(spec.name)
            if where.parameter in mine and (where.index is None or where.index in model.held):
                value = initial_value(spec, config, seed, model.config.n_routed_experts)
                where.view(mine[where.parameter], model.held.start).copy_(value)


def initial_value(spec: TensorSpec, config: InitConfig, seed: int, experts: int) -> Tensor:
    """The initial value of one released tensor, fp32 (tid2eid: int64), by the table above."""
    generator = torch.Generator().manual_seed(_key(seed, spec.name))
    if spec.kind in ("matrix", "table"):
        return torch.randn(spec.shape, generator=generator) * config.std
    if spec.name.endswith("tid2eid"):
        return balanced_table(spec.shape[0], spec.shape[1], experts, generator)
    if spec.name.endswith("norm.weight"):
        return torch.ones(spec.shape)
    if spec.group == "mhc" and spec.name.endswith("_scale"):
        return torch.full(spec.shape, config.hc_scale)
    return torch.zeros(spec.shape)


def balanced_table(tokens: int, K: int, experts: int, generator: torch.Generator) -> Tensor:
    """tid2eid: int64 [tokens, K], K distinct experts per row; any two experts are used equally often, up to one.

    Random permutations of the experts are laid end to end and cut into rows of K. Where a row spans two of them, the
    second is turned so that the row's missing entries are none of those it already has.
    """
    parts: list[Tensor] = []
    length = 0
    while length < tokens * K:
        fresh = torch.randperm(experts, generator=generator)
        held = length % K
        if held:
            taken = torch.isin(fresh, parts[-1][-held:])
            fresh = torch.cat((fresh[~taken][: K - held], fresh[taken], fresh[~taken][K - held :]))
        parts.append(fresh)
        length += experts
    return torch.cat(parts)[: tokens * K].unflatten(0, (tokens, K))


def _key(seed: int, name: str) -> int:
    """A 63-bit generator seed from (seed, purpose, name)."""
    digest = hashlib.blake2b(f"{seed}/init/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
