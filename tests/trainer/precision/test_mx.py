"""Proves that MXFP8 products by `te` have the operands of the emulated ones, in Transformer Engine's layouts.

A stand-in (`engine.py`) computes here; no Blackwell GPU has run them.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.trainer.precision import engine
from tests.trainer.precision.hopper import FP8, on_hopper, operands
from tests.trainer.precision.recipes import recipe
from tests.trainer.precision.test_blockscaled import RAGGED, assert_equal, three
from trainer.precision import backends, blockscaled, te
from trainer.precision.elements import named
from trainer.precision.formats import rounded
from trainer.precision.health import Watch, seen
from trainer.precision.recipe import Formats

CUDA = torch.device("cuda")
TE, EMULATED = backends.products_of("te"), backends.products_of("emulated")
ROWS, COLUMNS = named("e4m3_1x32"), named("e4m3_32x1")
MXFP8 = Formats(weight=(ROWS,), input=ROWS, grad=ROWS, dgrad_weight=COLUMNS, wgrad_input=COLUMNS, wgrad_grad=COLUMNS)


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, installed, on a Blackwell GPU."""
    on_hopper(monkeypatch, capability=(10, 0))
    with engine.installed(monkeypatch):
        yield


def given(counts: list[int], D: int, out: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """As `hopper.operands`, the weights of another size in each row, so that dgrad's rounding changes some."""
    found = operands(counts, D, out, torch.float32)
    sizes = torch.randn(out, 1, generator=torch.Generator().manual_seed(8)).mul(3).exp2()
    return {name: one.to(dtype) for name, one in (found | {"weight": rounded(found["weight"] * sizes, ROWS)}).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("counts", "D", "out"), [(RAGGED, 200, 72), ([256, 128], 640, 384), ([7], 128, 16), ([0, 3], 30, 8)]
)
def test_products_equal_the_emulated_ones(counts: list[int], D: int, out: int, dtype: torch.dtype) -> None:
    numbers = given(counts, D, out, dtype)
    found, expected = (
        three(lambda x, w, back=back: back.grouped(MXFP8, Watch())(x, w, counts), **numbers) for back in (TE, EMULATED)
    )
    assert_equal(found, expected)


def test_linear_maps_and_maps_side_by_side_equal_the_emulated_ones() -> None:
    numbers = given([75] * 4, 136, 24, torch.float32)
    x, grad = (numbers[name].unflatten(0, (4, 3, 25)).permute(1, 2, 0, 3) for name in ("x", "grad"))
    found, expected = (three(back.side_by_side(MXFP8, Watch()), x, numbers["weight"], grad) for back in (TE, EMULATED))
    assert_equal(found, expected)
    one = {"x": numbers["x"], "weight": numbers["weight"][0], "grad": numbers["grad"]}
    assert_equal(*(three(back.linear(MXFP8, Watch()), **one) for back in (TE, EMULATED)))


def test_dgrad_without_its_rounding_is_seen() -> None:
    """Negative control: the weight's own numbers in dgrad are not what the recipe says."""
    numbers = given([64], 128, 64, torch.float32)
    found = three(lambda x, w: TE.grouped(MXFP8, Watch())(x, w, [64]), **numbers)
    plain = Formats(weight=(ROWS,), input=ROWS, grad=ROWS, wgrad_input=COLUMNS, wgrad_grad=COLUMNS)
    expected = three(lambda x, w: EMULATED.grouped(plain, Watch())(x, w, [64]), **numbers)
    with pytest.raises(AssertionError, match="dx"):
        assert_equal(found, expected)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_seen_where_the_emulated_products_show_it(bad: float) -> None:
    numbers = given([5, 140], 256, 24, torch.float32)
    numbers["x"][9, 200] = bad
    found, expected = (
        three(lambda x, w, back=back: back.grouped(MXFP8, Watch())(x, w, [5, 140]), **numbers)
        for back in (TE, EMULATED)
    )
    assert expected[0].isnan().any()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


def test_notes_are_those_of_the_emulated_back_end() -> None:
    numbers, notes = given(RAGGED, 200, 72, torch.bfloat16), []
    for back in (TE, EMULATED):
        watch = Watch()
        watch.on = True
        three(lambda x, w, back=back, watch=watch: back.grouped(MXFP8, watch)(x, w, RAGGED), **numbers)
        notes.append(seen(watch.notes))
    assert notes[0].keys() == notes[1].keys()
    assert "dgrad_weight" in notes[0]
    for operand, one in notes[0].items():
        assert [(note.amax, note.error, note.poisoned) for note in one] == [
            (note.amax, note.error, note.poisoned) for note in notes[1][operand]
        ]


def test_who_serves() -> None:
    """`te` on Blackwell the recipe mxfp8 and no other, `torch` neither; on Hopper and a CPU nobody but emulation."""
    assert te.refusal(MXFP8, CUDA) == ""
    assert (
        te.refusal(FP8, CUDA) == "compute capability 10.0 scales blocks of 32: other numbers, so another recipe, mxfp8"
    )
    assert blockscaled.refusal(MXFP8, CUDA) == "weight is e4m3_1x32, not e4m3_128x128"
    assert te.refusal(MXFP8, torch.device("cpu")).startswith("a cpu has no MXFP8 products; ")
    table = {"one": MXFP8}
    assert backends.choose(recipe("mxfp8"), table, CUDA) == "te"
    assert backends.choose(recipe("mxfp8"), table, torch.device("cpu")) == "emulated"


@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
def test_other_gpus_refuse(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch, capability=capability)
    major, minor = capability
    line = f"compute capability {major}.{minor} has no MXFP8 products in Transformer Engine 2.20.2; 10 has"
    assert te.refusal(MXFP8, CUDA) == line
