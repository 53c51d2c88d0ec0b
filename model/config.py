"""Model configuration: the keys of the released `config.json`, under their released names.

Sizes have no default. A field has one only where every released V4 model has that value.
Source: DeepSeek-V4 report section 2 and the released `config.json` files.
"""

from dataclasses import dataclass
from typing import Literal

AttentionMode = Literal["dense", "indexer_warmup", "sparse"]
"""What CSA layers attend to: dense, every visible block, without the indexer; indexer_warmup, the same while the
indexer learns; sparse, the indexer's top-k (spec 6)."""

CSA_RATIO = 4
"""The ratio that means CSA (overlapping compressor + indexer); 0 is window only, anything else HCA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """YaRN parameters of the layers with compressed attention (released key `rope_scaling`); no mscale."""

    type: Literal["yarn"] = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "at least 1")
        length = self.original_max_position_embeddings
        require(length > 0, "original_max_position_embeddings", length, "a positive number of tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One DeepSeek-V4 model; raises ValueError naming key, value and expectation for contradictions."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    compress_ratios: tuple[int, ...]
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    num_nextn_predict_layers: Literal[0, 1] = 1
    n_shared_experts: Literal[1] = 1
    num_key_value_heads: Literal[1] = 1
    scoring_func: Literal["sqrtsoftplus"] = "sqrtsoftplus"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    norm_topk_prob: Literal[True] = True
    swiglu_limit: float = 10.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 1048576
    tie_word_embeddings: Literal[False] = False
    attention_bias: Literal[False] = False
    attention_dropout: Literal[0.0] = 0.0
    hidden_act: Literal["silu"] = "silu"
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_attention()
        self._check_experts()

    @property
    def attention_ratios(self) -> tuple[int, ...]:
        """Compression ratio of every main layer, without the MTP block's entry."""
        return self.compress_ratios[: self.num_hidden_layers]

    def _check_sizes(self) -> None:
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "q_lora_rank",
            "o_groups",
            "o_lora_rank",
            "sliding_window",
            "index_n_heads",
            "index_topk",
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "hc_mult",
            "hc_sinkhorn_iters",
            "max_position_embeddings",
        ):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number")
        for key in (
            "hc_eps",
            "rms_norm_eps",
            "swiglu_limit",
            "rope_theta",
            "compress_rope_theta",
            "routed_scaling_factor",
        ):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number")

    def _check_attention(self) -> None:
        entries = self.num_hidden_layers + self.num_nextn_predict_layers
        require(
            len(self.compress_ratios) == entries,
            "compress_ratios",
            list(self.compress_ratios),
            f"{entries} entries: num_hidden_layers={self.num_hidden_layers} "
            f"+ num_nextn_predict_layers={self.num_nextn_predict_layers}",
        )
        for ratio in self.compress_ratios:
            require(
                ratio == 0 or ratio >= 2,
                "compress_ratios",
                list(self.compress_ratios),
                "0 (window only), 4 (CSA) or another rate of at least 2 (HCA)",
            )
        if self.num_nextn_predict_layers:
            require(
                self.compress_ratios[-1] == 0,
                "compress_ratios",
                list(self.compress_ratios),
                "0 in the last entry: the MTP block has window attention only",
            )
        rope, limit = self.qk_rope_head_dim, min(self.head_dim, self.index_head_dim)
        require(
            0 < rope <= limit and rope % 2 == 0,
            "qk_rope_head_dim",
            rope,
            f"an even number of channels, at most {limit} (head_dim and index_head_dim)",
        )
        require(
            self.num_attention_heads % self.o_groups == 0,
            "o_groups",
            self.o_groups,
            f"a divisor of num_attention_heads={self.num_attention_heads}",
        )

    def _check_experts(self) -> None:
        require(
            self.num_experts_per_tok <= self.n_routed_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"at most n_routed_experts={self.n_routed_experts}",
        )
        require(
            0 <= self.num_hash_layers <= self.num_hidden_layers,
            "num_hash_layers",
            self.num_hash_layers,
            f"between 0 and num_hidden_layers={self.num_hidden_layers}",
        )
        for key in ("bos_token_id", "eos_token_id"):
            require(
                0 <= getattr(self, key) < self.vocab_size,
                key,
                getattr(self, key),
                f"below vocab_size={self.vocab_size}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Initial values; the table that uses them is `model/init.py`.

    std follows the V3 report (0.006), hc_scale the mHC paper's Table 5 (0.01). V4 publishes neither.
    """

    std: float = 0.006
    hc_scale: float = 0.01
    weights: str = ""
    """A folder to begin at instead, what `keel import` made or a checkpoint (docs/conversion.md)."""

    def __post_init__(self) -> None:
        require(self.std > 0, "std", self.std, "a positive standard deviation; 0 leaves the mHC streams equal for ever")


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Raise ValueError "key = value: expected ..." unless the condition holds."""
    if not holds:
        raise ValueError(f"{key} = {value}: expected {expected}")
