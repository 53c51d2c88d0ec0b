"""From torch's profiler to two short answers: which operations took the time, and what took the memory."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._C._profiler import _EventType

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


def alive(named: Mapping[str, Tensor], profile: Any) -> list[dict[str, Any]]:
    """The largest storages at the end: those of `named`, by name, and what the profile saw allocated and never freed.

    Not by asking the interpreter for all objects: it would show, and hold for a moment, what other threads are making.
    """
    storages = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in named.items()}
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "bytes": tensor.untyped_storage().nbytes(),
            "shape": "x".join(map(str, tensor.shape)),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        for name, tensor in storages.values()
    ]
    left = _never_freed(profile.profiler.kineto_results.experimental_event_tree())
    found += [
        {"name": None, "bytes": num_bytes, "allocated_by": operation}
        for place, (num_bytes, operation) in left.items()
        if place not in storages
    ]
    found.sort(key=lambda entry: (-entry["bytes"], entry["name"] or "", entry.get("allocated_by", "")))
    return found[:LARGEST]


def _never_freed(roots: Sequence[Any]) -> dict[int, tuple[int, str]]:
    """Bytes and operation by address, of what was allocated within the profile and not freed in it."""
    changes: list[tuple[int, Any, str]] = []
    stack = [(event, "") for event in roots]
    while stack:
        event, operation = stack.pop()
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields, operation))
        stack += [(child, event.name) for child in event.children]
    left: dict[int, tuple[int, str]] = {}
    for _, change, operation in sorted(changes, key=lambda change: change[0]):
        if change.alloc_size > 0:
            left[change.ptr] = (change.alloc_size, operation)
        else:
            left.pop(change.ptr, None)
    return left


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
