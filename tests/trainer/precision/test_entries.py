"""Proves what rounding of keys, entries, and the indexer's q and k does to values, gradients, decoding and runs."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from model.compressor import Compressor
from model.decode import prefill, step
from model.layers import unrounded
from model.rope import Rotation
from tests.model import golden
from tests.runs import tiny
from tests.trainer.precision.recipes import recipe
from trainer.precision.config import PrecisionConfig, RoundingConfig
from trainer.precision.elements import E2M1_1X32, named
from trainer.precision.entries import of_entries, of_index
from trainer.precision.formats import rounded
from trainer.precision.health import Watch
from trainer.precision.qat import hadamard
from trainer.precision.recipe import LookedAt, Recipe
from trainer.precision.serving import serve
from trainer.run import resume, train

INDEX, ENTRIES = RoundingConfig(format="e2m1_1x32"), RoundingConfig(format="e4m3_1x64")
E4M3_1X64 = named("e4m3_1x64")
LIMIT = 1e-12
"""As in tests/model/test_decode.py: logits of size 1 in fp64, whatever is rounded on the way is so on both sides."""


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_index_is_rotated_then_rounded() -> None:
    """Values are E2M1's after the rotation; without rounding, products of rotated q and k are those of q and k."""
    q, k = numbers(2, 3, 4, 64), numbers(5, 64)
    assert torch.equal(of_index(E2M1_1X32, "index_q", Watch())(q), rounded(hadamard(q), E2M1_1X32))
    # Sums of 64 products of size 1 in fp32: 1e-6; rounded to FP4 they are apart by a tenth.
    assert (hadamard(q) @ hadamard(k).T - q @ k.T).abs().max() < 1e-5
    apart = of_index(E2M1_1X32, "", Watch())(q) @ of_index(E2M1_1X32, "", Watch())(k).T - q @ k.T
    assert apart.abs().max() > 0.1


def test_entries_keep_their_rotated_channels() -> None:
    x = numbers(2, 5, 80)
    y = of_entries(E4M3_1X64, 16, "entries", Watch())(x)
    assert torch.equal(y[..., 64:], x[..., 64:])
    assert torch.equal(y[..., :64], rounded(x[..., :64], E4M3_1X64))
    assert not torch.equal(y[..., :64], x[..., :64])


def test_gradients_go_straight_through() -> None:
    """As if nothing had been rounded: through the rotation, which is its own inverse, and through all channels."""
    x, grad = numbers(3, 64).requires_grad_(), numbers(3, 64).flip(0)
    (of_x,) = torch.autograd.grad(of_index(E2M1_1X32, "", Watch())(x), x, grad)
    # Six sums of two in fp32, and one product; their order is the same.
    assert torch.allclose(of_x, hadamard(grad), rtol=0, atol=1e-6)
    (of_x,) = torch.autograd.grad(of_entries(E4M3_1X64, 16, "", Watch())(x), x, grad)
    assert torch.equal(of_x, grad)


def test_each_is_served_from_its_tokens_on() -> None:
    """In every attention of the model: keys and entries of all layers, q and k of indexers; before, nothing is."""
    found = golden.model()
    late = PrecisionConfig(dtype="fp64", index=replace(INDEX, from_tokens=10), entries=replace(ENTRIES, from_tokens=20))
    precision = serve(found, late, 0)
    attentions = [block.attn for block in found.layers] + [block.attn for block in found.mtp]

    def served() -> set[tuple[bool, ...]]:
        entries = {
            module.rounding is not unrounded for attn in attentions for module in (attn, attn.compressor) if module
        }
        indexers = [attn.indexer for attn in attentions if attn.indexer]
        index = {part.rounding is not unrounded for one in indexers for part in (one, one.compressor)}
        assert len(entries) == len(index) == 1
        return {(*entries, *index)}

    assert served() == {(False, False)}
    precision.enter(10)
    assert served() == {(False, True)}
    precision.enter(20)
    assert served() == {(True, True)}
    precision.enter(0)
    assert served() == {(False, False)}


def apart(prompt: int) -> float:
    """Largest difference of logits of a golden text, by the whole forward pass and decoded after so many tokens."""
    token_BT = golden.stored()["ids"][:40].unsqueeze(0)
    model = golden.model()
    serve(model, PrecisionConfig(dtype="fp64", index=INDEX, entries=ENTRIES), 0)
    with torch.no_grad():
        want_BTV = model.logits(model(token_BT).h_BTD)
    cache, logits_BV = prefill(model, token_BT[:, :prompt], [prompt], limit=token_BT.shape[1], mode="sparse")
    worst = (logits_BV - want_BTV[:, prompt - 1]).abs().max()
    for t in range(prompt, token_BT.shape[1]):
        worst = torch.maximum(worst, (step(model, cache, token_BT[:, t]) - want_BTV[:, t]).abs().max())
    return float(worst)


@pytest.mark.parametrize("prompt", [1, 7, 16])
def test_decoding_looks_at_what_training_did(prompt: int) -> None:
    """A cache filled by a prompt or token by token holds the entries of the whole forward pass."""
    assert apart(prompt) < LIMIT


def test_decoding_that_does_not_round_is_seen() -> None:
    """Negative control: entries that a cache makes are not rounded, those of the forward pass are."""

    def finish(self: Compressor, entry_BSC: Tensor, turn_S: Rotation, dtype: torch.dtype) -> Tensor:
        y = self.norm_rotate(entry_BSC, self.norm.weight, self.norm.eps, turn_S).to(dtype)
        return y if y.shape[1] == 1 else self.rounding(y)

    with mock.patch.object(Compressor, "finish", finish):
        assert apart(1) > 1e6 * LIMIT


def turning() -> PrecisionConfig:
    """FP8, and from the fifth of nine steps on rounded q, k, keys and entries, as `tiny.model` is wide."""
    index, entries = (RoundingConfig(format=name, from_tokens=200) for name in ("e2m1_1x4", "e4m3_1x2"))
    return replace(recipe("fp8"), index=index, entries=entries)


@pytest.mark.slow
def test_a_run_turns_and_resumes(corpus: Path, tmp_path: Path) -> None:
    """The bits of a run without a stop, which are not those of one that never turns; its health is told of."""
    whole, halves, never = (
        tiny.config(corpus, tmp_path / name, precision=precision)
        for name, precision in (("whole", turning()), ("halves", turning()), ("never", recipe("fp8")))
    )
    assert train(whole) == 0
    assert train(halves, stop_at=6) == 0
    assert resume(halves, tiny.only_run(Path(halves.runs_dir))) == 0
    assert train(never) == 0
    of_whole, of_halves, of_never = (tiny.only_run(Path(config.runs_dir)) for config in (whole, halves, never))
    tiny.assert_same_run(of_whole, of_halves)
    changed = tiny.different_tensors(tiny.final_tensors(of_whole), tiny.final_tensors(of_never))
    assert "model/layers.0.attn.indexer.wq_b.weight" in changed
    assert "model/layers.1.attn.wkv.weight" in changed
    told = {name for row in tiny.metrics_rows(of_whole) for name in row}
    assert {f"precision/error/{kind}" for kind in ("attention.entries", "indexer.q", "indexer.k")} <= told


def test_formats_are_part_of_the_recipe() -> None:
    """Its hash and stages know them; without formats both are as they were."""
    config, model = recipe("fp8"), tiny.model()
    plain, turned = Recipe(config, model), Recipe(turning(), model)
    assert plain.looked_at(10**9) == LookedAt()
    assert turned.looked_at(199) == LookedAt()
    assert turned.looked_at(200) == LookedAt(index=named("e2m1_1x4"), entries=named("e4m3_1x2"))
    assert turned.stages == (0, 200)
    assert plain.hash() == Recipe(replace(config, index=RoundingConfig(from_tokens=5)), model).hash()
    others = {Recipe(replace(config, **{key: ENTRIES}), model).hash() for key in ("index", "entries")}
    assert len({plain.hash(), turned.hash(), *others}) == 4
    assert not Recipe(PrecisionConfig(entries=ENTRIES), model).is_plain


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="format = e4m3_128x1: expected a block within a row"):
        RoundingConfig(format="e4m3_128x1")
    with pytest.raises(ValueError, match="format = e5m2_1x64: expected a format such as"):
        RoundingConfig(format="e5m2_1x64")
    with pytest.raises(ValueError, match="from_tokens = -1: expected at least 0"):
        RoundingConfig(from_tokens=-1)
    with pytest.raises(ValueError, match=r"precision\.index\.format = e2m1_1x32: expected .* index_head_dim=12"):
        Recipe(PrecisionConfig(index=INDEX), tiny.model(index_head_dim=12))
