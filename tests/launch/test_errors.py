"""Proves the error contract: what is wrong in a configuration is one line, key, value and expectation, exit code 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.compose import compose
from launch.main import main

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"keel: error: (?P<key>.+?) = (?P<value>.*?): expected (?P<expected>\S.*)\n")

UNKNOWN = [
    ("model.hiden_size=3", "did you mean model.hidden_size?"),
    ("modle.hidden_size=3", "did you mean model.hidden_size?"),
    ("modle=small", "did you mean model?"),
    ("recpie=flash", "did you mean recipe?"),
    ("peak=1e-3", "did you mean schedule.rate.peak?"),
    ("schedule.rate.peek=1e-3", "did you mean schedule.rate.peak?"),
    ("optimizer.muon.momentum=0.9", "did you mean optim.muon.momentum?"),
    ("data.sources.stdlib.wieght=2", "did you mean data.sources.stdlib.weight?"),
    ("data.sources.stlib.weight=2", "an entry of data.sources that exists (stdlib)"),
    ("+model.nothing=3", "a key that exists"),
    ("++model.nothing=3", "a key that exists"),
    ("~model.nothing", "a key that exists"),
    ("model={hiden_size: 3}", "did you mean model.hidden_size?"),
    ("schedule.row_length=[{from_tokens: 0, value: 256, wide: 1}]", "a key that exists"),
    ("hydra.verbose=true", "a key that exists"),
    ("xyzzy=1", "keel config show lists them"),
]
WRONG_TYPES = [
    ("model.hidden_size=abc", "an integer"),
    ("model.hidden_size=1.5", "an integer"),
    ("model.hidden_size=1e3", "an integer"),
    ("model.hidden_size=true", "an integer"),
    ("model.hidden_size='128'", "an integer"),
    ("model.hidden_size=null", "an integer"),
    ("schedule.rate.peak=fast", "a number"),
    ("schedule.rate.peak=nan", "a finite number"),
    ("schedule.rate.peak=inf", "a finite number"),
    ("deterministic=1", "true or false"),
    ("name=3", "a text"),
    ("profile.steps=1.5", "a text or an integer"),
    ("device=gpu", "one of auto, cpu, cuda"),
    ("model.num_nextn_predict_layers=2", "one of 0, 1"),
    ("model.norm_topk_prob=false", "true"),
    ("model.compress_ratios=7", "a list with an integer in each place"),
    ("model.compress_ratios=[0,4,x]", "an integer"),
    ("schedule.attention=[{from_tokens: 0, value: sparce}]", "one of dense, indexer_warmup, sparse"),
    ("data.sources.stdlib.kind=txt", "one of stdlib, text, jsonl, parquet, stream"),
    ("+optim.rate_scale.indexer=half", "a number"),
    ("sample=short", "a section with the keys prompt, tokens"),
    ("data.sources=null", "named entries"),
    ("model.rope_scaling=3", "a section with the keys type, factor"),
]
CONTRADICTIONS = [
    ("name=a/b", "letters, digits, '_', '.' and '-', at most 80, a letter or digit first"),
    ("name=.hidden", "a letter or digit first"),
    ("data.sources.stdlib.prompt_field=ask", "null: kind=stdlib has no fields"),
    ("data.sources.stdlib={kind: jsonl, path: a, prompt_field: text}", "another field than field=text"),
    ("model.num_experts_per_tok=999", "at most n_routed_experts="),
    ("model.compress_ratios=[0]", "num_nextn_predict_layers=1"),
    ("schedule.row_length=[{from_tokens: 0, value: 9999999}]", "a step holds at least one row"),
    ("schedule.row_length=[{from_tokens: 0, value: 5}]", "block of model.compress_ratios"),
    ("schedule.row_length=[{from_tokens: 5, value: 512}]", "a first stage at 0"),
    ("schedule=flash", "at most model.max_position_embeddings="),
    ("data.tokenizer.vocab_size=99999", "at most model.vocab_size="),
    ("optim.muon.momentum=1.5", "in [0, 1)"),
    ("model.rope_scaling={factor: 0.5, original_max_position_embeddings: 64}", "at least 1"),
    ("checkpoint.keep_last=1", "at least 2"),
    ("validation.rows=0", "a positive number of rows"),
    ("profile.steps=x", "steps such as 20..22 or 20, or nothing"),
    ("profile.steps=2..", "steps such as 20..22 or 20, or nothing"),
    ("profile.steps=0", "the first step, from 1 on, before the last"),
    ("profile.steps=5..2", "the first step, from 1 on, before the last"),
    ("profile.steps=1..999", "steps of the run, which has 84"),
]
MISSING = [
    ("~model.vocab_size", "a value: an integer"),
    ("~model", "a value: a section with the keys vocab_size"),
    ("~recipe", "a value: a text"),
    ("data=text", "a value: a text"),
    ("model.rope_scaling={factor: 4}", "a value: an integer"),
    ("+data.sources.mine.weight=2", "a value: one of stdlib"),
]
CHOICES = [
    ("recipe=flsh", "one of debug, flash, pro"),
    ("recipe=1", "one of debug, flash, pro"),
    ("recipe=null", "one of debug, flash, pro"),
    ("recipe=[debug]", "one of debug, flash, pro"),
    ("model=smal", "one of debug, flash, pro, small"),
    ("model=", "one of debug, flash, pro, small"),
    ("+model=small", "model=small, without a plus"),
    ("model@other=small", "a key without a package"),
]
MALFORMED = [
    ("nonsense", "KEY=VALUE"),
    ("=3", "KEY=VALUE"),
    ("seed=[1", "KEY=VALUE"),
    ("seed={1", "KEY=VALUE"),
    ("a b=3", "KEY=VALUE"),
    ("seed=1,2", "one value"),
    ("schedule.row_length.9.value=256", "a place that can be set"),
    ("~model.rope_scaling", "a key that a file or an override sets"),
    ("name=${nothing.here}", "an interpolation that can be resolved"),
    ("--orgin", "did you mean --origin?"),
]


@pytest.mark.usefixtures("merge_once")
@pytest.mark.parametrize(
    ("override", "expected"), [*UNKNOWN, *WRONG_TYPES, *CONTRADICTIONS, *MISSING, *CHOICES, *MALFORMED]
)
def test_one_line_and_exit_code_2(override: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", override]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = LINE.fullmatch(err)
    assert line, err
    assert expected in line["expected"]


@pytest.mark.usefixtures("merge_once")
@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.num_experts_per_tok=999", "model.num_experts_per_tok", "999"),
        ("optim.adamw.eps=-1.0", "optim.adamw.eps", "-1.0"),
        ("model.compress_ratios=[0,4,x]", "model.compress_ratios.2", "x"),
        ("model.rope_scaling={factor: 0.5, original_max_position_embeddings: 64}", "model.rope_scaling.factor", "0.5"),
        ("schedule.rate.final=1", "schedule.rate.final", "1.0"),
        ("schedule.rate.decay_start_tokens=99999999999", "schedule.rate.decay_start_tokens", "99999999999"),
        ("data=text", "data.sources.text.path", "???"),
    ],
)
def test_the_line_names_the_whole_key_and_the_value(
    override: str, key: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["config", "show", override])
    line = LINE.fullmatch(capsys.readouterr().err)
    assert line is not None
    assert (line["key"], line["value"]) == (key, value)


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    for folder in ("", "model"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "train.yaml").write_text("defaults:\n  - model: bad\n")
    (tmp_path / "model" / "bad.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(ValueError, match=r"^[^\n]+ = [^\n]+: expected valid YAML[^\n]*$"):
        compose([], tmp_path)


def test_a_process_ends_with_2_and_without_traceback() -> None:
    code = "import sys; from launch.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", "model.hiden_size=3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert LINE.fullmatch(ended.stderr)
