"""What decoding keeps of the tokens before: of each layer the window, the compressed entries, the compressors' tails.

    window   the keys of the last `sliding_window` tokens, at position modulo window
    entries  of layers with compression: the finished entries
    keys     of CSA layers in the sparse stage: the indexer's finished keys
    tail     of each compressor: value and logit of the tokens whose block is incomplete, at position modulo rate, and
             with overlap of the block before its first series, which the next entry weighs too (R 2.3.1 eqs. 9-12)

Rows begin at their left end and may have different lengths. Everything is allocated at once, for a number of tokens
that is given: `model.count_decode.cache_bytes` says from the configuration alone how many bytes that is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.compressor import Compressor, compress
from model.config import CSA_RATIO, AttentionMode, ModelConfig, require
from model.layers import island_dtype
from model.rope import Rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """What one compressor has made of each row, and the tail it goes on from; the tensors are changed in place.

    entry_BSC: row b of n tokens has n // m entries, what lies behind them means nothing. value_BMC, logit_BMC (`ape`
    added): projections of the incomplete block's tokens. value_before_BMC, logit_before_BMC: the first series of the
    block before, 0 and -inf where there is none; no M at all without overlap.
    """

    entry_BSC: Tensor
    value_BMC: Tensor
    logit_BMC: Tensor
    value_before_BMC: Tensor
    logit_before_BMC: Tensor

    def fill(self, compressor: Compressor, h_BTD: Tensor, entry_BSC: Tensor, length_B: Tensor) -> None:
        """Take in whole rows: their entries, made by the compressor, and the tail after length_B tokens."""
        self.entry_BSC[:, : entry_BSC.shape[1]] = entry_BSC
        m, C = self.value_BMC.shape[1], self.entry_BSC.shape[2]
        token_BM = (length_B // m * m).unsqueeze(1) + torch.arange(m, device=length_B.device)
        value_BMC, logit_BMC = _projected(compressor, h_BTD, token_BM)
        self.value_BMC.copy_(value_BMC)
        self.logit_BMC.copy_(logit_BMC)
        before_BM = token_BM[:, : self.value_before_BMC.shape[1]] - m
        value_BMC, logit_BMC = _projected(compressor, h_BTD, before_BM)
        missing_BM1 = (before_BM < 0).unsqueeze(-1)
        self.value_before_BMC.copy_(value_BMC[..., :C].masked_fill(missing_BM1, 0))
        self.logit_before_BMC.copy_(logit_BMC[..., :C].masked_fill(missing_BM1, -torch.inf))

    def add(
        self, compressor: Compressor, h_B1D: Tensor, position_B: Tensor, turn: Callable[[Tensor], Rotation]
    ) -> None:
        """Take in one token of each row; where it ends a block, make the entry. turn: rotation at given positions."""
        m, C = self.value_BMC.shape[1], self.entry_BSC.shape[2]
        row_B, place_B = torch.arange(len(position_B), device=position_B.device), position_B % m
        self.value_BMC[row_B, place_B] = compressor.wkv(h_B1D)[:, 0]
        self.logit_BMC[row_B, place_B] = compressor.wgate(h_B1D)[:, 0] + compressor.ape[place_B]
        done = (place_B == m - 1).nonzero()[:, 0]
        if not len(done):
            return
        value_BMC, logit_BMC = self.value_BMC[done], self.logit_BMC[done]
        values = torch.cat((self.value_before_BMC[done], value_BMC[..., -C:]), dim=1).unsqueeze(1)
        logits = torch.cat((self.logit_before_BMC[done], logit_BMC[..., -C:]), dim=1).unsqueeze(1)
        first_B1 = (position_B[done] - (m - 1)).unsqueeze(1)
        entry_B1C = compressor.finish(compress(values, logits), turn(first_B1), self.entry_BSC.dtype)
        self.entry_BSC[done, position_B[done] // m] = entry_B1C[:, 0]
        overlap = self.value_before_BMC.shape[1]
        self.value_before_BMC[done] = value_BMC[:, :overlap, :C]
        self.logit_before_BMC[done] = logit_BMC[:, :overlap, :C]

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.entry_BSC, self.value_BMC, self.logit_BMC, self.value_before_BMC, self.logit_before_BMC)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """One layer's window keys and, by its kind, compressed entries and indexer keys."""

    window_BWC: Tensor
    entries: Compressed | None
    keys: Compressed | None

    def fill_window(self, kv_BTC: Tensor, length_B: Tensor) -> None:
        """Put the last keys of each row at their places."""
        W = self.window_BWC.shape[1]
        last_B1 = (length_B - 1).unsqueeze(1)
        # The newest token at each place; where there is none yet, anything: it is not visible.
        token_BW = last_B1 - (last_B1 - torch.arange(W, device=length_B.device)) % W
        self.window_BWC.copy_(_rows(kv_BTC, token_BW))

    def add_window(self, kv_B1C: Tensor, position_B: Tensor) -> None:
        """Put one key of each row in the place of the one that leaves the window."""
        row_B = torch.arange(len(position_B), device=position_B.device)
        self.window_BWC[row_B, position_B % self.window_BWC.shape[1]] = kv_B1C[:, 0]

    def tensors(self) -> Iterator[Tensor]:
        yield self.window_BWC
        for part in (self.entries, self.keys):
            if part is not None:
                yield from part.tensors()


class Cache:
    """The state of a batch. layers: by number. lengths: tokens taken in by each row, so far none. limit: the most."""

    def __init__(self, layers: dict[int, LayerCache], rows: int, limit: int) -> None:
        self.layers, self.lengths, self.limit = layers, (0,) * rows, limit

    def size_bytes(self) -> int:
        """Bytes of all tensors, whether in use yet or not."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.tensors())


def allocate(
    config: ModelConfig,
    rows: int,
    limit: int,
    mode: AttentionMode,
    dtype: torch.dtype,
    device: torch.device,
    numbers: Sequence[int] | None = None,
) -> Cache:
    """An empty cache for rows of up to `limit` tokens. Tails are fp32 islands; all else has the model's type.

    numbers: the layers to have one for, default all.

    Raises ValueError for a limit beyond max_position_embeddings.
    """
    most = config.max_position_embeddings
    require(0 < limit <= most, "tokens", limit, f"prompt and text of at most max_position_embeddings={most} tokens")

    def compressed(ratio: int, channels: int) -> Compressed:
        overlap = ratio == CSA_RATIO
        tail = (rows, ratio, 2 * channels if overlap else channels)
        before = (rows, ratio if overlap else 0, channels)
        fp32 = {"dtype": island_dtype(dtype), "device": device}
        return Compressed(
            entry_BSC=torch.zeros(rows, limit // ratio, channels, dtype=dtype, device=device),
            value_BMC=torch.zeros(tail, **fp32),
            logit_BMC=torch.zeros(tail, **fp32),
            value_before_BMC=torch.zeros(before, **fp32),
            logit_before_BMC=torch.full(before, -torch.inf, **fp32),
        )

    layers = {
        number: LayerCache(
            window_BWC=torch.zeros(rows, config.sliding_window, config.head_dim, dtype=dtype, device=device),
            entries=compressed(ratio, config.head_dim) if ratio else None,
            keys=compressed(ratio, config.index_head_dim) if ratio == CSA_RATIO and mode == "sparse" else None,
        )
        for number, ratio in enumerate(config.attention_ratios)
        if numbers is None or number in numbers
    }
    return Cache(layers, rows, limit)


def lengths_tensor(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Lengths, or positions, of the rows as int64 [B]."""
    return torch.tensor(lengths, dtype=torch.int64, device=device)


def _projected(compressor: Compressor, h_BTD: Tensor, token_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Values and logits of a block's tokens, for tokens outside of the row anything."""
    h_BMD = _rows(h_BTD, token_BM)
    return compressor.wkv(h_BMD), compressor.wgate(h_BMD) + compressor.ape[: token_BM.shape[1]]


def _rows(x_BTC: Tensor, token_BM: Tensor) -> Tensor:
    """x at the given tokens of each row, [B, M, C]; tokens outside of the row give its first or last."""
    row_B1 = torch.arange(len(x_BTC), device=x_BTC.device).unsqueeze(1)
    return x_BTC[row_B1, token_BM.clamp(0, x_BTC.shape[1] - 1)]
