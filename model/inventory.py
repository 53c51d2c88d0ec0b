"""The released tensors of a V4 model, from its configuration: the one list of names, shapes, kinds and stored formats.

Source: spec 1.3 (R 2, released code) and the released checkpoints' layout. Shapes are logical: [out, in] for matrices,
whatever the checkpoint packs. Counts and bytes of Flash and Pro equal the published ones (tests/model/test_count.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from model.config import CSA_RATIO, ModelConfig

Kind = Literal["matrix", "table", "vector", "buffer"]
"""matrix: Muon. table: AdamW with decay. vector: AdamW without decay. buffer: no gradient."""

Group = Literal[
    "embedding",
    "head",
    "norms",
    "mhc",
    "attention",
    "compressor",
    "indexer",
    "router",
    "experts",
    "shared_experts",
    "mtp_projection",
]
"""The part of the model a tensor belongs to. A norm inside attention, compressor or indexer belongs to that part."""

Stored = Literal["F8_E4M3", "FP4", "BF16", "F32", "I64"]
"""Format in the released checkpoint; F8_E4M3 and FP4 have a tensor of scales beside them."""

FP8_BLOCK = 128
"""An FP8 weight has one scale per 128 x 128 block."""
FP4_BLOCK = 32
"""An FP4 weight has one scale per 32 columns of a row."""

Row = tuple[str, tuple[int, ...], Kind, Group, Stored]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One released tensor; `name` as in the checkpoint, `shape` logical, `stored` without its scales."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    group: Group
    stored: Stored

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_mtp(self) -> bool:
        """True for the tensors of the MTP block, which headline parameter counts leave out."""
        return self.name.startswith("mtp.")

    @property
    def is_island(self) -> bool:
        """True where the model holds the tensor in at least fp32 whatever its type (spec 1.3, column Ckpt dtype)."""
        return self.kind == "vector" or self.stored == "F32"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileTensor:
    """One entry of a released safetensors file: a tensor's codes or its scales."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    element_bytes: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes


def released_tensors(config: ModelConfig, *, experts: int | None = None) -> Iterator[TensorSpec]:
    """Every tensor of the released checkpoint of `config`, scales apart, main model first, then the MTP block.

    Source: spec 1.3. Shapes: matrices [out, in], one tensor per expert, wo_a's groups one below the other.
    experts: list only that many of each layer's routed experts, which are all alike; default all.
    """
    experts = config.n_routed_experts if experts is None else experts
    V, D = config.vocab_size, config.hidden_size
    yield _spec("", ("embed.weight", (V, D), "table", "embedding", "BF16"))
    for layer, ratio in enumerate(config.attention_ratios):
        for row in _block(config, ratio, experts, hashed=layer < config.num_hash_layers):
            yield _spec(f"layers.{layer}.", row)
    yield _spec("", ("norm.weight", (D,), "vector", "norms", "BF16"))
    yield from (_spec("", row) for row in _head_mixes(config))
    yield _spec("", ("head.weight", (V, D), "table", "head", "BF16"))
    if config.num_nextn_predict_layers:
        yield from (_spec("mtp.0.", row) for row in _mtp(config, experts))


def file_tensors(spec: TensorSpec) -> tuple[FileTensor, ...]:
    """What the released checkpoint stores for one tensor: itself, or its codes and its scales.

    FP8: codes [out, in] and one E8M0 scale per block [ceil(out / 128), ceil(in / 128)]. FP4: two codes per byte
    [out, in / 2] and scales [out, in / 32]. Scales are named `.scale` instead of `.weight`.
    """
    scale = spec.name.removesuffix("weight") + "scale"
    if spec.stored == "F8_E4M3":
        blocks = tuple(_ceil(length, FP8_BLOCK) for length in spec.shape)
        return _file(spec.name, spec.shape, "F8_E4M3", 1), _file(scale, blocks, "F8_E8M0", 1)
    if spec.stored == "FP4":
        rows, columns = spec.shape
        codes, scales = (rows, _ceil(columns, 2)), (rows, _ceil(columns, FP4_BLOCK))
        return _file(spec.name, codes, "I8", 1), _file(scale, scales, "F8_E8M0", 1)
    return (_file(spec.name, spec.shape, spec.stored, {"BF16": 2, "F32": 4, "I64": 8}[spec.stored]),)


def _block(config: ModelConfig, ratio: int, experts: int, *, hashed: bool) -> Iterator[Row]:
    """One block of spec 1.3: attention, experts, and their two mHC sites."""
    D, N = config.hidden_size, config.hc_mult
    yield "attn_norm.weight", (D,), "vector", "norms", "BF16"
    yield "ffn_norm.weight", (D,), "vector", "norms", "BF16"
    yield from _attention(config)
    if ratio:
        yield from _compressor("attn.compressor.", D, config.head_dim, ratio, "compressor")
    if ratio == CSA_RATIO:
        yield from _indexer(config)
    yield from _experts(config, experts, hashed=hashed)
    for site in ("attn", "ffn"):
        yield f"hc_{site}_fn", ((2 + N) * N, N * D), "matrix", "mhc", "F32"
        yield f"hc_{site}_base", ((2 + N) * N,), "vector", "mhc", "F32"
        yield f"hc_{site}_scale", (3,), "vector", "mhc", "F32"


def _attention(config: ModelConfig) -> Iterator[Row]:
    D, Q, G = config.hidden_size, config.q_lora_rank, config.o_groups
    H, C, R = config.num_attention_heads, config.head_dim, config.o_lora_rank
    yield "attn.wq_a.weight", (Q, D), "matrix", "attention", "F8_E4M3"
    yield "attn.q_norm.weight", (Q,), "vector", "attention", "BF16"
    yield "attn.wq_b.weight", (H * C, Q), "matrix", "attention", "F8_E4M3"
    yield "attn.wkv.weight", (C, D), "matrix", "attention", "F8_E4M3"
    yield "attn.kv_norm.weight", (C,), "vector", "attention", "BF16"
    yield "attn.attn_sink", (H,), "vector", "attention", "F32"
    yield "attn.wo_a.weight", (G * R, H * C // G), "matrix", "attention", "F8_E4M3"
    yield "attn.wo_b.weight", (D, G * R), "matrix", "attention", "F8_E4M3"


def _compressor(prefix: str, hidden: int, channels: int, ratio: int, group: Group) -> Iterator[Row]:
    """wkv, wgate, ape, norm; CSA's overlap doubles the width (spec 3.2, 3.5)."""
    width = 2 * channels if ratio == CSA_RATIO else channels
    yield prefix + "wkv.weight", (width, hidden), "matrix", group, "BF16"
    yield prefix + "wgate.weight", (width, hidden), "matrix", group, "BF16"
    yield prefix + "ape", (ratio, width), "vector", group, "F32"
    yield prefix + "norm.weight", (channels,), "vector", group, "BF16"


def _indexer(config: ModelConfig) -> Iterator[Row]:
    D, heads, channels = config.hidden_size, config.index_n_heads, config.index_head_dim
    yield "attn.indexer.wq_b.weight", (heads * channels, config.q_lora_rank), "matrix", "indexer", "F8_E4M3"
    yield "attn.indexer.weights_proj.weight", (heads, D), "matrix", "indexer", "BF16"
    yield from _compressor("attn.indexer.compressor.", D, channels, CSA_RATIO, "indexer")


def _experts(config: ModelConfig, experts: int, *, hashed: bool) -> Iterator[Row]:
    """Router, routed experts, shared expert (spec 4.1, 4.2): w1 gate and w3 up [F, D], w2 down [D, F]."""
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    yield "ffn.gate.weight", (E, D), "matrix", "router", "BF16"
    if hashed:
        yield "ffn.gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), "buffer", "router", "I64"
    else:
        yield "ffn.gate.bias", (E,), "buffer", "router", "F32"
    shapes = (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D)))
    for expert in range(experts):
        for name, shape in shapes:
            yield f"ffn.experts.{expert}.{name}.weight", shape, "matrix", "experts", "FP4"
    for name, shape in shapes:
        yield f"ffn.shared_experts.{name}.weight", shape, "matrix", "shared_experts", "F8_E4M3"


def _head_mixes(config: ModelConfig) -> Iterator[Row]:
    """The last collapse of the streams: only the `pre` part of an mHC site (spec 2)."""
    N = config.hc_mult
    yield "hc_head_fn", (N, N * config.hidden_size), "matrix", "mhc", "F32"
    yield "hc_head_base", (N,), "vector", "mhc", "F32"
    yield "hc_head_scale", (1,), "vector", "mhc", "F32"


def _mtp(config: ModelConfig, experts: int) -> Iterator[Row]:
    """The MTP block (spec 4.4): a block with learned routing, two projections, its own norms and head mixes."""
    D = config.hidden_size
    yield from _block(config, config.compress_ratios[-1], experts, hashed=False)
    for name in ("e_proj", "h_proj"):
        yield f"{name}.weight", (D, D), "matrix", "mtp_projection", "F8_E4M3"
    for name in ("enorm", "hnorm", "norm"):
        yield f"{name}.weight", (D,), "vector", "norms", "BF16"
    yield from _head_mixes(config)


def _spec(prefix: str, row: Row) -> TensorSpec:
    name, shape, kind, group, stored = row
    return TensorSpec(name=prefix + name, shape=shape, kind=kind, group=group, stored=stored)


def _file(name: str, shape: tuple[int, ...], dtype: str, element_bytes: int) -> FileTensor:
    return FileTensor(name=name, shape=shape, dtype=dtype, element_bytes=element_bytes)


def _ceil(length: int, block: int) -> int:
    return -(-length // block)
