"""Does a model trained in FP8 or FP4 learn as one in bf16 does? Whole runs on real text, in pairs with one seed.

    python -m benchmarks.precision FOLDER [--seeds N] [--steps N] [--rows N] [--recipe NAME ...] [--draw FILE.svg]
        [KEY=VALUE ...]

The debug model (or the overrides'), its own data. All recipes of a seed have the same initial weights and the same
rows; a run of one thread each, two at a time. FOLDER keeps the runs: the same command goes on where it was stopped.

"held out": loss on held-out rows at the end, nats. "gap": its distance from bf16's of the same seed, in percent.
"train gap": that of the training loss, the mean over the last quarter of the steps. "of seeds": what the seeds
themselves differ by, the standard deviation of a recipe's held-out losses in percent of their mean.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.plot import Curve, svg
from trainer.folder import RunFolder

ROW = 512
BASE = "bf16"
AT_A_TIME = 2
WINDOW = 20
"""Steps that a drawn curve is the mean of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """One run: training loss by step, and the held-out loss at its end."""

    losses: Sequence[float]
    held_out: float


def main() -> None:
    """Train what is not trained yet, print the tables, draw the gaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--recipe", nargs="*", default=["bf16", "fp8", "fp8_fp4", "turning"])
    parser.add_argument("--draw", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args()
    pairs = [(seed, recipe) for seed in range(1, given.seeds + 1) for recipe in given.recipe]

    def run(pair: tuple[int, str]) -> Learned:
        seed, recipe = pair
        return learn(given.folder / f"{recipe}-{seed}", words(recipe, seed, given.steps, given.rows) + given.overrides)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        found = dict(zip(pairs, pool.map(run, pairs), strict=True))
    print(
        report.heading(
            "benchmarks.precision", f"{given.steps} steps of {given.rows} rows of {ROW}, {given.seeds} seeds"
        )
    )
    print(report.table(table(found)))
    if given.draw is not None:
        given.draw.write_text(svg("loss over bf16's of the same seed, %", curves(found)), encoding="utf-8")


def words(recipe: str, seed: int, steps: int, rows: int) -> list[str]:
    """The command line of a run; `turning` is FP8 that turns to FP4 experts in the middle."""
    tokens = steps * rows * ROW
    turn = [f"precision.rules.experts.from_tokens={tokens // 2}"] if recipe == "turning" else []
    dense, sparse = tokens * 2 // 5, tokens * 9 // 20
    modes = f"[{{from_tokens: 0, value: dense}}, {{from_tokens: {dense}, value: indexer_warmup}}, "
    modes += f"{{from_tokens: {sparse}, value: sparse}}]"
    return [
        "recipe=debug", f"precision={'fp8_fp4' if recipe == 'turning' else recipe}", *turn, f"seed={seed}", "threads=1",
        "tracking=off", f"schedule.total_tokens={tokens}", f"schedule.batch.tokens={rows * ROW}",
        f"schedule.batch.start_tokens={rows * ROW}", f"schedule.attention={modes}",
        f"schedule.mtp_weight=[{{from_tokens: 0, value: 0.3}}, {{from_tokens: {sparse}, value: 0.1}}]",
        f"schedule.rate.warmup_tokens={tokens // 20}", f"schedule.rate.decay_start_tokens={tokens * 3 // 5}",
        "schedule.rate.peak=5e-3", "schedule.rate.final=5e-4", "validation.rows=64",
        f"validation.every_steps={max(1, steps // 10)}", f"checkpoint.every_steps={max(1, steps // 5)}",
        "validation.bigram=false", "sample.tokens=0",
    ]  # fmt: skip


def learn(folder: Path, given: Sequence[str]) -> Learned:
    """The run in a folder, trained to its end if it has not got there."""
    if not any(RunFolder(path).is_finished() for path in folder.glob("[!.]*")):
        start = "import sys; from launch.main import main; sys.exit(main())"
        command = [sys.executable, "-c", start, "train", *given, f"runs_dir={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{folder}: exit {done.returncode}\n{done.stderr}")
        print(f"{folder.name}: done", file=sys.stderr, flush=True)
    (path,) = (path for path in folder.glob("[!.]*") if RunFolder(path).is_finished())
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["validation/loss"] for row in rows if "validation/loss" in row]
    return Learned(losses=[row["loss/lm"] for row in rows], held_out=held_out[-1])


def table(found: Mapping[tuple[int, str], Learned]) -> list[tuple[str, ...]]:
    """A row for each run, then one for each recipe."""
    rows = [("recipe", "seed", "held out", "gap", "train gap")]
    recipes, seeds = dict.fromkeys(recipe for _, recipe in found), dict.fromkeys(seed for seed, _ in found)
    gaps: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for recipe in recipes:
        for seed in seeds:
            one, base = found[seed, recipe], found.get((seed, BASE))
            gap = percent(one.held_out, base.held_out) if base else math.nan
            trained = percent(late(one), late(base)) if base else math.nan
            gaps[recipe].append(gap)
            rows.append((recipe, f"{seed}", f"{one.held_out:.4f}", f"{gap:+.3f} %", f"{trained:+.3f} %"))
    rows.append(("", "", "", "", ""))
    rows.append(("recipe", "", "mean", "mean gap", "of seeds"))
    for recipe in recipes:
        losses = [found[seed, recipe].held_out for seed in seeds]
        mean = statistics.mean(losses)
        noise = f"{100 * statistics.stdev(losses) / mean:.3f} %" if len(losses) > 1 else "-"
        rows.append((recipe, "", f"{mean:.4f}", f"{statistics.mean(gaps[recipe]):+.3f} %", noise))
    return rows


def curves(found: Mapping[tuple[int, str], Learned]) -> list[Curve]:
    """The training loss of each run over that of bf16 with the same seed, in percent, smoothed."""
    made = []
    for (seed, recipe), one in found.items():
        base = found.get((seed, BASE))
        if recipe == BASE or base is None:
            continue
        gaps = [percent(loss, of) for loss, of in zip(one.losses, base.losses, strict=True)]
        smooth = [statistics.mean(gaps[max(0, step - WINDOW) : step + 1]) for step in range(len(gaps))]
        made.append(Curve(name=recipe, points=[(float(step), gap) for step, gap in enumerate(smooth)]))
    return made


def late(one: Learned) -> float:
    """The mean training loss of the last quarter."""
    return statistics.mean(one.losses[-max(1, len(one.losses) // 4) :])


def percent(loss: float, base: float) -> float:
    """How much a loss is above another."""
    return 100 * (loss / base - 1)


if __name__ == "__main__":
    main()
