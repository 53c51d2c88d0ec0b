"""Proves that `keel plan` prints the plan's numbers, the published ones of Flash and Pro, and refuses what is wrong."""

import json

import pytest

from launch.compose import compose
from launch.main import main
from trainer.plan import plan


@pytest.mark.parametrize(
    ("recipe", "figures"),
    [
        ("flash", ("284.33 B", "6.61 B", "13.27 B", "69,187 tensors", "159,609,485,896 bytes", " 10.1 %", " 7.3 %")),
        ("pro", ("1573.00 B", "25.84 B", "48.85 B", "145,116 tensors", "864,704,792,696 bytes", " 26.7 %", " 10.5 %")),
    ],
)
def test_prints_the_published_figures(
    recipe: str, figures: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"recipe={recipe}"]) == 0
    printed = capsys.readouterr().out
    for figure in figures:
        assert figure in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_every_part_and_stage_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(compose([]).config)
    assert main(["plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first_words = [line.split("  ")[0] for line in lines]
    flops = planned.stages[-1].row_flops
    for part in (*planned.counts.main, *planned.counts.mtp, *flops.main, *(f"stage {n + 1}" for n in range(3))):
        assert part in first_words
    assert len([word for word in first_words if word.startswith("MTP ")]) == len(flops.mtp)
    assert f"total {planned.counts.total_main:,}" in " ".join(" ".join(lines).split())


def test_json_has_the_exact_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model=small", "schedule.total_tokens=2000000"]
    assert main(["plan", "--json", *overrides]) == 0
    printed = json.loads(capsys.readouterr().out)
    planned = plan(compose(overrides).config)
    assert printed["parameters"]["total"] == planned.counts.total
    assert printed["parameters"]["active"] == planned.counts.active
    assert printed["flops"] == planned.flops
    assert printed["memory_bytes"]["total"] == planned.layout.largest.memory.total
    assert [stage["flops"] for stage in printed["stages"]] == [stage.flops for stage in planned.stages]
    assert sum(stage["steps"] for stage in printed["stages"]) == printed["steps"] == planned.steps
    assert all(
        sum(stage["row_flops"]["main"].values()) + sum(stage["row_flops"]["mtp"].values())
        == stage["flops_per_token"] * stage["row_length"]
        for stage in printed["stages"]
    )


def test_decoding_has_a_column_for_each_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=flash"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    (heading,) = [line for line in lines if line[0].startswith("decode, GFLOP")]
    assert [cell.strip() for cell in heading[1:] if cell] == ["4K", "16K", "64K", "256K", "1M"]
    assert main(["plan", "recipe=flash", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["decoding"]
    planned = plan(compose(["recipe=flash"]).config).decoding
    assert [one["context"] for one in printed] == [4096, 16384, 65536, 262144, 1048576]
    assert [one["flops"] for one in printed] == [one.cost.flops for one in planned]
    assert [one["cache_bytes"] for one in printed] == [one.cost.cache_bytes for one in planned]
    assert [one["own_cache_bytes"] for one in printed] == [one.own_cache_bytes for one in planned]
    assert printed[-1]["share_of_v32_flops"] == planned[-1].cost.flops / planned[-1].reference.flops


@pytest.mark.parametrize("words", [["--jsn"], ["recipe=flsh"], ["model.hidden_sise=3"], ["model.num_hidden_layers=7"]])
def test_a_mistake_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("keel: error: ")
    assert "expected" in captured.err
