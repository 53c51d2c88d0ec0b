"""Proves that the same command trains on one GPU, with formats too: the loss falls, a resumed run has the same bits."""

import multiprocessing
from pathlib import Path

import pytest

from tests.runs import children, tiny
from trainer.folder import RunFolder

DEVICE = "cuda"


def words(corpus: Path, runs_dir: Path, precision: str) -> list[str]:
    """The debug model over the made-up texts for ten steps of 2,048 tokens, through all three attention stages."""
    values = {
        "precision": precision,
        "device": DEVICE,
        "runs_dir": runs_dir,
        "data": "text",
        "data.sources.text.path": corpus,
        "data.tokenizer.vocab_size": tiny.VOCABULARY,
        "data.cache_dir": corpus.parent / "cache",
        "tracking": "off",
        "schedule.total_tokens": 20_480,
        "schedule.rate": "{peak: 3e-3, final: 3e-4, warmup_tokens: 2048, decay_start_tokens: 12000}",
        "schedule.batch": "{tokens: 2048, start_tokens: 2048, ramp_tokens: 0}",
        "schedule.row_length": "[{from_tokens: 0, value: 512}]",
        "schedule.attention": "[{from_tokens: 0, value: dense}, {from_tokens: 8000, value: indexer_warmup}, "
        "{from_tokens: 12000, value: sparse}]",
        "schedule.mtp_weight": "[{from_tokens: 0, value: 0.3}]",
        "validation.rows": 2,
        "validation.every_steps": 5,
        "checkpoint.every_steps": 4,
        "sample.tokens": 8,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8_fp4"])
def test_the_same_command_trains_on_a_gpu(
    precision: str, corpus: Path, tmp_path: Path, processes: multiprocessing.context.BaseContext
) -> None:
    runs: list[RunFolder] = []
    for name, rows_before in (("whole", None), ("interrupted", 21)):
        command, log = ["train", *words(corpus, tmp_path / name, precision)], tmp_path / f"{name}.log"
        if rows_before is not None:
            child = processes.Process(target=children.command_with_a_slow_row, args=(command, log, rows_before))
            child.start()
            while child.is_alive() and not (log.exists() and "a slow row begins" in log.read_text()):
                child.join(0.1)
            child.kill()
            child.join()
        child = processes.Process(target=children.command, args=(command, log, log))
        child.start()
        child.join()
        assert child.exitcode == 0, log.read_text()
        runs.append(tiny.only_run(tmp_path / name))
    assert runs[0].provenance["device"] == DEVICE
    log = (tmp_path / "interrupted.log").read_text()
    assert "going on after step 4" in log
    assert ("formats: " in log) == (precision != "bf16")
    rows = tiny.metrics_rows(runs[0])
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss/lm"] < 0.9 * rows[0]["loss/lm"]
    assert rows[-1]["validation/loss"] < rows[4]["validation/loss"]
    tiny.assert_same_run(runs[1], runs[0])
