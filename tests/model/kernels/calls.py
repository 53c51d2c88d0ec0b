"""Every twin called once, forwards and backwards, on tensors of the device `meta` with the sizes of V4-Flash."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.indexer import Index
from model.kernels import attend, enter, expand, indexer, norm, pool, rotate, swiglu
from model.rope import Rotation
from model.sight import Sight
from model.visibility import layout

B, T, D, N, H, C, PAIRS, F = 1, 4096, 4096, 4, 64, 512, 32, 2048


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def back(*results: Tensor) -> None:
    torch.autograd.backward(results, [torch.empty_like(result) for result in results])


def turn() -> Rotation:
    return Rotation(cos=empty(B, T, PAIRS).detach(), sin=empty(B, T, PAIRS).detach())


def call_norm(dtype: torch.dtype) -> None:
    back(norm.rms_norm(empty(B, T, D, dtype=dtype), empty(D), 1e-6))
    back(norm.norm_rotate(empty(B, T, C, dtype=dtype), empty(C), 1e-6, turn()))
    back(norm.norm_rotate(empty(B, T, H, C, dtype=dtype), None, 1e-6, turn()))


def call_rotate(dtype: torch.dtype) -> None:
    back(rotate.rotate(empty(B, T, H, C, dtype=dtype), turn(), inverse=True))


def call_swiglu(dtype: torch.dtype) -> None:
    back(swiglu.clamped_swiglu(empty(T, F, dtype=dtype), empty(T, F, dtype=dtype), empty(T), 10.0))
    back(swiglu.clamped_swiglu(empty(B, T, F, dtype=dtype), empty(B, T, F, dtype=dtype), None, 10.0))


def call_enter(dtype: torch.dtype) -> None:
    rows = (2 + N) * N
    operands = empty(B, T, N, D, dtype=dtype), empty(rows, N * D), empty(rows), empty(3)
    back(*enter.enter(*operands, iterations=20, hc_eps=1e-6, norm_eps=1e-6))


def call_expand(dtype: torch.dtype) -> None:
    back(expand.expand(empty(B, T, N, D, dtype=dtype), empty(B, T, D, dtype=dtype), empty(B, T, N), empty(B, T, N, N)))


def call_pool(dtype: torch.dtype) -> None:
    """CSA, overlapped, and HCA: in fp32 whatever the model's type."""
    if dtype == torch.float32:
        position_BT = torch.zeros(B, T, dtype=torch.int64, device="meta")
        blocks = layout(position_BT, position_BT, 128, {4, 128}).blocks
        for M, width in ((4, 2 * C), (128, C)):
            operands = empty(B, T, width), empty(B, T, width), empty(M, width)
            back(pool.pool(*operands, blocks[M], overlap=M == 4))


def sight(ratio: int) -> Sight:
    position_BT = torch.zeros(B, T, dtype=torch.int64, device="meta")
    return Sight(layout=layout(position_BT, position_BT, 128, {ratio}), window=128, ratio=ratio)


def call_attend(dtype: torch.dtype) -> None:
    """Window only, CSA with all entries and with selected ones, HCA; in fp32, dear to compile, selected ones alone."""
    selected = sight(4).restricted(torch.zeros(B, T, 512, dtype=torch.int64, device="meta"))
    for seen in (sight(0), sight(4), selected, sight(128)) if dtype == torch.bfloat16 else (selected,):
        entry = empty(B, T // seen.ratio, C, dtype=dtype) if seen.ratio else None
        operands = empty(B, T, H, C, dtype=dtype), empty(B, T, C, dtype=dtype), entry, empty(H)
        back(attend.attend(*operands, seen)[0])


def call_indexer(dtype: torch.dtype) -> None:
    heads, channels = 64, 128
    q, key = empty(B, T, heads, channels, dtype=dtype), empty(B, T // 4, channels, dtype=dtype)
    indexer.select(Index(q_BTIJ=q, k_BSJ=key, w_BTI=empty(B, T, heads)), 512, sight(4))


CALLS: Sequence[Callable[[torch.dtype], None]] = (
    call_norm,
    call_rotate,
    call_swiglu,
    call_enter,
    call_expand,
    call_pool,
    call_attend,
    call_indexer,
)
