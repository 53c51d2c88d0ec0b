"""Proves every hand-written backward pass by finite differences in fp64, and that chunks are only a way of computing.

`gradcheck` compares each with central differences; a wrong backward pass fails the same call (negative controls).
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from model import attend, experts, gather, indexer, losses, mhc, sight
from model.sight import Sight
from model.visibility import layout
from tests.model.mistakes import Mistake, mistake
from tests.model.observing import Rows, pack

WINDOW = 3
BF16 = torch.bfloat16
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
"""The same sums in another order, in float64."""


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def check(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare the function's backward pass with central differences; raises GradcheckError where they differ."""
    # Of central differences in float64: the error is eps^2 times the third derivative, and 1e-16 / eps from rounding.
    torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def see(checked: Callable[[], None], wrong: Mistake, patch: pytest.MonkeyPatch) -> None:
    """The check passes, and fails once the mistake is made."""
    checked()
    wrong.make(patch)
    with pytest.raises(GradcheckError):
        checked()


def rows(*lengths: int, padding: int = 0) -> Rows:
    return pack([[0] * n for n in lengths], padding=padding)


def sight_of(rows: Rows, ratio: int, selected_BTZ: Tensor | None = None) -> Sight:
    where = layout(rows.document_BT, rows.position_BT, WINDOW, {ratio})
    return Sight(layout=where, window=WINDOW, ratio=ratio, selected_BTZ=selected_BTZ)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 3, 4, 4)])
def test_sinkhorn(shape: tuple[int, ...], iterations: int) -> None:
    check(lambda x: mhc.sinkhorn(x, iterations, 1e-3), random(*shape))


def attend_inputs(T: int, ratio: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [1, T, 2, 4], kv, entries, sink; the first sink is so large that it holds most of the weight."""
    slots = T // ratio if ratio else 0
    sink_H = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    return random(1, T, 2, 4, seed=1), random(1, T, 4, seed=2), random(1, slots, 4, seed=3), sink_H


def picks(T: int) -> Tensor:
    """Two slots of four tokens for each token, among them invisible ones and unused picks."""
    return torch.tensor([[[t // 4 - 1, -1 if t % 3 or t // 5 == t // 4 - 1 else t // 5] for t in range(T)]])


def check_attention(case: str) -> int:
    """Window only, with entries, or with entries restricted to a selection. Returns the number of chunks."""
    packed, ratio = rows(2, 9, padding=2), 0 if case == "window" else 4
    seen = sight_of(packed, ratio, picks(13) if case == "selection" else None)
    check(lambda *x: attend.attend(*x, seen)[0], *attend_inputs(13, ratio))
    return len(seen.chunks())


@pytest.mark.parametrize(("chunk", "chunks"), [(4, 4), (256, 1)])
@pytest.mark.parametrize("case", ["window", "entries", "selection"])
def test_attention(case: str, chunk: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight, "CHUNK", chunk)
    assert check_attention(case) == chunks


@pytest.mark.parametrize("chunk", [4, 256])
def test_gathered_entries_are_masked_entries(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of attending a selection agree, in the attention, in the indexer's divergence and in gradients."""
    packed, inputs = rows(2, 14, 9, padding=2), attend_inputs(27, 4)
    slot_T = torch.arange(27)
    selected_BTZ = torch.stack((slot_T // 5, torch.where(slot_T % 3 == 0, -1, (slot_T // 5 + 1) % 6)), -1).unsqueeze(0)
    q_BTIJ, k_BSJ, w_BTI = random(1, 27, 2, 2, seed=5), random(1, 6, 2, seed=6), random(1, 27, 2, seed=7)
    monkeypatch.setattr(sight, "CHUNK", chunk)
    results = []
    for least in (0.0, math.inf):
        monkeypatch.setattr(sight, "GATHER", least)
        seen = sight_of(packed, 4, selected_BTZ)
        assert all((one.slot_BQZ is None) == (least > 0) for one in seen.chunks() if one.entries)
        o_BTHC, lse_BTH = attend.attend(*inputs, seen)
        target = indexer.Target(q_BTHC=inputs[0].detach(), entry_BSC=inputs[2].detach(), lse_BTH=lse_BTH)
        index = indexer.Index(q_BTIJ=q_BTIJ, k_BSJ=k_BSJ, w_BTI=w_BTI)
        divergence = indexer.kl_sum(index, target, seen, packed.document_BT >= 0)
        total = o_BTHC.sin().sum() + divergence
        results.append((o_BTHC, lse_BTH, divergence, *torch.autograd.grad(total, (*inputs, q_BTIJ, k_BSJ, w_BTI))))
    for gathered, masked in zip(*results, strict=True):
        torch.testing.assert_close(gathered, masked, **CLOSE)


@pytest.mark.parametrize("ratio", [0, 2, 4])
def test_attention_in_chunks_is_attention_at_once(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, inputs = rows(1, 11, 5, padding=3), attend_inputs(20, ratio)
    results = []
    for chunk in (256, 7, 3):
        monkeypatch.setattr(sight, "CHUNK", chunk)
        o_BTHC, lse_BTH = attend.attend(*inputs, sight_of(packed, ratio))
        gradients = torch.autograd.grad(o_BTHC.sin().sum(), [x for x in inputs if x.numel()])
        results.append((o_BTHC, lse_BTH, *gradients))
    for chunked in results[1:]:
        for one, other in zip(results[0], chunked, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_attention_is_the_softmax_of_the_report() -> None:
    """R eq. 27 written out for one row: visible keys and the sink under one softmax, no value for the sink."""
    packed, (q_BTHC, kv_BTC, entry_BSC, sink_H) = rows(3, 10), attend_inputs(13, 4)
    o_BTHC, lse_BTH = attend.attend(q_BTHC, kv_BTC, entry_BSC, sink_H, sight_of(packed, 4))
    for t in range(13):
        start = 0 if t < 3 else 3  # of the token's document; its blocks fill the row's slots from 0 on
        window = list(range(max(start, t - WINDOW + 1), t + 1))
        slots = list(range((t - start + 1) // 4))
        keys = torch.cat([kv_BTC[0, window], entry_BSC[0, slots]])
        for head in range(2):
            z = torch.cat([keys @ q_BTHC[0, t, head] / 2, sink_H[head : head + 1]])
            torch.testing.assert_close(lse_BTH[0, t, head], torch.logsumexp(z, 0), **CLOSE)
            torch.testing.assert_close(o_BTHC[0, t, head], torch.softmax(z, 0)[:-1] @ keys, **CLOSE)


def check_grouped_products(counts: list[int]) -> None:
    check(lambda x, w: experts.grouped_matmul(x, w, counts), random(sum(counts), 3), random(4, 2, 3))


@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 0, 6, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_grouped_products(counts: list[int]) -> None:
    check_grouped_products(counts)
    x_PD, w_EFD = random(sum(counts), 3), random(4, 2, 3)
    expert_P = torch.tensor([e for e, n in enumerate(counts) for _ in range(n)], dtype=torch.int64)
    expected_PF = torch.einsum("pd,pfd->pf", x_PD, w_EFD[expert_P])
    torch.testing.assert_close(experts.grouped_matmul(x_PD, w_EFD, counts), expected_PF, **CLOSE)


def check_picked_rows(picked: list[int]) -> None:
    """Rows of five, each picked at most once."""
    inverse_P = torch.tensor([picked.index(p) if p in picked else -1 for p in range(5)])
    index_Q = torch.tensor(picked, dtype=torch.int64)
    check(lambda x: gather.take(x, index_Q, inverse_P), random(5, 2))
    assert torch.equal(gather.take(random(5, 2), index_Q, inverse_P), random(5, 2)[index_Q])


@pytest.mark.parametrize("picked", [[4, 0, 3], [2, 1, 0, 4, 3], []])
def test_picked_rows(picked: list[int]) -> None:
    check_picked_rows(picked)


TARGET_BT = torch.tensor([[4, -1, 0, 2, -1, 3, 3]])


def check_cross_entropy() -> None:
    check(lambda h, w: 3 * losses.cross_entropy_sum(h, w, TARGET_BT), random(1, 7, 3), random(5, 3))


@pytest.mark.parametrize("chunk", [2, 1024])
def test_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    check_cross_entropy()
    h_BTD, weight_VD, learned = random(1, 7, 3), random(5, 3), TARGET_BT[0] >= 0
    logits_PV = (h_BTD @ weight_VD.T)[0, learned]
    expected = torch.nn.functional.cross_entropy(logits_PV, TARGET_BT[0, learned], reduction="sum")
    torch.testing.assert_close(losses.cross_entropy_sum(h_BTD, weight_VD, TARGET_BT), expected, **CLOSE)


def test_cross_entropy_of_no_target_is_zero_with_zero_gradient() -> None:
    h_BTD, weight_VD = random(1, 4, 3), random(5, 3)
    total = losses.cross_entropy_sum(h_BTD, weight_VD, torch.full((1, 4), -1))
    total.backward()
    assert total == 0
    assert not h_BTD.grad.any()
    assert not weight_VD.grad.any()


def test_an_attached_term_gets_its_scale_and_the_stream_its_own_gradient() -> None:
    x, term = random(3), random(1)
    attached = losses.attach(x, term.square().sum(), 0.25)
    assert torch.equal(attached, x)
    (7 * attached).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 7.0, dtype=torch.float64))
    torch.testing.assert_close(term.grad, 0.25 * 2 * term.detach(), **CLOSE)
    assert losses.attach(x, term.sum(), 0.0) is x


def test_the_indexer_s_divergence_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = rows(5, 9, 2, padding=1)
    q_BTIJ, k_BSJ, w_BTI = random(1, 17, 2, 2, seed=5), random(1, 4, 2, seed=6), random(1, 17, 2, seed=7)
    q_BTHC, kv_BTC, entry_BSC, sink_H = attend_inputs(17, 4)
    results = []
    for chunk in (256, 7, 3):
        monkeypatch.setattr(sight, "CHUNK", chunk)
        seen = sight_of(packed, 4)
        lse_BTH = attend.attend(q_BTHC, kv_BTC, entry_BSC, sink_H, seen)[1]
        target = indexer.Target(q_BTHC=q_BTHC.detach(), entry_BSC=entry_BSC.detach(), lse_BTH=lse_BTH)

        def divergence(q: Tensor, k: Tensor, w: Tensor, seen: Sight = seen, target: indexer.Target = target) -> Tensor:
            index = indexer.Index(q_BTIJ=q, k_BSJ=k, w_BTI=w)
            return indexer.kl_sum(index, target, seen, packed.document_BT >= 0)

        total = divergence(q_BTIJ, k_BSJ, w_BTI)
        results.append((total, *torch.autograd.grad(total, (q_BTIJ, k_BSJ, w_BTI))))
    check(divergence, q_BTIJ, k_BSJ, w_BTI)
    for chunked in results[1:]:
        for one, other in zip(results[0], chunked, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("gather", [0, math.inf])
def test_bf16_keys_of_the_indexer_have_gradients_summed_in_fp32(gather: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight, "GATHER", gather)
    T = 400
    selected_BTZ = torch.tensor([[[0, 1] if t >= 7 else [0, -1] if t >= 3 else [-1, -1] for t in range(T)]])
    seen = sight_of(rows(T), 4, selected_BTZ)
    given = (random(1, T, 2, 4, seed=5), random(1, T // 4, 4, seed=6), random(1, T, 2, seed=7))
    q_BTIJ, k_BSJ, w_BTI = (x.detach().to(dtype) for x, dtype in zip(given, (BF16, BF16, torch.float32), strict=True))
    q_BTHC, _, entry_BSC, _ = (x.detach().float() for x in attend_inputs(T, 4))
    target = indexer.Target(q_BTHC=q_BTHC, entry_BSC=entry_BSC, lse_BTH=torch.zeros(1, T, 2))
    gradients = []
    for dtype in (BF16, torch.float32):
        key = k_BSJ.detach().to(dtype).requires_grad_()
        index = indexer.Index(q_BTIJ=q_BTIJ, k_BSJ=key, w_BTI=w_BTI)
        indexer.kl_sum(index, target, seen, torch.ones(1, T, dtype=torch.bool)).backward()
        gradients.append(key.grad)
    assert gradients[0].dtype == BF16
    # One rounding to bf16 at the end, of up to 2^-9 of the number.
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=2**-8, atol=1e-6)


WRONG = {
    "sinkhorn": (
        lambda: check(lambda x: mhc.sinkhorn(x, 2, 1e-3), random(1, 3, 3)),
        mistake("mhc._Sinkhorn.backward", ("(grad_NNP - mean)", "grad_NNP.clone()")),
    ),
    "attention's softmax": (
        lambda: check_attention("entries"),
        mistake("attend._Attend.backward", (".sub_(mean_BQH1)", "")),
    ),
    "attention's values": (
        lambda: check_attention("window"),
        mistake("attend._Attend.backward", (" + _to_keys(p, grad_BQHC, key)", "")),
    ),
    "grouped products": (
        lambda: check_grouped_products([3, 0, 2, 1]),
        mistake("experts._GroupedMatmul.backward", ("grad_PF.split(counts)", "grad_PF.flip(0).split(counts)")),
    ),
    "picked rows": (
        lambda: check_picked_rows([4, 0, 3]),
        mistake("gather._Take.backward", (".masked_fill_(missing, 0)", "")),
    ),
    "cross entropy": (
        check_cross_entropy,
        mistake("losses._CrossEntropySum.forward", ("grad_PV.mul_(learned)", "grad_PV.mul_(1)")),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backward_pass_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    see(*WRONG[name], monkeypatch)
