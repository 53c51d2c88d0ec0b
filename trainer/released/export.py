"""From a checkpoint or an import to a folder in the released layout: codes, scales, bf16, or plain fp32.

Each block keeps the scale it was once stored by where its numbers are still what that scale's codes say, bit by bit;
other blocks get a fresh one. So what training has not touched comes back byte by byte: a fresh scale would give the
same numbers, but not always the same codes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.inventory import FileTensor, TensorSpec
from trainer import durable
from trainer.precision.elements import E4M3_128X128, E4M3_OF_FP4, Format
from trainer.precision.formats import Coded, block_amax, decode, encode_at, exponents, pack, scales
from trainer.precision.qat import inexact_tiles
from trainer.released import job
from trainer.released.imported import write_report
from trainer.released.keys import config_text
from trainer.released.layout import QUANTISED, ScaleType, Variant, entries, stored
from trainer.released.source import CONFIG, FORMATS, INDEX, TYPES
from trainer.released.stream import Entry, Stream
from trainer.released.weights import Kept, Weights

SHARD_BYTES = 5 * 10**9
"""Most bytes of a file (ours, and what other tools take)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What is to be written. like: whose scales are kept, and the config.json that comes with them.

    formats: of fresh scales, by the type of the tensor; `experts`: of experts in FP8.
    """

    weights: Weights
    config: ModelConfig
    variant: Variant
    like: Kept | None = None
    formats: Mapping[str, Format] = field(default_factory=lambda: FORMATS)
    experts: Format = E4M3_128X128

    def format(self, spec: TensorSpec) -> Format:
        """The format of a quantised tensor."""
        kind = stored(spec, self.variant)
        return self.experts if kind == "F8_E4M3" and spec.stored == "FP4" else self.formats[kind]

    def keeps(self, spec: TensorSpec) -> bool:
        """Whether there are scales of this tensor, of its format."""
        return self.like is not None and stored(spec, self.like.variant) == stored(spec, self.variant)

    def scale_type(self, spec: TensorSpec) -> ScaleType | None:
        """What its scales are stored as, as before; None: as is usual."""
        same = self.like is not None and self.like.variant == self.variant and stored(spec, self.variant) in QUANTISED
        return self.like.scale_type(spec) if same and self.like is not None else None


def run_export(export: Export, out: Path, say: job.Say, shard_bytes: int = SHARD_BYTES) -> tuple[job.Row, ...]:
    """Write `out` and return the rows of the report; goes on where it was broken off. Raises ValueError.

    In memory at a time: an expert, or a slab of another tensor, in fp32, and what its conversion takes.
    """
    items = [_item(export, spec) for spec in export.weights.specs]
    shared = job.share_out(items, shard_bytes)
    files = {f"model-{number:05d}-of-{len(shared):05d}.safetensors": part for number, part in enumerate(shared, 1)}
    what = {
        "export": export.weights.fingerprint,
        "format": export.variant,
        "like": export.like.fingerprint if export.like is not None else "",
        "formats": [str(one) for one in (*export.formats.values(), export.experts)],
        "shard_bytes": shard_bytes,
    }
    like = (export.like.text, export.like.variant) if export.like is not None else None

    def finish(working: Path, done: job.Done) -> None:
        where = {name: file.name for file in done.files for name in file.tensors}
        total = sum(one.stop - one.start for file in done.files for one in file.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        durable.write(working / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        durable.write(working / CONFIG, config_text(export.config, export.variant, like).encode())
        write_report(working, done)

    return job.make(out, what, files, finish, say).rows


def _item(export: Export, spec: TensorSpec) -> job.Item:
    files = entries(spec, export.variant, export.scale_type(spec))
    write = _write_quantised if len(files) == 2 else _write_plain
    return job.Item(
        entries=tuple(
            Entry(name=one.name, dtype=one.dtype, shape=one.shape, element_bytes=one.element_bytes) for one in files
        ),
        write=lambda stream: write(export, spec, files, stream),
    )


def _write_plain(export: Export, spec: TensorSpec, files: Sequence[FileTensor], stream: Stream) -> job.Row:
    error = 0.0
    dtype = TYPES[files[0].dtype]
    for _, numbers in export.weights.slabs(spec):
        rounded = numbers if dtype == torch.int64 else numbers.float().to(dtype)
        error = max(error, _largest(spec, rounded.to(numbers.dtype), numbers))
        stream.append(spec.name, rounded)
    return _row(spec, files, error)


def _write_quantised(export: Export, spec: TensorSpec, files: Sequence[FileTensor], stream: Stream) -> job.Row:
    format, kind = export.format(spec), stored(spec, export.variant)
    error, blocks, kept_blocks, tiles, inexact = 0.0, 0, 0, 0, 0
    for slab, numbers in export.weights.slabs(spec):
        kept = export.like.exponents(spec, slab) if export.like is not None and export.keeps(spec) else None
        coded, values, stays = quantise(numbers.float(), format, kept)
        error = max(error, _largest(spec, values, numbers))
        blocks, kept_blocks = blocks + coded.exponents.numel(), kept_blocks + stays
        if kind == "FP4":
            tiles += exponents(values, E4M3_OF_FP4).numel()
            inexact += inexact_tiles(values)
        stream.append(files[0].name, pack(coded.codes) if kind == "FP4" else coded.codes)
        stream.append(files[1].name, scales(coded.exponents) if files[1].dtype == "F32" else coded.exponents)
    how = "fresh" if not kept_blocks else "kept" if kept_blocks == blocks else "mixed"
    row = _row(spec, files, error) | {"scales": how, "blocks": blocks, "kept_blocks": kept_blocks}
    return row | ({"tiles": tiles, "inexact_tiles": inexact} if kind == "FP4" else {})


def quantise(x: Tensor, format: Format, kept: Tensor | None) -> tuple[Coded, Tensor, int]:
    """Codes of x [rows, columns], the numbers they stand for, and how many blocks have the scale they had.

    kept: by block, the scale it had, used where the block's numbers are bit by bit what its codes can say.
    """
    fresh, stays = exponents(x, format), 0
    if kept is not None:
        coded = encode_at(x, format, kept)
        values = decode(coded, format)
        same = block_amax((values.view(torch.int32) != x.view(torch.int32)).float(), format.block) == 0
        stays = int(same.sum())
        if stays == same.numel():
            return coded, values, stays
        fresh = torch.where(same, kept, fresh)
    coded = encode_at(x, format, fresh)
    return coded, decode(coded, format), stays


def of_experts(formats: Mapping[str, Format], *, were_fp4: bool) -> Format:
    """The FP8 format of experts: without a floor where they were FP4, of which the small ones would else be lost."""
    return replace(formats["F8_E4M3"], floor=0.0) if were_fp4 else formats["F8_E4M3"]


def _row(spec: TensorSpec, files: Sequence[FileTensor], error: float) -> job.Row:
    row = {"name": spec.name, "shape": list(spec.shape), "stored": files[0].dtype}
    return row | {"exact": error == 0, "largest_error": error}


def _largest(spec: TensorSpec, values: Tensor, numbers: Tensor) -> float:
    if not values.isfinite().all():
        largest = numbers.abs().max().item()
        raise ValueError(f"{spec.name} = {largest}: expected numbers that its format can say")
    return float((values - numbers).abs().max())
