"""Proves which back end a run has: the asked one or a clear no, else the first that computes all its formats."""

from dataclasses import replace

import pytest
import torch

from tests.trainer.precision.hopper import FP8, FP8_FP4, on_hopper
from trainer.precision import backends, blockscaled, te
from trainer.precision.config import BackEnd, PrecisionConfig
from trainer.precision.elements import named
from trainer.precision.health import Watch
from trainer.precision.recipe import PLAIN, Formats
from trainer.precision.serving import SEAMS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ONLY_WEIGHTS = Formats(weight=FP8.weight)
TABLE = {"norm.weight": PLAIN, "a.weight": ONLY_WEIGHTS, "b.weight": FP8, "c.weight": FP8, "d.w1": FP8_FP4}


def refuse(monkeypatch: pytest.MonkeyPatch, **reasons: str) -> None:
    """Back ends that refuse for these reasons; the others do not."""
    for name, module in (("torch", blockscaled), ("te", te)):
        monkeypatch.setattr(module, "refusal", lambda formats, device, name=name: reasons.get(name, ""))


@pytest.mark.parametrize(
    ("reasons", "chosen"),
    [({}, "torch"), ({"torch": "no"}, "te"), ({"torch": "no", "te": "no"}, "emulated")],
)
def test_auto_is_the_first_that_can(monkeypatch: pytest.MonkeyPatch, reasons: dict[str, str], chosen: str) -> None:
    refuse(monkeypatch, **reasons)
    assert backends.choose(PrecisionConfig(backend="auto"), TABLE, CUDA) == chosen


@pytest.mark.parametrize("name", ["emulated", "torch", "te"])
def test_the_asked_one_serves_where_it_can(monkeypatch: pytest.MonkeyPatch, name: BackEnd) -> None:
    refuse(monkeypatch)
    assert backends.choose(PrecisionConfig(backend=name), TABLE, CUDA) == name


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_transformer_engine_is_not_asked_where_another_serves(
    monkeypatch: pytest.MonkeyPatch, backend: BackEnd
) -> None:
    """To ask it is to import it."""
    refuse(monkeypatch)
    monkeypatch.delattr(te, "refusal")
    assert backends.choose(PrecisionConfig(backend=backend), TABLE, CUDA) == "torch"


def test_the_asked_one_is_refused_where_it_cannot() -> None:
    message = (
        r"^precision\.backend = torch: expected auto or emulated, because a cpu has no block-scaled FP8 products; "
        r"an NVIDIA GPU of compute capability 9\.0 has \(b\.weight\)$"
    )
    with pytest.raises(ValueError, match=message):
        backends.choose(PrecisionConfig(backend="torch"), TABLE, CPU)
    assert backends.choose(PrecisionConfig(backend="auto"), TABLE, CPU) == "emulated"


def test_one_format_that_it_cannot_compute_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch)
    assert backends.choose(PrecisionConfig(backend="torch"), TABLE, CUDA) == "torch"
    other = TABLE | {"e.weight": replace(FP8, input=named("e4m3_1x64"))}
    with pytest.raises(ValueError, match=r"because input is e4m3_1x64, not e4m3_1x128 \(e\.weight\)$"):
        backends.choose(PrecisionConfig(backend="torch"), other, CUDA)
    assert backends.choose(PrecisionConfig(backend="auto"), other, CUDA) == "emulated"


@pytest.mark.parametrize("name", ["torch", "te"])
def test_fp64_is_for_the_emulated_one(monkeypatch: pytest.MonkeyPatch, name: BackEnd) -> None:
    """Whatever the device: tensor cores multiply in fp32 or bf16."""
    refuse(monkeypatch)
    assert backends.choose(PrecisionConfig(backend="auto", dtype="fp64"), TABLE, CUDA) == "emulated"
    message = rf"^precision\.backend = {name}: expected auto or emulated, because its products are in fp32 or bf16"
    with pytest.raises(ValueError, match=message):
        backends.choose(PrecisionConfig(backend=name, dtype="fp64"), TABLE, CUDA)


@pytest.mark.parametrize("backend", ["auto", "emulated", "torch", "te"])
def test_where_no_product_has_a_format_nothing_is_refused(backend: BackEnd) -> None:
    table = {"norm.weight": PLAIN, "a.weight": ONLY_WEIGHTS}
    assert backends.choose(PrecisionConfig(backend=backend), table, CPU) == ("torch" if backend == "auto" else backend)


def test_each_describes_itself_and_has_all_products() -> None:
    lines = {name: backends.describe(name) for name in backends.MODULES}
    assert lines["emulated"] == "emulated"
    assert lines["torch"].startswith("torch: scaled_mm")
    assert lines["te"].startswith("te 2.20.2: ")
    for name in backends.MODULES:
        made = [getattr(backends.products_of(name), kind)(FP8, Watch()) for _, _, kind in SEAMS.values()]
        assert all(map(callable, made))
