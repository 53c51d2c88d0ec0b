"""Proves that benchmarks.precision trains pairs, goes on where it was stopped, and counts gaps as it says."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import plot, precision
from benchmarks.precision import Learned
from launch.compose import compose
from tests.benchmarks.programs import run
from trainer.precision.recipe import Recipe


def made_up(first: float, held_out: float) -> Learned:
    return Learned(losses=[first, first, first, first / 2], held_out=held_out)


FOUND = {
    (1, "bf16"): made_up(4.0, 2.0), (1, "fp8"): made_up(4.2, 2.01),
    (2, "bf16"): made_up(4.0, 2.2), (2, "fp8"): made_up(3.8, 2.178),
}  # fmt: skip


def test_gaps_are_of_pairs() -> None:
    """Each run is held against bf16 with its own seed; the noise is what seeds differ by."""
    rows = [" ".join(row) for row in precision.table(FOUND)]
    assert "fp8 1 2.0100 +0.500 % +5.000 %" in rows
    assert "fp8 2 2.1780 -1.000 % -5.000 %" in rows
    # Losses of 2.0 and 2.2: a deviation of 0.1414 around 2.1.
    assert "bf16  2.1000 +0.000 % 6.734 %" in rows
    assert "fp8  2.0940 -0.250 % 5.673 %" in rows


def test_curves_are_gaps_of_the_training_loss() -> None:
    """One for each run but bf16's, by step."""
    found = precision.curves(FOUND)
    assert [curve.name for curve in found] == ["fp8", "fp8"]
    assert [round(gap, 6) for _, gap in found[0].points] == [5.0] * 4


def test_a_picture_is_xml_with_all_its_curves() -> None:
    """Every curve is a path of all its points, inside the picture."""
    curves = precision.curves(FOUND)
    paths = [
        path.attrib["d"] for path in ElementTree.fromstring(plot.svg("gap <1>", curves)).iter() if "d" in path.attrib
    ]
    drawn = [path for path in paths if path.count("L") == 3]
    assert len(drawn) == 2
    numbers = [float(word) for path in drawn for word in path[1:].replace("L", " ").split()]
    assert all(0 <= x <= plot.WIDTH for x in numbers[::2])
    assert all(0 <= y <= plot.HEIGHT for y in numbers[1::2])


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8_fp4", "turning"])
def test_recipes_differ_in_precision_alone(recipe: str) -> None:
    """All runs of a seed have one schedule of so many steps; `turning` turns in the middle."""
    config = compose(precision.words(recipe, 3, 500, 2)).config
    assert config.seed == 3
    assert config.schedule == compose(precision.words("bf16", 1, 500, 2)).config.schedule
    assert config.schedule.total_tokens == 500 * 2 * precision.ROW
    stages = Recipe(config.precision, config.model).stages
    assert stages == ((0, 250 * 2 * precision.ROW) if recipe == "turning" else (0,))


@pytest.mark.slow
def test_runs_are_trained_once(tmp_path: Path) -> None:
    """From the command to the tables and the picture; the second time nothing is trained."""
    command = [str(tmp_path / "runs"), "--seeds", "1", "--steps", "20", "--recipe", "bf16", "fp8"]
    command += ["--draw", str(tmp_path / "gaps.svg"), "validation.rows=1"]
    first, second = run("precision", *command), run("precision", *command)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stderr.count(": done") == 2
    assert second.stderr == ""
    assert first.stdout.split("shapes")[1] == second.stdout.split("shapes")[1]
    ElementTree.parse(tmp_path / "gaps.svg")
