"""The one table of metrics: every name that may appear in `metrics.jsonl` and on a dashboard, and how it is made."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from model.losses import TermCounts
from trainer.row import RowSums

METRICS = {
    "step": "optimizer steps done",
    "tokens": "tokens seen, padding included: rows x row length of all steps so far",
    "time/run_s": "seconds since this process began training",
    "time/step_s": "seconds of this step; what its parts leave over is threads, or ranks, that wait for the last row",
    "time/wait_s": "of which: waiting for the rows of this step",
    "time/forward_s": "of which: forward passes and losses, summed over rows / rows that run side by side",
    "time/backward_s": "of which: backward passes, likewise",
    "time/reduce_s": "of which: adding the rows' gradients exactly, likewise",
    "time/pipe_s": "of which: moving streams and waiting for other stages; 0 where a rank has all layers",
    "time/exchange_s": "of which: rounding the sums, bringing those of all ranks together, handing out new weights",
    "time/update_s": "of which: clip and optimizer",
    "time/check_s": "of which: checksums of weights and optimizer state, 0 where none were due",
    "time/observe_s": "after this step: making this row, without validation",
    "time/validation_s": "after this step: the held-out loss",
    "time/save_s": "before this step: verifying a checkpoint and handing it to its writer, 0 where none was due",
    "speed/tokens_per_s": "tokens of this step per second of it",
    "speed/model_flops_per_s": "`model.count.training_flops` of the step, rows as one document each, per second of it",
    "speed/product_flops_per_s": "measured FLOP/s of matrix products, all threads; in the first row of a session",
    "speed/utilisation": "speed/model_flops_per_s over the session's speed/product_flops_per_s",
    "speed/rank_load_max_ratio": "tokens for the fullest expert rank over the mean, averaged over layers",
    "memory/peak_bytes": "most memory so far: of the GPU where there is one, else of the process",
    "memory/rss_bytes": "memory of the process",
    "schedule/rate": "learning rate of this step",
    "schedule/rows": "rows of this step",
    "schedule/row_length": "tokens per row",
    "schedule/mtp_weight": "weight of the MTP loss",
    "schedule/attention": "dense, indexer_warmup or sparse",
    "loss/lm": "next-token loss, nats per target",
    "loss/bits_per_byte": "loss/lm in bits per byte of training text",
    "loss/mtp": "MTP loss, nats per target",
    "loss/balance": "sequence-wise balance loss before its weight, mean over learned layers; 1 is perfect balance",
    "loss/indexer": "KL(attention || indexer), nats per token that sees a block, mean over CSA layers",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/clip_scale": "factor applied to the gradients by the clip, 1 if none",
    "router/load_max_ratio": "tokens of the fullest expert over the mean, mean over learned layers",
    "router/entropy_nats": "entropy of a token's normalised router scores, mean over tokens and layers",
    "router/dead_experts": "experts of learned layers that no token went to in this step",
    "router/bias_min": "smallest router bias of the learned layers, after this step",
    "router/bias_max": "largest router bias of the learned layers, after this step",
    "router/load_LE": "tokens of this step by layer and expert, hash layers included, the MTP block last",
    "mhc/row_sum_error": "largest |sum - 1| of a row of comb over all tokens of this step and all mHC sites",
    "mhc/col_sum_error": "the same of a column of comb, which Sinkhorn divides last",
    "mhc/composite_gain": "largest row sum of all sites' residual mixes multiplied (the report's B), mean over tokens",
    "mhc/composite_gain_backward": "the same of the column sums: what gradients meet",
    "experts/clamped_ratio": "share of SwiGLU inputs outside the clamp in this step, routed and shared experts",
    "validation/loss": "next-token loss on held-out rows, nats per target",
    "validation/bits_per_byte": "the same in bits per byte of text",
    "validation/mtp_loss": "MTP loss on held-out rows, nats per target",
    "validation/load_max_ratio": "router/load_max_ratio on held-out rows",
    "indexer/kl_nats": "loss/indexer on held-out rows",
    "indexer/recall": "share of the indexer's picks that are top-k of the dense attention's mass; held-out rows",
    "indexer/recall_L": "indexer/recall by layer, null where a layer has no indexer",
}
"""Names that end in shape letters are nested lists: they stand in `metrics.jsonl` only."""

FAMILIES = {
    "loss/source/NAME": "next-token loss, nats per target, of the rows of one data source",
    "optim/update_rms/GROUP": "RMS of the update of a parameter group, rate included",
    "optim/weight_rms/GROUP": "RMS of the weights of a parameter group, after this step",
    "fp4/inexact_tiles/GROUP": "128x128 tiles of FP4 weights that FP8 does not hold exactly, after this step",
    "precision/amax/GROUP.OPERAND": "largest magnitude that was rounded to a format in this step",
    "precision/error/GROUP.OPERAND": "what rounding changed over what there was, root of the sums of squares",
    "precision/lost_ratio/GROUP.OPERAND": "share of numbers that are not 0 and were rounded to 0",
    "precision/poisoned_blocks/GROUP.OPERAND": "blocks with an infinity or a NaN, which are NaN from then on",
}
"""Names of which there is one for each data source, parameter group, or operand of a group's products.

OPERAND: input, grad, wgrad_grad, as the step's rows had them; weight, after the step.
"""


def is_known(name: str) -> bool:
    """True for a name of the tables."""
    prefix, _, last = name.rpartition("/")
    return name in METRICS or (last != "" and prefix in {family.rpartition("/")[0] for family in FAMILIES})


def scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its nested lists."""
    return {name: value for name, value in row.items() if not isinstance(value, list)}


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


def by_source(rows: Sequence[RowSums], names: Sequence[str]) -> dict[str, float]:
    """loss/source/NAME for each source with a target in this step; a row is of one source."""
    result = {}
    for number, name in enumerate(names):
        mine = [row for row in rows if row.source == number]
        if targets := sum(row.targets for row in mine):
            result[f"loss/source/{name}"] = math.fsum(row.lm for row in mine) / targets
    return result


def bits_per_byte(rows: Sequence[RowSums], num_bytes: int) -> float:
    """Next-token loss in bits per byte of the text of all targets."""
    return _ratio(math.fsum(row.lm for row in rows) / math.log(2), num_bytes)


def routing(rows: Sequence[RowSums], counts: TermCounts, load_LE: Tensor) -> dict[str, float]:
    """Load and entropy of the learned layers over all rows. load_LE: tokens of all rows."""
    learned = [i for i, term in enumerate(rows[0].balance_L) if term is not None]
    if not learned:
        return {}
    load_LE = load_LE[learned]
    ratios = [_ratio(int(load_E.max()) * load_E.numel(), int(load_E.sum())) for load_E in load_LE]
    entropy = math.fsum(row.entropy_L[i] for row in rows for i in learned)
    return {
        "router/load_max_ratio": math.fsum(ratios) / len(ratios),
        "router/entropy_nats": _ratio(entropy, counts.tokens * len(learned)),
        "router/dead_experts": int((load_LE == 0).sum()),
    }


def rank_load(load_LE: Tensor, expert_ranks: int) -> float:
    """How uneven the work of the ranks that share out the experts is: fullest over mean, mean over layers."""
    load_LR = load_LE.unflatten(1, (expert_ranks, -1)).sum(2)
    ratios = [_ratio(int(load_R.max()) * expert_ranks, int(load_R.sum())) for load_R in load_LR]
    return math.fsum(ratios) / len(ratios)


def validation(rows: Sequence[RowSums], counts: TermCounts, num_bytes: int, load_LE: Tensor) -> dict[str, Any]:
    """The held-out metrics. num_bytes: bytes of text of all targets. load_LE: tokens of all rows."""
    values = losses(rows, counts)
    result = {"validation/loss": values["loss/lm"], "validation/bits_per_byte": bits_per_byte(rows, num_bytes)}
    recall_L = _recall(rows)
    recall = _share(recall_L)
    optional = {
        "validation/mtp_loss": values.get("loss/mtp"),
        "validation/load_max_ratio": routing(rows, counts, load_LE).get("router/load_max_ratio"),
        "indexer/kl_nats": values.get("loss/indexer"),
        "indexer/recall": recall,
        "indexer/recall_L": None if recall is None else [_share([of_layer]) for of_layer in recall_L],
    }
    return result | {name: value for name, value in optional.items() if value is not None}


def _recall(rows: Sequence[RowSums]) -> list[tuple[int, int]]:
    """(hits, picks) by layer over all rows, no picks where no indexer was measured."""
    layers = zip(*(row.recall_L for row in rows), strict=True)
    found = [[recall for recall in layer if recall is not None] for layer in layers]
    return [(sum(hits for hits, _ in layer), sum(picks for _, picks in layer)) for layer in found]


def _share(recall_L: Sequence[tuple[int, int]]) -> float | None:
    hits, picks = sum(hits for hits, _ in recall_L), sum(picks for _, picks in recall_L)
    return hits / picks if picks else None


def _layer_mean(values_by_row: Sequence[Sequence[float | None]], count: int) -> float | None:
    layers = list(zip(*values_by_row, strict=True))
    terms = [math.fsum(layer) for layer in layers if layer[0] is not None]
    return _ratio(math.fsum(terms), count * len(terms)) if terms else None


def _ratio(total: float, count: int) -> float:
    return total / count if count else 0.0
