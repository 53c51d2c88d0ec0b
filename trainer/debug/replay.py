"""Computing the row of a crash folder again: does it still fail, where, and in another precision?"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from data.batch import Batch
from model import names
from model.logical import logical_tensors
from optim.state import copy_exactly
from trainer import provenance
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.debug import crash
from trainer.debug.finding import find, table
from trainer.debug.trace import trace
from trainer.device import settle
from trainer.parallel.apply import apply_kernels, choose_kernels, describe_kernels
from trainer.precision.serving import serve
from trainer.row import pick
from trainer.step import frozen_groups, train_only


def replay(config: TrainConfig, path: Path, *, as_json: bool = False) -> int:
    """Run the row of a crash folder forwards and backwards and print what passes each module; nothing is changed.

    Returns 0 if the same tensor is the first that is not finite, or if all are finite now; 1 if another one is first.
    Raises ValueError where `config` describes another model, or the folder is no crash folder or damaged.
    """
    found = crash.load(path)
    device = settle(config)
    kernels = choose_kernels(config, device)
    model = build_model(config, device)
    apply_kernels(model, kernels)
    mine = names.tensors(model)
    copy_exactly(mine, _in_types_of(mine, found.tensors), "model")
    fault = found.fault
    groups: dict[str, str] = {one.parameter: one.group for one in logical_tensors(config.model)}
    train_only(model, groups, frozen_groups(fault.plan.attention, groups))
    serve(model, config.precision, fault.plan.tokens)
    row: Batch = pick(fault.row, 0, device)
    events = trace(model, row, fault.plan.attention, fault.weights)
    now = find(events)
    name = None if now is None else now.event.name
    reproduced = name is not None and name == found.first
    if as_json:
        print(json.dumps({"first": name, "reproduced": reproduced, "events": [asdict(event) for event in events]}))
    else:
        facts = provenance.facts(device=str(device), dtype=config.precision.dtype, kernels=describe_kernels(kernels))
        _say(path, config, found, facts)
        print("\n".join(table(events, None if now is None else now.event)), end="\n\n")
        print(_verdict(name, found.first))
        print(crash.describe(now, found.documents))
    return 0 if reproduced or now is None else 1


def _say(path: Path, config: TrainConfig, found: crash.Crash, now: Mapping[str, Any]) -> None:
    fault = found.fault
    where = f"step {fault.plan.step + 1}, row {fault.index + 1} of {fault.plan.rows}, {fault.plan.attention} attention"
    print(f"{path}: {where}, now in {config.precision.dtype} on {now['device']}")
    print(f"then: {fault.reason}; first not finite: {found.first or 'nothing when computed again'}")
    for difference in provenance.compare(found.facts, now):
        print(f"another machine or setting: {difference}")
    print()


def _verdict(name: str | None, before: str | None) -> str:
    if name is None:
        return "finite now: the fault does not repeat here"
    if name == before:
        return "reproduced: the same tensor is the first that is not finite"
    return f"not finite, but first in another tensor: {name}, not {before or 'none'}"


def _in_types_of(mine: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored weights in the types of the model; ValueError where they are of another model."""
    prefix = "model/"
    found = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    differing = {name: tensor.shape for name, tensor in mine.items()}.items() ^ shapes.items()
    if differing:
        name = min(name for name, _ in differing)
        raise ValueError(f"model = {name}: expected the sizes of the crash, which no override may change")
    return {name: tensor.to(mine[name].dtype) for name, tensor in found.items()}
