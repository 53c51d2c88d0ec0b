"""The kernels that `benchmarks.gpu_kernels` times: inputs of V4-Flash's sizes, and how many bytes and FLOP each needs.

Bytes: every operand read once and every result written once, forwards; backwards operands, gradients of results and
gradients of operands. FLOP: products only, two per multiply-add, recomputation not counted.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model import attend, compressor, experts, indexer, layers, mhc, rope
from model.count import block_pairs, window_pairs
from model.indexer import Index
from model.rope import Rotation
from model.sight import Sight
from model.visibility import layout

HC = {"iterations": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """V4-Flash's widths and a row of T tokens; `pairs` is half the rotated channels, F an expert's width."""

    T: int = 4096
    D: int = 4096
    N: int = 4
    H: int = 64
    C: int = 512
    pairs: int = 32
    F: int = 2048
    E: int = 256
    K: int = 6
    window: int = 128
    ratios: tuple[int, int] = (4, 128)
    topk: int = 512
    I: int = 64  # noqa: E741
    J: int = 128


TINY = Sizes(T=16, D=16, H=2, C=16, pairs=2, F=16, E=3, K=1, window=4, ratios=(4, 8), topk=2, I=2, J=16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A plain function and its kernel, called with `inputs`; backward None where there is none.

    moved: bytes forwards and backwards; flop likewise, in `products`; `formula` says both in words.
    """

    name: str
    plain: Callable[..., Any]
    kernel: Callable[..., Any]
    inputs: Sequence[Tensor]
    moved: tuple[float, float]
    flop: tuple[float, float] = (0, 0)
    products: str = "bf16"
    formula: str = ""
    learns: bool = True


def cases(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel of `model.kernels`, one after the other, so that only one case's tensors exist at a time."""
    yield from _streams(s, device, dtype)
    yield from _rows(s, device, dtype)
    yield _products(s, device, dtype)
    yield from _pools(s, device)
    yield from _attention(s, device, dtype)
    yield _selection(s, device, dtype)


def _kernel(name: str) -> Callable[..., Any]:
    """model.kernels.FILE.FUNCTION, imported only now: the interpreter is chosen before triton is imported."""
    file, function = name.split(".")
    return getattr(importlib.import_module(f"model.kernels.{file}"), function)


def _random(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()


def _streams(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    make, island = partial(_random, device, dtype), partial(_random, device, torch.float32)
    TD, rows, size = s.T * s.D, (2 + s.N) * s.N, dtype.itemsize
    x_BTND = make(1, s.T, s.N, s.D)
    yield Case(
        name="mHC enter",
        plain=partial(mhc.enter, **HC),
        kernel=partial(_kernel("enter.enter"), **HC),
        inputs=(x_BTND, island(rows, s.N * s.D, scale=0.02), island(rows), island(3)),
        moved=((s.N + 1) * TD * size, (2 * s.N + 1) * TD * size),
        flop=(2 * rows * s.N * TD, 4 * rows * s.N * TD),
        products="fp32",
        formula="(N+1) TD; (2N+1) TD. fp32 products: 2, 4 times (2+N)N ND T",
    )
    yield Case(
        name="mHC expand",
        plain=mhc.expand,
        kernel=_kernel("expand.expand"),
        inputs=(x_BTND, make(1, s.T, s.D), island(1, s.T, s.N), island(1, s.T, s.N, s.N)),
        moved=((2 * s.N + 1) * TD * size, (3 * s.N + 2) * TD * size),
        formula="(2N+1) TD; (3N+2) TD",
    )


def _rows(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    make, island, size = partial(_random, device, dtype), partial(_random, device, torch.float32), dtype.itemsize
    angle = torch.rand(1, s.T, s.pairs, device=device)
    turn = Rotation(cos=angle.cos(), sin=angle.sin())
    fixed = {"weight": None, "eps": 1e-6, "turn": turn}
    TD, THC, PF = s.T * s.D, s.T * s.H * s.C, s.T * s.K * s.F
    q_BTHC = make(1, s.T, s.H, s.C)
    yield Case(
        name="RMSNorm",
        plain=partial(layers.rms_norm, eps=1e-6),
        kernel=partial(_kernel("norm.rms_norm"), eps=1e-6),
        inputs=(make(1, s.T, s.D), island(s.D)),
        moved=(2 * TD * size, 3 * TD * size),
        formula="2 TD; 3 TD",
    )
    yield Case(
        name="norm, rotate q",
        plain=partial(rope.norm_rotate, **fixed),
        kernel=partial(_kernel("norm.norm_rotate"), **fixed),
        inputs=(q_BTHC,),
        moved=(2 * THC * size, 3 * THC * size),
        formula="2 THC; 3 THC",
    )
    yield Case(
        name="rotate o back",
        plain=partial(rope.rotate, turn=turn, inverse=True),
        kernel=partial(_kernel("rotate.rotate"), turn=turn, inverse=True),
        inputs=(q_BTHC,),
        moved=(2 * THC * size, 2 * THC * size),
        formula="2 THC; 2 THC",
    )
    yield Case(
        name="SwiGLU",
        plain=partial(experts.clamped_swiglu, limit=10.0),
        kernel=partial(_kernel("swiglu.clamped_swiglu"), limit=10.0),
        inputs=(make(s.T * s.K, s.F), make(s.T * s.K, s.F), island(s.T * s.K)),
        moved=(3 * PF * size, 5 * PF * size),
        formula="3 TKF; 5 TKF",
    )


def _products(s: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    """Every pair's expert is drawn, so that counts are uneven."""
    pairs = s.T * s.K
    counts = torch.bincount(torch.randint(s.E, (pairs,)), minlength=s.E).tolist()
    PD, EFD, PF = pairs * s.D, s.E * s.F * s.D, pairs * s.F
    return Case(
        name="experts' products",
        plain=partial(experts.grouped_matmul, counts=counts),
        kernel=partial(_kernel("grouped.grouped_matmul"), counts=counts),
        inputs=(_random(device, dtype, pairs, s.D), _random(device, dtype, s.E, s.F, s.D, scale=0.02)),
        moved=((PD + EFD + PF) * dtype.itemsize, (2 * PD + 2 * EFD + PF) * dtype.itemsize),
        flop=(2 * PF * s.D, 4 * PF * s.D),
        formula="(D+F) TK + EFD; (2D+F) TK + 2 EFD. bf16 products: 1, 2 times TKFD",
    )


def _sight(s: Sizes, device: torch.device, ratio: int) -> Sight:
    position_BT = torch.arange(s.T, device=device).unsqueeze(0)
    where = layout(torch.zeros_like(position_BT), position_BT, s.window, {ratio})
    return Sight(layout=where, window=s.window, ratio=ratio)


def _pools(s: Sizes, device: torch.device) -> Iterator[Case]:
    for name, ratio, series in (("pool CSA", s.ratios[0], 2), ("pool HCA", s.ratios[1], 1)):
        width, entries = series * s.C, s.T // ratio * s.C
        fixed = {"blocks": _sight(s, device, ratio).blocks, "overlap": series == 2}
        island = partial(_random, device, torch.float32)
        yield Case(
            name=name,
            plain=partial(compressor.pool, **fixed),
            kernel=partial(_kernel("pool.pool"), **fixed),
            inputs=(island(1, s.T, width), island(1, s.T, width), island(ratio, width)),
            moved=((2 * s.T * width + entries) * 4, (4 * s.T * width + entries) * 4),
            formula=f"fp32: 2 T {series}C + SC; 4 T {series}C + SC",
        )


def _attention(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    csa, hca = s.ratios
    dense = _sight(s, device, csa)
    index = _index(s, device, dtype)
    selected = dense.restricted(indexer.select(index, s.topk, dense))
    seen = {
        "attend window": (_sight(s, device, 0), 0),
        "attend HCA": (_sight(s, device, hca), block_pairs(s.T, hca)),
        "attend CSA, all": (dense, block_pairs(s.T, csa)),
        "attend CSA, selected": (selected, block_pairs(s.T, csa, s.topk)),
    }
    make = partial(_random, device, dtype)
    for name, (sight, entry_pairs) in seen.items():
        entries = s.T // sight.ratio if sight.ratio else 0
        pairs, THC = window_pairs(s.T, s.window) + entry_pairs, s.T * s.H * s.C
        product = 2 * pairs * s.H * s.C
        keys = (s.T + entries) * s.C
        entry = (make(1, entries, s.C),) if entries else ()
        wrap = _with_entries if entries else _without_entries
        yield Case(
            name=name,
            plain=partial(wrap, attend.attend, sight),
            kernel=partial(wrap, _kernel("attend.attend"), sight),
            inputs=(make(1, s.T, s.H, s.C), make(1, s.T, s.C), _random(device, torch.float32, s.H), *entry),
            moved=((2 * THC + keys) * dtype.itemsize, (4 * THC + 2 * keys) * dtype.itemsize),
            flop=(2 * product, 5 * product),
            formula="2 THC + (T+S) C; 4 THC + 2 (T+S) C. bf16 products: 2, 5 times pairs H C",
        )


def _with_entries(
    attention: Callable[..., Any], sight: Sight, q: Tensor, kv: Tensor, sink: Tensor, entry: Tensor
) -> Any:
    return attention(q, kv, entry, sink, sight)[0]


def _without_entries(attention: Callable[..., Any], sight: Sight, q: Tensor, kv: Tensor, sink: Tensor) -> Any:
    return attention(q, kv, None, sink, sight)[0]


def _index(s: Sizes, device: torch.device, dtype: torch.dtype) -> Index:
    q_BTIJ, k_BSJ = _random(device, dtype, 1, s.T, s.I, s.J), _random(device, dtype, 1, s.T // s.ratios[0], s.J)
    w_BTI = _random(device, torch.float32, 1, s.T, s.I)
    return Index(q_BTIJ=q_BTIJ.detach(), k_BSJ=k_BSJ.detach(), w_BTI=w_BTI.detach())


def _selection(s: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    sight, index = _sight(s, device, s.ratios[0]), _index(s, device, dtype)
    fixed = {"index": index, "topk": s.topk, "sight": sight}
    moved = (index.q_BTIJ.numel() + index.k_BSJ.numel()) * dtype.itemsize + 8 * s.T * s.topk
    return Case(
        name="select",
        plain=partial(indexer.select, **fixed),
        kernel=partial(_kernel("indexer.select"), **fixed),
        inputs=(),
        moved=(moved, 0),
        flop=(2 * block_pairs(s.T, s.ratios[0]) * s.I * s.J, 0),
        formula="TIJ + SJ, and 8 bytes a pick; bf16 products: pairs I J; the top-k is not counted",
        learns=False,
    )
