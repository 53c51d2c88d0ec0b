"""Proves that a released folder comes back byte by byte, and that what is between is what its codes say.

The folders are made up here and written by safetensors alone; what their codes stand for is decoded by an oracle that
shares no code with ours.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import names
from model.inventory import released_tensors
from model.logical import locate
from tests.model.released import released_config
from tests.trainer import released_folder as made
from trainer import checkpoint
from trainer.pieces import whole
from trainer.precision.elements import E2M1_1X32, E4M3_128X128, Element, Format
from trainer.precision.formats import Coded, decode, rounded
from trainer.reader import Reader
from trainer.released import verbs
from trainer.released.export import quantise
from trainer.released.layout import entries, slabs
from trainer.released.load import load
from trainer.released.source import ReleasedFolder

VARIANTS = ("released", "fp8", "bf16", "fp32")


def silent(line: str) -> None:
    """Says nothing."""


def import_and_export(folder: Path, **options: Any) -> tuple[dict[str, Any], ...]:
    """FOLDER to FOLDER-import to FOLDER-export; the rows of the export's report."""
    between, out = (folder.with_name(f"{folder.name}-{word}") for word in ("import", "export"))
    verbs.import_folder(folder, between, silent)
    return verbs.export_source(verbs.Source(checkpoint=between), out, silent, **options)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_comes_back_byte_by_byte(variant: str, tmp_path: Path) -> None:
    """All codes but NaN, -0 and scales of all sizes among them; blocks cut at the borders."""
    keys = made.config()
    stored = made.tensors(keys, 1, variant=variant, exponents=(1, 240))
    folder = made.write(tmp_path / "in", keys, stored, files=3)
    rows = import_and_export(folder, shard_bytes=200_000)
    out = tmp_path / "in-export"
    assert made.stored_bytes(out) == made.stored_bytes(folder)
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    assert all(row["exact"] for row in rows)
    assert {row.get("scales") for row in rows} == ({"kept", None} if variant in ("released", "fp8") else {None})
    of_import = [json.loads(line) for line in (tmp_path / "in-import" / "report.jsonl").read_text().splitlines()]
    keys_of_bytes = ("name", "shape", "stored", "sha256", "scales_sha256")
    assert [[row.get(key) for key in keys_of_bytes] for row in of_import] == [
        [row.get(key) for key in keys_of_bytes] for row in rows
    ]


@pytest.mark.parametrize(
    ("model", "tensors", "size_bytes"), [("flash", 69_187, 159_609_485_896), ("pro", 145_116, 864_704_792_696)]
)
def test_the_files_of_released_models_have_the_published_sizes(model: str, tensors: int, size_bytes: int) -> None:
    files = [one for spec in released_tensors(released_config(model)) for one in entries(spec, "released")]
    assert (len(files), sum(one.size_bytes for one in files)) == (tensors, size_bytes)


def test_fp8_scales_stored_as_bytes_stay_bytes(tmp_path: Path) -> None:
    """A folder of -Base's kind whose scales are F8_E8M0."""
    keys = made.config()
    stored = made.tensors(keys, 2, variant="fp8")
    stored = {name: t.to(torch.float8_e8m0fnu) if name.endswith(".scale") else t for name, t in stored.items()}
    folder = made.write(tmp_path / "in", keys, stored)
    import_and_export(folder)
    assert made.stored_bytes(tmp_path / "in-export") == made.stored_bytes(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_import_is_what_the_codes_say(variant: str, tmp_path: Path) -> None:
    keys = made.config()
    stored = made.tensors(keys, 3, variant=variant)
    verbs.import_folder(made.write(tmp_path / "in", keys, stored), tmp_path / "import", silent)
    reader = Reader(tmp_path / "import")
    reader.verify()
    for name, expected in made.numbers(stored).items():
        where = locate(name)
        found = where.view(reader.whole(f"model/{where.parameter}"))
        assert found.dtype == (torch.int64 if expected.dtype == torch.int64 else torch.float32)
        assert made.same(found.to(expected.dtype), expected), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_loaded_from_any_folder(variant: str, tmp_path: Path) -> None:
    keys = made.config()
    stored = made.tensors(keys, 4, variant=variant)
    model = names.tensors(load(made.write(tmp_path / "in", keys, stored), torch.float64))
    for name, expected in made.numbers(stored).items():
        where = locate(name)
        assert torch.equal(where.view(model[where.parameter]).detach().to(expected.dtype), expected), name


def test_a_folder_is_loaded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of 128 rows give what one slab gives."""
    keys = made.config()
    folder = made.write(tmp_path / "in", keys, made.tensors(keys))
    whole = names.tensors(load(folder))
    monkeypatch.setattr("trainer.released.layout.SLAB_SIZE", 1)
    parts = names.tensors(load(folder))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = import_and_export(folder)
    assert made.stored_bytes(tmp_path / "in-export") == made.stored_bytes(folder)
    assert all(row["exact"] for row in rows)


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_every_code_comes_back_with_every_scale(element: Element) -> None:
    """All codes but NaN, all scales E8M0 has: what is finite in fp32 keeps its code, both zeros too."""
    codes = torch.tensor([code for code in range(256 if element == "e4m3" else 16) if code & 127 != 127])
    coded = Coded(
        codes=codes.to(torch.uint8).repeat(255, 1),
        exponents=torch.arange(255).to(torch.uint8).unsqueeze(1).expand(-1, len(codes)).contiguous(),
    )
    format = Format(element=element, block=(1, 1), floor=0.0)
    values = decode(coded, format)
    finite = values.isfinite()
    assert finite.float().mean() > 0.98
    again, numbers, kept = quantise(torch.where(finite, values, 0), format, coded.exponents)
    assert torch.equal(again.codes[finite], coded.codes[finite])
    assert torch.equal(numbers[finite].view(torch.int32), values[finite].view(torch.int32))
    assert kept == values.numel()


def test_fresh_scales_give_the_same_numbers(tmp_path: Path) -> None:
    """Without the scales that were kept: numbers as before, but not all codes, which is why they are kept."""
    keys = made.config()
    folder = made.write(tmp_path / "in", keys, made.tensors(keys, 5))
    rows = import_and_export(folder, like=verbs.NONE)
    assert {row["scales"] for row in rows if "scales" in row} == {"fresh"}
    before, after = (ReleasedFolder(tmp_path / name) for name in ("in", "in-export"))
    assert made.stored_bytes(after.path) != made.stored_bytes(folder)
    for spec in before.specs.values():
        if spec.stored == "FP4":
            assert torch.equal(whole_of(before, spec.name), whole_of(after, spec.name)), spec.name


def test_a_block_that_has_changed_gets_a_fresh_scale_and_the_others_keep_theirs(tmp_path: Path) -> None:
    keys = made.config()
    stored = made.tensors(keys, 6)
    folder = made.write(tmp_path / "in", keys, stored)
    verbs.import_folder(folder, tmp_path / "import", silent)
    source = ReleasedFolder(folder)
    changed = {"layers.1.ffn.experts.1.w3.weight": (3, 40), "layers.0.attn.wq_a.weight": (129, 2)}
    values = dict(numbers_of(folder))
    for name, at in changed.items():
        values[name][at] = values[name][at] * 1.01 + 1e-3
    rows = export_values(tmp_path, values, like=folder)
    before, after = made.stored_bytes(folder), made.stored_bytes(tmp_path / "out")
    touched = {f"{name.removesuffix('weight')}{word}" for name in changed for word in ("weight", "scale")}
    assert {name for name in before if before[name] != after[name]} <= touched
    out = ReleasedFolder(tmp_path / "out")
    for name, format in zip(changed, (E2M1_1X32, E4M3_128X128), strict=True):
        (row,) = (row for row in rows if row["name"] == name)
        assert (row["scales"], row["blocks"] - row["kept_blocks"], row["exact"]) == ("mixed", 1, False)
        expected = rounded(values[name], format)
        kept = rounded(whole_of(source, name), format)
        assert torch.equal(whole_of(out, name), expected)
        assert row["largest_error"] == float((expected - values[name]).abs().max())
        assert not torch.equal(expected, kept)


@pytest.mark.parametrize("variant", ["released", "fp32"])
def test_what_fp32_cannot_say_of_an_fp64_run_is_no_exact_export(variant: str, tmp_path: Path) -> None:
    keys = made.config()
    folder = made.write(tmp_path / "in", keys, made.tensors(keys))
    verbs.import_folder(folder, tmp_path / "import", silent)
    values = {name: value if value.dtype == torch.int64 else value.double() for name, value in numbers_of(folder)}
    changed = ("hc_head_base", "layers.0.attn.wq_a.weight", "layers.1.ffn.experts.0.w2.weight")
    for name in changed:
        values[name] = values[name] + 1e-15
    rows = {row["name"]: row for row in export_values(tmp_path, values, like=folder, variant=variant)}
    assert {name for name, row in rows.items() if not row["exact"]} == set(changed)
    assert all(rows[name]["largest_error"] > 0 for name in changed)


def test_tiles_that_fp8_cannot_have_are_counted(tmp_path: Path) -> None:
    """Scales of an FP4 tile within a factor of 2^14 can be cast to FP8, and others not."""
    keys = made.config(moe_intermediate_size=128)
    stored = made.tensors(keys, 7, exponents=(120, 121))
    name = "layers.0.ffn.experts.0.w1"
    for lower, expected in ((14, 0), (15, 1)):
        stored[f"{name}.weight"] = torch.full((128, 80), 0x21, dtype=torch.int8)  # codes 0.5 and 1 in turn
        scale = torch.full((128, 5), 120, dtype=torch.uint8)
        scale[7, 1], scale[8, 2] = 120 + 6, 120 + 6 - lower
        stored[f"{name}.scale"] = scale.view(torch.float8_e8m0fnu)
        stored[f"{name}.weight"][7, 16] = 0x77  # 6, so that the tile's scale follows from this block
        folder = made.write(tmp_path / f"in{lower}", keys, stored)
        (row,) = (row for row in import_and_export(folder) if row["name"] == f"{name}.weight")
        assert (row["tiles"], row["inexact_tiles"]) == (2, expected)


def whole_of(folder: ReleasedFolder, name: str) -> Tensor:
    """All rows of a tensor."""
    return torch.cat([folder.numbers(folder.specs[name], slab) for slab in slabs(folder.specs[name])])


def numbers_of(folder: Path) -> list[tuple[str, Tensor]]:
    """Name and numbers of all tensors."""
    source = ReleasedFolder(folder)
    return [(name, whole_of(source, name)) for name in source.specs]


def export_values(
    tmp_path: Path, values: dict[str, Tensor], *, like: Path, variant: str | None = None
) -> tuple[dict[str, Any], ...]:
    """Export these numbers, from a checkpoint made of them, with the scales of a folder."""
    stacked: dict[str, dict[int | None, Tensor]] = {}
    for name, value in values.items():
        where = locate(name)
        stacked.setdefault(f"model/{where.parameter}", {})[where.index] = value
    tensors = {name: torch.stack(list(of.values())) if None not in of else of[None] for name, of in stacked.items()}
    source = Reader(tmp_path / "import").state
    checkpoint.save(tmp_path / "saved", 0, whole(tensors), source)
    from_values = verbs.Source(checkpoint=tmp_path / "saved" / "step-000000")
    return verbs.export_source(from_values, tmp_path / "out", silent, like=str(like), variant=variant)[0]


def test_an_import_in_another_format_says_the_rate_of_its_hca_layers_to_other_tools(tmp_path: Path) -> None:
    """transformers knows none but 128 by `compress_ratios` alone; in its own format an import keeps its text."""
    keys = made.config()
    import_and_export(made.write(tmp_path / "released", keys, made.tensors(keys)), variant="bf16")
    found = json.loads((tmp_path / "released-export" / "config.json").read_text())
    assert found["compress_rates"] == {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    assert len(found["layer_types"]) == keys["num_hidden_layers"]
    assert found["compress_ratios"] == keys["compress_ratios"]
