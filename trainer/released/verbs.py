"""What `keel import` and `keel export` do, and the few lines they end with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.folder import RunFolder
from trainer.manifest import COMMIT, CheckpointError
from trainer.reader import Reader, read_manifest
from trainer.released import imported, job
from trainer.released.export import SHARD_BYTES, Export, of_experts, run_export
from trainer.released.keys import first_difference
from trainer.released.layout import VARIANTS, Variant
from trainer.released.source import FORMATS, ReleasedFolder
from trainer.released.weights import Imported, Weights, find_kept
from trainer.sample import open_checkpoint

NONE = "none"
Result = tuple[tuple[job.Row, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is to be exported: a run, at a step or its newest, or a checkpoint or import by its folder."""

    run: Path | None = None
    checkpoint: Path | None = None
    config: TrainConfig | None = None
    step: int | None = None


def import_folder(path: Path, out: Path, say: job.Say) -> Result:
    """Import the released folder at `path`; the rows of the report and a summary."""
    folder = ReleasedFolder(path)
    rows = imported.run_import(folder, out, say, imported.FILE_BYTES)
    return rows, {
        "imported": str(out),
        "format": folder.variant,
        "tensors": len(rows),
        "parameters": sum(spec.size for spec in folder.specs.values() if spec.kind != "buffer"),
        "bytes": sum(row["bytes"] for row in rows),
        "a run begins at it": f"./keel train init.weights={out}",
    }


def export_source(
    source: Source,
    out: Path,
    say: job.Say,
    *,
    variant: str | None = None,
    like: str | None = None,
    shard_bytes: int | None = None,
) -> Result:
    """Export; the rows of the report and a summary. like: a folder, "none", or None: what the source came from."""
    if shard_bytes is not None and shard_bytes <= 0:
        raise ValueError(f"--shard-bytes = {shard_bytes}: expected a positive number")
    try:
        reader = _open(source)
        export = _export(reader, source.config, variant, like)
        rows = run_export(export, out, say, SHARD_BYTES if shard_bytes is None else shard_bytes)
    except CheckpointError as error:
        where = source.checkpoint or source.run
        raise ValueError(f"SOURCE = {where}: expected weights that verify: {error}") from error
    return rows, _summary(export, out, rows) | {"step": reader.step}


def _open(source: Source) -> Reader:
    if source.run is not None:
        return open_checkpoint(RunFolder(source.run), source.step)
    assert source.checkpoint is not None
    return Reader(source.checkpoint)


def _export(reader: Reader, config: TrainConfig | None, variant: str | None, like: str | None) -> Export:
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"--format = {variant}: expected one of {', '.join(VARIANTS)}")
    is_import = imported.KIND in reader.state
    if config is None and not is_import:
        raise ValueError(f"SOURCE = {reader.path}: expected a run, a checkpoint inside its run, or an import")
    own = Imported(reader) if is_import else None
    kept = own if like is None else None
    if like is None and config is not None and not is_import and config.init.weights:
        kept = _began_at(config.init.weights)
    elif like not in (None, NONE):
        kept = find_kept(Path(like))
    model = own.config if own is not None else config.model if config is not None else None
    assert model is not None
    if kept is not None and (key := first_difference(model, kept.config)) is not None:
        theirs = getattr(kept.config, key)
        raise ValueError(f"--like: {key} = {theirs}: expected {getattr(model, key)}, as the exported model has it")
    formats = dict(FORMATS)
    if config is not None and not is_import:
        found = {kind: config.precision.format(one.name) for kind, one in FORMATS.items()}
        formats = {kind: one for kind, one in found.items() if one is not None}
    chosen: Variant = next((one for one in VARIANTS if one == variant), own.variant if own is not None else "released")
    were_fp4 = own is not None and own.variant == "released"
    experts = of_experts(formats, were_fp4=were_fp4)
    return Export(
        weights=Weights(reader, model), config=model, variant=chosen, like=kept, formats=formats, experts=experts
    )


def _began_at(path: str) -> Imported | ReleasedFolder | None:
    """The import that a run began at; None where that was another run's checkpoint, which keeps no scales."""
    folder = Path(path)
    if not (folder / COMMIT).is_file():
        expected = "the folder that the run began at, whose scales are kept; or --like FOLDER, or --like none"
        raise ValueError(f"init.weights = {path}: expected {expected}")
    return find_kept(folder) if imported.KIND in read_manifest(folder).state else None


def _summary(export: Export, out: Path, rows: tuple[job.Row, ...]) -> dict[str, Any]:
    scaled = [row for row in rows if "scales" in row]
    worst = max(rows, key=lambda row: row["largest_error"])
    found: dict[str, Any] = {
        "exported": str(out),
        "format": export.variant,
        "tensors": len(rows),
        "bytes": sum(row["bytes"] for row in rows),
        "exact": sum(row["exact"] for row in rows),
        "largest error": worst["largest_error"],
    }
    if worst["largest_error"]:
        found["of"] = worst["name"]
    if scaled:
        names = {"scales kept": "kept", "scales fresh": "fresh", "scales kept in part": "mixed"}
        found |= {said: sum(row["scales"] == how for row in scaled) for said, how in names.items()}
    if any("tiles" in row for row in rows):
        found["tiles that FP8 cannot have"] = sum(row.get("inexact_tiles", 0) for row in rows)
    return found
