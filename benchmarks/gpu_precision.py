"""What do FP8 and FP4 gain on one GPU, and what do they cost in loss?

    python -m benchmarks.gpu_precision [--device cuda|cpu] [--quick] [--repetitions N] [--only products steps losses]

First the chip's ceilings and which back ends can compute here. Then three tables, all in one run:

- linear maps and experts at V4-Flash's sizes, 4096 tokens: the rate of the product forwards with codes that are there,
  then milliseconds of the map forwards and backwards, its casts in it, and both as multiples of bf16's speed. "apart":
  |y - emulated| / |emulated|. Aim: products at least 1.5 times bf16;
- a step of the slice of `benchmarks.gpu_step`, one row of 4096 tokens, by recipe and back end, with kernels; codes of
  weights are there, as after the first row of an optimizer step. Aim: 1.3 times bf16;
- losses: the debug recipe on the standard library's sources, the same data and initial weights, by recipe: the mean of
  the last tenth of steps and of the held-out loss at the end, and the gap to bf16. Seed noise is not in it.

A back end that refuses says why; what fails is named with its error, the rest goes on, and the exit code is 1.
"""

import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import gpu, gpu_products, gpu_step, report
from launch.compose import compose
from model.config import ModelConfig
from model.logical import logical_tensors
from model.transformer import Transformer
from trainer import journal
from trainer.config import PrecisionConfig
from trainer.members import members
from trainer.parallel.apply import apply_kernels, serving
from trainer.pool import view_of
from trainer.precision import backends
from trainer.precision.recipe import Recipe
from trainer.precision.serving import Precision
from trainer.precision.weights import Weights
from trainer.run import train

RECIPES = ("bf16", "fp8", "fp8_fp4")
TOKENS, STEPS = 4096, 300
STEP_COLUMNS = ("recipe", "who", "step ms", "tokens/s", "to bf16", "peak GiB")
LOSS_COLUMNS = ("recipe", "who", "loss, last tenth", "gap", "held out", "gap", "seconds")
BRIEF = {
    "schedule.total_tokens": 8192,
    "schedule.rate": "{peak: 1e-2, final: 1e-3, warmup_tokens: 1024, decay_start_tokens: 4096}",
    "schedule.attention": "[{from_tokens: 0, value: dense}]",
    "schedule.mtp_weight": "[{from_tokens: 0, value: 0.3}]",
    "schedule.batch": "{tokens: 2048, start_tokens: 2048, ramp_tokens: 0}",
    "validation.rows": 2,
}
"""Four steps, to try the program out."""
Line = tuple[str, ...]


def main() -> int:
    """Print ceilings, back ends and the three tables; 1 if something failed."""
    where = gpu.place(__doc__, tuple(PARTS))
    flash = compose(["recipe=flash", f"device={where.device.type}"]).config.model
    found, refused = gpu.ceilings(where), _refusals(where)
    able = [name for name, reason in refused.items() if not reason]
    print(report.heading("benchmarks.gpu_precision", f"{TOKENS} tokens, {STEPS} steps", where.device.type))
    print(found.lines())
    print("\n".join(f"{name:<10}{reason or 'computes here'}" for name, reason in refused.items()))
    failed = 0
    for title in where.parts:
        columns, lines = PARTS[title]
        rows: list[Line] = []
        try:
            rows.extend(lines(flash, able, where))
        except Exception as error:
            failed = 1
            print(f"\n{title} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        print(f"\n{title}\n{report.table([columns, *rows])}", flush=True)
        failed |= any("failed" in cell for cells in rows for cell in cells)
    return failed


def _refusals(where: gpu.Place) -> dict[str, str]:
    return {name: backends.module(name).refusal(gpu_products.FP8, where.device) for name in backends.MODULES}


def _products(flash: ModelConfig, able: Sequence[str], where: gpu.Place) -> Iterator[Line]:
    config, T = (gpu_products.tiny(flash), 192) if where.quick else (flash, TOKENS)
    for shape in gpu_products.shapes(config, T):
        yield from gpu_products.rows(shape, able, where)


def _steps(flash: ModelConfig, able: Sequence[str], where: gpu.Place) -> Iterator[Line]:
    config, T = (gpu_step.tiny_of(flash), 32) if where.quick else (gpu_step.slice_of(flash), TOKENS)
    model, base = gpu_step.build(config, where), math.nan
    for name in RECIPES:
        for who in able if name != "bf16" else ("-",):
            measured = gpu_step.measure(
                lambda name=name, who=who: gpu_step.step_of(_view(model, name, who), T, where), where
            )
            if isinstance(measured, str):
                yield name, who, measured, "-", "-", "-"
                continue
            seconds, peak = measured
            base = seconds if name == "bf16" else base
            cells = f"{seconds * 1e3:.1f}", f"{T / seconds:,.0f}", f"{base / seconds:.2f}", f"{peak / 2**30:.2f}"
            yield name, who, *cells


def _view(model: Transformer, name: str, backend: str) -> Transformer:
    """The model with kernels and, at its seams, this back end; its weights are rounded as the recipe says."""
    view = view_of(model)
    apply_kernels(view, serving(model.dtype))
    if name == "bf16":
        return view
    weights = Weights(Recipe(_precision(name), model.config))
    every, parameters = members(logical_tensors(model.config)), dict(model.named_parameters())
    for member in every:
        weights.round(member.parameter, member.view(parameters[member.parameter].detach()))
    Precision(weights, [view], {member.parameter: member.group for member in every}, backend)
    return view


def _precision(name: str) -> PrecisionConfig:
    return compose([f"precision={name}"]).config.precision


def _losses(flash: ModelConfig, able: Sequence[str], where: gpu.Place) -> Iterator[Line]:
    base: list[float] = []
    for name in RECIPES:
        for who in able if name != "bf16" else ("-",):
            numbers = _trained(name, who, where)
            base = base or numbers
            cells = (f"{one:.4f}  {one / of - 1:+.2%}".split("  ") for one, of in zip(numbers, base, strict=False))
            (loss, gap), (held_out, held_out_gap), _ = cells
            yield name, who, loss, gap, held_out, held_out_gap, f"{numbers[2]:.0f}"


def _trained(name: str, backend: str, where: gpu.Place) -> list[float]:
    """Mean loss of the last tenth of the steps, held-out loss, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        words = {
            "recipe": "debug",
            "precision": name,
            "precision.dtype": "fp32" if where.device.type == "cpu" else "bf16",
            "precision.backend": "auto" if backend == "-" else backend,
            "device": where.device.type,
            "threads": 1,
            "runs_dir": folder,
            "tracking": "off",
            "checkpoint.every_steps": 10**6,
            "validation.every_steps": 10**6,
            "schedule.total_tokens": STEPS * TOKENS,
            "sample.tokens": 1,
        } | (BRIEF if where.quick else {})
        seconds = report.timed(lambda: _run([f"{key}={value}" for key, value in words.items()]))
        (path,) = Path(folder).glob("[!.]*")
        told = journal.read(path / "metrics.jsonl")
    losses = [row["loss/lm"] for row in told]
    held_out = next(row["validation/loss"] for row in reversed(told) if "validation/loss" in row)
    return [statistics.fmean(losses[-max(1, len(losses) // 10) :]), held_out, seconds]


def _run(words: list[str]) -> None:
    """Train; what the run says goes where errors go."""
    with contextlib.redirect_stdout(sys.stderr):
        if train(compose(words).config) != 0:
            raise RuntimeError("the run did not end well")


PARTS = {
    "products": (gpu_products.COLUMNS, _products),
    "steps": (STEP_COLUMNS, _steps),
    "losses": (LOSS_COLUMNS, _losses),
}

if __name__ == "__main__":
    sys.exit(main())
