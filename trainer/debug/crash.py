"""A crash folder: all that it takes to compute one row of one step again, on this machine or another.

RUN/crashes/step-000123/   rank-00000.safetensors manifest.json COMMIT   as in a checkpoint (trainer/checkpoint.py):
                               model/... the weights at the step's start, row/... its tokens, targets, documents
                           config.yaml     the configuration, secrets taken out
                           trace.json      every tensor of the row's computation: largest value, what is not finite
                           report.md       the same for people
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from data.batch import Batch
from model import names
from model.block import TermScales
from trainer import checkpoint, durable, folder
from trainer.build import Built
from trainer.debug import documents, finding
from trainer.debug.documents import Document
from trainer.debug.fault import Fault
from trainer.debug.finding import Finding
from trainer.debug.trace import Event, trace
from trainer.folder import RunFolder
from trainer.manifest import CheckpointError
from trainer.pieces import whole
from trainer.row import Weights
from trainer.schedule import StepPlan

CONFIG, TRACE, REPORT = "config.yaml", "trace.json", "report.md"
MOST_DOCUMENTS = 3
"""Documents that a line names; the report names all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """A crash folder read back. documents: of the row, in order. first: name of the first tensor not finite, if any."""

    fault: Fault
    documents: tuple[Document, ...]
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]
    first: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What became of a fault: the line that says what is wrong, and the crash folder, None if it was not written."""

    line: str
    path: Path | None
    trouble: str = ""


def keep(built: Built, run: RunFolder, fault: Fault, facts: Mapping[str, Any]) -> Kept:
    """Write the crash folder of a fault, compute its row again and find where it begins.

    A folder of the same step is replaced, so that a run that fails there again and again needs no more disk.
    """
    pieces = _documents(built, fault)
    path, trouble = run.path / "crashes" / f"step-{fault.plan.step + 1:06d}", ""
    try:
        _save(path, built, fault, pieces, facts)
    except (CheckpointError, OSError) as error:
        path, trouble = None, str(error)
    events = trace(built.parts.model, fault.row, fault.plan.attention, fault.weights)
    found = finding.find(events)
    line = _line(built, fault, found, pieces)
    if path is not None:
        first = None if found is None else found.event.name
        content = {"first": first, "events": [asdict(event) for event in events]}
        try:
            durable.write(path / TRACE, json.dumps(content, allow_nan=False).encode())
            durable.write(path / REPORT, "\n".join(report(line, events, found, pieces)).encode())
        except OSError as error:
            path, trouble = None, str(error)
    return Kept(line=line, path=path, trouble=trouble)


def load(path: Path) -> Crash:
    """Read and verify a crash folder; ValueError if it is none or damaged."""
    if not (path / checkpoint.COMMIT).is_file() or not (path / TRACE).is_file():
        raise ValueError(f"--replay = {path}: expected a crash folder, such as RUN/crashes/step-000123")
    try:
        loaded = checkpoint.load(path)
    except CheckpointError as error:
        raise ValueError(f"--replay = {path}: expected a crash folder that verifies ({error})") from error
    state = loaded.state
    if "fault" not in state:
        raise ValueError(f"--replay = {path}: expected a crash folder, this is a checkpoint")
    of = state["fault"]
    row = Batch(**{field.name: loaded.tensors[f"row/{field.name}"] for field in fields(Batch)})
    weights = Weights(**(of["weights"] | {"layers": TermScales(**of["weights"]["layers"])}))
    fault = Fault(index=of["index"], row=row, plan=StepPlan(**of["plan"]), weights=weights, reason=of["reason"])
    first = json.loads((path / TRACE).read_bytes())["first"]
    pieces = tuple(Document(**piece) for piece in state["documents"])
    return Crash(fault=fault, documents=pieces, tensors=loaded.tensors, facts=state["facts"], first=first)


def size_bytes(path: Path) -> int:
    """Bytes of all files of a crash folder."""
    return sum(file.stat().st_size for file in path.iterdir())


def report(line: str, events: list[Event], found: Finding | None, pieces: tuple[Document, ...]) -> list[str]:
    """The lines of report.md: what is wrong, in which documents, and the table of modules."""
    about = affected(found, pieces)
    heading = f"Documents in which the first tensor is not finite ({len(about)} of {len(pieces)} of the row):"
    named = ["", heading, "", *(f"- {document}" for document in about)] if about else []
    return [line, *named, "", *finding.table(events, None if found is None else found.event), ""]


def affected(found: Finding | None, pieces: tuple[Document, ...]) -> list[Document]:
    """The documents that have a token of the finding."""
    tokens = found.tokens if found is not None else ()
    return [document for document in pieces if any(document.first <= token <= document.last for token in tokens)]


def describe(found: Finding | None, pieces: tuple[Document, ...]) -> str:
    """The finding and its first documents in one line."""
    if found is None:
        return "every tensor of the row is finite when it is computed again: the fault did not repeat"
    about = affected(found, pieces)
    if not about:
        return f"first not finite: {found}; in no document alone"
    more = f" and {len(about) - MOST_DOCUMENTS} more" if len(about) > MOST_DOCUMENTS else ""
    return f"first not finite: {found}; in {'; '.join(map(str, about[:MOST_DOCUMENTS]))}{more}"


def _line(built: Built, fault: Fault, found: Finding | None, pieces: tuple[Document, ...]) -> str:
    plan = fault.plan
    before = sum(rows for _, rows in built.plans.segments()[: plan.segment])
    number = before + plan.first_row + fault.index
    source = built.data.train.source_names[int(fault.row.source_B[0])]
    where = f"step {plan.step + 1}, row {fault.index + 1} of {plan.rows} (row {number} of the run, from {source})"
    return f"{where}: {fault.reason}; {describe(found, pieces)}"


def _documents(built: Built, fault: Fault) -> tuple[Document, ...]:
    row = fault.plan.first_row + fault.index
    data = built.data
    return tuple(documents.name(fault.row, data.train, fault.plan.segment, row, data.tokenizer))


def _save(path: Path, built: Built, fault: Fault, pieces: tuple[Document, ...], facts: Mapping[str, Any]) -> None:
    about = {name: getattr(fault, name) for name in ("index", "reason")}
    about |= {"plan": asdict(fault.plan), "weights": asdict(fault.weights)}
    state = {"fault": about, "documents": [asdict(piece) for piece in pieces], "facts": dict(facts)}
    tensors = {f"model/{name}": tensor for name, tensor in names.tensors(built.parts.model).items()}
    tensors |= {f"row/{field.name}": getattr(fault.row, field.name) for field in fields(Batch)}
    if path.exists():
        checkpoint.remove(path)
    checkpoint.save(path.parent, fault.plan.step + 1, whole(tensors), state)
    durable.write(path / CONFIG, folder.config_text(asdict(built.config)).encode())
