"""Runs that take a second: a model of every layer kind with 16 thousand parameters, a made-up corpus, a whole schedule.

Also what the tests of whole runs compare: every tensor of a run's newest checkpoint, and its rows of metrics.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import InitConfig, ModelConfig
from tests.trainer.checkpoint_samples import same_bits
from trainer import checkpoint, journal
from trainer.config import (
    CheckpointConfig,
    PrecisionConfig,
    SampleConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer.folder import RunFolder
from trainer.schedule_config import (
    AttentionStage,
    BatchConfig,
    MtpWeightStage,
    RateConfig,
    RowLengthStage,
    ScheduleConfig,
)

VOCABULARY = 272
STEPS = 9
"""Steps of `schedule()`: 3 dense, 2 of indexer warm-up, 4 sparse; the last two have rows of 48 tokens, not 32."""
MEASURED = ("time/", "speed/", "memory/")
"""The areas of metrics that two equal runs need not share."""


def model(**changes: Any) -> ModelConfig:
    """Window, CSA and HCA layers, hash and learned routing, MTP; every size as small as it can be."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "compress_ratios": (4, 8, 0),
        "num_attention_heads": 2,
        "head_dim": 8,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.5,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "max_position_embeddings": 256,
    }
    return ModelConfig(**(sizes | changes))


def schedule(**changes: Any) -> ScheduleConfig:
    """Every kind of stage in nine steps: batch ramp, three attention modes, two row lengths, two MTP weights."""
    values = {
        "total_tokens": 570,
        "rate": RateConfig(peak=1e-2, final=1e-3, warmup_tokens=100, decay_start_tokens=400),
        "batch": BatchConfig(tokens=96, start_tokens=48, ramp_tokens=200),
        "row_length": (RowLengthStage(from_tokens=0, value=32), RowLengthStage(from_tokens=380, value=48)),
        "attention": (
            AttentionStage(from_tokens=0, value="dense"),
            AttentionStage(from_tokens=90, value="indexer_warmup"),
            AttentionStage(from_tokens=200, value="sparse"),
        ),
        "mtp_weight": (MtpWeightStage(from_tokens=0, value=0.3), MtpWeightStage(from_tokens=400, value=0.1)),
    }
    return ScheduleConfig(**(values | changes))


def config(corpus: Path, runs_dir: Path, **changes: Any) -> TrainConfig:
    """A whole run over `corpus` (from `write_corpus`) on one thread in fp32; `changes` replace fields."""
    values = {
        "name": "tiny",
        "runs_dir": str(runs_dir),
        "device": "cpu",
        "threads": 1,
        "model": model(),
        "init": InitConfig(std=0.05),
        "schedule": schedule(),
        "data": DataConfig(
            sources={"text": SourceConfig(kind="text", path=str(corpus))},
            tokenizer=TokenizerConfig(kind="bpe", vocab_size=VOCABULARY),
            cache_dir=str(corpus.parent / "cache"),
            chunk_documents=16,
            validation_fraction=0.1,
        ),
        "precision": PrecisionConfig(dtype="fp32"),
        "checkpoint": CheckpointConfig(every_steps=3, keep_last=3),
        "tracking": TrackingConfig(wandb="off"),
        "validation": ValidationConfig(every_steps=4, rows=1),
        "sample": SampleConfig(tokens=3),
    }
    return TrainConfig(**(values | changes))


def words(config: TrainConfig) -> list[str]:
    """The command line that composes `config`, whose data must be one text source and whose name its own default."""
    (source,) = config.data.sources.values()
    data = {"sources.text.path": source.path, "tokenizer.vocab_size": config.data.tokenizer.vocab_size}
    data |= {key: getattr(config.data, key) for key in ("cache_dir", "chunk_documents", "validation_fraction")}
    sections = {
        key: asdict(getattr(config, key))
        for key in ("model", "init", "loss", "schedule", "checkpoint", "observe", "sample")
    }
    sections |= {"data": data, "validation": asdict(config.validation)}
    values = {key: getattr(config, key) for key in ("name", "runs_dir", "device", "threads", "seed")}
    values |= {f"{section}.{key}": value for section, of in sections.items() for key, value in of.items()}
    chosen = ["recipe=debug", "data=text", "tracking=off", f"precision.dtype={config.precision.dtype}"]
    return chosen + [f"{key}={_in_hydra(value)}" for key, value in values.items()]


def _in_hydra(value: Any) -> str:
    """A value in the syntax of overrides; texts without quotes must be plain."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_in_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_in_hydra, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value) or "''"


def with_dtype(base: TrainConfig, dtype: Any) -> TrainConfig:
    """The same run in another precision."""
    return replace(base, precision=replace(base.precision, dtype=dtype))


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """Write made-up texts of 20 to 400 bytes, so that rows hold several documents and some need more than one row."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1)
    words = ["".join(draw.choice(list("abcdefgh"), size)) for size in draw.integers(1, 6, 40)]
    for number in range(documents):
        text = " ".join(draw.choice(words, draw.integers(5, 90)))
        (folder / f"{number:03}.txt").write_text(f"{number} {text}\n")
    return folder


def only_run(runs_dir: Path) -> RunFolder:
    """The one run below `runs_dir`."""
    (path,) = runs_dir.glob("[!.]*")
    return RunFolder(path)


def final_tensors(run: RunFolder) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint, which must verify."""
    newest = max(checkpoint.steps(run.checkpoints).items())[1]
    return checkpoint.load(newest).tensors


def metrics_rows(run: RunFolder) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the machine decides."""
    rows = journal.read(run.path / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


def different_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the bit, or not in both."""
    same = {name for name in left.keys() & right.keys() if same_bits(left[name], right[name])}
    return sorted((left.keys() | right.keys()) - same)


def assert_same_run(left: RunFolder, right: RunFolder) -> None:
    """Both end with the same bits in model and optimizer, and have told the same story."""
    assert different_tensors(final_tensors(left), final_tensors(right)) == []
    assert len(metrics_rows(left)) == len(metrics_rows(right))
    for one, other in zip(metrics_rows(left), metrics_rows(right), strict=True):
        assert one == {name: _like(name, value, one) for name, value in other.items()}
    assert samples(left) == samples(right)


def _like(name: str, value: Any, row: Mapping[str, Any]) -> Any:
    """A product over layers that stages share out is one of products: fp64 with as many roundings, in another order."""
    if name.startswith("mhc/composite_gain") and math.isclose(value, row.get(name, 0.0), rel_tol=1e-13):
        return row[name]
    return value


def samples(run: RunFolder) -> dict[str, str]:
    """The texts that a run wrote, by file name."""
    return {path.name: path.read_text() for path in (run.path / "samples").iterdir()}
