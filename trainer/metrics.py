"""The one table of metrics: every name that may appear in `metrics.jsonl` and on a dashboard, and how it is made."""

import math
from collections.abc import Mapping, Sequence

import torch

from model.losses import TermCounts
from trainer.row import RowSums

METRICS = {
    "step": "optimizer steps done",
    "tokens": "tokens seen, padding included: rows x row length of all steps so far",
    "time/run_s": "seconds since this process began training",
    "time/step_s": "seconds of this step",
    "speed/tokens_per_s": "tokens of this step per second of it",
    "schedule/rate": "learning rate of this step",
    "schedule/rows": "rows of this step",
    "schedule/row_length": "tokens per row",
    "schedule/mtp_weight": "weight of the MTP loss",
    "schedule/attention": "dense, indexer_warmup or sparse",
    "loss/lm": "next-token loss, nats per target",
    "loss/mtp": "MTP loss, nats per target",
    "loss/balance": "sequence-wise balance loss before its weight, mean over learned layers; 1 is perfect balance",
    "loss/indexer": "KL(attention || indexer), nats per token that sees a block, mean over CSA layers",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/clip_scale": "factor applied to the gradients by the clip, 1 if none",
    "router/load_max_ratio": "tokens of the fullest expert over the mean, mean over learned layers",
    "router/entropy_nats": "entropy of a token's normalised router scores, mean over tokens and layers",
    "validation/loss": "next-token loss on held-out rows, nats per target",
    "validation/bits_per_byte": "the same in bits per byte of text",
    "validation/mtp_loss": "MTP loss on held-out rows, nats per target",
    "validation/load_max_ratio": "router/load_max_ratio on held-out rows",
    "indexer/kl_nats": "loss/indexer on held-out rows",
    "indexer/recall": "share of the indexer's picks that are top-k of the dense attention's mass; held-out rows",
}
"""Update sizes come as `optim/update_rms/GROUP`: RMS of the update of each parameter group, rate included."""


def is_known(name: str) -> bool:
    """True for a name of the table."""
    return name in METRICS or name.startswith("optim/update_rms/")


def losses(rows: Sequence[RowSums], counts: TermCounts) -> dict[str, float]:
    """The loss terms over all rows. Sums are exact (math.fsum), so they do not depend on the rows' order."""
    result = {"loss/lm": _ratio(math.fsum(row.lm for row in rows), counts.lm)}
    if counts.mtp:
        result["loss/mtp"] = math.fsum(row.mtp for row in rows) / counts.mtp
    balance = _layer_mean([row.balance_L for row in rows], counts.tokens)
    indexer = _layer_mean([row.indexer_L for row in rows], counts.indexer)
    if balance is not None:
        result["loss/balance"] = balance
    if indexer is not None:
        result["loss/indexer"] = indexer
    return result


def routing(rows: Sequence[RowSums], counts: TermCounts) -> dict[str, float]:
    """Load and entropy of the learned layers over all rows."""
    learned = [i for i, term in enumerate(rows[0].balance_L) if term is not None]
    if not learned:
        return {}
    load_LE = torch.stack([row.load_LE for row in rows]).sum(0)[learned]
    ratios = [_ratio(int(load_E.max()) * load_E.numel(), int(load_E.sum())) for load_E in load_LE]
    entropy = math.fsum(row.entropy_L[i] for row in rows for i in learned)
    return {
        "router/load_max_ratio": math.fsum(ratios) / len(ratios),
        "router/entropy_nats": _ratio(entropy, counts.tokens * len(learned)),
    }


def validation(rows: Sequence[RowSums], counts: TermCounts, num_bytes: int) -> dict[str, float]:
    """The held-out metrics. num_bytes: bytes of text of all targets."""
    values = losses(rows, counts)
    nats = math.fsum(row.lm for row in rows)
    result = {"validation/loss": values["loss/lm"], "validation/bits_per_byte": _ratio(nats / math.log(2), num_bytes)}
    picks = sum(row.recall[1] for row in rows)
    optional: Mapping[str, float | None] = {
        "validation/mtp_loss": values.get("loss/mtp"),
        "validation/load_max_ratio": routing(rows, counts).get("router/load_max_ratio"),
        "indexer/kl_nats": values.get("loss/indexer"),
        "indexer/recall": sum(row.recall[0] for row in rows) / picks if picks else None,
    }
    return result | {name: value for name, value in optional.items() if value is not None}


def _layer_mean(values_by_row: Sequence[Sequence[float | None]], count: int) -> float | None:
    layers = list(zip(*values_by_row, strict=True))
    terms = [math.fsum(layer) for layer in layers if layer[0] is not None]
    return _ratio(math.fsum(terms), count * len(terms)) if terms else None


def _ratio(total: float, count: int) -> float:
    return total / count if count else 0.0
