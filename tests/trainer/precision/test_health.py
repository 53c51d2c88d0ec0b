"""Proves that what is told of roundings is what they did: sizes, losses, errors, blocks without a scale, FP4 tiles."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.runs import tiny
from tests.trainer.precision.recipes import recipe
from trainer import metrics
from trainer.precision import health
from trainer.precision.elements import E4M3_1X128
from trainer.precision.formats import decode, encode
from trainer.precision.health import Seen, Watch
from trainer.run import train


def taken(x: torch.Tensor) -> Seen:
    watch, coded = Watch(), encode(x, E4M3_1X128)
    watch.note("input", x, decode(coded, E4M3_1X128, x.dtype), coded)
    (one,) = health.seen(watch.notes)["input"]
    return one


def test_a_rounding_in_numbers() -> None:
    """256 is a code's number under the scale of 448, 2^-12 is below half of the smallest, 20.5 becomes 20."""
    one = taken(torch.tensor([[448.0, 256.0, 2.0**-12, 20.5, 0.0]]))
    assert one == Seen(
        size=4, lost=1, poisoned=0, amax=448.0, error=2.0**-24 + 0.25, square=448.0**2 + 256**2 + 2.0**-24 + 20.5**2
    )


def test_an_infinity_is_told_of() -> None:
    """Its block is poisoned, and no other."""
    x = torch.ones(3, 256)
    x[1, 200] = torch.inf
    assert taken(x).poisoned == 1


def test_what_was_rounded_before_is_not_told_of_again() -> None:
    """Tokens that came as codes are told of where they were sent."""
    x, watch = torch.ones(2, 128), Watch()
    coded = encode(x, E4M3_1X128)
    watch.note("input", x, x, coded)
    assert health.seen(watch.notes) == {}


def test_several_roundings_are_one() -> None:
    """Sums of counts and squares, the largest amax; the metrics are ratios of the sums."""
    one = Seen(size=10, lost=1, poisoned=0, amax=2.0, error=1.0, square=100.0)
    other = Seen(size=30, lost=3, poisoned=2, amax=8.0, error=3.0, square=300.0)
    assert health.measure({"experts.input": [one, other]}) == {
        "precision/amax/experts.input": 8.0,
        "precision/lost_ratio/experts.input": 0.1,
        "precision/poisoned_blocks/experts.input": 2,
        "precision/error/experts.input": math.sqrt(4 / 400),
    }


@pytest.fixture(scope="module")
def told(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The rows of metrics of a tiny run in FP8 with FP4 experts."""
    base = tiny.config(corpus, tmp_path_factory.mktemp("health"), precision=recipe("fp8_fp4"))
    assert train(base) == 0
    path = tiny.only_run(Path(base.runs_dir)).path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_tells_of_every_operand(told: list[dict[str, float]]) -> None:
    """The first step and the last; each group with formats has its operands, each number is a known metric."""
    watched = [row for row in told if "precision/error/experts.input" in row]
    assert [row["step"] for row in watched] == [1, told[-1]["step"]]
    for group in ("attention", "experts", "shared_experts"):
        for operand in ("input", "grad", "wgrad_grad", "weight"):
            assert {f"precision/{what}/{group}.{operand}" for what in ("amax", "error")} <= watched[-1].keys()
    assert all(metrics.is_known(name) for row in told for name in row)
    errors = {name: value for name, value in watched[-1].items() if name.startswith("precision/error/")}
    # A number of 3 mantissa bits is off by up to 1/16 and by 1/40 to 1/30 in the mean, one of FP4 by about a tenth.
    assert all(0.01 < value < 0.05 for name, value in errors.items() if name != "precision/error/experts.weight")
    assert 0.05 < errors["precision/error/experts.weight"] < 0.2


def test_tiles_of_fp4_are_counted(told: list[dict[str, float]]) -> None:
    """Weights of one run are within 2^14 of each other in every tile; a matrix that is not is counted."""
    assert told[-1]["fp4/inexact_tiles/experts"] == 0


def test_a_run_without_formats_tells_nothing(corpus: Path, tmp_path: Path) -> None:
    """No metric of precision where nothing is rounded."""
    base = tiny.config(corpus, tmp_path)
    assert train(base) == 0
    path = tiny.only_run(Path(base.runs_dir)).path / "metrics.jsonl"
    assert not any(name.startswith(("precision/", "fp4/")) for name in path.read_text().split('"'))
