"""Deliberate mistakes in reading and writing released folders: the checks that a right folder passes must see each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.logical import Location, locate
from tests.trainer import released_folder as made
from tests.trainer.test_released import silent
from trainer.precision.formats import Coded
from trainer.reader import Reader
from trainer.released import export, imported, layout, source, verbs, weights

Patch = pytest.MonkeyPatch


def holds(folder: Path) -> bool:
    """Whether an import of the folder has the numbers that its codes say, and its export the folder's bytes."""
    between, out = folder.with_name("import"), folder.with_name("out")
    try:
        verbs.import_folder(folder, between, silent)
        reader = Reader(between)
        for name, expected in made.numbers(made.tensors(made.config())).items():
            where = locate(name)
            found = where.view(reader.whole(f"model/{where.parameter}"))
            if not made.same(found.to(expected.dtype), expected):
                return False
        verbs.export_source(verbs.Source(checkpoint=between), out, silent)
    except (ValueError, RuntimeError):
        return False
    return made.stored_bytes(out) == made.stored_bytes(folder)


def other_nibbles(packed: Tensor) -> Tensor:
    packed = packed.view(torch.uint8)
    return packed >> 4 | (packed & 15) << 4


def nibbles_swapped_in_reading(patch: Patch) -> None:
    unpack = source.unpack
    patch.setattr(source, "unpack", lambda packed, columns: unpack(other_nibbles(packed), columns))


def nibbles_swapped_in_writing(patch: Patch) -> None:
    pack = export.pack
    patch.setattr(export, "pack", lambda codes: other_nibbles(pack(codes)))


def nibbles_swapped_both_times(patch: Patch) -> None:
    nibbles_swapped_in_reading(patch)
    nibbles_swapped_in_writing(patch)


def scale_of_the_next_column(patch: Patch) -> None:
    decode = source.decode

    def wrong(coded: Coded, format: Any) -> Tensor:
        return decode(Coded(codes=coded.codes, exponents=coded.exponents.roll(1, -1)), format)

    patch.setattr(source, "decode", wrong)


def scale_of_the_next_row(patch: Patch) -> None:
    found = weights.Imported.exponents
    patch.setattr(weights.Imported, "exponents", lambda self, spec, slab: found(self, spec, slab).roll(1, 0))


def scales_of_the_first_rows(patch: Patch) -> None:
    """Every slab gets the scales of the first."""
    patch.setattr(layout, "SLAB_SIZE", 1)
    found = source.ReleasedFolder.exponents

    def wrong(self: Any, spec: Any, slab: layout.Slab) -> Tensor:
        return found(self, spec, layout.Slab(start=0, stop=slab.stop - slab.start))

    patch.setattr(source.ReleasedFolder, "exponents", wrong)


def scale_twice_as_large(patch: Patch) -> None:
    found = source.ReleasedFolder.exponents
    patch.setattr(source.ReleasedFolder, "exponents", lambda self, spec, slab: found(self, spec, slab) + 1)


def another_expert_kind(patch: Patch, module: Any) -> None:
    def swapped(name: str) -> Location:
        last, parts = {"w1": "w3", "w3": "w1"}, name.split(".")
        if "experts" in parts and parts[-2] in last:
            parts[-2] = last[parts[-2]]
        return locate(".".join(parts))

    patch.setattr(module, "locate", swapped)


def w1_and_w3_exchanged_in_reading(patch: Patch) -> None:
    another_expert_kind(patch, imported)


def w1_and_w3_exchanged_in_writing(patch: Patch) -> None:
    another_expert_kind(patch, weights)


def w1_and_w3_exchanged_both_times(patch: Patch) -> None:
    another_expert_kind(patch, imported)
    another_expert_kind(patch, weights)


def experts_one_further(patch: Patch) -> None:
    """Expert 0 is stored where expert 1 belongs, and the last where the first does."""

    def moved(name: str) -> Location:
        where = locate(name)
        experts = made.config()["n_routed_experts"]
        return where if where.index is None else Location(parameter=where.parameter, index=(where.index + 1) % experts)

    patch.setattr(imported, "locate", moved)
    patch.setattr(weights, "locate", moved)


def transposed(patch: Patch) -> None:
    """Square matrices, of which the shape does not tell."""
    found = source.ReleasedFolder.numbers

    def wrong(self: Any, spec: Any, slab: layout.Slab, raw: Any = None) -> Tensor:
        numbers = found(self, spec, slab, raw)
        return numbers.T if len(spec.shape) == 2 and numbers.shape[0] == numbers.shape[1] else numbers

    patch.setattr(source.ReleasedFolder, "numbers", wrong)


def negative_zero_lost(patch: Patch) -> None:
    found = source.ReleasedFolder.numbers
    patch.setattr(source.ReleasedFolder, "numbers", lambda *words: found(*words) + 0)


def fresh_scales(patch: Patch) -> None:
    patch.setattr(export.Export, "keeps", lambda self, spec: False)


def equal_is_enough(patch: Patch) -> None:
    """Blocks keep their scale where numbers are close, not the same."""
    quantise = export.quantise

    def wrong(x: Tensor, format: Any, kept: Tensor | None) -> Any:
        coded, values, _ = quantise(x, format, None)
        return (coded, values, 0) if kept is None else (Coded(codes=coded.codes, exponents=kept), values, kept.numel())

    patch.setattr(export, "quantise", wrong)


MISTAKES: list[Callable[[Patch], None]] = [
    nibbles_swapped_in_reading,
    nibbles_swapped_in_writing,
    nibbles_swapped_both_times,
    scale_of_the_next_column,
    scale_of_the_next_row,
    scales_of_the_first_rows,
    scale_twice_as_large,
    w1_and_w3_exchanged_in_reading,
    w1_and_w3_exchanged_in_writing,
    w1_and_w3_exchanged_both_times,
    experts_one_further,
    transposed,
    negative_zero_lost,
    fresh_scales,
    equal_is_enough,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made.write(tmp_path / "in", made.config(), made.tensors(made.config()))


def test_a_right_folder_passes(folder: Path) -> None:
    assert holds(folder)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(mistake: Callable[[Patch], None], folder: Path, monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    assert not holds(folder)
