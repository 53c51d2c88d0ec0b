"""Runs made up for tests: every metric of the table, three stages, one restart; as plain data or as a folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from tests.runs import tiny
from trainer.report.read import Folder, Run, Saved

BEGAN = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
NOW = BEGAN + timedelta(hours=2)
STEP_S, TOKENS = 10.0, 4096
STEPS = 80
GROUPS = ("attention", "experts", "mhc")


def config(name: str = "made", source: str = "text") -> dict[str, Any]:
    """A resolved configuration with 80 steps of 4096 tokens, 8 experts of which 2 are chosen."""
    made = asdict(tiny.config(Path("corpus"), Path("runs"), name=name, model=tiny.model(n_routed_experts=8)))
    made["data"]["sources"] = {source: made["data"]["sources"]["text"]}
    made["schedule"] |= {
        "total_tokens": STEPS * TOKENS,
        "batch": {"tokens": TOKENS, "start_tokens": TOKENS, "ramp_tokens": 0},
        "row_length": [{"from_tokens": 0, "value": 256}],
    }
    made["schedule"]["rate"] |= {"decay_start_tokens": STEPS * TOKENS // 2}
    return made


def row(step: int, source: str = "text") -> dict[str, Any]:
    """A row with every metric, a validation at every eighth step; the loss falls like a root."""
    loss = 2 + 3 / math.sqrt(step)
    stage = "dense" if step <= 40 else "indexer_warmup" if step <= 50 else "sparse"
    load_LE = [[10 + (step * (layer + 3) * (expert + 1)) % 7 for expert in range(8)] for layer in range(3)]
    made = {
        "step": step,
        "tokens": step * TOKENS,
        "time/run_s": step * STEP_S,
        "time/step_s": STEP_S,
        "time/wait_s": 0.1,
        "time/forward_s": 3.0,
        "time/backward_s": 5.0,
        "time/reduce_s": 0.5,
        "time/pipe_s": 0.0,
        "time/exchange_s": 0.2,
        "time/update_s": 1.0,
        "time/check_s": 0.02,
        "time/observe_s": 0.01,
        "time/validation_s": 0.5,
        "time/save_s": 0.2,
        "speed/tokens_per_s": TOKENS / STEP_S + step % 5,
        "speed/model_flops_per_s": 2e9 + 1e7 * (step % 7),
        "speed/product_flops_per_s": 1e10,
        "speed/rank_load_max_ratio": 1.2,
        "speed/utilisation": 0.2 + 0.001 * (step % 7),
        "memory/peak_bytes": 700 * 2**20,
        "memory/rss_bytes": 500 * 2**20 + step,
        "schedule/rate": 1e-2 if step < 50 else 1e-3,
        "schedule/rows": 16,
        "schedule/row_length": 256,
        "schedule/mtp_weight": 0.3,
        "schedule/attention": stage,
        "loss/lm": loss,
        "loss/mtp": loss + 0.3,
        "loss/balance": 1.1,
        "loss/bits_per_byte": loss / 1.5,
        f"loss/source/{source}": loss,
        "optim/grad_norm": 0.5 + 0.01 * (step % 3),
        "optim/clip_scale": 1.0,
        "router/load_max_ratio": 1.4,
        "router/entropy_nats": 2.0,
        "router/dead_experts": 0,
        "router/bias_min": -0.01 * step,
        "router/bias_max": 0.02 * step,
        "mhc/row_sum_error": 2e-6,
        "mhc/col_sum_error": 3e-7,
        "mhc/composite_gain": 1.02,
        "mhc/composite_gain_backward": 1.01,
        "experts/clamped_ratio": 0.0001,
    }
    made |= {f"optim/update_rms/{group}": 1e-3 / step for group in GROUPS}
    made |= {f"optim/weight_rms/{group}": 0.05 for group in GROUPS}
    if step % 4 == 0:
        made["router/load_LE"] = load_LE
    if stage != "dense":
        made["loss/indexer"] = 3 / step
    if step % 8 == 0:
        made |= {
            "validation/loss": loss + 0.02,
            "validation/bits_per_byte": (loss + 0.02) / 1.5,
            "validation/mtp_loss": loss + 0.4,
            "validation/load_max_ratio": 1.5,
        }
        if stage != "dense":
            made |= {
                "indexer/kl_nats": 3.1 / step,
                "indexer/recall": step / 100,
                "indexer/recall_L": [None, step / 100],
            }
    return made


def history(*events: tuple[str, int, float] | tuple[str, int, float, str]) -> list[dict[str, Any]]:
    """Rows of (event, step, seconds since BEGAN[, reason])."""
    rows = []
    for event, step, seconds, *reason in events:
        time = (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="seconds")
        rows.append({"time": time, "event": event, "step": step, **({"reason": reason[0]} if reason else {})})
    return rows


def run(
    rows: Sequence[Mapping[str, Any]] | None = None,
    told: Sequence[Mapping[str, Any]] | None = None,
    **changes: Any,
) -> Run:
    """A finished run as plain data; `changes` replace fields."""
    of = changes.pop("config", None) or config()
    values = {
        "path": Path("runs/made-1234"),
        "config": of,
        "state": "finished",
        "now": NOW,
        "total_steps": STEPS,
        "total_tokens": STEPS * TOKENS,
        "checkpoints": [Saved(step=len(rows) if rows is not None else STEPS, time=NOW)],
        "rows": [row(step) for step in range(1, STEPS + 1)] if rows is None else rows,
        "history": history(("start", 0, 0.0), ("end", STEPS, 1000.0, "finished")) if told is None else told,
    }
    return Run(**(values | changes))


def folder(path: Path, rows: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> Folder:
    """The same as files below `path`, and read from there."""
    of = changes.get("config") or config()
    told = changes.get("history", history(("start", 0, 0.0), ("end", STEPS, 1000.0, "finished")))
    (path / "checkpoints" / "step-000080").mkdir(parents=True)
    (path / "checkpoints" / "step-000080" / "COMMIT").touch()
    (path / "checkpoints" / "step-000040").mkdir()
    (path / "samples").mkdir()
    (path / "samples" / "step-000080.txt").write_text("def f(x):\n    return x\n")
    (path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(of)), sort_keys=False))
    (path / "overrides.txt").write_text("seed=5\n")
    (path / "provenance.json").write_text(json.dumps({"run_id": path.name, "torch": "2.13.0", "device": "cpu"}))
    made = [row(step) for step in range(1, STEPS + 1)] if rows is None else rows
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    (path / "history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    return Folder(path)
