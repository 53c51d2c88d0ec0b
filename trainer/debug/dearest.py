"""From torch's profiler to two short answers: which operations took the time, and what took the memory."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

OPERATIONS = 10
"""Rows of the table of operations."""
LARGEST = 50
"""Rows of each list in memory.json."""


def operations(profile: Any) -> list[Any]:
    """One entry per operation and shapes of its inputs, from a profile that has ended; slow, so ask once."""
    collected = gc.isenabled()
    gc.disable()  # torch makes millions of objects here and frees none: collecting garbage took most of the time
    try:
        events = profile.key_averages(group_by_input_shape=True)
    finally:
        if collected:
            gc.enable()
    return [event for event in events if not event.is_user_annotation and event.key != "[memory]"]


def table(found: Sequence[Any], title: str, seconds: float, *, cuda: bool) -> list[str]:
    """Markdown: of `operations`, those with the most time of their own, that is without the operations they call.

    seconds: the whole time profiled, of which the shares are.
    """
    ordered = sorted(((_self_s(event, cuda), event) for event in found), key=lambda item: (-item[0], item[1].key))
    total = sum(self_s for self_s, _ in ordered)
    where = "on the GPU" if cuda else "in one thread"
    lines = [
        f"# {title}: {seconds:.2f} s, of which operations {total:.2f} s {where}; the profiler's own cost is in them",
        "",
        "| operation | shapes of its inputs | calls | self time ms | share |",
        "|---|---|---|---|---|",
    ]
    for self_s, event in ordered[:OPERATIONS]:
        share = f"{self_s / seconds:.1%}"
        lines.append(f"| {event.key} | {_shapes(event)} | {event.count} | {self_s * 1e3:.1f} | {share} |")
    return lines


def memory(profile: Any, found: Sequence[Any]) -> dict[str, Any]:
    """Bytes on a CPU: how far memory rose, and which of `operations` allocated most."""
    allocated = [
        {
            "operation": event.key,
            "input_shapes": _shapes(event),
            "calls": event.count,
            "bytes": event.self_cpu_memory_usage,
        }
        for event in found
        if event.self_cpu_memory_usage > 0
    ]
    allocated.sort(key=lambda entry: (-entry["bytes"], entry["operation"]))
    return {
        "largest_rise_bytes": _rise(profile.profiler.kineto_results.events()),
        "allocated_by_operation": allocated[:LARGEST],
    }


def alive(named: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The largest tensors of this process, each storage once. named: those that have a name; others have a shape."""
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in named.items()}
    views: dict[int, Tensor] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.layout is torch.strided and not thing.is_meta:
            place = thing.untyped_storage().data_ptr()
            if place not in views or views[place].numel() < thing.numel():
                views[place] = thing
    found = [
        {
            "name": names.get(place),
            "bytes": view.untyped_storage().nbytes(),
            "shape": "x".join(map(str, view.shape)),
            "dtype": str(view.dtype).removeprefix("torch."),
        }
        for place, view in views.items()
    ]
    found.sort(key=lambda entry: (-entry["bytes"], entry["name"] or "", entry["shape"]))
    return found[:LARGEST]


def _shapes(event: Any) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)


def _self_s(event: Any, cuda: bool) -> float:
    return (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6


def _rise(events: Sequence[Any]) -> int:
    """The most bytes that were allocated at a time on top of those at the beginning."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, num_bytes in changes:
        now += num_bytes
        most = max(most, now)
    return most
