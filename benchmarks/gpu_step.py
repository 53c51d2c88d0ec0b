"""How fast does a slice of V4-Flash train on one GPU, how well is the chip used, and what does Muon add?

    python -m benchmarks.gpu_step [--device cuda|cpu] [--quick] [--repetitions N]

The slice has V4-Flash's widths, a window, two CSA and two HCA layers, 32 of 256 experts, no MTP, a vocabulary of 16384;
bf16. A step is forward and backward of one row of one document with all losses, sparse attention, each layer computed
again in the backward pass ("block"), by deterministic algorithms; it is run with the kernels ("triton"), with plain
functions, and by transformers' `deepseek_v4` with its own loss, without recomputation, without the indexer's KL and
with any algorithm, where that is installed.

"used" is `model.count.training_flops` (no recomputation in it) over the time and the measured bf16 rate. Memory is the
largest allocated. What runs out of memory says so; what fails is named with its error, the rest goes on, and the exit
code is 1. The sum of gradients over rows is not in a step; the indexer's KL has no kernel yet and runs plain.

Muon: the optimizer's step on one CSA layer's matrices, as it is (fp32 products). Its share of a step of V4-Flash at the
report's batch is FLOP by FLOP: m = FLOP of Newton-Schulz for all of V4-Flash's matrices over the rate reached here,
s = training FLOP of the batch over the rate reached here at the longest row that ran; share = m / (m + s).
"""

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import gpu, report
from benchmarks.newton_schulz import iterations_flop
from data.batch import Batch
from launch.compose import compose
from model.config import InitConfig, ModelConfig
from model.count import training_flops
from model.init import initialize
from model.logical import logical_tensors
from model.losses import count
from model.transformer import Transformer
from optim.config import OptimConfig
from optim.groups import Member
from optim.optimizer import Optimizer
from trainer import row
from trainer.device import settle
from trainer.members import members
from trainer.parallel.apply import apply_kernels, serving
from trainer.parallel.recompute import apply_recompute
from trainer.pool import view_of

LENGTHS = (4096, 16384, 65536)
RATIOS = (0, 4, 128, 4, 128)
EXPERTS, VOCABULARY = 32, 16384
LAYER = "layers.1."
"""The layer that Muon is timed on, a CSA layer: fp32 master, momentum and gradient of the whole slice would not fit."""
BATCH_TOKENS, BATCH_LENGTH = 75_497_472, 65536
"""V4-Flash's largest batch (R 4.2), and the row length at which most of it is trained."""
COLUMNS = ("row", "who", "step ms", "tokens/s", "used", "peak GiB")


def main() -> int:
    """Print ceilings, then steps by row length and implementation, then Muon; 1 if one failed."""
    where = gpu.place(__doc__)
    recipe = compose(["recipe=flash", f"device={where.device.type}"]).config
    settle(recipe)
    flash = recipe.model
    config, lengths = (tiny_of(flash), (32, 64)) if where.quick else (slice_of(flash), LENGTHS)
    found = gpu.ceilings(where)
    torch.manual_seed(0)
    model = build(config, where)
    rows = [line for T in lengths for line in _steps(model, T, where, found)]
    optimizer = _muon(model, where)
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    shapes = f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts, {million:.0f} million parameters"
    print(report.heading("benchmarks.gpu_step", shapes, where.device.type))
    print(found.lines())
    print(f"\n{report.table([COLUMNS, *(cells for cells, _ in rows)])}")
    rates = [rate for _, rate in rows if rate]
    print(f"\n{_muon_lines(flash, config, optimizer, rates[-1] if rates else None)}")
    failures = [cells[2] for cells, _ in rows if cells[2].startswith("failed")]
    return 1 if failures or isinstance(optimizer, str) else 0


def slice_of(flash: ModelConfig) -> ModelConfig:
    """V4-Flash cut to what one GPU holds; every width is the released one."""
    return replace(
        flash,
        num_hidden_layers=len(RATIOS),
        compress_ratios=RATIOS,
        num_nextn_predict_layers=0,
        num_hash_layers=1,
        n_routed_experts=EXPERTS,
        vocab_size=VOCABULARY,
    )


def tiny_of(flash: ModelConfig) -> ModelConfig:
    """The same layers with widths at which the interpreter shows that the program runs."""
    return replace(
        slice_of(flash),
        vocab_size=64,
        hidden_size=16,
        num_attention_heads=2,
        head_dim=16,
        qk_rope_head_dim=4,
        q_lora_rank=8,
        o_groups=2,
        o_lora_rank=8,
        sliding_window=4,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        hc_sinkhorn_iters=2,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 8),
    )


def build(config: ModelConfig, where: gpu.Place) -> Transformer:
    """With its initial values, on the device."""
    model = Transformer(config, torch.float32 if where.device.type == "cpu" else torch.bfloat16)
    initialize(model, InitConfig(), 0)
    model.to(where.device)
    model.share_weights()
    return model


Line = tuple[tuple[str, ...], float | None]
"""Cells of a row of the table, and the FLOP per second reached by the kernels."""


def _steps(model: Transformer, T: int, where: gpu.Place, found: gpu.Ceilings) -> Iterator[Line]:
    flop = training_flops(model.config, T, "sparse").total
    for who, make in {"triton": _ours, "plain": _ours, "transformers": _theirs}.items():
        torch.set_deterministic_debug_mode("default" if who == "transformers" else "error")
        if who == "transformers" and importlib.util.find_spec("transformers") is None:
            yield (f"{T}", who, "not installed", "-", "-", "-"), None
            continue
        measured = measure(lambda who=who, make=make: make(model, who, T, where), where)
        if isinstance(measured, str):
            yield (f"{T}", who, measured, "-", "-", "-"), None
            continue
        step_s, peak = measured
        used = "-" if who == "transformers" else f"{flop / step_s / found.bf16:.1%}"
        cells = (f"{T}", who, f"{step_s * 1e3:.1f}", f"{T / step_s:,.0f}", used, f"{peak / 2**30:.2f}")
        yield cells, flop / step_s if who == "triton" else None


def measure(prepare: Callable[[], Callable[[], object]], where: gpu.Place) -> tuple[float, int] | str:
    """Seconds and bytes of a step, or why there are none."""
    gc.collect()
    if where.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = where.seconds(prepare())
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    return seconds, torch.cuda.max_memory_allocated() if where.device.type == "cuda" else 0


def _ours(model: Transformer, who: str, T: int, where: gpu.Place) -> Callable[[], object]:
    view = view_of(model)
    apply_kernels(view, serving(model.dtype) if who == "triton" else ())
    return step_of(view, T, where)


def step_of(view: Transformer, T: int, where: gpu.Place) -> Callable[[], object]:
    """Forward and backward of one row of T tokens with all losses, each layer computed again in the backward pass."""
    apply_recompute(view, ("block",))
    batch = _batch(view.config, T, where)
    counts = count(batch.target_BT, batch.document_BT, batch.position_BT)
    weights = row.weigh(counts, mtp=0.0, balance=1e-4, indexer=1.0)

    def step() -> None:
        view.zero_grad(set_to_none=True)
        row.learn(view, batch, "sparse", weights)

    return step


def _theirs(model: Transformer, who: str, T: int, where: gpu.Place) -> Callable[[], object]:
    from benchmarks import transformers_model

    theirs: Any = transformers_model.build(model).to(where.device, model.dtype)
    batch = _batch(model.config, T, where)

    def step() -> None:
        theirs.zero_grad(set_to_none=True)
        logits = theirs(input_ids=batch.token_BT, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), batch.target_BT.flatten()).backward()

    return step


def _batch(config: ModelConfig, T: int, where: gpu.Place) -> Batch:
    token_BT = torch.randint(0, config.vocab_size, (1, T + 1), device=where.device)
    return Batch(
        token_BT=token_BT[:, :-1],
        target_BT=token_BT[:, 1:],
        document_BT=torch.zeros(1, T, dtype=torch.int64, device=where.device),
        position_BT=torch.arange(T, device=where.device).unsqueeze(0),
        source_B=torch.zeros(1, dtype=torch.int64),
    )


def _matrices(config: ModelConfig, prefix: str = "") -> list[Member]:
    logicals = logical_tensors(config)
    return members(one for one in logicals if one.kind == "matrix" and one.parameter.startswith(prefix))


def _muon(model: Transformer, where: gpu.Place) -> float | str:
    """Seconds of an optimizer step on the matrices of one layer, or why there are none."""

    def prepare() -> Callable[[], object]:
        matrices, parameters = _matrices(model.config, LAYER), dict(model.named_parameters())
        weights = {member.parameter: parameters[member.parameter].detach() for member in matrices}
        gradients = {name: torch.randn_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        optimizer = Optimizer(weights, matrices, OptimConfig())
        return lambda: optimizer.step(gradients, rate=1e-4)

    measured = measure(prepare, where)
    return measured if isinstance(measured, str) else measured[0]


def _muon_flop(config: ModelConfig, prefix: str = "") -> int:
    """Newton-Schulz of every logical matrix."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    total = 0
    for member in _matrices(config, prefix):
        shape = shapes[member.parameter]
        sides = shape[1:] if len(shape) == 3 else (member.stop - member.start, *shape[1:])
        total += iterations_flop(*sides)
    return total


def _muon_lines(flash: ModelConfig, config: ModelConfig, seconds: float | str, rate: float | None) -> str:
    if isinstance(seconds, str) or rate is None:
        return f"Muon on a layer: {seconds}; its share of a step needs a step that ran"
    reached = _muon_flop(config, LAYER) / seconds
    muon_s = _muon_flop(flash) / reached
    tokens_s = BATCH_TOKENS * training_flops(flash, BATCH_LENGTH, "sparse").per_token / rate
    return "\n".join(
        [
            f"Muon on a layer: {seconds * 1e3:.1f} ms, {reached / 1e12:.4g} TFLOP/s of Newton-Schulz",
            f"V4-Flash: m = {muon_s:.3g} s of one GPU, s = {tokens_s:.3g} s of one GPU a batch of {BATCH_TOKENS:,}",
            f"share of a step: {muon_s / (muon_s + tokens_s):.2%}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
