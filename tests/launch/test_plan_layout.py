"""Proves that `keel plan` prints the layout's numbers for small and large meshes, and all of them with --json."""

import json
import re
from dataclasses import asdict

import pytest

from launch.compose import CONFIGS, compose
from launch.main import main
from trainer.plan import plan
from trainer.plan_parallel import Layout

CPU4 = ["parallel=cpu4"]
PIPE2 = ["model=small", "parallel=pipe2"]
LARGE = ["threads=1", "parallel.data=256", "parallel.expert=64"]


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["plan", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    return lines


def table(lines: list[str], head: str) -> list[list[str]]:
    """The cells of the table whose heading begins so."""
    (first,) = [number for number, line in enumerate(lines) if line.startswith(head)]
    return [line.split() for line in lines[first : lines.index("", first)]]


def layout(words: list[str]) -> Layout:
    return plan(compose(words).config).layout


def test_one_process_has_memory_but_neither_ranks_nor_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed([], capsys)
    memory = layout([]).largest.memory
    cells = {line[0]: line[1] for line in table(lines, "memory in one process")[1:]}
    assert {part: f"{size:,}" for part, size in memory.parts().items()}.items() <= cells.items()
    assert cells["total"] == f"{memory.total:,}"
    assert not [line for line in lines if line.startswith(("mesh of", "rank", "MB sent"))]


def test_a_small_mesh_is_printed_rank_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    lines, planned = printed(CPU4, capsys), layout(CPU4)
    axes = {line[0]: line[1] for line in table(lines, "mesh of 4 ranks")[1:]}
    expected = {"pipe": "1", "context": "1", "data": "4", "expert": "2", "owners": "4", "replicas": "2"}
    assert expected.items() <= axes.items()
    ranks = table(lines, "rank ")[1:]
    assert [line[0] for line in ranks] == ["0", "1", "2", "3"]
    assert [" ".join(line[1:4]) for line in ranks] == ["0 to 3", "4 to 7", "0 to 3", "4 to 7"]
    assert [line[4] for line in ranks] == ["0", "1", "2", "3"]
    assert [line[6] for line in ranks] == [f"{planned.role_of(rank).load.elements:,}" for rank in range(4)]


def test_traffic_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    lines, planned = printed(CPU4, capsys), layout(CPU4)
    *rows, total = table(lines, "MB sent by a rank")[1:-1]
    assert len(rows) == len({one.name for stage in planned.traffic for one in stage})
    for stage, exact in enumerate(planned.traffic):
        sent = sum(one.sent_bytes for one in exact) / 4 / 1e6
        place = stage - len(planned.traffic)
        assert float(total[place]) == pytest.approx(sent, abs=6e-4)
        assert sum(float(row[place]) for row in rows) == pytest.approx(sent, abs=6e-4 * len(rows))


@pytest.mark.parametrize("recipe", ["flash", "pro"])
@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_large_mesh_is_printed_by_roles(recipe: str, reduction: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"recipe={recipe}", f"parallel.reduction={reduction}", *LARGE]
    lines, planned = printed(words, capsys), layout(words)
    head = f"largest and smallest of {len(planned.roles)} roles"
    assert len(table(lines, head)) == 3
    assert axes_of(lines)["owners"] == "64"
    (note,) = [line for line in lines if line.startswith("largest dense share")]
    assert f"{planned.flop.of_mean:.3f} of FLOP, {planned.state.of_mean:.3f} of bytes" in note
    sent = {line[0] for line in table(lines, "GB sent by a rank")}
    assert {"tokens", "their", "dense", "experts'", "between", "new", "total"} <= sent


@pytest.mark.parametrize(
    "words", [PIPE2, ["model=small", "parallel=pipe4"], ["recipe=pro", "parallel.pipe=16", *LARGE]]
)
def test_a_pipeline_is_printed_by_rank(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines, pipeline = printed(words, capsys), layout(words).pipeline
    assert pipeline is not None
    ranks = table(lines, "pipe ranks, 1f1b")
    rows = ranks[1 : pipeline.ranks + 1]
    assert [row[0] for row in rows] == [str(rank) for rank in range(pipeline.ranks)]
    for row, chunk in zip(rows, pipeline.chunks, strict=True):
        assert str(chunk.layers[0]) in row
        assert f"{chunk.parameters:,}" in row
        assert f"{100 * chunk.share:.1f}" in row
    (bubbles,) = [line for line in lines if line.startswith("bubble of all ranks")]
    assert bubbles.split()[4::2] == [f"{100 * one.bubble:.1f}" for one in pipeline.played]
    sent = [line.split("  ")[0] for line in lines if re.search(r" send +\d+ pipe| \d+ ends", line)]
    assert sent == ["streams", "gradients of streams", "embedding between ends"]


def test_a_pipeline_is_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", *PIPE2, "parallel.schedule=dualpipev"]) == 0
    found, pipeline = json.loads(capsys.readouterr().out)["layout"], layout([*PIPE2, "parallel.schedule=dualpipev"])
    assert pipeline.pipeline is not None
    told = found["pipeline"]
    assert [chunk["layers"] for chunk in told["chunks"]] == [list(one.layers) for one in pipeline.pipeline.chunks]
    assert [chunk["rank"] for chunk in told["chunks"]] == [0, 1, 1, 0]
    assert [stage["bubble"] for stage in told["stages"]] == [one.bubble for one in pipeline.pipeline.played]
    assert [stage["in_flight"] for stage in told["stages"]] == [[5, 5]] * len(told["stages"])
    assert [role["pipe"] for role in found["roles"]] == [0, 1]
    assert len(found["rows_bytes"]) == 2


def axes_of(lines: list[str]) -> dict[str, str]:
    return {line[0]: line[1] for line in table(lines, "mesh of 256 ranks")[1:]}


def test_json_has_every_role_and_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", *CPU4]) == 0
    found, planned = json.loads(capsys.readouterr().out)["layout"], layout(CPU4)
    assert found["mesh"] == asdict(planned.mesh) | {"size": 4}
    assert [role["ranks"] for role in found["roles"]] == [list(role.ranks) for role in planned.roles]
    for role, exact in zip(found["roles"], planned.roles, strict=True):
        assert role["owned"] == asdict(exact.load)
        assert role["memory_bytes"]["total"] == exact.memory.total
    assert found["traffic"] == [[asdict(one) for one in stage] for stage in planned.traffic]
    assert found["activations_bytes"] == list(planned.activations)
    assert found["balance"]["flop"]["of_bound"] == planned.flop.of_bound


@pytest.mark.parametrize(
    ("words", "heads"), [(CPU4, ("mesh of 4 ranks", "sent by a rank")), (PIPE2, ("pipe ranks, 1f1b",))]
)
def test_the_examples_of_the_document_are_what_is_printed(
    words: list[str], heads: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(words, capsys)
    page = (CONFIGS.parent / "docs" / "parallelism.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shown = [block for block in blocks if any(head in block for head in heads)]
    assert len(shown) == len(heads)
    for block in shown:
        assert [line for line in block.splitlines() if line not in lines and not line.startswith("$ ")] == []
