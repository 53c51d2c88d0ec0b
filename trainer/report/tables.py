"""What the page shows beside curves: parameter groups, expert load, samples, configuration, provenance."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from trainer.leaves import flatten
from trainer.report.charts import Axis
from trainer.report.numbers import percent, short, tick
from trainer.report.read import Run
from trainer.report.shapes import heat, heat_key, sparkline

_UPDATE, _WEIGHT = "optim/update_rms/", "optim/weight_rms/"
HEAT_COLUMNS = 48
"""Measurements of expert load shown over time; of more, evenly chosen ones."""


def groups_table(run: Run, axis: Axis) -> str:
    """RMS of update and weight of each parameter group; empty text where none was measured."""
    names = [name.removeprefix(_UPDATE) for name in run.below(_UPDATE)]
    if not names:
        return ""
    rows = []
    for name in names:
        update, weight = run.last(_UPDATE + name), run.last(_WEIGHT + name)
        spark = sparkline(run.series(_UPDATE + name), axis.first, axis.last)
        now = [
            short(update) if update is not None else "",
            short(weight) if weight is not None else "",
            percent(update / weight) if update is not None and weight else "",
        ]
        cells = "".join(f'<td class="n">{text}</td>' for text in now)
        rows.append(f'<tr><td>{escape(name)}</td><td class="curve">{spark}</td>{cells}</tr>')
    return (
        '<figure class="wide"><figcaption><b>Update of each parameter group</b> <span>RMS, rate included; each curve '
        "from 0 tokens to now on its own scale</span></figcaption><table><tr><th>group</th><th>update over time</th>"
        '<th class="n">update now</th><th class="n">weight now</th><th class="n">update / weight</th></tr>'
        f"{''.join(rows)}</table></figure>"
    )


def expert_load(run: Run) -> str:
    """Load by layer and expert at the last measurement, and each layer's fullest expert over time."""
    rows = [row for row in run.rows if row.get("router/load_LE")]
    if not rows:
        return ""
    names = layer_names(run.config["model"], len(rows[-1]["router/load_LE"]))
    last = [(name, over_mean(load_E)) for name, load_E in zip(names, rows[-1]["router/load_LE"], strict=True)]
    cell = 22 if len(names) <= 16 else 8
    count = len(last[0][1])
    experts = [str(number) for number in range(count)]
    chosen = rows if len(rows) <= HEAT_COLUMNS else [rows[i * len(rows) // HEAT_COLUMNS] for i in range(HEAT_COLUMNS)]
    fullest = [
        (name, [max(over_mean(row["router/load_LE"][layer])) for row in chosen]) for layer, name in enumerate(names)
    ]
    crosses = "; a cross is an expert without a token" if any(0 in ratios for _, ratios in last) else ""
    now, times = f"at {tick(rows[-1]['tokens'])} tokens", [tick(row["tokens"]) for row in chosen]
    return (
        f'<figure class="wide"><figcaption><b>Expert load</b> <span>tokens of layer and expert over the layer\'s mean, '
        f"{now}{crosses}</span></figcaption>{heat(last, experts, cell)}</figure>"
        '<figure class="wide"><figcaption><b>Fullest expert over time</b> <span>its load over the layer\'s mean, by '
        f"layer and tokens</span></figcaption>{heat(fullest, times, cell)}{heat_key()}</figure>"
    )


def layer_names(model: Mapping[str, Any], count: int) -> list[str]:
    """Names of the layers of `router/load_LE`: hash layers first, the MTP block last."""
    hashed, layers = model.get("num_hash_layers", 0), model["num_hidden_layers"]
    return [
        f"{i} hash" if i < hashed else f"{i}" if i < layers else "mtp" if i == layers else f"mtp {i - layers}"
        for i in range(count)
    ]


def over_mean(load_E: Sequence[float]) -> list[float]:
    """Loads over their mean; all 0 where there was no token."""
    total = sum(load_E)
    return [load * len(load_E) / total if total else 0.0 for load in load_E]


def samples(run: Run) -> str:
    """What the run wrote, newest first."""
    return "".join(
        f"<h3>{escape(name.removesuffix('.txt'))}</h3><pre>{escape(text)}</pre>"
        for name, text in reversed(list(run.samples.items()))
    )


def set_by(key: str, overrides: Sequence[str]) -> str | None:
    """The command-line word that set `key`, itself or with the section it is in; the last one counts."""
    for word in reversed(overrides):
        name = word.partition("=")[0].lstrip("+~")
        if key == name or key.startswith(f"{name}."):
            return word
    return None


def configuration(run: Run) -> str:
    """Every key, by section, folded; what the command line set is marked with its words."""
    leaves = flatten(run.config)
    parts = []
    for section, keys in groupby(leaves, key=lambda key: key.partition(".")[0] if "." in key else ""):
        listed = list(keys)
        rows, marked = [], 0
        for key in listed:
            word = set_by(key, run.overrides)
            marked += word is not None
            origin = f' <span class="from">set by {escape(word)}</span>' if word is not None else ""
            value = escape(json.dumps(leaves[key], ensure_ascii=False))
            mark = ' class="set"' if word is not None else ""
            rows.append(f"<tr{mark}><td><code>{escape(key)}</code></td><td><code>{value}</code>{origin}</td></tr>")
        about = f"{len(listed)} keys" + (f", {marked} set on the command line" if marked else "")
        parts.append(
            f"<details{' open' if marked and section else ''}><summary>{escape(section or 'run')} <span>{about}</span>"
            f"</summary><table>{''.join(rows)}</table></details>"
        )
    words = " ".join(map(escape, run.overrides))
    typed = (
        f"<p>Set on the command line: <code>{words}</code></p>"
        if words
        else "<p>As the recipe has it; nothing was set on the command line.</p>"
    )
    return typed + "".join(parts)


def provenance(run: Run) -> str:
    """Versions, device and commit, and every start and end."""
    facts = "".join(
        f"<tr><td>{escape(str(key))}</td><td><code>{escape(json.dumps(value) if not isinstance(value, str) else value)}"
        f"</code></td></tr>"
        for key, value in run.provenance.items()
    )
    history = "".join(
        f"<tr><td>{escape(str(row.get('time', '')))}</td><td>{escape(str(row.get('event', '')))}</td>"
        f'<td class="n">{escape(str(row.get("step", "")))}</td><td>{escape(_why(row))}</td></tr>'
        for row in run.history
    )
    return (
        f"<details open><summary>what it ran on</summary><table>{facts}</table></details><details open><summary>what "
        f'happened</summary><table><tr><th>time</th><th>event</th><th class="n">step</th><th>reason</th></tr>{history}'
        "</table></details>"
    )


def _why(row: Mapping[str, Any]) -> str:
    """Why a run stopped, or what had changed when it went on."""
    return "; ".join([str(row["reason"])] if "reason" in row else map(str, row.get("changes", ())))
