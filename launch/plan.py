"""`keel plan`: what a run will be, without starting it: parameters, schedule, FLOP, ranks, memory, decoding."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import arguments, draw, plan_decoding, plan_parallel, plan_pipe

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.parallel.simulate import Profile
    from trainer.plan import Plan, Stage

HELP = "print parameters, FLOP, schedule, ranks, memory, traffic and decoding of a run without starting it"
USAGE = f"""
keel plan [--json] [--draw FILE.svg] [--times FILE.json] [KEY=VALUE ...]

{HELP}.

  --json           the same numbers, exact, for programs
  --draw FILE.svg  also draw the schedule of the pipeline (parallel.pipe above 1), played through by FLOP
  --times FILE.json
                   play it through by these times instead: {{"forward": [...], "backward": [...], "transfer": T}},
                   seconds of a row in each chunk, and of its streams from one rank to the next
  KEY=VALUE        overrides, e.g. recipe=flash, model=small (keel config show lists all keys)
"""
Row = Sequence[str]


def main(argv: list[str]) -> int:
    """Compose a configuration and print its plan."""
    given = arguments.parse(argv, {"--json": bool, "--draw": str, "--times": str}, USAGE)
    from launch.compose import compose
    from trainer.plan import plan

    config = compose(given.words).config
    times, drawing = given.flags["--times"], given.flags["--draw"]
    measured = None if times is None else plan_pipe.read_times(times, config.parallel)
    planned = plan(config, measured)
    if drawing is not None:
        _draw(config, planned, measured, Path(drawing))
    print(json.dumps(as_json(planned), indent=2) if given.flags["--json"] else render(planned))
    return 0


def _draw(config: "TrainConfig", plan: "Plan", measured: "Profile | None", path: Path) -> None:
    """The last step of the stage that has the most FLOP; of many rows some, for the middle repeats itself."""
    if plan.layout.pipeline is None:
        raise ValueError(f"--draw = {path}: expected a pipeline, parallel.pipe above 1")
    from trainer.plan_pipe import play

    stage = busiest(plan)
    step, rows = plan.stages[stage].last, plan.layout.pipeline.played[stage].rows
    drawn = min(rows, draw.ROWS_PER_RANK * config.parallel.pipe)
    of_rows = f"{rows} rows" if drawn == rows else f"{drawn} of {rows} rows"
    picture = draw.svg(
        play(config, step, drawn, measured), f"{plan.name}, {config.parallel.schedule}: {of_rows} on each column"
    )
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--draw = {path}: expected a file that can be written ({error.strerror})") from None


def busiest(plan: "Plan") -> int:
    """The stage of the schedule that has the most FLOP."""
    return max(range(len(plan.stages)), key=lambda stage: plan.stages[stage].flops)


def as_json(plan: "Plan") -> dict[str, Any]:
    """All numbers of a plan as plain values, integers exact."""
    counts, memory = plan.counts, plan.layout.largest.memory
    totals = {name: getattr(counts, name) for name in ("total_main", "total_mtp", "total", "total_active")}
    return {
        "name": plan.name,
        "dtype": plan.dtype,
        "precision": plan.precision.splitlines(),
        "parameters": asdict(counts) | totals,
        "release": asdict(plan.release),
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "rule_of_thumb_flops": plan.rule_of_thumb_flops,
        "stages": [_stage_json(stage) for stage in plan.stages],
        "memory_bytes": memory.parts() | {"total": memory.total},
        "layout": plan_parallel.as_json(plan.layout),
        "decoding": [plan_decoding.as_json(one) for one in plan.decoding],
    }


def render(plan: "Plan") -> str:
    """The plan as text, one table per question."""
    blocks = [_parameters(plan), _schedule(plan), _flops(plan), *_layout(plan), _decoding(plan)]
    precision = [f"precision\n{plan.precision}"] if plan.precision else []
    return "\n\n".join([f"plan of {plan.name}", *("\n".join(block) for block in blocks), *precision])


def _stage_json(stage: "Stage") -> dict[str, Any]:
    first, last = stage.first, stage.last
    return {
        "first_step": first.step,
        "steps": stage.steps,
        "from_tokens": first.tokens,
        "tokens": stage.tokens,
        "row_length": first.row_length,
        "rows": [first.rows, last.rows],
        "rate": [first.rate, last.rate],
        "attention": first.attention,
        "mtp_weight": first.mtp_weight,
        "flops": stage.flops,
        "flops_per_token": stage.row_flops.per_token,
        "row_flops": {"main": stage.row_flops.main, "mtp": stage.row_flops.mtp},
    }


def _parameters(plan: "Plan") -> list[str]:
    counts = plan.counts
    rows: list[Row] = [("parameters", "main model", "MTP block", "active per token")]
    columns = (counts.main, counts.mtp, counts.active)
    for part in dict.fromkeys([*counts.main, *counts.mtp]):
        rows.append((part, *(f"{column[part]:,}" if part in column else "" for column in columns)))
    totals = (counts.total_main, counts.total_mtp, counts.total_active)
    rows.append(("total", *(f"{total:,}" for total in totals)))
    rows.append(("", *(_rounded(total).replace("G", "B") for total in totals)))
    release = plan.release
    return [
        *_table(rows),
        f"active: no embedding, with the head; the chosen experts and the shared one. "
        f"Without gradient: {counts.buffers:,} numbers.",
        f"released format: {release.tensors:,} tensors, {release.size_bytes:,} bytes",
    ]


def _schedule(plan: "Plan") -> list[str]:
    rows: list[Row] = [
        ("schedule", "from step", "steps", "tokens", "row length", "rows", "attention", "rate", "MTP weight")
    ]
    for number, stage in enumerate(plan.stages, 1):
        first, last = stage.first, stage.last
        sizes = (f"{first.step:,}", f"{stage.steps:,}", _short(stage.tokens), f"{first.row_length:,}")
        changing = (_range(first.rows, last.rows), first.attention, _range(first.rate, last.rate))
        rows.append((f"stage {number}", *sizes, *changing, f"{first.mtp_weight:g}"))
    rows.append(("total", "", f"{plan.steps:,}", _short(plan.tokens)))
    return _table(rows)


def _flops(plan: "Plan") -> list[str]:
    flops = [stage.row_flops for stage in plan.stages]
    size, name = (1e9, "GFLOP") if max(row.per_token for row in flops) >= 1e9 else (1e6, "MFLOP")
    rows: list[Row] = [(f"{name} per token", *(f"stage {number}" for number in range(1, len(flops) + 1)))]
    for prefix, branches in (("", [row.main for row in flops]), ("MTP ", [row.mtp for row in flops])):
        for part in dict.fromkeys(part for branch in branches for part in branch):
            per_token = [branch.get(part, 0) / row.row_length for branch, row in zip(branches, flops, strict=True)]
            rows.append((prefix + part.removeprefix("mtp_"), *(f"{value / size:.3f}" for value in per_token)))
    rows.append(("total", *(f"{row.per_token / size:.3f}" for row in flops)))
    rows.append(("FLOP of the stage", *(f"{stage.flops:.3g}" for stage in plan.stages)))
    return [
        *_table(rows),
        "forward and backward; a row is one document; recomputation and elementwise work not counted",
        f"whole run: {plan.flops:.4g} FLOP; by the rule of thumb, 6 x active x tokens: {plan.rule_of_thumb_flops:.4g}",
    ]


def _layout(plan: "Plan") -> list[list[str]]:
    """Mesh, memory and traffic; ranks only where there are several."""
    layout, several = plan.layout, plan.layout.mesh.size > 1
    memory = _table(plan_parallel.memory(layout, plan.dtype))
    memory[0] += f"  in stage {layout.dearest + 1}" if len(plan.stages) > 1 else ""
    blocks = [plan_parallel.mesh(layout)] if several else []
    blocks += [_table(plan_parallel.ranks(layout))] if several else []
    blocks += [[*memory, *plan_parallel.MEMORY_NOTES], _table(plan_parallel.activations(layout))]
    if layout.pipeline is not None:
        table = _table(plan_pipe.ranks(layout.pipeline, busiest(plan)))
        table[0] += f"  in stage {busiest(plan) + 1}" if len(plan.stages) > 1 else ""
        blocks += [[*table, *plan_pipe.notes(layout.pipeline)], _table(plan_pipe.bubbles(layout.pipeline))]
    traffic = plan_parallel.traffic(layout)
    return [*blocks, [*_table(traffic), *plan_parallel.TRAFFIC_NOTES]] if traffic else blocks


def _decoding(plan: "Plan") -> list[str]:
    return [*_table(plan_decoding.rows(plan.decoding, plan.dtype)), *plan_decoding.NOTES]


def _table(rows: Sequence[Row]) -> list[str]:
    """Lines of aligned columns, the first to the left, the others to the right; short rows end early."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    return [_line(row, widths) for row in rows]


def _line(row: Row, widths: Sequence[int]) -> str:
    others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
    return "  ".join([row[0].ljust(widths[0]), *others]).rstrip()


def _range(first: float, last: float) -> str:
    """A value at a stage's first and last step, or once if it reads the same."""
    ends = [f"{end:,}" if isinstance(end, int) else f"{end:.3g}" for end in (first, last)]
    return " to ".join(dict.fromkeys(ends))


def _rounded(number: int) -> str:
    """Billions or millions with two digits."""
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _short(tokens: int) -> str:
    """A number of tokens with its usual letter, four digits."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if tokens >= size:
            return f"{tokens / size:.4g} {letter}"
    return str(tokens)
