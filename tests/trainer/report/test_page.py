"""Proves that the page is whole and closed: each metric has a place, nothing comes from elsewhere, text is escaped."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.report import made_up
from trainer import metrics
from trainer.report import curves, speed, tables
from trainer.report.charts import Axis, Chart, Line, figure, scale_for, spread
from trainer.report.compare import change, comparison, difference, differences
from trainer.report.lines import axis_of, running_mean
from trainer.report.page import page
from trainer.report.shapes import heat

VOID = ("meta", "link", "br", "circle")
ELSEWHERE = {
    "step", "tokens", "time/run_s", "schedule/mtp_weight", "optim/clip_scale", "time/observe_s", "time/validation_s",
    "speed/product_flops_per_s", "speed/rank_load_max_ratio", "schedule/row_length",
}  # fmt: skip
"""Metrics that are no curve: they are axes, parts of other curves, or in a verdict."""


class Outline(HTMLParser):
    """Open tags, addresses and attributes of a document; raises on a tag that closes another."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def names_in(html: str) -> str:
    return re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.DOTALL)


def test_the_page_is_one_closed_document() -> None:
    html = page(made_up.run(samples={"step-000080.txt": "def f(x):"}, provenance={"torch": "2.13.0"}))
    outline = Outline(html)
    assert outline.open == []
    assert outline.addresses == ["data:,"]
    assert "@import" not in html
    assert "url(" not in html
    assert outline.tags.count("script") == 1, "read-outs; the drawings do not need it"
    for heading in ("Learning", "Health", "Speed", "Samples", "Configuration", "Provenance"):
        assert f"<h2>{heading}</h2>" in html


@pytest.mark.parametrize("poison", ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "a&b</style>"])
def test_what_others_wrote_is_escaped(poison: str) -> None:
    of = made_up.config(source=poison) | {"name": poison}
    rows = [made_up.row(step, poison) | {f"optim/update_rms/{poison}": 1e-3} for step in range(1, 81)]
    told = made_up.history(("start", 0, 0.0), ("resume", 40, 500.0), ("end", 80, 1000.0, poison))
    told[1]["changes"] = [poison]
    run = made_up.run(
        rows=rows, told=told, config=of, path=Path(f"runs/{poison.replace('/', '')}"), samples={"step.txt": poison},
        overrides=[f"name={poison}"], provenance={"torch": poison, "device": poison, "commit": poison}, state="failed",
    )  # fmt: skip
    plain = page(made_up.run())
    for html in (page(run), comparison(run, run)):
        outline = Outline(html)
        assert outline.open == []
        assert outline.tags.count("script") == 1
        assert "img" not in outline.tags
        assert not any(name.startswith("on") for name in outline.attributes)
        assert html.count("</style>") == plain.count("</style>")


def test_every_metric_of_the_table_has_its_place() -> None:
    """A metric that this run has and no chart reads would be one that nobody sees."""
    asked: set[str] = set()

    class Asking(dict[str, Any]):
        def __contains__(self, name: object) -> bool:
            asked.add(str(name))
            return super().__contains__(name)

        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

        def __getitem__(self, name: str) -> Any:
            asked.add(name)
            return super().__getitem__(name)

    page(made_up.run(rows=[Asking(made_up.row(step)) for step in range(1, 81)]))
    assert set(metrics.METRICS) - asked - ELSEWHERE == set()


def test_the_made_up_run_has_every_metric() -> None:
    have = {name for step in range(1, 81) for name in made_up.row(step)}
    assert set(metrics.METRICS) <= have


def test_a_run_that_measured_little_has_a_page_that_says_what_it_lacks() -> None:
    bare = [
        {name: value for name, value in made_up.row(step).items() if name in ("step", "tokens", "loss/lm")}
        for step in range(1, 81)
    ]
    html = page(made_up.run(rows=bare))
    assert Outline(html).open == []
    assert "Not measured in this run: held-out loss, " in html
    assert "residual mixes" in html
    assert "Gradient norm" not in html
    assert "Not measured" not in page(made_up.run())


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_run_that_has_just_begun_has_a_page(count: int) -> None:
    run = made_up.run(rows=[made_up.row(step) for step in range(1, count + 1)], told=[], state="running")
    assert Outline(page(run)).open == []
    assert Outline(comparison(run, made_up.run())).open == []


def test_losses_that_are_no_numbers_leave_a_gap_and_a_mark() -> None:
    chart = Chart(
        title="t", unit="u", lines=[Line(label="a", points=[(0, 1.0), (1, float("nan")), (2, 2.0), (3, 3.0)])]
    )
    html = figure(chart, Axis(first=0, last=4))
    (path,) = re.findall(r'<path class="line c1" d="([^"]*)"', html)
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert 'class="broken"' in html
    assert figure(Chart(title="t", unit="u", lines=[]), Axis(first=0, last=4)) == ""


def test_curves_lie_where_their_numbers_say() -> None:
    chart = Chart(
        title="t", unit="u", lines=[Line(label="a", points=[(0, 0.0), (50, 5.0), (100, 10.0)])], zero=True, height=106
    )
    scale = scale_for([0.0, 5.0, 10.0], chart)
    assert [round(scale.y(value)) for value in (0, 5, 10)] == [106, 56, 6]
    assert "M0.0 106.0L500.0 56.0L1000.0 6.0" in figure(chart, Axis(first=0, last=100))


def test_rounding_does_not_look_like_a_course() -> None:
    chart = Chart(title="t", unit="u", lines=[], least=0.1)
    scale = scale_for([0.99999418, 0.99999421], chart)
    assert scale.high - scale.low == pytest.approx(0.1)
    assert scale_for([1.0, 2.0], chart).low == pytest.approx(0.94)


def test_a_steep_beginning_is_left_out_and_told() -> None:
    points = [(float(i), 10.0 if i < 3 else 2 - i / 1000) for i in range(100)]
    chart = Chart(title="t", unit="u", lines=[Line(label="a", points=points)], crop=True)
    html = figure(chart, Axis(first=0, last=100))
    assert "the beginning, up to 10.0, is above the picture" in html
    assert "above the picture" not in figure(Chart(title="t", unit="u", lines=chart.lines), Axis(first=0, last=100))


def test_labels_do_not_cover_each_other() -> None:
    placed = spread([50, 50, 51, 10, 99], height=100, gap=14)
    assert all(b - a >= 14 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert max(placed) <= 100
    assert placed[3] == 10


def test_stages_and_restarts_are_marked() -> None:
    run = made_up.run(told=made_up.history(("start", 0, 0.0), ("resume", 24, 300.0), ("end", 80, 1000.0, "finished")))
    axis = axis_of(run)
    assert [tokens for tokens, _ in axis.borders] == [40 * made_up.TOKENS, 50 * made_up.TOKENS]
    assert axis.restarts == [24 * made_up.TOKENS]
    html = page(run)
    assert "dashed: a restart" in html
    assert 'class="restart"' in html


def test_the_running_mean_does_not_cross_a_stage() -> None:
    run = made_up.run()
    points = [(row["tokens"], 1.0 if row["schedule/attention"] == "dense" else 0.0) for row in run.rows]
    assert {value for _, value in running_mean(run, points)} == {0.0, 1.0}


def test_loads_are_told_over_their_mean_and_a_dead_expert_has_a_cross() -> None:
    assert tables.over_mean([1, 2, 3, 2]) == [0.5, 1.0, 1.5, 1.0]
    assert tables.over_mean([0, 0]) == [0.0, 0.0]
    assert 'class="cross"' in heat([("a", [0.0, 2.0])], ["0", "1"])
    assert 'class="cross"' not in heat([("a", [0.9, 1.1])], ["0", "1"])
    assert tables.layer_names({"num_hash_layers": 1, "num_hidden_layers": 2}, 3) == ["0 hash", "1", "mtp"]


def test_the_heat_map_of_a_large_model_stays_small() -> None:
    rows = [(str(layer), [1.0 + 0.01 * (expert % 90) for expert in range(384)]) for layer in range(61)]
    # 23 424 cells; a rectangle each would be about 2 MB.
    assert len(heat(rows, [str(i) for i in range(384)], 8)) < 900_000


def test_keys_that_the_command_line_set_carry_its_words() -> None:
    words = ["seed=5", "model={hidden_size: 3}", "seed=6"]
    assert tables.set_by("seed", words) == "seed=6"
    assert tables.set_by("model.hidden_size", words) == "model={hidden_size: 3}"
    assert tables.set_by("name", words) is None
    html = page(made_up.run(overrides=["schedule.rate.peak=1"]))
    assert '<span class="from">set by schedule.rate.peak=1</span>' in html


def test_a_comparison_begins_with_the_keys_that_differ_and_only_them() -> None:
    other = made_up.config() | {"seed": 9}
    first, second = made_up.run(), made_up.run(config=other)
    html = differences(first, second)
    assert re.findall(r"<td><code>([\w.]+)</code></td><td>", html) == ["seed"]
    assert "The two configurations are the same." in differences(first, first)
    whole = comparison(first, second)
    assert Outline(whole).open == []
    assert whole.index("<h2>Configuration</h2>") < whole.index("<h2>Learning</h2>")


def test_a_difference_is_taken_at_equal_tokens() -> None:
    left, right = [(0, 4.0), (100, 2.0)], [(50, 2.5), (75, 2.5), (150, 1.0)]
    assert difference(left, right) == [(50, -0.5), (75, 0.0)]
    assert difference([], right) == []


def test_only_curves_of_one_name_are_subtracted() -> None:
    one = Chart(title="t", unit="u", lines=[Line(label="held out", points=[(0, 1.0), (9, 1.0)])])
    other = Chart(title="t", unit="u", lines=[Line(label="training", points=[(0, 1.0), (9, 1.0)])])
    assert change(one, other) is None
    assert change(one, one) is not None


def test_what_is_zero_throughout_is_told_in_a_word() -> None:
    html = page(made_up.run())
    assert "Zero in every step: dead experts." in html
    assert any(chart.title == "Dead experts" and curves.is_zero(chart) for chart in curves.health_charts(made_up.run()))


def test_two_runs_share_the_units_of_the_larger() -> None:
    small = made_up.run()
    large = made_up.run(rows=[made_up.row(step) | {"memory/peak_bytes": 9 * 2**30} for step in range(1, 81)])
    units = [{chart.title: chart.unit for chart in speed.speed_charts(run, (small, large))} for run in (small, large)]
    assert units[0] == units[1]
    assert units[0]["Memory"] == "GiB"
    assert next(chart for chart in speed.speed_charts(small) if chart.title == "Memory").unit == "MiB"
