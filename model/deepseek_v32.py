"""Sizes of DeepSeek-V3.2, with which the V4 report compares itself: its released `config.json`. Nothing else of it.

Multi-head latent attention: queries of 128 + 64 channels per head, one latent of 512 + 64 channels per token as key
and value of all heads; each query attends to the 2048 latents that the indexer picks among all tokens.
"""

LAYERS = 61
DENSE_LAYERS = 3
"""The first layers have one feed-forward of DENSE_INTERMEDIATE instead of experts."""
HIDDEN = 7168
VOCABULARY = 129280

HEADS = 128
Q_RANK = 1536
KV_RANK = 512
HEAD_CHANNELS = 128
"""Of a head's key and value, without RoPE."""
ROPE_CHANNELS = 64

INDEX_HEADS = 64
INDEX_CHANNELS = 128
INDEX_TOPK = 2048

EXPERTS = 256
CHOSEN_EXPERTS = 8
SHARED_EXPERTS = 1
EXPERT_INTERMEDIATE = 2048
DENSE_INTERMEDIATE = 18432

LATENT_BYTES = KV_RANK + 4 * (KV_RANK // 128) + 2 * ROPE_CHANNELS
"""A served token and layer: FP8 latent, an fp32 scale per 128 channels, BF16 RoPE channels."""
INDEX_KEY_BYTES = INDEX_CHANNELS + 4
"""FP8 with one fp32 scale."""
