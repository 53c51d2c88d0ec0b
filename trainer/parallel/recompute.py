"""Which activations are kept for the backward pass, and which are computed again: memory against time, bits alike.

| recompute  | kept of a layer instead                                                                           |
| ---------- | ------------------------------------------------------------------------------------------------- |
| attention  | the normalised input and the output of the attention, not queries, keys, entries, indexer          |
| experts    | the normalised input and the output of the mixture of experts, not gate, up and the sorted tokens  |
| block      | the streams at its start; it stands for both others. The MTP block keeps its own                   |

Streams around both sites, their small mixes and what the hand-written backward passes ask for are kept in any case.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from model.transformer import Transformer
from trainer.config import Recomputed


def apply_recompute(model: Transformer, what: Sequence[Recomputed]) -> None:
    """Set the seams of the parts that are to be computed again in the backward pass."""
    if "block" in what:
        model.run_block = _again
    for block in model.blocks():
        if "attention" in what:
            block.run_attn = _again
        if "experts" in what:
            block.run_ffn = _again


def _again(module: nn.Module, *arguments: Any) -> Any:
    return checkpoint(module, *arguments, use_reentrant=False, preserve_rng_state=False)
